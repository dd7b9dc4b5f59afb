"""What the benchmarks share: stored results, runs of the scripts, statistics and tables.

A stored result is a CSV file with a row per seed. Its first line holds the configuration that it
was made with; the next lines say when and with which versions. If the configuration differs from
the current one, the result is stale: it is trained again, and tables mark it with a dagger.
"""

import contextlib
import csv
import dataclasses
import importlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax
import numpy as np
import scipy.stats

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
RUNS = ROOT / "runs" / "benchmarks"  # unfinished runs; starting a benchmark again continues them
EPISODES = 100  # greedy episodes per seed
sys.path.insert(0, str(ROOT))

LABELS = {"clip": "PPO-clip", "ppo_penalty": "PPO-penalty", "trpo": "TRPO"}  # columns of tables
COLORS = {"clip": "tab:blue", "ppo_penalty": "tab:orange", "trpo": "tab:green"}
CONTINUOUS = ("Pendulum", "MountainCarContinuous", "Reacher", "PointRobot", "Swimmer", "hopper")


# ---- Scripts -------------------------------------------------------------------------------------


def script_of(column, env_id):
    """The name of the script behind a column of a table."""
    if column != "clip":
        return column
    task = env_id.rpartition(":")[2]
    return "ppo_continuous" if task.startswith(CONTINUOUS) else "ppo_discrete"


def config_of(name, env_id, steps, **values):
    """What the command line uses for an environment, with other `values` for some fields."""
    config = importlib.import_module(name).default_config(env_id)
    return dataclasses.replace(config, total_timesteps=steps, **values)


def load_module(path, name):
    """Import a file under another name than its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copy_patched(name, patches, folder):
    """Copy a script into a folder and apply patches of tests/edits to it; return its path."""
    shutil.copy(ROOT / f"{name}.py", folder)
    for patch in patches:
        file = ROOT / "tests" / "edits" / f"{patch}.patch"
        subprocess.run(["patch", "-s", "-p1", "-i", file], cwd=folder, check=True)
    return Path(folder) / f"{name}.py"


@contextlib.contextmanager
def replaced(module, **functions):
    """Within this context, `module` has these functions in place of its own."""
    originals = {name: getattr(module, name) for name in functions}
    vars(module).update(functions)
    try:
        yield
    finally:
        vars(module).update(originals)


def train_here(name, config, seeds):
    """Train all seeds in this process.

    Returns their final states, their training returns [seeds, updates] and the mean returns of
    greedy episodes [seeds].
    """
    script = importlib.import_module(name)
    env = script.load_env(config.env_id)

    def run(seed):
        state, metrics = script.train(config, jax.random.key(seed), env)
        key = jax.random.fold_in(state.key, 0)  # as on the command line
        returns, _ = script.evaluate(config, state, key, EPISODES, env)
        return state, metrics["episodic_return"], returns.mean()

    return jax.device_get(script.over_seeds(run, len(seeds))(np.array(seeds)))


def run_script(path, flags, name):
    """Run a script in runs/benchmarks/<name>, or continue its run there; return its folder."""
    folder = RUNS / name
    folder.mkdir(parents=True, exist_ok=True)
    begun = [config.parent for config in folder.glob("runs/*/config.json")]
    if begun:
        flags = ["--resume", begun[0].relative_to(folder)]
    if not list(folder.glob("runs/*/evaluation.csv")):
        command = [sys.executable, path, *map(str, flags)]
        print("\npython", Path(path).name, *command[2:], flush=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which also kills the script
        # The root is in the path for --env-id benchmarks.environments:name.
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=folder, env=environment, check=True)
    return next(folder.glob("runs/*/evaluation.csv")).parent


def read_columns(run_dir):
    """The columns of a run's metrics.csv: {name: [updates, seeds]}."""
    table = np.genfromtxt(run_dir / "metrics.csv", delimiter=",", names=True)
    num_seeds = len(np.unique(table["seed"]))
    return {name: table[name].reshape(-1, num_seeds) for name in table.dtype.names}


