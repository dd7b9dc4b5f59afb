"""The promises of the command line: its files, its messages, and how it resumes."""

import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT
from kill_and_resume import (
    FLAGS,
    ROWS,
    command,
    count_rows,
    kill_and_resume,
    only_run,
    read_files,
    wait_for_rows,
)

import ppo_continuous
import ppo_discrete
import ppo_penalty
import trpo

QUICK = ["--num-seeds", 3, "--num-envs", 4, "--num-steps", 16, "--hidden-sizes", 8]
QUICK += ["--update-epochs", 2, "--num-minibatches", 2]  # TRPO uses these for its critic
ALL_METRICS = {"episodic_return", "episodic_length", "value_loss", "entropy", "explained_variance"}
METRICS = {
    ppo_discrete: {"policy_loss", "approx_kl", "clip_fraction", "stopped"},
    ppo_continuous: {"policy_loss", "approx_kl", "clip_fraction", "stopped"},
    ppo_penalty: {"policy_loss", "kl", "beta"},
    trpo: {"kl", "surrogate_improvement", "step_accepted"},
}


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def main(tmp_path, monkeypatch, capsys):
    """Call the `main` of a script in an empty folder. Returns its exit code and all its output. An
    exception that would show the user a traceback fails the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = jax.config.jax_compilation_cache_dir

    def main(*arguments, script=ppo_discrete):
        monkeypatch.setattr(sys, "argv", [f"{script.SCRIPT}.py", *map(str, arguments)])
        monkeypatch.setattr(script, "use_cores", lambda num_seeds: None)  # JAX has started
        code = 0
        try:
            script.main()
        except SystemExit as end:
            code = end.code
        return code, "".join(capsys.readouterr())

    yield main
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def quick(environment):
    """Environment variables for subprocesses that compile as quickly as these tests do."""
    return {**environment, "XLA_FLAGS": os.environ["XLA_FLAGS"]}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, quick):
    """The folder of a process that nothing interrupted, and its output. Python showed all warnings,
    and those about files that are not closed were errors."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    shutil.copy(ROOT / "ppo_discrete.py", folder)
    python, *program = command("ppo_discrete", *FLAGS)
    arguments = [python, "-W", "error::ResourceWarning", *program]
    options = dict(check=True, capture_output=True, text=True, cwd=folder, env=quick)
    process = subprocess.run(arguments, **options)
    return SimpleNamespace(folder=folder, output=process.stdout + process.stderr)


@pytest.fixture
def folder(uninterrupted, tmp_path):
    """An empty folder with a copy of the script that `uninterrupted` ran."""
    shutil.copy(uninterrupted.folder / "ppo_discrete.py", tmp_path)
    return tmp_path


# ---- What a run writes ---------------------------------------------------------------------------


@pytest.mark.parametrize("script", METRICS, ids=lambda script: script.SCRIPT)
def test_the_files_of_a_run(script, main, tmp_path):
    code, output = main(*QUICK, "--seed", 3, "--total-timesteps", 64 * 4 + 63, script=script)
    assert code == 0
    run_dir = only_run(tmp_path)
    env_id = script.Config.env_id
    assert re.fullmatch(rf"{env_id}__{script.SCRIPT}__3__\d{{8}}-\d{{6}}-\d+", run_dir.name)
    assert f"--resume runs/{run_dir.name}" in output
    config = script.load_config(run_dir)
    assert (config.seed, config.num_envs, config.hidden_sizes) == (3, 4, (8,))

    rows = rows_of(run_dir / "metrics.csv")
    assert [(row["seed"], row["update"], row["env_step"]) for row in rows] == [
        (str(seed), str(update), str(64 * update)) for update in (1, 2, 3, 4) for seed in (3, 4, 5)
    ]
    assert {*rows[0]} >= {"seed", "update", "env_step"} | ALL_METRICS | METRICS[script]
    assert all(np.isfinite(float(row["value_loss"])) for row in rows)

    rows = rows_of(run_dir / "evaluation.csv")
    assert [(row["seed"], row["episode"]) for row in rows] == [
        (str(seed), str(episode)) for seed in (3, 4, 5) for episode in range(100)
    ]
    returns = np.array([float(row["episodic_return"]) for row in rows]).reshape(3, 100)
    for seed, mean, std in zip((3, 4, 5), returns.mean(axis=1), returns.std(axis=1), strict=True):
        assert f"{seed:6d} {mean:10.2f} ± {std:.2f}\n" in output
    assert f"mean of 3 seeds: {returns.mean():.2f}\n" in output
    lengths = np.array([int(row["episodic_length"]) for row in rows]).reshape(3, 100)
    if env_id == "CartPole-v1":  # pays 1 per step
        np.testing.assert_array_equal(lengths, returns)
    else:  # an episode of Pendulum has 200 steps
        assert (lengths == 200).all() and (returns < 0).all()
    picture = matplotlib.image.imread(run_dir / "learning_curve.png")
    assert picture.shape[0] > 300 and picture.std() > 0.01


