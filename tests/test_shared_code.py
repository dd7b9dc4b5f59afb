"""What several scripts define under one name is the same text in all, and how they are laid out."""

import ast
import builtins
import functools
import re
import textwrap
from itertools import combinations

import pytest
from conftest import ROOT

NAMES = ["ppo_discrete", "ppo_continuous", "ppo_penalty", "trpo"]
CLIPPED, BOTH_SPACES = {"ppo_discrete", "ppo_continuous"}, {"ppo_penalty", "trpo"}
DIVIDER = "# ==== The algorithm ends here"

# Definitions that differ on purpose, and why: the text is the same only within these groups.
SAME_WITHIN = {
    "Config": [],  # each algorithm has its own knobs
    "PRESETS": [],  # likewise
    "Flags": [],  # its docstring is what --help says first
    "Actor": [BOTH_SPACES],  # returns the distribution that the actions need
    "Actor.__call__": [BOTH_SPACES],
    "bound_action": [BOTH_SPACES],  # where actions may be discrete, these pass
    "make_env": [BOTH_SPACES],  # which actions there may be
    "evaluate": [BOTH_SPACES],  # discrete actions have no bounds
    "critic_loss": [CLIPPED, BOTH_SPACES],  # only these clip it, on request
    "normalize_advantage": [{*NAMES[:3]}],  # TRPO has one step for the whole rollout: its docstring
    "validate": [CLIPPED],  # which values may be zero, and which at most one
    "Transition": [],  # what of π_old the objective needs
    "State": [CLIPPED],  # the penalty adds β; whose parameters Adam knows
    "make_train": [],  # the algorithm itself: see below
}

# Of these all but a few lines, which differ as the comments above say, is the same code in all.
OWN_LINES = {
    "Flags": [],
    "bound_action": ["if hasattr(space, 'n'):", "return action"],
    "make_env": ["if not hasattr(", "space = env.action_space", "raise Failure(f'{env_id} has "],
    "evaluate": ["actor = Actor(", "action = bound_action("],
    "normalize_advantage": [],
    "validate": ["may_be_zero = ", "at_most_one = "],
    "Transition": ["log_prob: ", "policy: "],
    "State": ["beta: "],
    "make_train": [
        "size = math.prod(",
        "actor = Actor(",
        "minibatch_size = ",
        "clip_norm = ",
        "optimizer = ",
    ],
    "make_train.init": ["beta=", "opt_state="],
    "make_train.act": ["log_prob, done = ", "done = ", "transition = Transition("],
    # The actor of ppo_discrete and ppo_penalty may skip a minibatch.
    "make_train.gradient_step": ["if config.kl", "skip = ", "change['actor'] = ", "metrics['sk"],
}


