"""What importing a script does to JAX and to the process: nothing. And what the command line does
to the random numbers: they are computed faster, and stay the same."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = ["ppo_discrete", "ppo_continuous", "ppo_penalty", "trpo"]

IMPORT = """
import os, signal, sys
import jax, flax.linen, optax, chex, tyro, tqdm
import orbax.checkpoint, jax.experimental.multihost_utils  # they may do what they like
from jax._src import xla_bridge
from jax._src.interpreters import mlir
from jax.extend.random import threefry2x32_p

def everything():
    lowerings = {name: table.get(threefry2x32_p)
                 for name, table in mlir._platform_specific_lowerings.items()}
    return dict(
        threefry=(lowerings, mlir._lowerings.get(threefry2x32_p)),
        lowerings={name: dict(table) for name, table in mlir._platform_specific_lowerings.items()},
        config={name: value for name, value in jax.config.values.items()},
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


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_leaves_jax_as_it_was(script, environment, tmp_path):
    path = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", IMPORT, script],
        cwd=tmp_path,
        env={**environment, **path},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


DRAW = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
import ppo_discrete
from jax.extend.random import threefry2x32_p

if sys.argv[1] == "straight":
    ppo_discrete.straight_threefry()

def draw(key):  # as gymnax does: split, split again, draw, under vmap
    keys = jax.random.split(jax.random.split(key)[1], 4)
    return jax.vmap(lambda key: jax.random.uniform(key, (4,)))(keys)

words = lambda keys: np.asarray(jax.random.key_data(keys)).tolist()
numbers = lambda x: np.asarray(x).tolist()
keys = jax.vmap(jax.random.key)(jnp.asarray([0, 1, 42]))
key = jax.random.key(7)
draws = jax.jit(jax.vmap(draw))
threefry = jax.jit(lambda *words: threefry2x32_p.bind(*words))
known = [((0, 0), (0, 0)), ((2**32 - 1,) * 2, (2**32 - 1,) * 2),
         ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3))]
print(json.dumps(dict(
    program=draws.lower(keys).compile().as_text(),
    uniform=numbers(draws(keys)),
    # Odd numbers of words, one and many, eagerly and compiled, of several widths.
    bits=[numbers(jax.random.bits(key, (n,), kind)) for n in (1, 2, 7, 1000)
          for kind in (jnp.uint8, jnp.uint16, jnp.uint32)],
    compiled=numbers(jax.jit(lambda key: jax.random.bits(key, (33,)))(key)),
    per_seed=numbers(jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(keys)),
    split=words(jax.random.split(key, 2)),
    split_many=words(jax.random.split(key, (3, 5))),
    fold_in=words(jax.random.fold_in(key, 5)),
    many_splits=words(jax.lax.fori_loop(0, 50, lambda _, key: jax.random.split(key)[0], key)),
    normal=numbers(jax.random.normal(key, (5, 3))),
    categorical=numbers(jax.random.categorical(key, jnp.zeros((20, 3)))),
    known=[[int(word) for word in threefry(*map(jnp.uint32, (*key, *count)))]
           for key, count in known],
)))
"""


@pytest.fixture(scope="module")
def draws(environment):
    """What a process draws in which `straight_threefry` was called, and one in which it was not."""

    def draw(how):
        command = [sys.executable, "-c", DRAW, how]
        env = {**environment, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
        result = subprocess.run(command, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return draw("straight"), draw("as it is")


def test_straight_threefry_draws_the_same_numbers(draws):
    straight, usual = (dict(x) for x in draws)
    straight.pop("program"), usual.pop("program")
    assert straight == usual


def test_straight_threefry_gives_the_known_answers(draws):
    # Those of Random123, whose authors invented Threefry (tests/kat_vectors there), ...
    assert draws[0]["known"] == [
        [0x6B200159, 0x99BA4EFE],
        [0x1CB996FC, 0xBB002BE7],
        [0xC4923A9C, 0x483DF7A0],
    ]
    # ... and of jax.random, of releases that had never seen these scripts.
    assert draws[0]["per_seed"][0] == [0xF29A4FA7, 0xFA843692]
    assert draws[0]["per_seed"][2] == [0x7D1C13A2, 0xAE0730D9]
    assert draws[0]["split"] == [[3625411723, 1954958720], [195045567, 4062205631]]
    assert draws[0]["fold_in"] == [3583082021, 1947592014]


def test_straight_threefry_compiles_without_loops(draws):
    straight, usual = (x["program"] for x in draws)
    assert "fusion(" in straight and "while(" not in straight
    # Without the call there are loops. When JAX has none any more, the function may go.
    assert "while(" in usual