def test_a_row_belongs_to_its_seed(uninterrupted):
    run_dir = only_run(uninterrupted.folder)
    config = ppo_discrete.load_config(run_dir)
    _, metrics = jax.jit(lambda key: ppo_discrete.train(config, key))(jax.random.key(5))
    rows = [row for row in rows_of(run_dir / "metrics.csv") if row["seed"] == "5"]
    value_loss = np.array([float(row["value_loss"]) for row in rows])
    # Later the two programs round differently.
    np.testing.assert_allclose(value_loss[:4], metrics["value_loss"][:4], rtol=1e-3)


def test_the_command_prints_what_differs_from_the_defaults(uninterrupted):
    first_line = uninterrupted.output.splitlines()[0]
    differences = "{'total_timesteps': 2560, 'num_envs': 4, 'num_steps': 16, 'hidden_sizes': (8,)}"
    assert first_line == f"ppo_discrete with {differences}"  # eight seeds are the default
    assert "ResourceWarning" not in uninterrupted.output


def test_presets_are_defaults_that_flags_override(monkeypatch):
    presets = {"MinAtar": dict(num_envs=64, gamma=0.5), "Breakout-MinAtar": dict(gamma=0.6)}
    monkeypatch.setattr(ppo_discrete, "PRESETS", presets)

    def parse(*arguments):
        monkeypatch.setattr(sys, "argv", ["ppo_discrete.py", *arguments])
        config = ppo_discrete.parse_flags().config
        return config.num_envs, config.gamma

    assert parse() == (16, 0.99)
    assert parse("--env-id", "Freeway-MinAtar") == (64, 0.5)
    assert parse("--env-id=Breakout-MinAtar") == (64, 0.6)
    assert parse("--gamma", "0.7", "--env-id", "Breakout-MinAtar") == (64, 0.7)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("ended", [True, False])
def test_the_learning_curve(ended, tmp_path, monkeypatch):
    rows = ["seed,env_step,episodic_return", "0,64,1", "1,64,3", "0,128,nan", "1,128,nan"]
    rows += ["0,192,5", "1,192,nan"]
    text = "\n".join(rows)
    if not ended:
        text = re.sub(r",[135]\b", ",nan", text)
    (tmp_path / "metrics.csv").write_text(text)
    figures = []
    save = lambda figure, *_, **__: figures.append(figure)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", save)
    ppo_discrete.plot_learning_curve(tmp_path, ppo_discrete.Config(num_seeds=2))
    (axes,) = figures[0].axes
    *_, mean = axes.lines
    (label,) = axes.get_legend().get_texts()
    if ended:
        assert label.get_text() == "mean of 2 seeds"
        np.testing.assert_array_equal(np.ma.filled(mean.get_ydata(), np.nan), [2, np.nan, 5])
    else:
        assert label.get_text() == "no episode ended"
    np.testing.assert_array_equal(mean.get_xdata(), [64, 128, 192])


def test_a_diverged_seed_does_not_stop_the_others(main, tmp_path, monkeypatch):
    make_train = ppo_discrete.make_train

    def make_broken_train(config, env):
        init, update = make_train(config, env)

        def init_with_nan(key):  # in the weights of seed 1
            state = init(key)
            bad = jax.random.key_data(key)[-1] == 1
            params = jax.tree.map(lambda x: jnp.where(bad, jnp.nan, x), state.params)
            return state._replace(params=params)

        def update_with_metric(state, _=None):  # a metric that is not finite harms nothing
            state, metrics = update(state)
            return state, metrics | {"mine": -jnp.inf, "episodic_return": -jnp.inf}

        return init_with_nan, update_with_metric

    monkeypatch.setattr(ppo_discrete, "make_train", make_broken_train)
    code, output = main(*QUICK, "--total-timesteps", 64 * 4)
    assert code == 0
    assert re.findall("(.*) diverged", output) == ["seed 1"]  # in four segments
    table = output.partition("return ± std")[2]
    assert [line for line in table.splitlines() if "(diverged)" in line] == [
        line for line in table.splitlines() if line.startswith("     1 ")
    ]
    for row in rows_of(only_run(tmp_path) / "metrics.csv"):
        assert row["mine"] == "-inf"
        assert np.isfinite(float(row["value_loss"])) == (row["seed"] != "1")


