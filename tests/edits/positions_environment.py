"""CartPolePositions-test: CartPole-v1 without velocities, so the policy needs a memory."""

import gymnax
from gymnax.environments import spaces
from gymnax.environments.classic_control import cartpole


class CartPolePositions(cartpole.CartPole):
    def get_obs(self, state, params=None, key=None):
        return super().get_obs(state)[..., ::2]

    def observation_space(self, params):
        box = super().observation_space(params)
        return spaces.Box(box.low[::2], box.high[::2], (2,), box.dtype)


gymnax.register("CartPolePositions-test", CartPolePositions)
