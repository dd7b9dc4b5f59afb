"""The scripts as a user runs them: in a subprocess, from an empty folder."""

import csv
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT

import ppo_discrete

SCRIPTS = {  # and the environment that each trains on by default
    "ppo_discrete": "CartPole-v1",
    "ppo_continuous": "Pendulum-v1",
    "ppo_penalty": "CartPole-v1",
    "trpo": "CartPole-v1",
}
OWN_METRICS = {
    "ppo_discrete": {"policy_loss", "approx_kl", "clip_fraction"},
    "ppo_continuous": {"policy_loss", "approx_kl", "clip_fraction"},
    "ppo_penalty": {"policy_loss", "kl", "beta"},
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
    monkeypatch.setattr(
        ppo_discrete.Figure, "savefig", lambda figure, *_, **__: figures.append(figure)
    )
    ppo_discrete.plot_learning_curve(tmp_path, ppo_discrete.Config(num_seeds=2))
    (axes,) = figures[0].axes
    mean = axes.lines[-1]
    np.testing.assert_array_equal(mean.get_xydata(), [[64, 2], [192, 5]])
    # Student's t of two seeds, 12.706, times their standard error, 1; one seed has no interval.
    ((band,),) = [collection.get_paths() for collection in axes.collections]
    np.testing.assert_allclose(band.get_extents().get_points(), [[64, -10.706], [64, 14.706]], 1e-4)


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
        often = path.read_text().replace("CHECKPOINT_SECONDS = 30", "CHECKPOINT_SECONDS = 0")
        path.write_text(often)
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
    assert not (run_dir / "checkpoints" / "0").exists(), "no later checkpoint was written"

    code, _, errors = run("--resume", run_dir.relative_to(tmp_path))
    assert code == 0, errors
    for name in ("metrics.csv", "evaluation.csv"):
        expected = (uninterrupted(script)[0] / name).read_bytes()
        assert (run_dir / name).read_bytes() == expected


def test_a_run_killed_before_its_first_checkpoint_starts_again(start, run, tmp_path, uninterrupted):
    process = start(*LONG)
    run_dir = wait_for_run(tmp_path, process)
    wait_for_update(run_dir, 60, process)
    process.kill()
    process.communicate()
    assert (run_dir / "checkpoints" / "0").exists() and (run_dir / "metrics.csv").stat().st_size
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
    assert re.search(r"the (policy|value)_loss of seed \d is not finite in update \d+", errors)
    assert "Traceback" not in errors
    checkpoints = [path.name for path in (only_run(tmp_path) / "checkpoints").iterdir()]
    assert checkpoints == ["0"]


def test_the_first_value_that_is_not_finite_is_named():
    config = ppo_discrete.Config(seed=10)
    fine, weights = np.ones((3, 4)), np.array([True, True, True])
    losses = {"value_loss": fine.copy(), "cg_residual": fine.copy(), "kl": fine * np.nan}
    ppo_discrete.check_finite(config, 20, losses, weights)
    losses["value_loss"][0, 3] = np.nan
    losses["cg_residual"][2, 1] = np.inf
    with pytest.raises(FloatingPointError, match=r"the cg_residual of seed 12 .* in update 22$"):
        ppo_discrete.check_finite(config, 20, losses, weights)
    with pytest.raises(FloatingPointError, match=r"the weights of seed 11 .* after update 24$"):
        ppo_discrete.check_finite(config, 20, {"value_loss": fine}, weights & [True, False, True])


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 59.9)
    for second in ("000059", "000100"):
        run_dir, checkpoints, _, _ = ppo_discrete.open_run(ppo_discrete.Config(), None)
        checkpoints.close()
        assert run_dir.name == f"CartPole-v1__ppo_discrete__0__19700101-{second}"
        assert (run_dir / "config.json").exists()


BAD = {
    "unknown environment": (["--env-id", "cartpole"], "did you mean CartPole-v1"),
    "continuous actions": (["--env-id", "Pendulum-v1"], "use ppo_continuous.py"),
    "not divisible": (["--num-minibatches", 3], "num_minibatches = 3"),
    "zero": (["--num-envs", 0], "num_envs must be finite and positive"),
    "negative": (["--learning-rate", -1], "learning_rate must be finite and positive"),
    "not finite": (["--ent-coef", "nan"], "ent_coef must be finite"),
    "too few steps": (["--total-timesteps", 10], "less than one rollout"),
    "unknown flag": (["--lerning-rate", 1], "--learning-rate"),
    "missing run": (["--resume", "nowhere"], "cannot continue from nowhere/config.json"),
    "empty run": (["--resume", ""], "--resume needs the directory of a run"),
}


def is_refused(code, text, message):
    text = re.sub(r"[\s│]+", " ", text)
    assert code == 2 and message in text and "Traceback" not in text, text


@pytest.fixture
def main_refuses(tmp_path, monkeypatch, capsys):
    """Call `main` here, which costs less than a subprocess."""

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


def test_bad_run_directories(uninterrupted, main_refuses, tmp_path, script):
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted(script)[0], run_dir)
    before = (run_dir / "metrics.csv").read_bytes()

    def refused(message, *arguments):
        main_refuses(message, "--resume", run_dir, *arguments)
        assert (run_dir / "metrics.csv").read_bytes() == before

    refused("was started with learning_rate", "--learning-rate", 0.5)
    config = (run_dir / "config.json").read_text()
    (run_dir / "config.json").write_text(config.replace(script, "other"))
    refused("this is a run of other.py")
    (run_dir / "config.json").write_text(config.replace("num_envs", "number"))
    refused("cannot continue from")
    (run_dir / "config.json").write_text("[]")
    refused("cannot continue from")
    # Another network than the checkpoint's.
    wider = config.replace('"hidden_sizes": [\n    8', '"hidden_sizes": [\n    9')
    (run_dir / "config.json").write_text(wider)
    refused("missing or damaged")
    (run_dir / "config.json").write_text(config)
    for path in (run_dir / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    refused("missing or damaged")
    shutil.rmtree(run_dir / "checkpoints")
    refused("missing or damaged: none was written; start anew")


def test_an_unwritable_folder(run, tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    code, _, errors = run(*QUICK)
    assert code == 2 and "cannot write to" in errors and "Traceback" not in errors


def test_a_full_disk(start, tmp_path):
    # `ulimit` stands in for it: no file beyond 40 kB, which metrics.csv soon is.
    process = start(*LONG, before=["sh", "-c", 'ulimit -f 80; exec "$@"', "sh"])
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2 and "Traceback" not in errors
    assert "error: cannot write: [Errno 27] File too large" in errors and "--resume" in errors
    assert (only_run(tmp_path) / "checkpoints" / "0").exists()


def readme_block(name):
    readme = (ROOT / "README.md").read_text()
    return readme.split(f"<!-- {name} -->")[1].split("```python")[1].split("```")[0]


def test_the_readme_shows_how_to_load_a_checkpoint(uninterrupted, environment, script):
    run_dir, _ = uninterrupted(script)
    code = re.sub(r'"runs/[^"]*"', repr(str(run_dir)), readme_block("load"))
    code += "\nprint('action', action)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, text=True, capture_output=True
    )
    assert re.search(r"action \[[01]\]", result.stdout), result.stderr


def test_the_sweep_of_the_readme(tmp_path, environment):
    code = (
        readme_block("sweep").replace("100_000", "4096").replace("logspace(-4, -2, 5)", "ones(2)")
    )
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
