"""What several scripts define under one name is the same text in all of them."""

import ast
import functools
import textwrap
from itertools import combinations

import pytest
from conftest import ROOT

NAMES = ["ppo_discrete", "ppo_continuous", "ppo_penalty", "trpo"]
CLIPPED, BOTH_SPACES = {"ppo_discrete", "ppo_continuous"}, {"ppo_penalty", "trpo"}

# Definitions that differ on purpose, and why: the text is the same only within these groups.
SAME_WITHIN = {
    "Config": [],  # each algorithm has its own knobs
    "PRESETS": [],  # likewise
    "Actor": [BOTH_SPACES],  # returns the distribution that the actions need
    "action_interface": [BOTH_SPACES],  # discrete or continuous actions, or both
    "Transition": [],  # what of π_old the objective needs
    "Batch": [],  # likewise
    "State": [{"ppo_discrete", "ppo_continuous", "trpo"}],  # the penalty adds β
    "make_train": [CLIPPED],  # the algorithm itself
}


@functools.cache
def definitions(name):
    """Top-level functions, classes and constants by name, as source text."""
    source = (ROOT / f"{name}.py").read_text()
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined = node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            defined = (node.targets[0] if isinstance(node, ast.Assign) else node.target).id
        else:
            continue
        found[defined] = "\n".join(lines[node.lineno - 1 : node.end_lineno])
    return found


@pytest.mark.parametrize("one, other", list(combinations(NAMES, 2)))
def test_shared_definitions_are_the_same_text(one, other):
    ours, theirs = definitions(one), definitions(other)
    shared = ours.keys() & theirs.keys()
    assert len(shared) > 40
    for name in shared:
        groups = SAME_WITHIN.get(name, [set(NAMES)])
        if any({one, other} <= group for group in groups):
            assert ours[name] == theirs[name], f"{name} differs"


def test_what_may_differ_does():
    # No name stays in the list of exceptions after its reason has gone.
    for name, groups in SAME_WITHIN.items():
        for one, other in combinations(NAMES, 2):
            if not any({one, other} <= group for group in groups):
                assert definitions(one)[name] != definitions(other)[name]


def closures(name):
    """The functions inside `make_train`, as source text."""
    source = definitions(name)["make_train"]
    (function,) = ast.parse(source).body
    return {
        node.name: ast.get_source_segment(source, node)
        for node in function.body
        if isinstance(node, ast.FunctionDef)
    }


def test_all_roll_out_and_estimate_advantages_alike():
    # `env_step` differs by what it keeps of π_old, `update` by what follows the advantages.
    own = ("log_prob=", "policy=policy")
    steps, starts = set(), set()
    for name in NAMES:
        lines = closures(name)["env_step"].splitlines()
        steps.add("\n".join(line for line in lines if not line.strip().startswith(own)))
        update = closures(name)["update"]
        starts.add(update[update.index("        key, action_key") :].split("gae_lambda,")[0])
    assert len(steps) == len(starts) == 1


def test_all_begin_and_report_alike():
    # `init` differs by β and by whose parameters Adam knows, the reports by the losses.
    own = ("beta=", "opt_state=")
    begins, reports = set(), set()
    for name in NAMES:
        lines = closures(name)["init"].splitlines()
        begins.add("\n".join(line for line in lines if not line.strip().startswith(own)))
        update = closures(name)["update"]
        reports.add(update[update.index("        mean_of_ended") :].split("**")[0])
    assert len(begins) == len(reports) == 1


def test_the_penalty_takes_the_same_gradient_steps_as_the_clip():
    # `minibatch_step` differs by the β that it hands on.
    clip, penalty = closures("ppo_discrete"), closures("ppo_penalty")
    assert penalty["learning_rate"] == clip["learning_rate"] == closures("trpo")["learning_rate"]
    assert (
        penalty["minibatch_step"]
        .replace("(beta, take, ", "(take, ")
        .replace("(params, beta, minibatch)", "(params, minibatch)")
        == clip["minibatch_step"]
    )


@pytest.mark.parametrize("script", NAMES)
def test_a_script_stands_alone_and_keeps_the_order(script):
    source = (ROOT / f"{script}.py").read_text()
    imported = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not imported & set(NAMES)
    order = ["Config", "Actor", "Critic", "gae", "Transition", "State", "make_train", "train"]
    order += ["evaluate", "main"]
    names = [name for name in definitions(script) if name in order]
    assert names == order
    # Above the host side nothing prints, writes or reads the clock.
    pure = source.split("# ---- The host side")[0]
    for word in ("print(", "time.perf_counter", "time.time", "open("):
        assert word not in pure


def test_the_readme_quotes_the_scripts():
    quotes = (ROOT / "README.md").read_text().split("<!-- from ")[1:]
    assert len(quotes) >= 6
    for quote in quotes:
        script = quote.split(" -->")[0]
        code = quote.split("```python\n")[1].split("```")[0]
        source = (ROOT / script).read_text()
        indented = (textwrap.indent(code, " " * width) for width in range(0, 20, 4))
        assert any(code in source for code in indented), f"{script} has no longer:\n{code}"
