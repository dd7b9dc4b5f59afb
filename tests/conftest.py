"""What all tests share: the scripts, small configurations, and environments with known answers."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# The suite runs on the CPU, because only there two runs agree bit for bit.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA's optimisations would take most of the suite's time. They only change the speed and the
# rounding of a program, so most tests switch them off. Three kinds of tests keep them: tests that
# compare bits and tests with long runs, which use `as_shipped`, and tests that start a process.
DEFAULTS, QUICKLY = {"xla_backend_optimization_level": 3}, {"xla_backend_optimization_level": 0}
if version("jaxlib") < "0.11":  # jaxlib 0.11 has no such flag, and stops at unknown ones
    DEFAULTS["xla_cpu_use_fusion_emitters"] = True
    QUICKLY["xla_cpu_use_fusion_emitters"] = False
QUICK_FLAGS = "".join(f" --{name}={value}" for name, value in QUICKLY.items())
USERS_FLAGS = os.environ.get("XLA_FLAGS", "").removesuffix(QUICK_FLAGS)
os.environ["XLA_FLAGS"] = USERS_FLAGS + QUICK_FLAGS

import gymnax
import jax
import jax.numpy as jnp
import pytest
from flax import struct
from gymnax.environments import environment, spaces


@struct.dataclass
class ProbeState(environment.EnvState):
    time: int
    cue: jax.Array  # what the agent sees


@struct.dataclass
class ProbeParams(environment.EnvParams):
    max_steps_in_episode: int = 10**6


class Probe(environment.Environment):
    """An environment of a few numbers, whose values can be worked out by hand.

    The observation is [cue, time]. The cue is 1, or a new random ±1 in each step if `random_cue`.
    An episode terminates after `length` steps, and a time limit truncates it after `limit` steps.
    With `truncates`, the time limit is `length`, nothing terminates, and the observation is [cue].
    The reward is `reward(cue, action, time)`, where the time counts from 1.
    """

    def __init__(self, reward, length=1, truncates=False, random_cue=False, limit=10**6):
        super().__init__()
        self.reward, self.length = reward, length
        self.truncates, self.random_cue = truncates, random_cue
        self.limit = length if truncates else limit

    @property
    def default_params(self):
        return ProbeParams(max_steps_in_episode=self.limit)

    def draw(self, key):
        return jax.random.rademacher(key, (1,), jnp.float32) if self.random_cue else jnp.ones(1)

    def reset_env(self, key, params):
        cue = self.draw(key)
        return self.observe_time(cue, 0), ProbeState(time=0, cue=cue)

    def observe_time(self, cue, time):
        # The value depends on the time unless the episodes only end by a time limit.
        if self.truncates:
            return cue
        return jnp.concatenate([cue, jnp.asarray([time], jnp.float32)])

    def step_env(self, key, state, action, params):
        time = state.time + 1
        reward = jnp.asarray(self.reward(state.cue[0], action, time), jnp.float32)
        cue = self.draw(key)
        terminated = jnp.asarray(not self.truncates) & (time >= self.length)
        return self.observe_time(cue, time), ProbeState(time, cue), reward, terminated, {}

    def action_space(self, params=None):
        return spaces.Discrete(2)

    def observation_space(self, params=None):
        return spaces.Box(-1.0, 1.0, (1,) if self.truncates else (2,), jnp.float32)


class ContinuousProbe(Probe):
    """A probe whose action is a box of any shape and bounds."""

    def __init__(self, *arguments, low=-1.0, high=1.0, shape=(1,), **keywords):
        super().__init__(*arguments, **keywords)
        self.box = spaces.Box(jnp.asarray(low), jnp.asarray(high), shape, jnp.float32)

    def action_space(self, params=None):
        return self.box


PROBES = {
    # The reward is what is seen: V(cue) = cue.
    "ProbeObservation-test": lambda: Probe(lambda cue, action, time: cue, random_cue=True),
    # One reward after two steps: V = γ, then 1.
    "ProbeDelay-test": lambda: Probe(lambda cue, action, time: 1.0 * (time == 2), length=2),
    # The reward is the action: choose 1.
    "ProbeAction-test": lambda: Probe(lambda cue, action, time: 1.0 * action),
    # The right action is the one that is seen: choose (cue > 0).
    "ProbeBoth-test": lambda: Probe(
        lambda cue, action, time: 1.0 * (action == (cue > 0)), random_cue=True
    ),
    # Pays 1 for ever; a time limit truncates after five steps: V = 1 / (1 - γ).
    "ProbeTruncated-test": lambda: Probe(lambda cue, action, time: 1.0, length=5, truncates=True),
    # Pays 1 five times and ends: V = 1 + γ + ... + γ^(4 - time).
    "ProbeTerminated-test": lambda: Probe(lambda cue, action, time: 1.0, length=5),
}
for name, factory in PROBES.items():
    gymnax.register(name, lambda factory=factory: factory())


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Environment variables for subprocesses, which share one compilation cache."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": USERS_FLAGS,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture
def keys():
    """Keys for a number of seeds."""
    return lambda n: jax.vmap(jax.random.key)(jnp.arange(n))


@pytest.fixture
def patched(tmp_path):
    """patched("cnn") applies tests/edits/cnn.patch to a copy of its script and imports the copy.

    With several names, all patches are applied to the same copy, in this order.
    """

    def apply(*names):
        folder = tmp_path / "_".join(names)
        folder.mkdir()
        patches = [ROOT / "tests" / "edits" / f"{name}.patch" for name in names]
        (script,) = re.findall(r"^--- a/(.*)$", patches[0].read_text(), re.MULTILINE)
        shutil.copy(ROOT / script, folder)
        for patch in patches:
            # Without the ceiling, git might find a repository around the temporary folder.
            ceiling = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)}
            command = ["git", "apply", str(patch)]
            done = subprocess.run(command, cwd=folder, env=ceiling, capture_output=True, text=True)
            assert done.returncode == 0, f"{patch.name} does not fit {script}:\n{done.stderr}"
        name = f"{Path(script).stem}_{folder.name}"
        spec = importlib.util.spec_from_file_location(name, folder / script)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return apply


# `jax.jit` with XLA's default optimisations, as users have it.
as_shipped = functools.partial(jax.jit, compiler_options=DEFAULTS)
