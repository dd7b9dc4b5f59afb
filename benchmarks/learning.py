"""Train script × environment with the documented command and write the README's table.

    python benchmarks/learning.py              # every cell of CELLS that has no result yet
    python benchmarks/learning.py --only CartPole
    python benchmarks/learning.py --table      # train nothing, only write the table

A cell is one run of `python SCRIPT.py --env-id ... --total-timesteps ... --num-seeds ...`, no other
flag. Its result is a CSV file in benchmarks/results/: one row per seed with the mean return of the
greedy evaluation, below a line that says when and with what it was made. Delete a file to have it
made again.
"""

import argparse
import csv
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import scipy.stats

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# (script, environment, steps per seed, seeds, best published figure)
CELLS = [
    ("ppo_discrete", "CartPole-v1", 50_000, 10, "500 (100k, rl-zoo)"),
    ("ppo_discrete", "CartPole-v1", 100_000, 10, "500 (100k, rl-zoo)"),
    ("ppo_discrete", "Acrobot-v1", 100_000, 10, "-83.1 (100k, TRPO, rl-zoo)"),
    ("ppo_discrete", "Acrobot-v1", 500_000, 10, "-73.5 (1M, rl-zoo)"),
    ("ppo_discrete", "MountainCar-v0", 1_000_000, 10, "-107.3 (100k, TRPO, rl-zoo)"),
    ("ppo_discrete", "Catch-bsuite", 100_000, 10, "1.0"),
    ("ppo_discrete", "FourRooms-misc", 100_000, 10, "1.0"),
    ("ppo_discrete", "DeepSea-bsuite", 200_000, 10, "0"),
    ("ppo_discrete", "FrozenLake-misc", 300_000, 10, "-"),
    ("ppo_continuous", "Pendulum-v1", 100_000, 10, "-172 (100k, rl-zoo, gSDE)"),
    ("ppo_continuous", "Pendulum-v1", 300_000, 10, "-175 (300k, SLM)"),
    ("ppo_continuous", "Pendulum-v1", 1_000_000, 10, "-172 (100k, rl-zoo, gSDE)"),
    ("ppo_continuous", "MountainCarContinuous-v0", 100_000, 10, "92.5 (50k, TRPO, gSDE)"),
    ("ppo_continuous", "MountainCarContinuous-v0", 1_000_000, 10, "92.5 (50k, TRPO, gSDE)"),
    ("ppo_continuous", "Reacher-misc", 1_000_000, 10, "-"),
    ("ppo_continuous", "PointRobot-misc", 1_000_000, 10, "-"),
    ("ppo_continuous", "Swimmer-misc", 1_000_000, 10, "-"),
    ("ppo_discrete", "Breakout-MinAtar", 10_000_000, 3, "50.1 (10M, gymnax-blines)"),
    ("ppo_discrete", "SpaceInvaders-MinAtar", 10_000_000, 3, "170 (10M, PureJaxRL)"),
]


def interquartile_mean(x, axis=-1):
    return scipy.stats.trim_mean(x, 0.25, axis=axis)


def result_path(script, env_id, steps):
    return RESULTS / f"{script}__{env_id}__{steps}.csv"


def run_cell(script, env_id, steps, num_seeds):
    """Train in an empty folder, keep the mean return of each seed."""
    flags = ["--env-id", env_id, "--total-timesteps", str(steps), "--num-seeds", str(num_seeds)]
    print(f"\npython {script}.py {' '.join(flags)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([sys.executable, ROOT / f"{script}.py", *flags], cwd=folder, check=True)
        seconds = time.perf_counter() - start
        (evaluation,) = Path(folder).glob("runs/*/evaluation.csv")
        with evaluation.open(newline="") as file:
            rows = [(int(r["seed"]), float(r["episodic_return"])) for r in csv.DictReader(file)]
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax", "gymnax"))
    RESULTS.mkdir(exist_ok=True)
    with result_path(script, env_id, steps).open("w", newline="") as file:
        file.write(
            f"# {time.strftime('%Y-%m-%d')}, {seconds:.0f} s on the CPU ({platform.machine()}), "
            f"Python {platform.python_version()}, {versions}\n"
        )
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["seed", "episodes", "mean_episodic_return"])
        for seed in sorted({seed for seed, _ in rows}):
            returns = [value for other, value in rows if other == seed]
            writer.writerow([seed, len(returns), f"{np.mean(returns):.6g}"])


def table():
    """The Markdown table of all results that exist."""
    lines = [
        "| script | environment | steps | seeds | IQM | 95 % interval | worst seed | published |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for script, env_id, steps, _, published in CELLS:
        path = result_path(script, env_id, steps)
        if not path.exists():
            continue
        with path.open(newline="") as file:
            file.readline()
            scores = np.array([float(r["mean_episodic_return"]) for r in csv.DictReader(file)])
        interval = scipy.stats.bootstrap(
            (scores,), interquartile_mean, method="percentile", rng=0
        ).confidence_interval
        budget = f"{steps // 1_000_000}M" if steps % 1_000_000 == 0 else f"{steps // 1000}k"
        lines.append(
            f"| `{script}` | {env_id} | {budget} | {len(scores)} "
            f"| **{interquartile_mean(scores):.2f}** | {interval.low:.2f} to {interval.high:.2f} "
            f"| {scores.min():.2f} | {published} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default="", help="cells whose script or environment contains this"
    )
    parser.add_argument("--table", action="store_true", help="train nothing, only write the table")
    arguments = parser.parse_args()
    for script, env_id, steps, num_seeds, _ in [] if arguments.table else CELLS:
        wanted = arguments.only in f"{script} {env_id}"
        if wanted and not result_path(script, env_id, steps).exists():
            run_cell(script, env_id, steps, num_seeds)
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split("<!-- results -->\n")
    after = rest.split("<!-- end of results -->\n")[1]
    readme.write_text(f"{before}<!-- results -->\n{table()}\n<!-- end of results -->\n{after}")


if __name__ == "__main__":
    main()
