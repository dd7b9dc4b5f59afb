"""TwoDials-test: set two dials, with three and with five positions, to what the observation shows.

An episode has one step. The reward is 1 if both dials are right, and 0 otherwise.
"""

import gymnax
import jax
import jax.numpy as jnp
from flax import struct
from gymnax.environments import environment, spaces

SIZES = (3, 5)


@struct.dataclass
class State(environment.EnvState):
    wanted: jax.Array  # [2]


class TwoDials(environment.Environment):
    def observe(self, state):
        return jnp.concatenate([jax.nn.one_hot(state.wanted[i], n) for i, n in enumerate(SIZES)])

    def reset_env(self, key, params):
        state = State(time=0, wanted=jax.random.randint(key, (2,), 0, jnp.array(SIZES)))
        return self.observe(state), state

    def step_env(self, key, state, action, params):
        reward = jnp.float32(jnp.all(action == state.wanted))
        return self.observe(state), state, reward, jnp.bool_(True), {}

    def is_truncated(self, state, params):
        return jnp.bool_(False)

    def action_space(self, params=None):
        return spaces.Tuple([spaces.Discrete(n) for n in SIZES])

    def observation_space(self, params=None):
        return spaces.Box(0.0, 1.0, (sum(SIZES),), jnp.float32)


gymnax.register("TwoDials-test", TwoDials)
