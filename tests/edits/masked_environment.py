"""Masked-test: six actions, of which those that are possible change in every step.

A possible action pays its number, an impossible one ends the episode with -100. The agent sees a
constant: only the mask tells what is possible. The best is the largest possible action.
"""

import gymnax
import jax
import jax.numpy as jnp
from flax import struct
from gymnax.environments import environment, spaces

ACTIONS, LENGTH = 6, 10


@struct.dataclass
class State(environment.EnvState):
    possible: jax.Array  # [6] bool


class Masked(environment.Environment):
    def draw(self, key):
        some_key, one_key = jax.random.split(key)
        some = jax.random.bernoulli(some_key, 0.4, (ACTIONS,))
        return some.at[jax.random.randint(one_key, (), 0, ACTIONS)].set(True)  # never none

    def action_mask(self, state, params):
        return state.possible

    def reset_env(self, key, params):
        return jnp.ones(1), State(time=0, possible=self.draw(key))

    def step_env(self, key, state, action, params):
        possible, time = state.possible[action], state.time + 1
        reward = jnp.where(possible, jnp.float32(action), -100.0)
        terminated = ~possible | (time >= LENGTH)
        return jnp.ones(1), State(time, self.draw(key)), reward, terminated, {}

    def is_truncated(self, state, params):
        return jnp.bool_(False)

    def action_space(self, params=None):
        return spaces.Discrete(ACTIONS)

    def observation_space(self, params=None):
        return spaces.Box(1.0, 1.0, (1,), jnp.float32)


gymnax.register("Masked-test", Masked)
