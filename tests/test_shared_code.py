"""What several scripts define under one name is the same text in all, and how they are laid out."""

import ast
import difflib
import functools
import re
import textwrap

import pytest
from conftest import ROOT

NAMES = ["ppo_discrete", "ppo_continuous", "ppo_penalty", "trpo"]
DIVIDER = "# ==== The command line. "
SIZES = {"ppo_discrete": 900, "ppo_continuous": 930, "ppo_penalty": 990, "trpo": 1050}

# Definitions that each algorithm has for itself.
OWN_DEFINITIONS = {
    "Actor",
    "Actor.__call__",
    "PRESETS",
    "value_loss",
    "make_train.loss",
    "make_train.update",
}
# Beginnings of lines that differ on purpose in a definition that is otherwise shared.
OWN_LINES = {
    "Config": [
        '"""Hyper',
        "steps. The common",
        *("env_id", "num_steps", "learning_rate", "update_epochs"),
        *("clip_", "target_kl", "beta", "adaptive_beta", "early_stop_kl", "max_kl", "cg_"),
        *("fisher_stride", "line_search_", "ent_coef", "vf_coef", "max_grad_norm"),
        *("normalize_obs", "activation", "initial_std"),
    ],
    "Config.__post_init__": ["counts +="],
    "Flags": ['"""Train'],
    "Environment": ["step: keys [N]", "episode the first"],
    "Transition": ["action:", "log_prob:", "policy:"],
    "State": ["beta:", "opt_state:"],
    "bound_action": ['if hasattr(space, "n")', "return action  #"],
    "make_networks": ["action_size =", "actor ="],
    "make_train": ["optimizer =", "optax.", ")"],
    "make_train.init": ["opt_state=", "beta="],
    "make_train.env_step": ["log_prob=", "policy=", "env_keys, state.env_state"],
    "evaluate": ["action = bound_action", "jax.random.split(step_key"],
    "load_env": ["if not hasattr(", "other =", "raise UserError(f"],
}


@functools.cache
def definitions(script):
    """The text of all functions, classes and constants by name; a.b is the function b inside a."""
    source = (ROOT / f"{script}.py").read_text()
    lines, found = source.splitlines(), {}

    def lines_of(node):
        return range(node.lineno - 1 - len(getattr(node, "decorator_list", [])), node.end_lineno)

    def collect(nodes, prefix):
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                inner = [x for x in node.body if isinstance(x, ast.FunctionDef)]
                if isinstance(node, ast.FunctionDef) and node.name != "make_train":
                    inner = []  # only methods, and the parts of make_train, are compared one by one
                without = {i for x in inner for i in lines_of(x)}
                text = [lines[i] for i in lines_of(node) if i not in without and lines[i]]
                found[prefix + node.name] = "\n".join(text)
                collect(inner, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                found[target.id] = "\n".join(lines[i] for i in lines_of(node))

    collect(ast.parse(source).body, "")
    return found


def shared_text(script, name):
    """A definition without the lines that are its own."""
    own = tuple(OWN_LINES.get(name, []))
    lines = definitions(script)[name].splitlines()
    kept = [line for line in lines if not (own and line.strip().startswith(own))]
    return sorted(kept) if name == "Config" else kept  # TRPO orders its hyperparameters differently


@pytest.mark.parametrize("name", sorted({name for x in NAMES for name in definitions(x)}))
def test_scripts_define_the_same_name_in_the_same_way(name):
    having = [x for x in NAMES if name in definitions(x)]
    texts = [shared_text(x, name) for x in having]
    if name in OWN_DEFINITIONS:
        assert len({tuple(text) for text in texts}) > 1, f"remove {name} from OWN_DEFINITIONS"
        return
    for script, text in zip(having[1:], texts[1:], strict=True):
        diff = "\n".join(difflib.unified_diff(texts[0], text, having[0], script, lineterm=""))
        assert not diff, (
            f"{name} differs between two scripts.\n{diff}\n"
            "Make the same change in all scripts that define it. If a line has to differ, list its "
            "beginning in OWN_LINES of tests/test_shared_code.py."
        )
    for prefix in OWN_LINES.get(name, []):
        seen = [
            re.findall(rf"^ *{re.escape(prefix)}.*$", definitions(x)[name], re.M) for x in having
        ]
        assert any(x != seen[0] for x in seen), f"remove {prefix!r} from OWN_LINES[{name!r}]"


def test_most_of_the_code_is_shared():
    assert len([x for x in definitions("ppo_discrete") if x in definitions("trpo")]) > 45
    assert len(shared_text("trpo", "make_train.env_step")) > 20


def test_all_scripts_collect_and_report_in_the_same_way():
    starts, ends = set(), set()
    for script in NAMES:
        lines = definitions(script)["make_train.update"].splitlines()
        first, gae, end = (
            next(i for i, line in enumerate(lines) if start in line)
            for start in ("key, action_key", "advantage, target = gae(", "# 1 if V predicts")
        )
        starts.add("\n".join(lines[first : gae + 3]))
        ends.add("\n".join(lines[end : end + 5]))
    assert len(starts) == len(ends) == 1


@pytest.mark.parametrize("script", NAMES)
def test_a_script_keeps_the_order_and_the_size(script):
    lines = (ROOT / f"{script}.py").read_text().splitlines()
    (divider,) = (i for i, line in enumerate(lines) if line.startswith(DIVIDER))
    assert len(lines) <= SIZES[script] and len(lines) - divider <= 310
    order = ["Config", "Actor", "gae", "RunningStats", "Transition", "State", "make_train", "train"]
    order += ["evaluate", "random_orders", "make_gymnax", "PRESETS", "load_env", "main"]
    assert [name for name in definitions(script) if name in order] == order


@pytest.mark.parametrize("script", NAMES)
def test_the_algorithm_imports_only_its_packages(script):
    above, _ = (ROOT / f"{script}.py").read_text().split(DIVIDER)
    tree = ast.parse(above)
    imported = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    packages = {x.split(".")[0] for x in imported}
    standard = {"math", "collections", "dataclasses", "functools", "typing"}
    assert packages == standard | {"jax", "flax", "optax", "chex", "gymnax"}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not used & {"print", "open", "input"} and "callback" not in above


def test_the_readme_quotes_the_scripts():
    quotes = (ROOT / "README.md").read_text().split("<!-- from ")[1:]
    assert len(quotes) >= 3
    for quote in quotes:
        script = quote.split(" -->")[0]
        code = quote.split("```python\n")[1].split("```")[0]
        source = (ROOT / script).read_text()
        indented = (textwrap.indent(code, " " * width) for width in range(0, 20, 4))
        assert any(code in source for code in indented), f"{script} has no longer:\n{code}"


@pytest.mark.parametrize("script", NAMES)
def test_the_script_metadata_lists_the_requirements(script):
    # What `uv run` installs is the run-time part of requirements.txt.
    text = (ROOT / "requirements.txt").read_text().split("# tests")[0]
    wanted = {line.split("#")[0].strip() for line in text.splitlines()} - {"", "scipy>=1.17,<2"}
    block = (ROOT / f"{script}.py").read_text().split("# /// script\n")[1].split("# ///")[0]
    assert set(re.findall(r'"([a-z-]+[><=][^"]*)"', block.split("dependencies")[1])) == wanted
