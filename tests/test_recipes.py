"""The blocks of docs/recipes.md do what the text around them says."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import gymnax
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import ppo_continuous
import ppo_discrete
import ppo_penalty
import trpo

SCRIPTS = [ppo_discrete, ppo_continuous, ppo_penalty, trpo]
RECIPES = (ROOT / "docs" / "recipes.md").read_text()
EXAMPLE = r"runs/[A-Za-z]+-\w+__ppo_discrete__0__20261121-120000-4242"


def block(name, language="python"):
    """The fenced block below the mark with this name."""
    text = RECIPES.split(f"<!-- {name} -->\n```{language}\n")[1]
    return text.split("```\n")[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short run of two seeds that has ended."""
    folder = tmp_path_factory.mktemp("trained")
    flags = "--env-id Catch-bsuite --num-seeds 2 --num-envs 4 --num-steps 32 --hidden-sizes 16"
    flags += " --total-timesteps 12800 --learning-rate 1e-3 --normalize-obs"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(sys, "argv", ["ppo_discrete.py", *flags.split()])
        ppo_discrete.run(ppo_discrete.parse_flags())
    (run,) = (folder / "runs").iterdir()
    return run


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Execute a block in an empty folder, after replacing some texts. Returns its variables."""

    def execute(code, *changes):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [*sys.path])
        matplotlib.use("agg")
        for pattern, text in changes:
            code, count = re.subn(pattern, text.replace("\\", r"\\"), code)
            assert count == 1, pattern
        names = {}
        exec(compile(code, "docs/recipes.md", "exec"), names)
        return names

    return execute


# ---- Which environment, how ----


def test_the_table_of_environments(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import environments

    optional = (ROOT / "benchmarks" / "requirements.txt").read_text()
    rows = RECIPES.split("<!-- environments -->\n")[1].split("\n\n")[0].splitlines()[2:]
    scripts = {script.SCRIPT: script for script in SCRIPTS}
    for row in rows:
        name, env_id = re.search(r"`python (\w+)\.py --env-id (\S+)`", row).groups()
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--env-id", env_id])
        assert scripts[name].parse_flags().config.env_id == env_id
        module, _, last = env_id.rpartition(":")
        assert module in ("", "point", "environments")
        if not module:
            assert last in gymnax.registered_envs
        if module == "environments":
            assert last.rpartition("-")[2] in environments.ADAPTERS
            assert re.search(r'pip install "(\S+)"', row)[1] in optional
    assert len(rows) == 5


# ---- Load a trained agent ----


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.SCRIPT)
def test_an_agent_is_loaded(script, execute, tmp_path):
    # `load_run` returns the initial state of a run that has no checkpoint.
    config = script.Config(num_seeds=2, num_envs=4, num_steps=16, hidden_sizes=(8,))
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    changes = (EXAMPLE, str(tmp_path)), ("import ppo_discrete", f"import {script.SCRIPT}")
    names = execute(block("load"), *changes)
    assert names["updates_done"] == 0 and names["config"] == config
    action = names["action"]
    if script is ppo_continuous:
        action = script.bound_action(action, names["env"].action_space)
    assert action.shape == (1, *names["env"].action_space.shape)


# ---- See the agent ----


def test_the_episode_becomes_a_picture(trained, execute, tmp_path):
    names = execute(block("watch"), (EXAMPLE, str(trained)))
    # An episode of Catch has nine steps, and `evaluate` plays the same ones.
    assert len(names["seen"]) == 9 and len(names["rewards"]) == 9
    state = names["state"]
    returns, lengths = ppo_discrete.evaluate(names["config"], state, jax.random.key(0), 20)
    assert (lengths == 9).all() and float(sum(names["rewards"])) in np.asarray(returns)
    with Image.open(tmp_path / "episode.gif") as picture:
        assert picture.n_frames == 9 and picture.size == (300, 250)
        frames = []
        for frame in range(9):
            picture.seek(frame)
            frames.append(np.asarray(picture.convert("L"), float)[40:])  # below the title
    # The ball falls by one row in each step, so every frame differs from the one before.
    assert all(np.abs(a - b).max() > 50 for a, b in itertools.pairwise(frames))


# ---- Follow the curves ----


RUN, FOLLOW = block("tail", "sh").splitlines(keepends=True)
READ = RUN + re.search(r"`(python follow.py .* < .*)`", RECIPES)[1]
METRICS = """seed,update,env_step,episodic_return,clip_fraction
3,1,64,nan,0.25
4,1,64,12.5,0.5
3,2,128,20,0
4,2,128,nan,0.125
"""
SEEN = {  # of each seed: tag, step and value
    "3": {
        ("losses/clipfrac", 64, 0.25),
        ("charts/episodic_return", 128, 20.0),
        ("losses/clipfrac", 128, 0.0),
    },
    "4": {
        ("charts/episodic_return", 64, 12.5),
        ("losses/clipfrac", 64, 0.5),
        ("losses/clipfrac", 128, 0.125),
    },
}


@pytest.fixture
def start(tmp_path):
    """Start a shell block in a folder that has follow.py, and a run without rows."""
    run = tmp_path / "runs" / "CartPole-v1__ppo_discrete__0__20261121-120000-4242"
    run.mkdir(parents=True)
    (run / "metrics.csv").touch()
    started = []

    def start(command, code):
        (tmp_path / "follow.py").write_text(code)
        command = command.replace("python", shlex.quote(sys.executable))
        # A group of its own, which can be ended as a whole.
        process = subprocess.Popen(["bash", "-c", command], cwd=tmp_path, start_new_session=True)
        started.append(process)
        return run, process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def events(run):
    """What TensorBoard reads below a run, as `SEEN` has it."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in run.glob("seed_*/events.*"):
        seen, data = found.setdefault(path.parent.name[5:], set()), path.read_bytes()
        while len(data) >= 12:  # length, its checksum, the event, its checksum
            length = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            seen |= {(x.tag, event.step, x.simple_value) for x in event.summary.value}
    return {seed: seen for seed, seen in found.items() if seen}


