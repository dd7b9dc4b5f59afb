"""What the edits of tests/edits do to the return: each beside the script that it changes.

    python benchmarks/edits.py                    # all that has no result; forty minutes, two cores
    python benchmarks/edits.py --only recurrent   # of these, those whose name contains this
    python benchmarks/edits.py --tables           # train nothing, write the table

Script and edited script are run with the same command. Each seed's score is the mean return of 100
greedy episodes. Results are rows of benchmarks/results/edits.csv, which does not see that a script
has changed: delete rows to have them made again. A run that was killed goes on where it was, from
its last checkpoint in runs/edits/. Hopper needs Brax (`benchmarks/requirements.txt`).
"""

import argparse
import csv
import re
import shutil
import subprocess
import time
from importlib.metadata import version

import numpy as np
from learning import RESULTS, ROOT, budget, interquartile_mean, interval, replace_table, run_script

EDITS = ROOT / "tests" / "edits"
STORED, WORK = RESULTS / "edits.csv", ROOT / "runs" / "edits"
COLUMNS = "edit environment steps flags edited seed mean_episodic_return trained_steps seconds"
COLUMNS = (COLUMNS + " date jax").split()

# edit, environment, steps, seeds, flags
UNSCALED = "--no-normalize-reward --vf-coef"
POSITIONS = "positions_environment:CartPolePositions-test"
EXPERIMENTS = [
    ("shared_trunk", "CartPole-v1", 50_000, 10, ""),
    ("shared_trunk", "CartPole-v1", 50_000, 10, f"{UNSCALED} 0.5"),
    ("shared_trunk", "CartPole-v1", 50_000, 10, f"{UNSCALED} 0.005"),
    ("shared_trunk", "CartPole-v1", 50_000, 10, f"{UNSCALED} 0.0001"),
    ("squashed_gaussian", "Pendulum-v1", 100_000, 10, ""),
    ("squashed_gaussian", "environments:hopper-brax", 1_000_000, 5, "--initial-std 1"),
    ("recurrent", POSITIONS, 500_000, 6, ""),
    ("cnn", "Breakout-MinAtar", 2_000_000, 6, ""),
]


def read_rows():
    """All rows, each a dictionary of strings."""
    if not STORED.exists():
        return []
    with STORED.open(newline="") as file:
        return list(csv.DictReader(file))


def name_of(experiment, edited):
    """What the rows of one run have in common."""
    edit, env_id, steps, _, flags = experiment
    return [edit, env_id, str(steps), flags, str(edited)]


def scores_of(experiment, edited):
    """One per seed, or none."""
    rows = [row for row in read_rows() if [*row.values()][:5] == name_of(experiment, edited)]
    return np.array([float(row["mean_episodic_return"]) for row in rows])


def train(experiment, edited):
    """Run the command in a folder with the script, or the edited one, and what it imports."""
    edit, env_id, steps, num_seeds, flags = experiment
    patch = EDITS / f"{edit}.patch"
    (script,) = re.findall(r"^--- a/(.*)\.py$", patch.read_text(), re.MULTILINE)
    name = re.sub(r"\W+", "_", " ".join(name_of(experiment, edited)))
    folder = WORK / name
    folder.mkdir(parents=True, exist_ok=True)
    for source in (ROOT / "benchmarks" / "environments.py", *EDITS.glob("*_environment.py")):
        shutil.copy(source, folder)
    shutil.copy(ROOT / f"{script}.py", folder)
    if edited:
        subprocess.run(["patch", "-s", "-p1", "-i", patch], cwd=folder, check=True)
    print(f"\n{edit}: {'edited' if edited else 'as it is'}", flush=True)
    clock = time.perf_counter()
    seeds = range(num_seeds)
    run = run_script(script, env_id, steps, seeds, folder, flags.split())
    made = (run.trained_steps, f"{time.perf_counter() - clock:.0f}", time.strftime("%Y-%m-%d"))
    is_new = not STORED.exists()
    with STORED.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS] * is_new)
        for seed, score in zip(seeds, run.scores, strict=True):
            row = *name_of(experiment, edited), seed, f"{score:.6g}", *made, version("jax")
            writer.writerow(row)


def cell(scores):
    """Interquartile mean over seeds, its 95 % bootstrap interval, and the worst seed."""
    if not len(scores):
        return ""
    low, high = interval(scores)
    middle = f"**{interquartile_mean(scores):z.1f}** ({low:z.1f} to {high:z.1f}"
    return f"{middle}; worst {scores.min():z.1f}, {len(scores)} seeds)"


def table():
    """A row per experiment that was made: the script as it is, and with the edit."""
    lines = ["| edit | environment | steps | flags | as it is | edited |", "|---" * 6 + "|"]
    for experiment in EXPERIMENTS:
        edit, env_id, steps, _, flags = experiment
        texts = [cell(scores_of(experiment, edited)) for edited in (False, True)]
        if not all(texts):  # one of both is missing
            continue
        flags = f"`{flags}`" if flags else ""
        row = (f"`{edit}`", env_id.rpartition(":")[2], budget(steps), flags, *texts)
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="what the name of a run must contain")
    parser.add_argument("--tables", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    for experiment in EXPERIMENTS if not arguments.tables else []:
        for edited in (False, True):
            wanted = arguments.only in " ".join(name_of(experiment, edited))
            if wanted and not len(scores_of(experiment, edited)):
                train(experiment, edited)
    replace_table("edits", table())
    print("\n" + table())


if __name__ == "__main__":
    main()
