"""Picture-test: does the line lie or stand? Three pixels in a row, anywhere among random ones.

Every pixel is as often part of a line that lies as of one that stands: only neighbours tell. An
episode is one picture, and pays 1 for a right answer.
"""

import gymnax
import jax
import jax.numpy as jnp
from flax import struct
from gymnax.environments import environment, spaces


import os

NOISE = float(os.environ.get("NOISE", 0.05))


@struct.dataclass
class State(environment.EnvState):
    stands: jax.Array  # 0 or 1, the right answer
    picture: jax.Array  # [10, 10, 1]


class Picture(environment.Environment):
    def reset_env(self, key, params):
        kind_key, place_key, noise_key = jax.random.split(key, 3)
        stands = jax.random.randint(kind_key, (), 0, 2)
        line = jnp.zeros((10, 10), bool).at[0, :3].set(True)
        line = jnp.where(stands == 1, line.T, line)
        # Anywhere; past an edge the other side follows.
        line = jnp.roll(line, jax.random.randint(place_key, (2,), 0, 10), axis=(0, 1))
        picture = line | jax.random.bernoulli(noise_key, NOISE, (10, 10))
        picture = jnp.float32(picture)[..., None]
        return picture, State(time=0, stands=stands, picture=picture)

    def step_env(self, key, state, action, params):
        reward = jnp.float32(action == state.stands)
        return state.picture, state, reward, jnp.bool_(True), {}

    def is_truncated(self, state, params):
        return jnp.bool_(False)

    def action_space(self, params=None):
        return spaces.Discrete(2)

    def observation_space(self, params=None):
        return spaces.Box(0.0, 1.0, (10, 10, 1), jnp.float32)


gymnax.register("Picture-test", Picture)
