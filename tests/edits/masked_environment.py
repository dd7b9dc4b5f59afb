"""Masked-test: six actions. Each step draws which of them are possible.

The reward of a possible action is its number. An impossible action ends the episode with a reward
of -100. The observation is constant, so only the mask shows which actions are possible. The optimal
action is the largest possible one.
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
        one = jax.random.randint(one_key, (), 0, ACTIONS)
        return some.at[one].set(True)  # so that at least one action is possible

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
