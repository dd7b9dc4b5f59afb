"""Each bug of break_it.py, put into a copy of the scripts, is seen by the test that it names."""

import multiprocessing
import shutil
import subprocess
import sys

import pytest
from break_it import MUTATIONS, broken, run_tests, table
from conftest import ROOT

# To import these takes longer than most of the tests. It is done once, in a server of which the
# process of each test is a fork. None of them starts a backend of JAX, whose threads a fork would
# lack; gymnax does, so that it is imported in each.
LIBRARIES = ["jax", "flax.linen", "optax", "chex", "tyro", "orbax.checkpoint", "scipy.stats"]
LIBRARIES += ["jax.experimental.multihost_utils", "scipy.optimize", "pytest"]


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """What became of the tests that are to be run with each bug, in processes of their own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    names = [name for name in MUTATIONS if any(x and x.id == name for x in calls)]
    with context.Pool(2, maxtasksperchild=1) as pool:
        started = {}
        for name in names:
            folder = tmp_path_factory.mktemp("copy")
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignored)
            for script in ROOT.glob("*.py"):
                shutil.copy(script, folder)
            (folder / f"{MUTATIONS[name].script}.py").write_text(broken(MUTATIONS[name]))
            started[name] = pool.apply_async(run_tests, (str(folder), [MUTATIONS[name].test]))
        yield lambda name: started[name].get(timeout=300)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_bug_is_seen(name, outcomes):
    code, raised, output = outcomes(name)
    # An assertion that does not hold: no other error, and none of collecting the test.
    assert code == pytest.ExitCode.TESTS_FAILED and {*raised} == {"AssertionError"}, output


def test_the_document_has_the_list():
    text = (ROOT / "docs" / "recipes.md").read_text()
    assert f"<!-- bugs -->\n{table()}\n<!-- end of bugs -->" in text


def test_a_script_with_a_bug_is_written():
    text = (ROOT / "docs" / "recipes.md").read_text()
    command = text.split("<!-- break -->\n```sh\npython ")[1].splitlines()[0]
    program, name = command.removesuffix(" > broken.py").split()
    script = subprocess.run(
        [sys.executable, ROOT / program, name], capture_output=True, text=True, check=True
    ).stdout
    assert script == broken(MUTATIONS[name])
    compile(script, "broken.py", "exec")