# ---- Wrong input ---------------------------------------------------------------------------------

OWN_ENVIRONMENTS = """
from gymnax.environments import spaces
from ppo_discrete import Environment

def make(name):
    actions = spaces.Tuple([spaces.Discrete(2), spaces.Discrete(2)])
    return Environment(reset=None, step=None, action_space=actions)
"""
WRONG = {
    "unknown flag": (["--lerning-rate", 1], "Unrecognized options: --lerning-rate"),
    "mistyped value": (["--num-envs", "many"], "Error parsing --num-envs"),
    "value out of range": (["--gamma", 1.5], "gamma must be between 0 and 1, not 1.5"),
    "value that is no number": (["--ent-coef", "nan"], "ent_coef must be between 0 and inf"),
    "count of zero": (["--num-envs", 0], "num_envs must be between 1 and inf"),
    "layer without units": (["--hidden-sizes", 0], "hidden_sizes must be"),
    "batch that cannot be divided": (["--num-minibatches", 3], "num_minibatches must divide"),
    "too few steps": (["--total-timesteps", 10], "total_timesteps must be at least"),
    "unknown environment": (["--env-id", "cartpole"], "gymnax has Acrobot-v1, "),
    "missing module": (["--env-id", "no_such:any"], "No module named 'no_such'"),
    "file instead of a module": (["--env-id", "./own_tuple.py:any"], "cannot make ./own_tuple.py:"),
    "missing run": (["--resume", "nowhere"], "nowhere is not the folder of a ppo_discrete run"),
    "flag without its value": (["--resume"], "--resume"),
}


def is_refused(result, message):
    code, output = result
    assert code == 2 and "Traceback" not in output
    assert message in re.sub(r"[\s│]+", " ", output)  # tyro draws a box around its messages


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_message(case, main, tmp_path):
    (tmp_path / "own_tuple.py").write_text(OWN_ENVIRONMENTS)
    arguments, message = WRONG[case]
    is_refused(main(*arguments), message)
    assert not [*tmp_path.glob("runs/*__*")]  # there may be compiled programs


@pytest.mark.parametrize(
    "script, env_id, message",
    [
        (ppo_discrete, "Pendulum-v1", "ppo_continuous.py"),
        (ppo_continuous, "CartPole-v1", "ppo_discrete.py"),
        *[(script, "own_tuple:any", "action") for script in METRICS],
    ],
    ids=lambda value: getattr(value, "SCRIPT", value),
)
def test_a_wrong_action_space(script, env_id, message, main, tmp_path):
    (tmp_path / "own_tuple.py").write_text(OWN_ENVIRONMENTS)
    is_refused(main("--env-id", env_id, script=script), message)
    assert not [*tmp_path.glob("runs/*__*")]  # there may be compiled programs


def test_what_cannot_be_resumed(main, tmp_path, uninterrupted):
    run_dir = shutil.copytree(only_run(uninterrupted.folder), tmp_path / "run")
    is_refused(main("--resume", "run", "--gamma", 0.5), "a resumed run keeps its hyperparameters")
    is_refused(main("--resume", "run", "--env-id", "Acrobot-v1"), "a resumed run keeps")
    is_refused(main("--resume", "run", script=trpo), "run is not the folder of a trpo run")
    config = run_dir / "config.json"
    complete = config.read_text()
    config.write_text(complete[:-20])
    is_refused(main("--resume", "run"), "run is not the folder of a ppo_discrete run")
    config.write_text(complete)
    for name in ("metrics.csv", "evaluation.csv"):
        assert (run_dir / name).read_bytes() == (only_run(uninterrupted.folder) / name).read_bytes()
    # The same flags again are no difference.
    assert main("--resume", "run", *FLAGS)[0] == 0


def test_a_process_that_is_refused(folder, quick):
    arguments = command("ppo_discrete", "--env-id", "cartpole")
    process = subprocess.run(arguments, cwd=folder, env=quick, capture_output=True, text=True)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith("error: cannot make cartpole: ")
    assert process.stderr.count("\n") == 1


