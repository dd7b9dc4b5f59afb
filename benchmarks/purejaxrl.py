"""Run PureJaxRL (github.com/luchris429/purejaxrl), which was written for gymnax 0.x, on gymnax 1.0.

    python benchmarks/purejaxrl.py PATH     # its default training of 8 seeds, timed in phases

Nothing in the checkout is changed. When its scripts are loaded into memory:
- classes below replace distrax, if it is not installed;
- the environment is gymnax's behind gymnax's own `LegacyStepAPIWrapper`, without the entries of
  `info` that are new in gymnax 1.0. For continuous actions it replaces Brax's;
- on the CPU, `network.init` is wrapped in `sequential_vmap`, because with many seeds its QR
  decompositions can deadlock (jax 0.10, few cores).
"""

import contextlib
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from common import load_module as load
from gymnax.wrappers.compat import LegacyStepAPIWrapper
from jax.custom_batching import sequential_vmap

import ppo_continuous
import ppo_discrete

# Values of our configuration that make it the same algorithm. PureJaxRL always clips the value loss
# and never stops early. Its script for continuous actions normalises observations and rewards.
OURS = {
    "ppo_discrete": dict(
        clip_vloss=True, target_kl=None, normalize_obs=False, normalize_reward=False
    ),
    "ppo_continuous": dict(
        clip_vloss=True, target_kl=None, normalize_obs=True, normalize_reward=True,
        hidden_sizes=(256, 256),
    ),
}  # fmt: skip
THEIRS = {"ppo_discrete": "ppo.py", "ppo_continuous": "ppo_continuous_action.py"}
DEFAULTS = dict(  # of purejaxrl/ppo.py, under our names
    env_id="CartPole-v1", num_envs=4, num_steps=128, total_timesteps=500_000, update_epochs=4,
    num_minibatches=4, learning_rate=2.5e-4, max_grad_norm=0.5, ent_coef=0.01,
)  # fmt: skip


class Categorical(ppo_discrete.Categorical):
    """distrax.Categorical, as far as PureJaxRL uses it."""

    def sample(self, seed):
        return super().sample(seed)


class Gaussian(ppo_continuous.DiagGaussian):
    """distrax.MultivariateNormalDiag, as far as PureJaxRL uses it."""

    def __new__(cls, loc, scale):
        return super().__new__(cls, loc, jnp.broadcast_to(jnp.log(scale), loc.shape))

    def sample(self, seed):
        return super().sample(seed)


class OldEnvironment(LegacyStepAPIWrapper):
    """A gymnax environment with the interface of gymnax 0.x, and its default parameters."""

    def __init__(self, name):
        env, self.params = gymnax.make(name)
        super().__init__(env)

    def reset(self, key, params=None):
        return super().reset(key, self.params)

    def step(self, key, state, action, params=None):
        obs, state, reward, done, info = super().step(key, state, action, self.params)
        for name in ("terminated", "truncated", "final_observation"):
            info.pop(name, None)
        return obs, state, reward, done, info

    def observation_space(self, params=None):
        return self._env.observation_space(self.params)

    def action_space(self, params=None):
        return self._env.action_space(self.params)


def stand_ins():
    """Modules that PureJaxRL imports, for those that are not installed."""
    distrax = SimpleNamespace(Categorical=Categorical, MultivariateNormalDiag=Gaussian)
    modules = {"distrax": distrax, "navix": MagicMock(), "brax": MagicMock()}
    for name in ("brax.envs", "brax.envs.wrappers", "brax.envs.wrappers.training"):
        modules[name] = MagicMock()
    missing = [name for name in ("distrax", "navix", "brax") if not find_spec(name)]
    return {name: module for name, module in modules.items() if name.split(".")[0] in missing}


@contextlib.contextmanager
def importable(modules):
    """Within this context, `modules` can be imported."""
    new = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(new)
    try:
        yield
    finally:
        for name in new:
            del sys.modules[name]


def load_module(checkout, name):
    """PureJaxRL's counterpart of our script `name`."""
    folder = Path(checkout) / "purejaxrl"
    with (
        importable(stand_ins()),
        importable({"wrappers": load(folder / "wrappers.py", "wrappers")}),
    ):
        module = load(folder / THEIRS[name], f"purejaxrl_{name}")
    network = module.ActorCritic

    def patched_network(*arguments, **options):
        made = network(*arguments, **options)
        return SimpleNamespace(init=sequential_vmap(made.init), apply=made.apply)

    if jax.default_backend() == "cpu":
        module.ActorCritic = patched_network
    return module


def load_train(checkout, name):
    """PureJaxRL's training on gymnax 1.0 as a function train(config, key) of our configuration."""
    module = load_module(checkout, name)
    module.gymnax = SimpleNamespace(make=lambda name: (OldEnvironment(name), None))
    module.BraxGymnaxWrapper = OldEnvironment

    def train(config, key):
        names = "NUM_ENVS NUM_STEPS TOTAL_TIMESTEPS UPDATE_EPOCHS NUM_MINIBATCHES GAMMA GAE_LAMBDA "
        names += "CLIP_EPS ENT_COEF VF_COEF MAX_GRAD_NORM ACTIVATION ANNEAL_LR"
        theirs = {name: getattr(config, name.lower()) for name in names.split()}
        theirs |= dict(LR=config.learning_rate, ENV_NAME=config.env_id, NORMALIZE_ENV=True)
        return module.make_train(theirs)(key)

    return train


def main():
    """Train 8 seeds with PureJaxRL's defaults; print the time at the end of each phase."""
    train = partial(load_train(sys.argv[1], "ppo_discrete"), ppo_discrete.Config(**DEFAULTS))
    print("imported", time.time(), flush=True)
    keys = jax.random.split(jax.random.key(0), 8)
    program = jax.jit(jax.vmap(train)).lower(keys).compile()
    print("compiled", time.time(), flush=True)
    returns = jax.block_until_ready(program(keys))["metrics"]["returned_episode_returns"]
    print("trained", time.time(), flush=True)
    print("best", np.max(returns, axis=(1, 2, 3)).min())  # in the worst seed


if __name__ == "__main__":
    main()
