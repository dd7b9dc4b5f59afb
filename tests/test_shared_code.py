"""What several scripts define under one name is the same text in all of them."""

import ast
from itertools import combinations

import pytest
from conftest import ROOT

SCRIPTS = [
    path
    for name in ("ppo_discrete", "ppo_continuous", "ppo_penalty", "trpo")
    if (path := ROOT / f"{name}.py").exists()
]

# Definitions that differ on purpose, and why.
DIFFERENT = {
    "Config": "each algorithm has its own knobs",
    "PRESETS": "and its own values for a family of environments",
    "Actor": "returns the distribution that the actions need",
    "action_interface": "discrete or continuous actions",
    "Transition": "what of π_old the objective needs",
    "Batch": "likewise",
}
# Both scripts of the clipped objective hold the same algorithm; between others it may differ.
CLIPPED = {"ppo_discrete", "ppo_continuous"}
DIFFERENT_ALGORITHM = {"make_train": "the algorithm"}


def definitions(path):
    """Top-level functions, classes and constants by name, as source text."""
    source = path.read_text()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = ast.get_source_segment(source, node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found[target.id] = ast.get_source_segment(source, node)
    return found


@pytest.mark.parametrize("one, other", list(combinations(SCRIPTS, 2)), ids=lambda path: path.stem)
def test_shared_definitions_are_the_same_text(one, other):
    different = set(DIFFERENT)
    if {one.stem, other.stem} != CLIPPED:
        different |= set(DIFFERENT_ALGORITHM)
    one, other = definitions(one), definitions(other)
    for name in (one.keys() & other.keys()) - different:
        assert one[name] == other[name], f"{name} differs"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_stands_alone_and_keeps_the_order(script):
    tree = ast.parse(script.read_text())
    imported = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not imported & {path.stem for path in SCRIPTS}
    order = ["Config", "Actor", "Critic", "gae", "Transition", "State", "make_train", "train"]
    order += ["evaluate", "main"]
    names = [name for name in definitions(script) if name in order]
    assert names == order
    # Above the host side nothing prints, writes or reads the clock.
    pure = script.read_text().split("# ---- The host side")[0]
    for word in ("print(", "time.perf_counter", "time.time", "open("):
        assert word not in pure
