"""Runs that do not learn, each for its own reason, and the column of metrics.csv that shows it.

    python benchmarks/symptoms.py    # some minutes; writes docs/symptoms.png, prints the figures

The table in docs/recipes.md says what each of them means. A command is run as it is written there,
with three seeds of 100,000 steps, and beside it the same script on the same environment without its
other flags. The runs lie in runs/symptoms/ of the current folder; those that have ended there are
not made again.
"""

import csv
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "symptoms.png"
BUDGET = "--num-seeds 3 --total-timesteps 100000"
SYMPTOMS = [  # what the picture says, the column, and the command
    ("steps too small", "clip_fraction", "ppo_discrete.py --learning-rate 1e-5"),
    ("steps too large", "clip_fraction", "ppo_discrete.py --learning-rate 0.1"),
    ("the KL jumps", "approx_kl", "ppo_discrete.py --learning-rate 0.1 --kl-threshold 1000"),
    ("entropy gone", "entropy", "ppo_discrete.py --learning-rate 0.1"),
    ("entropy kept", "entropy", "ppo_discrete.py --ent-coef 1"),
    (
        "the critic does not learn",
        "explained_variance",
        "ppo_discrete.py --env-id Acrobot-v1 --vf-coef 0",
    ),
    (
        "rewards out of scale",
        "value_loss",
        "ppo_continuous.py --no-normalize-reward --learning-rate 1e-4",
    ),
    ("no reward found", "value_loss", "ppo_discrete.py --env-id MountainCar-v0 --no-normalize-obs"),
    (
        "every step rejected",
        "step_accepted",
        "trpo.py --cg-damping 0 --cg-iterations 3 --line-search-tries 1",
    ),
    ("β at its lower bound", "beta", "ppo_penalty.py --learning-rate 1e-5"),
    ("β at its upper bound", "beta", "ppo_penalty.py --learning-rate 0.1"),
    ("harmless: nothing is left to explain", "explained_variance", "ppo_discrete.py"),
]
LOGARITHMIC = {"approx_kl", "value_loss", "beta"}


def without_flags(command):
    """The healthy run beside it: the same script on the same environment."""
    script, *flags = command.split()
    env = flags.index("--env-id") if "--env-id" in flags else len(flags)
    return " ".join([script, *flags[env : env + 2]])


def run(command):
    """The columns of metrics.csv, [updates, seeds], and the mean return of the greedy episodes."""
    folder = Path("runs", "symptoms", re.sub(r"[^\w.]+", "_", command))
    if not list(folder.glob("runs/*/evaluation.csv")):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        script, *flags = [*command.split(), *BUDGET.split()]
        print(f"\npython {script} {' '.join(flags)}", flush=True)
        subprocess.run([sys.executable, ROOT / script, *flags], cwd=folder, check=True)
    (metrics,) = folder.glob("runs/*/metrics.csv")
    rows = list(csv.DictReader(metrics.open(newline="")))
    seeds = len({row["seed"] for row in rows})
    columns = {
        name: np.array([float(row[name] or "nan") for row in rows]).reshape(-1, seeds)
        for name in rows[0]
    }
    evaluation = csv.DictReader(metrics.with_name("evaluation.csv").open(newline=""))
    return columns, np.mean([float(row["episodic_return"]) for row in evaluation])


def figures(column):
    """Of the median over the seeds: that of each fifth of the updates, and the extremes."""
    curve = np.nanmedian(column, axis=1)
    fifths = ", ".join(f"{np.median(part):.2g}" for part in np.array_split(curve, 5))
    return f"{fifths} (from {curve.min():.2g} to {curve.max():.2g})"


def draw(axes, title, name, command, sick, healthy):
    axes.set_title(
        "\n".join([title, *textwrap.wrap(command, 48, break_on_hyphens=False)]), fontsize=8
    )
    for (columns, _), color in ((sick, "tab:red"), (healthy, "tab:gray")):
        steps = columns["env_step"][:, 0] / 1000
        axes.plot(steps, columns[name], color=color, alpha=0.3, linewidth=0.8)
        axes.plot(steps, np.nanmedian(columns[name], axis=1), color=color, linewidth=2)
    if name in LOGARITHMIC:
        axes.set_yscale("log")
    axes.set_ylabel(name)
    axes.grid(alpha=0.3)


def main():
    commands = [command for *_, command in SYMPTOMS]
    results = {
        each: run(each) for each in dict.fromkeys([*commands, *map(without_flags, commands)])
    }
    figure = Figure(figsize=(15, 9), layout="constrained")
    panels = figure.subplots(3, 4).ravel()
    for axes, (title, name, command) in zip(panels, SYMPTOMS, strict=True):
        sick, healthy = results[command], results[without_flags(command)]
        draw(axes, title, name, command, sick, healthy)
        print(f"\n{command}\n  {name}: {figures(sick[0][name])}; return {sick[1]:.1f}")
        print(f"  without the flags: {figures(healthy[0][name])}; return {healthy[1]:.1f}")
    for axes in panels[-4:]:
        axes.set_xlabel("thousand environment steps per seed")
    figure.suptitle(
        "red: with the flags above the panel, gray: without them; median of three seeds"
    )
    figure.savefig(PICTURE, dpi=80)


if __name__ == "__main__":
    main()