# ---- Stored results ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table: where its result is stored, and how the result is made."""

    path: Path
    config: dict  # everything that decides the result, except the seeds
    seeds: range
    train: Callable  # list of seeds -> a dictionary per seed, which becomes a row of the file
    chunk: int | None = None  # number of seeds to train and store at a time; None: always all

    @classmethod
    def of_script(cls, path, name, config, seeds, train, chunk=None, **others):
        """The cell of a script's configuration, with `others` as further entries."""
        values = {"script": name, **others, **dataclasses.asdict(config)}
        del values["seed"], values["num_seeds"]
        values = json.loads(json.dumps(values))  # tuples become lists, as in the file
        return cls(path, values, seeds, train, chunk)

    def read(self):
        """The lines above the table, and the rows of the table as dictionaries of strings."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        comments = [line.removeprefix("# ") for line in lines if line.startswith("# ")]
        return comments, list(csv.DictReader(lines[len(comments) :]))

    def rows(self):
        return self.read()[1]

    def scores(self, column="mean_episodic_return"):
        return np.array([float(row[column]) for row in self.rows()])

    def is_current(self):
        """Whether there is a result of the current configuration."""
        comments, _ = self.read()
        return bool(comments) and json.loads(comments[0]) == self.config

    def missing_seeds(self):
        done = {int(row["seed"]) for row in self.rows()} if self.is_current() else set()
        return [seed for seed in self.seeds if seed not in done]

    def add_rows(self, rows):
        """Store rows in place of those of the same seeds, or of a stale result."""
        (_, *made), old = self.read() if self.is_current() else ([""], [])
        made = list(dict.fromkeys([*made, circumstances()]))
        seeds = {row["seed"] for row in rows}
        rows = [row for row in old if int(row["seed"]) not in seeds] + rows
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        with unfinished.open("w", newline="") as file:
            file.writelines(f"# {line}\n" for line in [json.dumps(self.config), *made])
            writer = csv.DictWriter(file, rows[-1], lineterminator="\n")
            writer.writeheader()
            for row in rows:
                texts = {k: f"{x:.7g}" for k, x in row.items() if isinstance(x, float)}
                writer.writerow(row | texts)
        unfinished.replace(self.path)

    def complete(self):
        """Train the seeds that have no current result."""
        while missing := self.missing_seeds():
            seeds = missing[: self.chunk] if self.chunk else list(self.seeds)
            start = time.perf_counter()
            rows = self.train(seeds)
            seconds = round(time.perf_counter() - start)
            self.add_rows([row | {"seconds": seconds} for row in rows])
            print(f"{self.path.stem}, seeds {seeds[0]} to {seeds[-1]}: {seconds} s", flush=True)

    def text(self, digits=2, column="mean_episodic_return", brief=False):
        """The text in a table: interquartile mean, 95 % interval, worst seed, dagger if stale."""
        scores = self.scores(column)
        if len(scores) == 0:
            return ""
        number = lambda x: f"{x:z.{digits}f}"  # without a minus in -0.00
        details = " to ".join(map(number, interval(scores)))
        if not brief:
            few = f", {len(scores)} seeds" if len(scores) != 10 else ""
            details += f"; worst {number(scores.min())}{few}"
        return f"**{number(interquartile_mean(scores))}** ({details}){self.dagger()}"

    def dagger(self):
        """The mark of a stale result in a table."""
        return "" if self.is_current() else " †"


def circumstances():
    """Date, machine and versions, in a line."""
    versions = [f"Python {platform.python_version()}"]
    for package in ("jax", "flax", "optax", "gymnax", "brax"):
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return ", ".join([time.strftime("%Y-%m-%d"), platform.machine(), *versions])


def script_cell(path, name, env_id, steps, seeds, **changes):
    """The cell of a command: the score of each seed, and the learning curves in a second file.

    `changes` can be further `flags`, a string, and `patches` of the script, a list of names.
    """

    def train(seeds):
        work = f"{path.stem}__{zlib.crc32(json.dumps(cell.config).encode())}"
        script = ROOT / f"{name}.py"
        if changes.get("patches"):
            (RUNS / work).mkdir(parents=True, exist_ok=True)
            script = copy_patched(name, changes["patches"], RUNS / work)
        command = ["--env-id", env_id, "--total-timesteps", steps, "--num-seeds", len(seeds)]
        run_dir = run_script(script, [*command, *changes.get("flags", "").split()], work)
        write_curve(path.with_suffix(".curve.csv"), read_columns(run_dir))
        episodes = np.genfromtxt(run_dir / "evaluation.csv", delimiter=",", names=True)
        means = episodes["episodic_return"].reshape(len(seeds), -1).mean(axis=1).tolist()
        shutil.rmtree(RUNS / work)
        return scored(seeds, means)

    cell = Cell.of_script(path, name, config_of(name, env_id, steps), seeds, train, **changes)
    return cell


def scored(seeds, scores):
    """The rows of seeds that have nothing but a score."""
    pairs = zip(seeds, scores, strict=True)
    return [{"seed": seed, "mean_episodic_return": float(score)} for seed, score in pairs]


def write_curve(path, columns):
    """The training returns of each seed, averaged over each hundredth of the run."""
    steps, returns = columns["env_step"][:, 0], columns["episodic_return"]
    parts = np.array_split(np.arange(len(steps)), min(100, len(steps)))
    means = [np.ma.masked_invalid(returns[part]).mean(axis=0).filled(np.nan) for part in parts]
    table = np.column_stack([[steps[part[-1]] for part in parts], means])
    header = ",".join(["env_step", *map(str, range(returns.shape[1]))])
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(path, table, "%.6g", ",", header=header, comments="")


# ---- Statistics, tables and pictures -------------------------------------------------------------


def interquartile_mean(x, axis=-1):
    return scipy.stats.trim_mean(x, 0.25, axis=axis)


def interval(scores):
    """95 % bootstrap interval of the interquartile mean over seeds."""
    result = scipy.stats.bootstrap((scores,), interquartile_mean, method="percentile", rng=0)
    return result.confidence_interval


def budget(steps):
    """A number of steps in short: 3M or 500k."""
    return f"{steps // 1_000_000}M" if steps % 1_000_000 == 0 else f"{steps // 1000}k"


def draw_curve(axes, path, label, color):
    """Interquartile mean over the seeds of a stored learning curve, and the middle half of them."""
    table = np.genfromtxt(path, delimiter=",", skip_header=1)
    table = table[np.isfinite(table).all(axis=1)]  # at first, no episode may have ended
    thousands, returns = table[:, 0] / 1000, table[:, 1:]
    axes.plot(thousands, interquartile_mean(returns), label=label, color=color)
    low, high = np.quantile(returns, [0.25, 0.75], axis=1)
    axes.fill_between(thousands, low, high, alpha=0.2, color=color, linewidth=0)


def markdown(header, rows):
    """A table in Markdown."""
    lines = [f"| {' | '.join(map(str, line))} |" for line in [header, *rows]]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def publish(name, table):
    """Print a table, and write it between its marks in docs/results.md."""
    print(f"\n{table}")
    path = DOCS / "results.md"
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    text = path.read_text()
    if text.count(start) != 1 or text.count(end) != 1:
        print(f"{path} has no marks for this table: {start.strip()} ... {end.strip()}")
        return
    before, rest = text.split(start)
    path.write_text(f"{before}{start}{table}\n{end}{rest.split(end)[1]}")