def test_ctrl_c_ends_without_a_traceback(main, monkeypatch):
    def interrupted(flags):
        raise KeyboardInterrupt

    monkeypatch.setattr(ppo_discrete, "run", interrupted)
    assert main() == (130, "")


def test_the_compilation_cache(main, tmp_path, monkeypatch):
    monkeypatch.setattr(ppo_discrete, "run", lambda flags: None)
    jax.config.update("jax_compilation_cache_dir", "/mine")  # as JAX_COMPILATION_CACHE_DIR does
    assert main() == (0, "") and jax.config.jax_compilation_cache_dir == "/mine"
    jax.config.update("jax_compilation_cache_dir", None)
    assert main() == (0, "")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "runs" / "jax_cache")


# ---- Interruptions -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed, save_always", [(0, True), (1, True), (2, False)])
def test_a_killed_run_resumes_to_the_same_bytes(seed, save_always, folder, quick, uninterrupted):
    rng = random.Random(seed)
    rows, delay = rng.randint(0, ROWS), rng.uniform(0, 0.5)
    kill_and_resume(folder, "ppo_discrete", quick, rows, delay, save_always)
    assert read_files(folder) == read_files(uninterrupted.folder)


def test_a_run_is_resumed_by_one_process(folder, quick, uninterrupted):
    options = dict(cwd=folder, env=quick, text=True)
    first = command("ppo_discrete", *FLAGS, save_always=True)
    with subprocess.Popen(first, **options, stderr=subprocess.DEVNULL, stdout=-3) as process:
        wait_for_rows(folder, ROWS // 4, process)
        process.send_signal(signal.SIGSTOP)  # it waits for the second process
        second = command("ppo_discrete", "--resume", only_run(folder).relative_to(folder))
        result = subprocess.run(second, **options, capture_output=True)
        rows = count_rows(folder)
        process.send_signal(signal.SIGCONT)
        assert process.wait() == 0
    assert result.returncode == 2 and rows < ROWS
    *_, message = result.stderr.splitlines()
    assert message.startswith("error: another process is training")
    assert "Traceback" not in result.stderr
    assert read_files(folder) == read_files(uninterrupted.folder)


def test_a_run_resumes_after_a_full_disk(folder, quick, uninterrupted):
    # `ulimit` stands in for the full disk: metrics.csv must not grow beyond 18 kB.
    size = len(read_files(uninterrupted.folder)[0])
    assert size > 22_000
    limited = ["bash", "-c", 'ulimit -f 18; exec "$@"', "bash"]
    options = dict(cwd=folder, env=quick, capture_output=True, text=True)
    process = subprocess.run(
        [*limited, *command("ppo_discrete", *FLAGS, save_always=True)], **options
    )
    assert process.returncode == 1 and "File too large" in process.stderr
    assert any((only_run(folder) / "checkpoints").glob("[0-9]*"))
    resumed = command("ppo_discrete", "--resume", only_run(folder).relative_to(folder))
    subprocess.run(resumed, check=True, capture_output=True, cwd=folder, env=quick)
    assert read_files(folder) == read_files(uninterrupted.folder)


# ---- The README ----------------------------------------------------------------------------------


def block(name):
    """The Python block of the README below the mark with this name."""
    text = (ROOT / "README.md").read_text()
    return text.split(f"<!-- {name} -->")[1].split("```python")[1].split("```")[0]


def test_the_sweep_of_the_readme(tmp_path, monkeypatch):
    code = block("sweep").replace("logspace(-4, -2, 5)", "ones(2)")
    code = code.replace("jax.random.key(0), 8)", "jax.random.key(0), 3)")
    code = code.replace("ppo.Config()", "ppo.Config(total_timesteps=4096)")
    code += "\nassert returns.shape == (2, 3, 2), returns.shape\n"
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "sweep.png").exists()


def test_the_environment_of_the_readme(main, tmp_path):
    (tmp_path / "point.py").write_text(block("environment"))
    code, _ = main("--env-id", "./point:any", "--num-seeds", 2, "--total-timesteps", 40_960)
    assert code == 0
    rows = rows_of(only_run(tmp_path) / "evaluation.csv")
    assert {row["episodic_length"] for row in rows} == {"20"}
    # A point starts 0.8 from zero on average. Staying there costs 16, walking to zero about 2.5.
    assert np.mean([float(row["episodic_return"]) for row in rows]) > -4
