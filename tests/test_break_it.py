"""Each bug of break_it.py is detected by the test that it names."""

import multiprocessing
import shutil
import subprocess
import sys

import pytest
from break_it import MUTATIONS, broken, run_tests, table
from conftest import ROOT

# Importing these modules takes longer than most tests. A server imports them once, and each test
# runs in a fork of the server. The server must not start a backend of JAX, because a fork would not
# have its threads. Importing gymnax starts one, so each fork imports gymnax for itself.
LIBRARIES = ["jax", "flax.linen", "optax", "chex", "tyro", "orbax.checkpoint", "scipy.stats"]
LIBRARIES += ["jax.experimental.multihost_utils", "scipy.optimize", "pytest"]


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """Run the test of each bug in a process of its own; outcomes(name) waits for the result."""
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
    # An assertion has failed. Any other error would be a bug in the test or in break_it.py.
    assert code == pytest.ExitCode.TESTS_FAILED and {*raised} == {"AssertionError"}, output


def test_the_document_has_the_list():
    text = (ROOT / "docs" / "recipes.md").read_text()
    assert f"<!-- bugs -->\n{table()}\n<!-- end of bugs -->" in text, (
        "Replace the list in docs/recipes.md by the output of `python tests/break_it.py`."
    )


def test_a_script_with_a_bug_is_written():
    text = (ROOT / "docs" / "recipes.md").read_text()
    command = text.split("<!-- break -->\n```sh\npython ")[1].splitlines()[0]
    program, name = command.removesuffix(" > broken.py").split()
    script = subprocess.run(
        [sys.executable, ROOT / program, name], capture_output=True, text=True, check=True
    ).stdout
    assert script == broken(MUTATIONS[name])
    compile(script, "broken.py", "exec")