def test_tensorboard_follows_a_run(start):
    pytest.importorskip("tensorboardX")
    code = block("follow").replace("flush_secs=5", "flush_secs=0.1")
    run, process = start(RUN + FOLLOW, code)
    half = METRICS.index("12.5") + 2  # in the middle of a number
    first = {"3": {("losses/clipfrac", 64, 0.25)}}
    for text, expected in ((METRICS[:half], first), (METRICS[half:], SEEN)):
        with (run / "metrics.csv").open("a") as file:
            file.write(text)
        found, deadline = None, time.monotonic() + 60
        while found != expected and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
            found = events(run)
        assert found == expected
    # Ctrl-C ends all processes of the pipeline.
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    deadline = time.monotonic() + 60
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_tensorboard_reads_a_run_that_has_ended(start):
    pytest.importorskip("tensorboardX")
    run, process = start("sleep 0.1\n" + READ, block("follow"))
    (run / "metrics.csv").write_text(METRICS)
    assert process.wait(60) == 0
    assert events(run) == SEEN


STAND_IN = """
import json

class Run:
    def __init__(self, **about):
        self.about = about

    def log(self, values, step):
        (item,) = values.items()
        with open("log.jsonl", "a") as file:
            print(json.dumps([self.about, item[0], step, item[1]]), file=file)

init = Run
"""


def test_three_lines_make_it_weights_and_biases(start, tmp_path):
    # A stand-in, which keeps what it is given: the package wants an account.
    (tmp_path / "wandb.py").write_text(STAND_IN)
    lines = block("wandb", "diff").splitlines()
    code = block("follow")
    for old, new in zip(lines[::2], lines[1::2], strict=True):
        assert (old[0], new[0], code.count(old[1:])) == ("-", "+", 1)
        code = code.replace(old[1:], new[1:])
    run, process = start("sleep 0.1\n" + READ, code)
    (run / "metrics.csv").write_text(METRICS)
    assert process.wait(60) == 0
    found = {}
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        about, *value = json.loads(line)
        assert about["group"] == run.name and about["reinit"] == "create_new"
        found.setdefault(about["name"].removeprefix("seed "), set()).add(tuple(value))
    assert found == SEEN


