"""The blocks of docs/recipes.md do what the text around them says."""

import contextlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import jax
import matplotlib.pyplot
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import ppo_discrete

RECIPES = (ROOT / "docs" / "recipes.md").read_text()
EXAMPLE = r"runs/[A-Za-z]+-\w+__ppo_discrete__0__20261121-120000"


def block(name, language="python"):
    """The fenced block below the mark with this name."""
    text = RECIPES.split(f"<!-- {name} -->\n```{language}\n")[1]
    return text.split("```\n")[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, environment):
    """The directory of a short run of two seeds that has ended."""
    folder = tmp_path_factory.mktemp("trained")
    flags = "--env-id Catch-bsuite --num-seeds 2 --num-envs 4 --num-steps 32 --hidden-sizes 16"
    command = [sys.executable, str(ROOT / "ppo_discrete.py"), *flags.split()]
    command += ["--total-timesteps", "12800", "--normalize-obs"]
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True)
    (run,) = (folder / "runs").iterdir()
    return run


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Execute a block in an empty folder, with other texts in the places of some: its names."""

    def execute(code, *changes):
        monkeypatch.chdir(tmp_path)
        matplotlib.pyplot.switch_backend("agg")
        monkeypatch.setattr("matplotlib.pyplot.switch_backend", lambda _: None)  # to a window
        for pattern, text in changes:
            code, count = re.subn(pattern, text.replace("\\", r"\\"), code)
            assert count == 1, pattern
        names = {}
        exec(compile(code, "docs/recipes.md", "exec"), names)
        return names

    return execute


# ---- See the agent ----


def test_the_episode_becomes_a_picture(trained, execute, tmp_path):
    names = execute(block("watch"), (EXAMPLE, str(trained)))
    # Catch lasts nine steps; what is played is what `evaluate` plays.
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
    # The ball falls a row in each step: every frame differs from that before.
    assert all(np.abs(a - b).max() > 50 for a, b in itertools.pairwise(frames))


def test_brax_draws_a_picture(monkeypatch, tmp_path):
    monkeypatch.setenv("MUJOCO_GL", "egl")  # before MuJoCo is imported
    envs = pytest.importorskip("brax.envs")
    env = envs.get_environment("hopper", backend="spring")
    state = jax.jit(env.reset)(jax.random.key(0)).pipeline_state
    flat = state.replace(q=state.q.at[1].add(-1.0))
    monkeypatch.chdir(tmp_path)
    exec(compile(block("brax"), "docs/recipes.md", "exec"), {"seen": [state] * 4 + [flat]})
    with Image.open(tmp_path / "episode.gif") as picture:
        assert picture.n_frames == 2 and picture.size == (240, 160)


# ---- Follow the curves ----


METRICS = """seed,update,env_step,episodic_return,clip_fraction
3,1,64,,0.25
4,1,64,12.5,0.5
3,2,128,20,0
4,2,128,,0.125
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
    run = tmp_path / "runs" / "CartPole-v1__ppo_discrete__0__20261121-120000"
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
    command, tensorboard = block("tail", "sh").split("&\n")
    assert tensorboard == "tensorboard --logdir runs\n"
    code = block("follow").replace("flush_secs=5", "flush_secs=0.1")
    run, process = start(command, code)
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


def test_tensorboard_reads_a_run_that_has_ended(start):
    pytest.importorskip("tensorboardX")
    run, process = start("sleep 0.1\n" + block("read", "sh"), block("follow"))
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
    run, process = start("sleep 0.1\n" + block("read", "sh"), code)
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
    states, earlier, metrics = names["states"], names["earlier"], names["metrics"]
    # The statistics go on, Adam does not.
    np.testing.assert_allclose(earlier.return_stats.count, 12_800, rtol=1e-4)
    np.testing.assert_allclose(states.return_stats.count, 25_600, rtol=1e-4)
    np.testing.assert_allclose(states.obs_stats.count, 25_600, rtol=1e-4)
    np.testing.assert_array_equal(states.updates_done, 100)
    np.testing.assert_allclose(metrics["learning_rate"][:, 0], 1e-3, rtol=1e-6)
    # A policy that knows nothing catches one ball in five, and returns -0.6.
    assert (metrics["episodic_return"][:, :5].mean(axis=1) > 0.5).all()


def test_a_resumed_run_keeps_its_budget(trained, monkeypatch):
    arguments = ["--resume", str(trained), "--total-timesteps", "1000000"]
    monkeypatch.setattr(sys, "argv", ["ppo_discrete.py", *arguments])
    with pytest.raises(ppo_discrete.Failure) as failure:
        ppo_discrete.parse_flags()
    expected = re.sub(EXAMPLE, str(trained), block("resume", "")).replace("500000", "12800")
    assert f"error: {failure.value}\n" == expected


# ---- Evaluate while training ----


def test_evaluation_while_training(execute, tmp_path, keys):
    changes = (r"100_000", "32_768"), (r"arange\(8\)", "arange(2)"), (r"= 4, ", "= 1, ")
    names = execute(block("evaluate"), *changes)
    greedy, training = (np.asarray(curve) for curve in names["curves"])
    assert greedy.shape == training.shape == (2, 16)
    # The training is that of `train`; later both round otherwise, and part.
    train = jax.vmap(lambda key: ppo_discrete.train(names["config"], key)[1]["episodic_return"])
    expected = np.asarray(jax.jit(train)(keys(2)))
    np.testing.assert_allclose(training[:, :2], expected[:, :2], rtol=1e-4)
    # Without its noise the policy is better; at first it would fall after nine steps. (`nanmean`:
    # in an update during which no episode ended, the training's mean return is NaN.)
    assert (greedy.mean(axis=1) > 1.2 * np.nanmean(training, axis=1)).all()
    assert (greedy[:, -1] > 100).all()
    with Image.open(tmp_path / "evaluation.png") as picture:
        assert picture.size == (640, 480)
