"""The scripts as a user runs them: in a subprocess, from an empty folder."""

import csv
import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT

import ppo_discrete
import trpo

SCRIPTS = {  # and the environment that each trains on by default
    "ppo_discrete": "CartPole-v1",
    "ppo_continuous": "Pendulum-v1",
    "ppo_penalty": "CartPole-v1",
    "trpo": "CartPole-v1",
}
OWN_METRICS = {
    "ppo_discrete": {"policy_loss", "approx_kl", "clip_fraction", "skipped"},
    "ppo_continuous": {"policy_loss", "approx_kl", "clip_fraction"},
    "ppo_penalty": {"policy_loss", "kl", "beta", "minibatch_kl", "skipped"},
    "trpo": {"kl", "surrogate_improvement", "step_accepted", "line_search_steps", "cg_residual"},
}
every_script = pytest.mark.parametrize("script", SCRIPTS, indirect=True)
QUICK = ["--num-seeds", "2", "--num-envs", "4", "--num-steps", "16", "--hidden-sizes", "8"]


@pytest.fixture
def script(request):
    """Name of the script: all of them with @every_script, else the first."""
    return getattr(request, "param", "ppo_discrete")


@pytest.fixture
def start(tmp_path, environment, script):
    """Start a copy of the script, alone in an empty folder, there."""
    shutil.copy(ROOT / f"{script}.py", tmp_path)

    started = []

    def run(*arguments, before=()):
        process = subprocess.Popen(
            [*before, sys.executable, f"{script}.py", *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        started.append(process)
        return process

    yield run
    end(started)


def end(processes):
    """Whatever the test came to, nothing goes on behind it."""
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def run(start):
    """Run it to its end: exit code, standard output, standard error."""

    def run(*arguments):
        process = start(*arguments)
        output, errors = process.communicate(timeout=300)
        return process.returncode, output, errors

    return run


def only_run(path):
    (run_dir,) = (path / "runs").iterdir()
    return run_dir


def wait_until(found, *processes):
    """Until `found` returns something, which comes back; fail if a process ends before that."""
    deadline = time.monotonic() + 300
    while not (result := found()):
        assert all(process.poll() is None for process in processes), "a process has ended"
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)
    return result


def wait_for_run(path, *processes):
    """Until there is the directory of the only run."""
    runs = path / "runs"
    wait_until(lambda: runs.exists() and any(runs.iterdir()), *processes)
    return only_run(path)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def wait_for_update(run_dir, update, *processes):
    """Until metrics.csv knows of an update."""

    def known():
        try:
            return int(rows_of(run_dir / "metrics.csv")[-1]["update"] or 0) >= update
        except (OSError, LookupError, TypeError, ValueError):
            return False  # it is not there yet, or was read while it was being written

    wait_until(known, *processes)


UPDATES = 2000  # enough to be interrupted in between
LONG = [*QUICK, "--seed", "3", "--total-timesteps", str(64 * UPDATES + 63)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, environment):
    """A long run that nothing disturbs, made once per script: its directory, and what it said."""

    @functools.cache
    def finished(script):
        folder = tmp_path_factory.mktemp("uninterrupted")
        command = [sys.executable, str(ROOT / f"{script}.py"), *LONG]
        process = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stderr
        return only_run(folder), process.stdout

    return finished


@every_script
def test_outputs(uninterrupted, script):
    run_dir, output = uninterrupted(script)
    assert re.fullmatch(rf"{SCRIPTS[script]}__{script}__3__\d{{8}}-\d{{6}}", run_dir.name)
    assert f"2 seeds x {UPDATES} updates x 64 steps" in output
    assert f"trained {2 * 64 * UPDATES:,} steps in" in output
    assert "compiled in" in output and "95 % bootstrap interval" in output
    config = json.loads((run_dir / "config.json").read_text())
    assert config["script"] == script and config["num_envs"] == 4
    assert config["format"] == 2 and not {"resume", "distributed"} & config.keys()

    rows = rows_of(run_dir / "metrics.csv")
    assert [(row["seed"], row["update"], row["env_step"]) for row in rows] == [
        (str(seed), str(update), str(64 * update))
        for update in range(1, UPDATES + 1)
        for seed in (3, 4)
    ]
    assert all(np.isfinite(float(row["value_loss"])) for row in rows)
    names = "episodic_return episodic_length value_loss entropy explained_variance learning_rate"
    assert {*rows[0]} == {"seed", "update", "env_step", *names.split(), *OWN_METRICS[script]}

    rows = rows_of(run_dir / "evaluation.csv")
    assert [(int(row["seed"]), int(row["episode"])) for row in rows] == [
        (seed, episode) for seed in (3, 4) for episode in range(100)
    ]
    if SCRIPTS[script] == "CartPole-v1":  # pays 1 per step
        assert all(float(row["episodic_return"]) == int(row["episodic_length"]) for row in rows)
    else:  # Pendulum lasts 200 steps and never pays
        assert {row["episodic_length"] for row in rows} == {"200"}
        assert all(-2000 < float(row["episodic_return"]) < 0 for row in rows)
    picture = matplotlib.image.imread(run_dir / "learning_curve.png")
    assert picture.shape[0] > 300 and picture.std() > 0.01


def test_each_row_is_of_its_own_seed(run, tmp_path, keys):
    assert run(*QUICK, "--seed", 3, "--total-timesteps", 64 * 6)[0] == 0
    config = ppo_discrete.Config(
        num_seeds=2, num_envs=4, num_steps=16, hidden_sizes=(8,), total_timesteps=64 * 6
    )
    _, metrics = jax.jit(jax.vmap(functools.partial(ppo_discrete.train, config)))(keys(5)[3:])
    rows = rows_of(only_run(tmp_path) / "metrics.csv")
    value_loss = np.array([float(row["value_loss"]) for row in rows]).reshape(6, 2)
    np.testing.assert_allclose(value_loss, metrics["value_loss"].T, rtol=1e-3)


@pytest.mark.filterwarnings("error")
def test_the_learning_curve_where_few_episodes_end(tmp_path, monkeypatch):
    rows = ["seed,env_step,episodic_return", "0,64,1", "1,64,3", "0,128,", "1,128,", "0,192,5"]
    (tmp_path / "metrics.csv").write_text("\n".join([*rows, "1,192,"]) + "\n")
    figures = []
    keep = lambda figure, *_, **__: figures.append(figure)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    ppo_discrete.plot_learning_curve(tmp_path, ppo_discrete.Config(num_seeds=2))
    (axes,) = figures[0].axes
    mean = axes.lines[-1]
    np.testing.assert_array_equal(mean.get_xydata(), [[64, 2], [192, 5]])
    # Student's t of two seeds, 12.706, times their standard error, 1; one seed has no interval.
    ((band,),) = [collection.get_paths() for collection in axes.collections]
    np.testing.assert_allclose(band.get_extents().get_points(), [[64, -10.706], [64, 14.706]], 1e-4)


def every_time(path, seconds):
    """Let a copy of a script write checkpoints at this distance."""
    text = path.read_text()
    changed = text.replace("\nCHECKPOINT_SECONDS = 30", f"\nCHECKPOINT_SECONDS = {seconds}")
    assert changed != text
    path.write_text(changed)


def checkpoints_of(run_dir):
    """The updates of the complete ones."""
    folder = run_dir / "checkpoints"
    return [int(x.name) for x in folder.glob("*") if x.name.isdigit()]


@pytest.mark.parametrize(
    "script, number",
    [
        ("ppo_discrete", signal.SIGINT),
        ("ppo_continuous", signal.SIGTERM),
        ("ppo_penalty", signal.SIGKILL),
        ("trpo", signal.SIGKILL),
    ],
    indirect=["script"],
)
def test_an_interrupted_run_resumes_to_the_same_bits(
    script, number, start, run, tmp_path, uninterrupted
):
    if number == signal.SIGKILL:  # write checkpoints all the time, so that it hits one of them
        path = tmp_path / f"{script}.py"
        every_time(path, 0)
    process = start(*LONG)
    run_dir = wait_for_run(tmp_path, process)
    wait_for_update(run_dir, 300, process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number, errors
        assert f"--resume {run_dir.relative_to(tmp_path)}" in output
        assert (run_dir / "learning_curve.png").exists()
        assert "stopping after this segment" in errors and "Traceback" not in errors
    assert len(rows_of(run_dir / "metrics.csv")) < 2 * UPDATES, "it was not interrupted"
    assert len(checkpoints_of(run_dir)) >= 1, "no checkpoint was written"

    code, _, errors = run("--resume", run_dir.relative_to(tmp_path))
    assert code == 0, errors
    for name in ("metrics.csv", "evaluation.csv"):
        expected = (uninterrupted(script)[0] / name).read_bytes()
        assert (run_dir / name).read_bytes() == expected


def test_what_came_after_the_last_checkpoint_is_done_again(start, run, tmp_path, uninterrupted):
    every_time(tmp_path / "ppo_discrete.py", 3000)
    process = start(*LONG)
    run_dir = wait_for_run(tmp_path, process)
    wait_for_update(run_dir, 60, process)
    process.kill()
    process.communicate()
    assert checkpoints_of(run_dir) == [20]  # of the first segment
    assert int(rows_of(run_dir / "metrics.csv")[-1]["update"]) >= 60
    code, _, errors = run("--resume", run_dir.relative_to(tmp_path))
    assert code == 0, errors
    for name in ("metrics.csv", "evaluation.csv"):
        expected = (uninterrupted("ppo_discrete")[0] / name).read_bytes()
        assert (run_dir / name).read_bytes() == expected


def test_a_loss_that_is_not_finite_stops_the_run(run, tmp_path):
    code, _, errors = run(
        *QUICK, "--total-timesteps", 6400, "--learning-rate", 1e38, "--max-grad-norm", 1e38
    )
    assert code == 1
    found = re.search(r"error: a (loss|weight) of seed \d in update (\d+) is not finite", errors)
    assert found and "try a lower --learning-rate" in errors and "Traceback" not in errors
    # The rows that show it are there, and no checkpoint is.
    rows = rows_of(only_run(tmp_path) / "metrics.csv")
    assert int(rows[-1]["update"]) >= int(found[2]) and checkpoints_of(only_run(tmp_path)) == []


def test_the_first_value_that_is_not_finite_is_named():
    # The causes are of observations, rewards, losses and weights, in this order.
    names = ["an observation", "a reward", "a loss", "a weight"]

    def train(*broken):
        """Five updates after the 20th, of three seeds from 10 on; where something is broken."""
        finite = np.ones((3, 5, 4), bool)
        for place in broken:
            finite[place] = False
        config = ppo_discrete.Config(seed=10, num_seeds=3, total_timesteps=2048 * 25)
        rows, saved = [], []
        run = SimpleNamespace(config=config, done=20, state="before")
        run.append, run.save = rows.append, lambda force: saved.append((run.done, force))
        metrics = {"episodic_return": np.full((3, 5), np.nan)}  # may be NaN
        try:
            end = ppo_discrete.train_in_segments(run, lambda _: ("after", (metrics, finite)), 5)
        finally:
            assert len(rows) == 1 and saved == ([] if broken else [(25, True)])
        assert (end, run.done, run.state) == (0, 25, "after")

    train()
    for cause, name in enumerate(names):
        message = rf"{name} of seed 12 in update 23 is not finite, .*metrics\.csv"
        with pytest.raises(ppo_discrete.Failure, match=message) as failure:
            train((2, 2, cause))
        assert failure.value.code == 1
    # The earliest update counts, of one update the first seed, of this one the first cause.
    for broken, message in [
        ([(0, 3, 0), (2, 1, 3)], "a weight of seed 12 in update 22 "),
        ([(1, 3, 0), (0, 3, 2)], "a loss of seed 10 in update 24 "),
        ([(1, 0, 3), (1, 0, 1)], "a reward of seed 11 in update 21 "),
    ]:
        with pytest.raises(ppo_discrete.Failure, match=message):
            train(*broken)


def test_what_is_not_finite_is_found(keys, monkeypatch):
    # In the second of two seeds, in the place where it is.
    config = ppo_discrete.Config(num_envs=4, num_steps=16, hidden_sizes=(8,), total_timesteps=128)
    init, update = ppo_discrete.make_train(config)

    def finite(update=update, **change):
        states = jax.jit(jax.vmap(init))(keys(jax.device_count() * 2))
        run_segment, length = ppo_discrete.compile_segment(config, update, states)
        assert length == 1
        return np.asarray(run_segment(states)[1][1])[:, 0]  # [seeds, causes]

    def broken(change):
        def wrong(state, _):
            new, metrics = update(state, None)
            return change(new, metrics, jax.random.key_data(state.key)[-1])

        return finite(wrong)

    assert finite().all()
    second = jax.jit(jax.vmap(init))(keys(2)).key[1]
    mark = int(jax.random.key_data(second)[-1])
    nan = lambda x, word: jax.numpy.where(word == mark, np.nan, x)
    changes = [
        lambda s, m, word: (s._replace(obs=nan(s.obs, word)), m),
        lambda s, m, word: (
            s._replace(episode=s.episode._replace(discounted=nan(s.episode.discounted, word))),
            m,
        ),
        lambda s, m, word: (s, m | {"approx_kl": nan(m["approx_kl"], word)}),
        lambda s, m, word: (s._replace(params=jax.tree.map(lambda x: nan(x, word), s.params)), m),
    ]
    for cause, change in enumerate(changes):
        expected = np.ones((jax.device_count() * 2, 4), bool)
        expected[1, cause] = False
        np.testing.assert_array_equal(broken(change), expected)


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 59.9)
    for second in ("000059", "000100"):
        run_dir = Path(ppo_discrete.create_run(ppo_discrete.Config()))
        assert run_dir.name == f"CartPole-v1__ppo_discrete__0__19700101-{second}"
        assert (run_dir / "config.json").exists()


BAD = {
    "unknown environment": (["--env-id", "cartpole"], "did you mean CartPole-v1"),
    "continuous actions": (["--env-id", "Pendulum-v1"], "use ppo_continuous.py"),
    "missing module": (["--env-id", "no.such:thing"], "there is no module 'no.such'"),
    "not divisible": (["--num-minibatches", 3], "num_minibatches = 3"),
    "zero": (["--num-envs", 0], "num_envs must be from more than 0"),
    "negative": (["--learning-rate", -1], "learning_rate must be from more than 0"),
    "not finite": (["--ent-coef", "nan"], "ent_coef must be from 0 to"),
    "too few steps": (["--total-timesteps", 10], "total_timesteps must be at least"),
    "unknown flag": (["--lerning-rate", 1], "--learning-rate"),
    "missing run": (["--resume", "nowhere"], "nowhere has no configuration of a run"),
    "empty run": (["--resume", ""], "has no configuration of a run"),
}


def is_refused(code, text, message):
    text = re.sub(r"[\s│]+", " ", text)
    assert code == 2 and message in text and "Traceback" not in text, text


@pytest.fixture
def main_refuses(tmp_path, monkeypatch, capsys):
    """Call `main` here, which costs less than a subprocess, without its effects on JAX."""
    monkeypatch.setattr(ppo_discrete, "straight_threefry", lambda: None)
    monkeypatch.setattr(ppo_discrete, "use_cores", lambda _: None)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def refuses(message, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["ppo_discrete.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            ppo_discrete.main()
        said = capsys.readouterr()
        is_refused(end.value.code, said.out + said.err, message)

    return refuses


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_message(case, main_refuses, tmp_path):
    arguments, message = BAD[case]
    main_refuses(message, *arguments)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("case", ["unknown environment", "unknown flag"])
def test_bad_input_of_a_user(case, run, tmp_path):
    arguments, message = BAD[case]
    code, output, errors = run(*arguments)
    is_refused(code, output + errors, message)
    assert not (tmp_path / "runs").exists()


def test_bad_run_directories(uninterrupted, main_refuses, monkeypatch, tmp_path, script):
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted(script)[0], run_dir)
    metrics, config = run_dir / "metrics.csv", run_dir / "config.json"
    before, stored = metrics.read_bytes(), config.read_text()

    def refused(message, *arguments, written=None):
        config.write_text(stored if written is None else written)
        now = metrics.read_bytes()
        main_refuses(message, "--resume", run_dir, *arguments)
        assert metrics.read_bytes() == now

    refused("was started with learning_rate", "--learning-rate", 0.5)
    theirs = json.dumps(dict(format=2, script="trpo", **dataclasses.asdict(trpo.Config())))
    refused("is a run of trpo.py", written=theirs)
    refused("format 1", written=stored.replace('"format": 2,', ""))  # the first edition
    refused("has an unknown number", written=stored.replace("num_envs", "number"))
    refused("no configuration of a run", written="[]")
    refused("no configuration of a run", written=stored[:-20])
    refused("config.json lacks", written=re.sub(r'\n *"num_envs": \d+,', "", stored))
    refused("num_envs must be", written=stored.replace('"num_envs": 4', '"num_envs": 0'))
    # Another network than the checkpoint's.
    wider = stored.replace('"hidden_sizes": [\n    8', '"hidden_sizes": [\n    9')
    assert wider != stored
    refused("not this run's", written=wider)
    # Another optimizer than the checkpoint's, as in a copy that was changed since.
    with monkeypatch.context() as changed:
        changed.setattr(ppo_discrete, "packed", lambda optimizer, config: optimizer)
        refused("or of another ppo_discrete.py")
    # Rows that the checkpoint does not know, a row too few, another number.
    metrics.write_bytes(before[:-10])
    refused("changed since the checkpoint")
    metrics.write_bytes(before.replace(b"\n3,1,64,", b"\n3,1,65,"))
    refused("changed since the checkpoint")
    metrics.write_bytes(before)
    for path in (run_dir / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    refused("is damaged")


def test_an_unwritable_folder(run, tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    code, _, errors = run(*QUICK)
    assert code == 2 and "error: cannot write: " in errors and "Traceback" not in errors


def test_a_full_disk(start, tmp_path):
    # `ulimit` stands in for it: no file beyond 40 kB, which metrics.csv soon is.
    process = start(*LONG, before=["sh", "-c", 'ulimit -f 80; exec "$@"', "sh"])
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2 and "Traceback" not in errors
    assert "error: cannot write: [Errno 27] File too large" in errors
    assert (only_run(tmp_path) / "metrics.csv").stat().st_size <= 80 * 512


def block(name, document="README.md"):
    """The Python block below the mark with this name."""
    text = (ROOT / document).read_text()
    return text.split(f"<!-- {name} -->")[1].split("```python")[1].split("```")[0]


def test_the_recipe_loads_a_checkpoint(uninterrupted, environment, script):
    run_dir, _ = uninterrupted(script)
    code = re.sub(r'"runs/[^"]*"', repr(str(run_dir)), block("load", "docs/recipes.md"))
    code += "\nprint('action', action)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, text=True, capture_output=True
    )
    assert re.search(r"action \[[01]\]", result.stdout), result.stderr


def test_the_sweep_of_the_readme(tmp_path, environment):
    code = block("sweep").replace("100_000", "4096").replace("logspace(-4, -2, 5)", "ones(2)")
    code = code.replace("jax.random.key(0), 8)", "jax.random.key(0), 3)")
    code += "\nassert returns.shape == (2, 3, 2), returns.shape\nprint(rates[0] == rates[1])"
    path = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": os.pathsep.join(path), "MPLBACKEND": "agg"},
        check=True,
    )
    assert (tmp_path / "sweep.png").exists()


def test_the_environment_of_the_readme(run, tmp_path):
    (tmp_path / "point.py").write_text(block("environment"))
    flags = ["--num-seeds", 2, "--total-timesteps", 40_960]
    code, _, errors = run("--env-id", "point:any", *flags)
    assert code == 0, errors
    rows = rows_of(only_run(tmp_path) / "evaluation.csv")
    assert {row["episodic_length"] for row in rows} == {"20"}
    # It begins .8 away on average: to stay there costs 16, to walk home about 2.5.
    assert np.mean([float(row["episodic_return"]) for row in rows]) > -4
