"""Importing a script changes nothing outside of its module."""

import subprocess
import sys

import pytest
from conftest import ROOT

IMPORT = """
import os, signal, sys
import jax, flax.linen, optax, chex, tyro, tqdm
import orbax.checkpoint, jax.experimental.multihost_utils  # these may change what they like
from jax._src import xla_bridge
from jax._src.interpreters import mlir

def everything():
    return dict(
        config=dict(jax.config.values),
        lowerings={name: dict(rules) for name, rules in mlir._platform_specific_lowerings.items()},
        environment=dict(os.environ),
        path=list(sys.path),
        streams=(sys.stdout, sys.stderr),
        signals=[signal.getsignal(number) for number in signal.valid_signals()],
        folder=sorted(os.listdir()),
    )

before = everything()
__import__(sys.argv[1])
after = everything()
for name in before:
    assert before[name] == after[name], (name, before[name], after[name])
assert not xla_bridge.backends_are_initialized()  # one may still choose the devices
assert "gymnax" not in sys.modules and "matplotlib" not in sys.modules
"""


@pytest.mark.parametrize("script", ["ppo_discrete", "ppo_continuous", "ppo_penalty", "trpo"])
def test_importing_a_script_changes_nothing(script, environment, tmp_path):
    path = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", IMPORT, script],
        cwd=tmp_path,
        env={**environment, **path},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
