"""PureJaxRL (github.com/luchris429/purejaxrl), as it was written for gymnax 0.x, run on gymnax 1.0.

Nothing in the checkout is changed; when it is loaded, in memory:
- distrax, if it is not installed, is what stands below: two distributions with three methods;
- the environment is gymnax's behind gymnax's own `LegacyStepAPIWrapper`, without the entries of
  `info` that gymnax 1.0 has added, which `train` would return for every step. For continuous
  actions it takes the place of Brax's, without Brax;
- on the CPU `network.init` is wrapped in `sequential_vmap`: its initialisers are QR decompositions,
  which with many seeds side by side can wait for each other for ever (jax 0.10, few cores).
"""

import contextlib
import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from gymnax.wrappers.compat import LegacyStepAPIWrapper
from jax.custom_batching import sequential_vmap

# What our configuration needs to be the same algorithm: PureJaxRL always clips the value loss; its
# script for continuous actions normalises observations and rewards and has wider networks.
OURS = {
    "ppo_discrete": dict(clip_vloss=True, normalize_obs=False, normalize_reward=False),
    "ppo_continuous": dict(
        clip_vloss=True, normalize_obs=True, normalize_reward=True, hidden_sizes=(256, 256)
    ),
}
THEIRS = {"ppo_discrete": "ppo.py", "ppo_continuous": "ppo_continuous_action.py"}


class Categorical:
    def __init__(self, logits):
        self.logits = jax.nn.log_softmax(logits)

    def sample(self, seed):
        return jax.random.categorical(seed, self.logits)

    def log_prob(self, value):
        chosen = jax.nn.one_hot(value, self.logits.shape[-1], dtype=self.logits.dtype)
        return jnp.sum(chosen * self.logits, axis=-1)

    def entropy(self):
        return -jnp.sum(jnp.exp(self.logits) * self.logits, axis=-1)


class MultivariateNormalDiag(NamedTuple):
    loc: jax.Array
    scale: jax.Array

    def sample(self, seed):
        return self.loc + self.scale * jax.random.normal(seed, self.loc.shape)

    def log_prob(self, value):
        z = (value - self.loc) / self.scale
        log_scale = jnp.log(self.scale) + 0.5 * np.log(2 * np.pi)
        return -jnp.sum(0.5 * z**2 + log_scale, axis=-1)

    def entropy(self):
        scale = jnp.broadcast_to(self.scale, self.loc.shape)
        return jnp.sum(jnp.log(scale) + 0.5 * np.log(2 * np.pi * np.e), axis=-1)


class OldEnvironment(LegacyStepAPIWrapper):
    """A gymnax environment as gymnax 0.x had it; its parameters are the default ones."""

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
    """Modules that PureJaxRL imports and may be missing."""
    distrax, brax, navix = (ModuleType(name) for name in ("distrax", "brax", "navix"))
    distrax.Categorical, distrax.MultivariateNormalDiag = Categorical, MultivariateNormalDiag
    brax.envs = ModuleType("brax.envs")
    training = ModuleType("brax.envs.wrappers.training")
    training.EpisodeWrapper = training.AutoResetWrapper = None
    modules = {"distrax": distrax, "brax": brax, "brax.envs": brax.envs, "navix": navix}
    modules |= {"brax.envs.wrappers": ModuleType("wrappers"), training.__name__: training}
    found = functools.cache(lambda name: importlib.util.find_spec(name) is not None)
    return {name: module for name, module in modules.items() if not found(name.split(".")[0])}


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def added(modules):
    """In here `modules` can be imported, where no others of these names are."""
    new = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(new)
    try:
        yield
    finally:
        for name in new:
            del sys.modules[name]


def load_module(folder, name):
    """PureJaxRL's counterpart of our script `name`, whose seeds may be vmapped."""
    folder = Path(folder) / "purejaxrl"
    with added(stand_ins()), added({"wrappers": load(folder / "wrappers.py", "wrappers")}):
        module = load(folder / THEIRS[name], f"purejaxrl_{name}")
    network = module.ActorCritic

    def patched_network(*arguments, **options):
        made = network(*arguments, **options)
        return SimpleNamespace(init=sequential_vmap(made.init), apply=made.apply)

    if jax.default_backend() == "cpu":
        module.ActorCritic = patched_network
    return module


def load_train(folder, name):
    """Its train(config, key) with our configuration, on an environment of gymnax."""
    module = load_module(folder, name)
    module.gymnax = SimpleNamespace(make=lambda name: (OldEnvironment(name), None))
    module.BraxGymnaxWrapper = OldEnvironment

    def train(config, key):
        names = "NUM_ENVS NUM_STEPS TOTAL_TIMESTEPS UPDATE_EPOCHS NUM_MINIBATCHES GAMMA GAE_LAMBDA "
        names += "CLIP_EPS ENT_COEF VF_COEF MAX_GRAD_NORM ACTIVATION ANNEAL_LR"
        theirs = {name: getattr(config, name.lower()) for name in names.split()}
        theirs |= dict(LR=config.learning_rate, ENV_NAME=config.env_id, NORMALIZE_ENV=True)
        return module.make_train(theirs)(key)

    return train
