"""Each bug of break_it.py, put into a copy of the scripts, is seen by the test that it names."""

import multiprocessing
import shutil

import pytest
from break_it import MUTATIONS, broken, run_tests, table
from conftest import ROOT

# To import these takes longer than most of the tests: it is done once, in a server that starts no
# JAX backend, and of which each test's process is a fork. gymnax, which starts one, is not among
# them.
LIBRARIES = ["jax", "flax.linen", "optax", "chex", "tyro", "orbax.checkpoint", "scipy.stats"]
LIBRARIES += ["jax.experimental.multihost_utils", "scipy.optimize", "pytest"]


@pytest.fixture(scope="module")
def run():
    """run(folder, tests), as `run_tests`, in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with context.Pool(1, maxtasksperchild=1) as pool:
        yield lambda *arguments: pool.apply_async(run_tests, arguments).get(timeout=120)


@pytest.fixture
def copied(tmp_path):
    """The scripts and their tests in a folder of their own."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=ignored)
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_bug_is_seen(name, copied, run):
    mutation = MUTATIONS[name]
    (copied / f"{mutation.script}.py").write_text(broken(mutation))
    code, raised, output = run(str(copied), [mutation.test])
    # An assertion that does not hold: no error of the bug's own, and none of collecting the test.
    assert code == pytest.ExitCode.TESTS_FAILED and {*raised} == {"AssertionError"}, output


def test_the_document_has_the_list():
    text = (ROOT / "docs" / "recipes.md").read_text()
    assert f"<!-- bugs -->\n{table()}\n<!-- end of bugs -->" in text