# ---- Continue from a policy ----


def test_a_run_begins_with_the_policy_of_another(trained, execute):
    names = execute(block("continue"), (EXAMPLE, str(trained)), ("200_000", "12_800"))
    state, earlier, returns = names["state"], names["earlier"], names["returns"]
    # The statistics continue.
    np.testing.assert_allclose(earlier.reward_stats.count, 12_800, rtol=1e-4)
    np.testing.assert_allclose(state.reward_stats.count, 25_600, rtol=1e-4)
    np.testing.assert_allclose(state.obs_stats.count, 25_600, rtol=1e-4)
    assert names["config"].learning_rate == pytest.approx(1e-3 / 3)
    assert returns.shape == (2, 100)
    # A policy that knows nothing catches one ball in five, and returns -0.6.
    assert (np.nanmean(returns[:, :5], axis=1) > 0.5).all()


def test_a_resumed_run_keeps_its_budget(trained, monkeypatch):
    arguments = ["--resume", str(trained), "--total-timesteps", "1000000"]
    monkeypatch.setattr(sys, "argv", ["ppo_discrete.py", *arguments])
    with pytest.raises(ppo_discrete.UserError, match="a resumed run keeps its hyperparameters"):
        ppo_discrete.parse_flags()


# ---- Sweep a hyperparameter ----


def floats_of(config):
    """The names of the hyperparameters that are floats, or floats or None."""
    return [field.name for field in dataclasses.fields(config) if "float" in str(field.type)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.SCRIPT)
def test_floats_can_be_vmapped(script):
    config = script.Config(num_envs=4, num_steps=16, hidden_sizes=(8,), total_timesteps=64)
    values = {name: jnp.full(3, getattr(config, name) or 0.01) for name in floats_of(config)}

    def run(values):
        return script.train(dataclasses.replace(config, **values), jax.random.key(0))

    _, metrics = jax.eval_shape(jax.vmap(run), values)
    assert metrics["value_loss"].shape == (3, 1)


def test_all_floats_are_named():
    paragraph = RECIPES.split("<!-- floats -->\n")[1].split("\n\n")[0]
    named = re.findall(r"`(\w+)`", paragraph)
    assert sorted(named) == sorted(
        {name for script in SCRIPTS for name in floats_of(script.Config)}
    )


# ---- Evaluate while training ----


def test_evaluation_while_training(execute, tmp_path):
    changes = (r"total_timesteps=100_000", "total_timesteps=32_768, num_seeds=2"), ("= 4 ", "= 1 ")
    names = execute(block("evaluate"), *changes)
    greedy, training = (np.asarray(curve) for curve in names["curves"])
    assert greedy.shape == training.shape == (2, 16)
    # The greedy policy is better than the exploring one. (`nanmean`: in an update during which no
    # episode ended, the training's mean return is NaN.)
    assert (greedy.mean(axis=1) > 1.1 * np.nanmean(training, axis=1)).all()
    assert (greedy[:, -1] > 100).all()
    with Image.open(tmp_path / "evaluation.png") as picture:
        assert picture.size == (640, 480)


# ---- When it does not learn ----


def test_the_symptoms_are_those_of_the_picture(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import figures

    rows = RECIPES.split("| symptom in `metrics.csv` |")[1].split("\n\n")[0].splitlines()[2:]
    cells = [row.split(" | ") for row in rows]
    assert [command.strip("`") for _, command, *_ in cells] == [x[2] for x in figures.SYMPTOMS]
    for (symptom, *_), (_, column, _) in zip(cells, figures.SYMPTOMS, strict=True):
        assert f"`{column}`" in symptom