@functools.cache
def definitions(name):
    """Top-level functions, classes, their methods, and constants by name, as source text."""
    source = (ROOT / f"{name}.py").read_text()
    lines, found = source.splitlines(), {}

    def text(node, end=None):
        start = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", []))])
        return "\n".join(lines[start - 1 : end or node.end_lineno])

    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            methods = [x for x in node.body if isinstance(x, ast.FunctionDef)]
            found |= {f"{node.name}.{x.name}": text(x) for x in methods}
            start = [min([x.lineno, *(y.lineno for y in x.decorator_list)]) for x in methods]
            found[node.name] = text(node, start[0] - 1 if start else None)
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = text(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found[target.id] = text(node)
    return found


def code(node):
    """The lines of a definition without comments, docstrings and line breaks."""
    for x in ast.walk(node):
        if isinstance(x, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(x):
            x.body = x.body[1:] or [ast.Pass()]
    return ast.unparse(node)


@functools.cache
def closures(name):
    """The functions inside `make_train` and of those inside `update`, as code; the rest of both."""
    (function,) = ast.parse(definitions(name)["make_train"]).body
    found = {}

    def collect(function):
        inner = [x for x in function.body if isinstance(x, ast.FunctionDef)]
        function.body = [x for x in function.body if x not in inner]
        for x in inner:
            if x.name == "update":
                collect(x)
            found[f"make_train.{x.name}"] = code(x)

    collect(function)
    return found | {"make_train": code(function)}


def common(name, definition):
    """The code of a definition, without what is its own in this script."""
    if definition.startswith("make_train"):
        text = closures(name)[definition]
    else:
        text = code(ast.parse(textwrap.dedent(definitions(name)[definition])))
    # Discrete actions have no bounds.
    text = text.replace("bound_action(action, env.action_space)", "action")
    if definition == "evaluate":
        text = text.replace("env_state, policy.mode())", "env_state, action)")
    if definition == "make_train.init":  # one argument a line
        text = re.sub(r", (?=\w+=)", "\n", text)
    if definition == "make_train.gradient_step":  # PPO's loss has metrics, TRPO's is the critic's
        text = text.replace("gradient, metrics = jax.grad(loss, has_aux=True)(", "GRADIENT(")
        text = text.replace("value_loss, gradient = jax.value_and_grad(loss)(", "GRADIENT(")
        text = text.replace("params, state.beta, ", "params, ")
        text = text.replace("take(indices)", "jax.tree.map(lambda x: x[indices], batch)")
        text = text.replace("opt_state), metrics", "opt_state), LOSS")
        text = text.replace("opt_state), value_loss", "opt_state), LOSS")
    own = tuple(OWN_LINES[definition])
    return [line for line in text.splitlines() if not line.strip().startswith(own)]


@pytest.mark.parametrize("one, other", list(combinations(NAMES, 2)))
def test_shared_definitions_are_the_same_text(one, other):
    ours, theirs = definitions(one), definitions(other)
    shared = ours.keys() & theirs.keys()
    assert len(shared) > 60
    for name in shared:
        groups = SAME_WITHIN.get(name, [set(NAMES)])
        if any({one, other} <= group for group in groups):
            assert ours[name] == theirs[name], f"{name} differs"


@pytest.mark.parametrize("definition", OWN_LINES)
def test_what_differs_is_else_the_same_code(definition):
    having = [x for x in NAMES if definition in definitions(x) or "make_train" in definition]
    texts = [common(x, definition) for x in having]
    assert len(having) >= 3 and len(texts[0]) >= 2
    for text in texts[1:]:
        assert text == texts[0]


def test_what_may_differ_does():
    # No name stays in the lists of exceptions after its reason has gone.
    for name, groups in SAME_WITHIN.items():
        having = [x for x in NAMES if name in definitions(x)]
        for one, other in combinations(having, 2):
            if not any({one, other} <= group for group in groups):
                assert definitions(one)[name] != definitions(other)[name], name
    for definition, own in OWN_LINES.items():
        having = [x for x in NAMES if definition in definitions(x) or "make_train" in definition]
        for prefix in own:
            if definition.startswith("make_train"):
                texts = [closures(x)[definition] for x in having]
            else:
                texts = [code(ast.parse(definitions(x)[definition])) for x in having]
            lines = {re.search(f"^.*{re.escape(prefix)}.*$", x, re.MULTILINE) for x in texts}
            assert len({line and line.group() for line in lines}) > 1, f"{definition}: {prefix}"


def test_hyperparameters_of_one_name_have_one_type_and_one_meaning():
    types = {}
    for name in NAMES:
        for line in definitions(name)["Config"].splitlines():
            if field := re.match(r"    (\w+): (.+?) = ", line):
                types.setdefault(field[1], set()).add(field[2])
    assert len(types) > 20
    assert {field: seen for field, seen in types.items() if len(seen) > 1} == {}


def test_the_clip_scripts_train_alike():
    # But for the bounds of the actions, the number that describes them, and skipped minibatches.
    one, other = (closures(name) for name in sorted(CLIPPED))
    assert one.keys() == other.keys()
    for part in one.keys() - {"make_train", "make_train.act", "make_train.gradient_step"}:
        assert one[part] == other[part]


def test_all_roll_out_estimate_and_report_alike():
    starts, reports, rates = set(), set(), set()
    for name in NAMES:
        lines = closures(name)["make_train.update"].splitlines()
        (gae,) = (i for i, line in enumerate(lines) if " = gae(" in line)
        (metrics,) = (line for line in lines if line.strip().startswith("metrics = {"))
        starts.add("\n".join(lines[: gae + 1]))
        # The losses in the middle are each algorithm's own.
        reports.add((metrics.split("**")[0], metrics[metrics.index("'explained_variance'") :]))
        rates.add(closures(name)["make_train.learning_rate"])
    assert len(starts) == len(reports) == len(rates) == 1
    (start,) = starts
    for part in ("jax.lax.scan(act,", "next_value = critic.apply", "update_stats(state.return"):
        assert part in start


# ---- The layout ----


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
    order += ["evaluate", "validate", "straight_threefry", "make_env", "main"]
    names = [name for name in definitions(script) if name in order]
    assert names == order


def halves(script):
    """The syntax above and below the divider, of which there is one."""
    above, below = (ROOT / f"{script}.py").read_text().split(DIVIDER)
    return ast.parse(above), ast.parse("#" + below)


def imports(nodes):
    """What statements import, as `module.name`."""
    return {
        f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }


@pytest.mark.parametrize("script", NAMES)
def test_above_the_divider_is_the_algorithm_alone(script):
    above, below = halves(script)
    allowed = {"math", "chex", "flax.linen", "jax", "jax.numpy", "optax", "dataclasses.dataclass"}
    allowed |= {"typing.Any", "typing.Literal", "typing.NamedTuple"}
    if script == "trpo":
        allowed |= {"functools.partial", "jax.flatten_util.ravel_pytree"}
    # `signal` is for a script that is being run, under `if __name__ == "__main__"`.
    assert imports(above.body) == allowed
    assert imports(ast.walk(above)) == allowed | {"signal"}
    assert sum(isinstance(node, ast.If) for node in above.body) == 1
    # Nothing prints, writes or reads the clock: there is nothing imported that could, and of the
    # builtins only these are used, and of what stands below only what has no effect on the world.
    used = {node.id for node in ast.walk(above) if isinstance(node, ast.Name)}
    harmless = {"dict", "float", "getattr", "hasattr", "int", "bool", "str", "tuple", "property"}
    assert used & vars(builtins).keys() <= harmless | {"__name__"}
    assert used & {node.name for node in below.body if hasattr(node, "name")} == {
        "validate",
        "make_env",
        "shuffled_indices",
        "packed",
        *(["make_take"] if script != "trpo" else []),  # TRPO's batch is two arrays
    }
    assert "callback" not in ast.unparse(above) and "jax.debug" not in ast.unparse(above)


SIZES = {  # the last line of the divider, and of the beginning of `update`
    "ppo_discrete": (490, 400),
    "ppo_continuous": (510, 410),
    "ppo_penalty": (560, 450),
    "trpo": (630, 540),
}


@pytest.mark.parametrize("script", NAMES)
def test_the_algorithm_is_short(script):
    lines = (ROOT / f"{script}.py").read_text().splitlines()
    (divider,) = (i for i, line in enumerate(lines, 1) if line.startswith(DIVIDER))
    (update,) = (i for i, line in enumerate(lines, 1) if line.strip().startswith("def update("))
    most_lines, most_before = SIZES[script]
    assert divider <= most_lines and update <= most_before
    if script == "ppo_discrete":  # the README compares these with other programs
        said = f"{divider - 1} lines of algorithm, of {len(lines)}; update on line {update}"
        assert said in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("script", NAMES)
def test_what_every_import_runs_does_not_reach_into_jax(script):
    # Its unstable parts are for `straight_threefry`, which only the command line calls.
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    top = imports(tree.body)
    assert not [x for x in top if x.startswith(("jax.interpreters", "jax.extend", "jax._src"))]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = [node.func.id for node in calls if isinstance(node.func, ast.Name)]
    assert names.count("straight_threefry") == 1
    (main,) = (node for node in tree.body if getattr(node, "name", "") == "main")
    assert "straight_threefry()" in ast.unparse(main)


def test_the_readme_quotes_the_scripts():
    quotes = (ROOT / "README.md").read_text().split("<!-- from ")[1:]
    assert len(quotes) >= 6
    for quote in quotes:
        script = quote.split(" -->")[0]
        code = quote.split("```python\n")[1].split("```")[0]
        source = (ROOT / script).read_text()
        if script.endswith(".patch"):  # of which a quote is what comes in
            source = re.sub(r"^\+", "", source, flags=re.MULTILINE)
        indented = (textwrap.indent(code, " " * width) for width in range(0, 20, 4))
        assert any(code in source for code in indented), f"{script} has no longer:\n{code}"


@pytest.mark.parametrize("script", NAMES)
def test_the_script_metadata_lists_the_requirements(script):
    # What `uv run` installs is the run-time part of requirements.txt.
    text = (ROOT / "requirements.txt").read_text().split("# tests")[0]
    wanted = [line.split("#")[0].strip() for line in text.splitlines()]
    block = (ROOT / f"{script}.py").read_text().split("# /// script\n")[1]
    assert block.endswith("# ]\n# ///\n")
    assert re.findall(r'^#     "(.*)",$', block, re.MULTILINE) == [x for x in wanted if x]
