"""Train script × environment with the documented command; write docs/results.md's tables, figures.

    python benchmarks/learning.py                     # every cell without a current result
    python benchmarks/learning.py --only CartPole     # of these, those whose name contains this
    python benchmarks/learning.py --ablations         # the ablation study, likewise
    python benchmarks/learning.py --tables            # train nothing, write tables and figures
    python benchmarks/learning.py --quick             # repeat four cells and compare, 5 minutes

A cell is one run of `python SCRIPT.py --env-id ... --total-timesteps ... --num-seeds ...`, no other
flag. Its result is a CSV file in benchmarks/results/: one row per seed with the mean return of the
greedy evaluation, below two lines that say when, on what and with which configuration it was made;
beside it the learning curve, thinned out. A result of another configuration than the current one,
because a default or a preset has changed, counts as missing. Delete a file to have it made again.
A run that was stopped or killed goes on where it was, from the last checkpoint of the cell, which
lies in runs/learning/.

An ablation changes one thing: a value of the configuration, or one of the script's public
functions, which is replaced in the loaded module. The scripts need no flag for it. Its seeds
are spread over the cores, as those of the command line are.
"""

import argparse
import csv
import dataclasses
import functools
import importlib
import json
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "runs" / "learning"
DOCUMENT = ROOT / "docs" / "results.md"
sys.path.insert(0, str(ROOT))
import ppo_discrete

CLIP, PENALTY, TRPO = "clip", "ppo_penalty", "trpo"  # the columns of the table
LABELS = {CLIP: "PPO-clip", PENALTY: "PPO-penalty", TRPO: "TRPO"}
COLORS = {CLIP: "tab:blue", PENALTY: "tab:orange", TRPO: "tab:green"}
CONTINUOUS = ("Pendulum", "MountainCarContinuous", "Reacher", "PointRobot", "Swimmer", "hopper")
ROWS = [  # environment, steps per seed, seeds, best published figure
    ("CartPole-v1", 50_000, 10, "500 (100k, PPO and TRPO, rl-zoo)"),
    ("CartPole-v1", 100_000, 10, "500 (100k, PPO and TRPO, rl-zoo)"),
    ("Acrobot-v1", 100_000, 10, "-83.1 (100k, TRPO, rl-zoo)"),
    ("Acrobot-v1", 500_000, 10, "-73.5 (1M, PPO, rl-zoo)"),
    ("MountainCar-v0", 1_000_000, 10, "-107.3 (100k, TRPO, rl-zoo)"),
    ("Pendulum-v1", 100_000, 10, "-172 (100k, PPO with gSDE, rl-zoo)"),
    ("Pendulum-v1", 300_000, 10, "-175 (300k, PPO, SLM)"),
    ("Pendulum-v1", 1_000_000, 10, "-172 (100k, PPO with gSDE, rl-zoo)"),
    ("MountainCarContinuous-v0", 100_000, 10, "92.5 (50k, TRPO with gSDE, rl-zoo)"),
    ("MountainCarContinuous-v0", 1_000_000, 10, "92.5 (50k, TRPO with gSDE, rl-zoo)"),
    ("Catch-bsuite", 100_000, 10, "1 (README of gymnax)"),
    ("FourRooms-misc", 100_000, 10, "1 (README of gymnax)"),
    ("DeepSea-bsuite", 200_000, 10, "0 (README of gymnax)"),
    ("UmbrellaChain-bsuite", 100_000, 10, "1 (README of gymnax)"),
    ("DiscountingChain-bsuite", 100_000, 10, "1.1 (README of gymnax)"),
    ("FrozenLake-misc", 300_000, 10, "-"),
    ("MetaMaze-misc", 1_000_000, 10, "-"),
    ("Pong-misc", 50_000, 10, "-"),
    ("Reacher-misc", 1_000_000, 10, "-"),
    ("PointRobot-misc", 1_000_000, 10, "-"),
    ("Swimmer-misc", 1_000_000, 10, "-"),
]
MINATAR = [  # seeds of PPO-clip, PPO-penalty and TRPO
    ("Breakout-MinAtar", 10_000_000, (10, 6, 6), "50.1 (10M, PPO, gymnax-blines)"),
    ("SpaceInvaders-MinAtar", 10_000_000, (10, 6, 6), "170 (10M, PPO, PureJaxRL)"),
    ("Asterix-MinAtar", 10_000_000, (10, 6, 6), "17.8 (10M, PPO, gymnax-blines)"),
    ("Freeway-MinAtar", 10_000_000, (10, 6, 6), "61.8 (10M, PPO, gymnax-blines)"),
    ("Seaquest-MinAtar", 10_000_000, (10, 6, 6), "-"),
]
CURVES = [  # panels of the figure
    ("CartPole-v1", 100_000),
    ("Acrobot-v1", 500_000),
    ("MountainCar-v0", 1_000_000),
    ("Pendulum-v1", 1_000_000),
    ("MountainCarContinuous-v0", 1_000_000),
    ("Reacher-misc", 1_000_000),
]
QUICK = [
    ("CartPole-v1", 50_000, CLIP),
    ("CartPole-v1", 100_000, PENALTY),
    ("CartPole-v1", 100_000, TRPO),
    ("Pendulum-v1", 100_000, CLIP),
]


def script_of(column, env_id):
    """The script behind a column of the table."""
    if column != CLIP:
        return column
    name = env_id.rpartition(":")[2]
    return "ppo_continuous" if name.startswith(CONTINUOUS) else "ppo_discrete"


def cells_of(row):
    """(script, environment, steps, seeds) of a row of the table."""
    env_id, steps, seeds, _ = row
    scripts = [script_of(column, env_id) for column in LABELS]
    seeds = [seeds] * len(scripts) if isinstance(seeds, int) else seeds
    return [(script, env_id, steps, n) for script, n in zip(scripts, seeds, strict=True)]


def cells():
    """Those of the whole table."""
    return [cell for row in ROWS + MINATAR for cell in cells_of(row)]


# ---- Results on disk ----


def result_path(script, env_id, steps, folder=RESULTS):
    return folder / f"{script}__{env_id}__{steps}.csv"


def configuration(script, env_id, steps, num_seeds, **values):
    """What a run writes into config.json but its format, with `values` in place of defaults."""
    config = importlib.import_module(script).default_config(env_id)
    config = dataclasses.replace(config, total_timesteps=steps, num_seeds=num_seeds, **values)
    return json.loads(json.dumps({"script": script, **dataclasses.asdict(config)}))


def write_scores(path, config, scores, seconds, episodes):
    """One row per seed, below two lines that say how they were made; `config` as in config.json.

    The file is there when it is complete: until then the cell counts as missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax", "gymnax"))
    with unfinished.open("w", newline="") as file:
        file.write(
            f"# {time.strftime('%Y-%m-%d')}, {seconds:.0f} s on the CPU ({platform.machine()}), "
            f"Python {platform.python_version()}, {versions}\n"
            f"# {json.dumps(config)}\n"
        )
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["seed", "episodes", "mean_episodic_return"])
        for seed, score in enumerate(scores):
            writer.writerow([seed, episodes, f"{score:.6g}"])
    unfinished.replace(path)


def read_scores(path):
    """Mean return of each seed, [seeds]."""
    with path.open(newline="") as file:
        rows = (line for line in file if not line.startswith("#"))
        return np.array([float(r["mean_episodic_return"]) for r in csv.DictReader(rows)])


def is_current(path, config):
    """Whether there is a result, made with this configuration."""
    if not path.exists():
        return False
    with path.open() as file:
        file.readline()
        return json.loads(file.readline().removeprefix("# ")) == config


def interquartile_mean(x, axis=-1):
    return scipy.stats.trim_mean(x, 0.25, axis=axis)


def interval(scores):
    """95 % bootstrap interval of the interquartile mean over seeds."""
    result = scipy.stats.bootstrap((scores,), interquartile_mean, method="percentile", rng=0)
    return result.confidence_interval


# ---- The table of results ----


def read_evaluation(run_dir):
    """Mean return of each seed of a run, [seeds], and the number of episodes that each played."""
    with (run_dir / "evaluation.csv").open(newline="") as file:
        rows = [(int(r["seed"]), float(r["episodic_return"])) for r in csv.DictReader(file)]
    seeds = sorted({seed for seed, _ in rows})
    scores = np.array([np.mean([x for other, x in rows if other == seed]) for seed in seeds])
    return scores, len(rows) // len(seeds)


def write_curve(path, run_dir):
    """The returns of training: the mean of each hundredth of the run, one column per seed."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = [(r["seed"], int(r["env_step"]), r["episodic_return"]) for r in csv.DictReader(file)]
    num_seeds = len({seed for seed, *_ in rows})
    env_steps = np.array([step for _, step, _ in rows]).reshape(-1, num_seeds)[:, 0]
    returns = np.array([float(value or "nan") for *_, value in rows]).reshape(-1, num_seeds)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["env_step", *range(num_seeds)])
        for part in np.array_split(np.arange(len(env_steps)), min(100, len(env_steps))):
            known = np.isfinite(returns[part])
            total = np.where(known, returns[part], 0).sum(axis=0)
            means = total / np.where(known.any(axis=0), known.sum(axis=0), np.nan)
            values = ("" if np.isnan(mean) else f"{mean:.5g}" for mean in means)
            writer.writerow([env_steps[part[-1]], *values])


class Run(NamedTuple):
    scores: np.ndarray  # [seeds]
    episodes: int  # of each seed, whose mean is its score
    trained_steps: int  # per seed
    config: dict  # as in config.json, but for its format


def run_script(script, env_id, steps, seeds, folder, flags=(), curve=None):
    """Run the documented command in `folder`, where the script lies, or go on with what has begun
    there. Then the folder goes away, but for the learning curve, which is kept as `curve`."""
    command = [sys.executable, f"{script}.py"]
    begun = [path.parent for path in folder.glob("runs/*/checkpoints")]
    if begun:
        command += ["--resume", str(begun[0].relative_to(folder))]
    else:
        command += ["--env-id", env_id, "--total-timesteps", str(steps)]
        command += ["--num-seeds", str(len(seeds)), "--seed", str(seeds[0]), *flags]
    print(f"\npython {' '.join(command[1:])}", flush=True)
    process = subprocess.Popen(command, cwd=folder)
    terminate = lambda *_: process.terminate()
    before = signal.signal(signal.SIGTERM, terminate)
    while process.returncode is None:
        try:
            process.wait()
        except KeyboardInterrupt:  # the script got it, too, and saves
            continue
    signal.signal(signal.SIGTERM, before)
    if process.returncode:
        sys.exit(process.returncode)
    (run_dir,) = folder.glob("runs/*")
    config = json.loads((run_dir / "config.json").read_text())
    del config["format"]
    batch = config["num_envs"] * config["num_steps"]
    run = Run(*read_evaluation(run_dir), steps // batch * batch, config)
    if curve:
        write_curve(curve, run_dir)
    shutil.rmtree(folder)
    return run


def run_cell(script, env_id, steps, num_seeds, folder=RESULTS, work=WORK):
    """Run the documented command; keep each seed's score and the curve."""
    path = result_path(script, env_id, steps, folder)
    # Of another configuration nothing is to go on: its folder has another name.
    asked = json.dumps(configuration(script, env_id, steps, num_seeds))
    empty = work / f"{path.stem}__{zlib.crc32(asked.encode())}"
    empty.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / f"{script}.py", empty)
    start = time.perf_counter()
    curve = path.with_suffix(".curve.csv")
    run = run_script(script, env_id, steps, range(num_seeds), empty, curve=curve)
    write_scores(path, run.config, run.scores, time.perf_counter() - start, run.episodes)


def budget(steps):
    return f"{steps // 1_000_000}M" if steps % 1_000_000 == 0 else f"{steps // 1000}k"


def cell_text(script, env_id, steps, num_seeds):
    path = result_path(script, env_id, steps)
    if not is_current(path, configuration(script, env_id, steps, num_seeds)):
        return ""
    scores = read_scores(path)
    if len(scores) == 1:
        return f"**{scores[0]:z.2f}** (1 seed)"
    low, high = interval(scores)
    few = "" if len(scores) == 10 else f", {len(scores)} seeds"
    return (
        f"**{interquartile_mean(scores):z.2f}** "
        f"({low:z.2f} to {high:z.2f}; worst {scores.min():z.2f}{few})"
    )


def optima():
    """The best that any policy can do in the episodes of seeds 0 to 9, where that is known."""
    with (RESULTS / "optimum.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if float(row["discount"]) == 1]
    return {row["environment"]: f"{float(row['seeds_0_to_9']):.2f}" for row in rows}


def results_table():
    """One row per environment and budget, one column per algorithm."""
    columns = " | ".join(LABELS.values())
    lines = [f"| environment | steps | {columns} | optimum | published PPO or TRPO |"]
    lines += ["|---" * 7 + "|"]
    optimum = optima()
    for row in ROWS + MINATAR:
        env_id, steps, _, published = row
        texts = [cell_text(*cell) for cell in cells_of(row)]
        if any(texts):
            texts += optimum.get(env_id, "-"), published
            lines.append(f"| {env_id} | {budget(steps)} | {' | '.join(texts)} |")
    return "\n".join(lines)


def draw_curve(axes, paths, label, color):
    """Interquartile mean over the seeds of these files, and the middle half of them."""
    parts = [np.genfromtxt(path, delimiter=",", skip_header=1) for path in paths]
    env_steps, returns = parts[0][:, 0], np.hstack([part[:, 1:] for part in parts])
    known = np.isfinite(returns).all(axis=1)
    thousands, returns = env_steps[known] / 1000, returns[known]
    axes.plot(thousands, interquartile_mean(returns, axis=1), label=label, color=color)
    low, high = np.quantile(returns, [0.25, 0.75], axis=1)
    axes.fill_between(thousands, low, high, alpha=0.2, color=color, linewidth=0)


def curves_figure():
    """One panel per environment."""
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    for axes, (env_id, steps) in zip(panels, CURVES, strict=True):
        for column, label in LABELS.items():
            script = script_of(column, env_id)
            path = result_path(script, env_id, steps)
            if is_current(path, configuration(script, env_id, steps, 10)):
                draw_curve(axes, [path.with_suffix(".curve.csv")], label, COLORS[column])
        axes.set(title=env_id, xlabel="thousand steps per seed", ylabel="return in training")
        axes.grid(alpha=0.3)
    panels[0].legend(loc="lower right")
    figure.savefig(RESULTS / "learning_curves.png", dpi=110)


def repeat_quickly():
    """Run some cells again; True if each result lies in the interval of the stored one."""
    good = True
    with tempfile.TemporaryDirectory() as folder:
        for env_id, steps, column in QUICK:
            script = script_of(column, env_id)
            run_cell(script, env_id, steps, 10, Path(folder), Path(folder))
            score = interquartile_mean(
                read_scores(result_path(script, env_id, steps, Path(folder)))
            )
            low, high = interval(read_scores(result_path(script, env_id, steps)))
            inside = low - 0.005 <= score <= high + 0.005
            good &= inside
            print(
                f"{script} on {env_id}: {score:.2f}, stored interval {low:.2f} to {high:.2f}"
                f"{'' if inside else '   <- OUTSIDE'}"
            )
    return good


# ---- The ablation study ----

ABLATION_ENVS = [  # environment, steps, seeds; hopper needs Brax (benchmarks/requirements.txt)
    ("CartPole-v1", 100_000, 10),
    ("Acrobot-v1", 300_000, 10),
    ("Pendulum-v1", 300_000, 10),
    ("MountainCarContinuous-v0", 100_000, 10),
    ("environments:hopper-brax", 1_000_000, 6),
    ("Breakout-MinAtar", 2_000_000, 6),
]


def only_clipped(ratio, advantage, clip_eps):
    return jnp.mean(jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps) * advantage)


def unclipped(ratio, advantage, clip_eps):
    return jnp.mean(ratio * advantage)


def accept_always(measure, theta, step, max_kl, num_tries, ratio):
    import trpo

    improvement, kl = measure(theta + step)
    return trpo.LineSearch(theta + step, jnp.asarray(True), jnp.asarray(1), improvement, kl)


def terminate_at_time_limits(script):
    gae = script.gae
    return lambda reward, value, next_value, terminated, done, *rest: gae(
        reward, value, next_value, done, done, *rest
    )


# name: (column, values of the configuration, {public function: what replaces it})
ABLATIONS = {
    "clip: default (ε = 0.2)": (CLIP, {}, {}),
    "ε = 0.1": (CLIP, {"clip_eps": 0.1}, {}),
    "ε = 0.3": (CLIP, {"clip_eps": 0.3}, {}),
    "ε = 0.5": (CLIP, {"clip_eps": 0.5}, {}),
    "1 epoch": (CLIP, {"update_epochs": 1}, {}),
    "4 epochs": (CLIP, {"update_epochs": 4}, {}),
    "10 epochs": (CLIP, {"update_epochs": 10}, {}),
    "30 epochs": (CLIP, {"update_epochs": 30}, {}),
    "normalised observations": (CLIP, {"normalize_obs": True}, {}),
    "raw observations": (CLIP, {"normalize_obs": False}, {}),
    "tanh": (CLIP, {"activation": "tanh"}, {}),
    "ReLU": (CLIP, {"activation": "relu"}, {}),
    "no advantage normalisation": (CLIP, {}, {"normalize_advantage": lambda _: lambda a: a}),
    "no minimum, only the clipped term": (CLIP, {}, {"clipped_surrogate": lambda _: only_clipped}),
    "no clip": (CLIP, {}, {"clipped_surrogate": lambda _: unclipped}),
    "time limits as terminations": (CLIP, {}, {"gae": terminate_at_time_limits}),
    "the same, tanh": (CLIP, {"activation": "tanh"}, {"gae": terminate_at_time_limits}),
    "value clipping": (CLIP, {"clip_vloss": True}, {}),
    "penalty: default (adaptive β)": (PENALTY, {}, {}),
    "fixed β = 0.3": (PENALTY, {"adaptive_beta": False, "beta": 0.3}, {}),
    "fixed β = 3": (PENALTY, {"adaptive_beta": False, "beta": 3.0}, {}),
    "TRPO: default": (TRPO, {}, {}),
    "TRPO without line search": (TRPO, {}, {"line_search": lambda _: accept_always}),
}


# What the tables call those whose files have another name.
SHOWN = {
    "clip: default (ε = 0.2)": "PPO-clip: default (ε = 0.2)",
    "penalty: default (adaptive β)": "PPO-penalty: default (adaptive β)",
}


def ablation_path(name, env_id):
    words = "".join(c if c.isalnum() or c == "." else "_" for c in name)
    return RESULTS / "ablations" / f"{words}__{env_id.rpartition(':')[2]}.csv"


def ablation_values(name, script):
    """What an ablation changes. None has the threshold of CartPole's preset, which does the work of
    the clip, and of β, where these fail."""
    _, values, _ = ABLATIONS[name]
    has_threshold = hasattr(importlib.import_module(script).Config, "kl_threshold")
    return {"kl_threshold": None, **values} if has_threshold else values


def ablation_configuration(name, env_id, steps, num_seeds):
    script = script_of(ABLATIONS[name][0], env_id)
    return configuration(script, env_id, steps, num_seeds, **ablation_values(name, script))


def run_ablation(name, env_id, steps, num_seeds):
    """Train in this process, with one thing changed; same seeds and episodes as a cell's."""
    column, _, functions = ABLATIONS[name]
    script = importlib.import_module(script_of(column, env_id))
    values = ablation_values(name, script.__name__)
    originals = {function: getattr(script, function) for function in functions}
    config = dataclasses.replace(script.default_config(env_id), total_timesteps=steps, **values)
    keys = jax.vmap(jax.random.key)(jnp.arange(num_seeds))

    def score(key):
        state, _ = script.train(config, key)
        play = functools.partial(script.evaluate, num_episodes=script.EVALUATION_EPISODES)
        return play(config, state, jax.random.fold_in(key, 2**31))[0].mean()

    start = time.perf_counter()
    try:
        for function, make in functions.items():
            setattr(script, function, make(script))
        scores = np.asarray(script.over_seeds(score)(keys))
    finally:
        for function, original in originals.items():
            setattr(script, function, original)
    seconds = time.perf_counter() - start
    stored = ablation_configuration(name, env_id, steps, num_seeds)
    write_scores(ablation_path(name, env_id), stored, scores, seconds, script.EVALUATION_EPISODES)
    print(f"{name}, {env_id}: {interquartile_mean(scores):.2f} in {seconds:.0f} s", flush=True)


def ablation_scores(name, env_id, steps, num_seeds):
    """Mean return of each seed, or None where there is no result of today's configuration."""
    path = ablation_path(name, env_id)
    current = is_current(path, ablation_configuration(name, env_id, steps, num_seeds))
    return read_scores(path) if current else None


def ablation_columns():
    """Those with a result."""
    known = lambda column: any(ablation_path(name, column[0]).exists() for name in ABLATIONS)
    return [column for column in ABLATION_ENVS if known(column)]


def ablation_title(env_id, steps, num_seeds):
    few = "" if num_seeds == 10 else f", {num_seeds} seeds"
    return f"{env_id.rpartition(':')[2]}, {budget(steps)}{few}"


def ablation_table():
    """One row per ablation, one column per environment."""
    columns = [ablation_title(*column) for column in ablation_columns()]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in ABLATIONS:
        texts = []
        for column in ablation_columns():
            scores = ablation_scores(name, *column)
            if scores is None:
                texts.append("")
                continue
            low, high = interval(scores)
            texts.append(f"**{interquartile_mean(scores):z.1f}** ({low:z.1f} to {high:z.1f})")
        lines.append(f"| {SHOWN.get(name, name)} | {' | '.join(texts)} |")
    return "\n".join(lines)


def ablation_figure():
    """One panel per environment, one bar of interval and point per ablation."""
    columns = ablation_columns()
    figure = Figure(figsize=(2 + 2.5 * len(columns), 4.6), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True)
    for axes, column in zip(panels, columns, strict=True):
        for row, name in enumerate(ABLATIONS):
            scores = ablation_scores(name, *column)
            if scores is None:
                continue
            color = COLORS[ABLATIONS[name][0]]
            axes.plot(interval(scores), [row, row], color=color, linewidth=4, alpha=0.4)
            axes.plot(interquartile_mean(scores), row, "o", color=color)
        axes.set_title(ablation_title(*column), fontsize="small")
        axes.set_xlabel("return")
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(ABLATIONS)), [SHOWN.get(name, name) for name in ABLATIONS])
    panels[0].invert_yaxis()
    figure.savefig(RESULTS / "ablations.png", dpi=110)


# ---- Command line ----


def replace_table(name, table):
    """Put a table between its markers in docs/results.md."""
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, rest = DOCUMENT.read_text().split(start)
    DOCUMENT.write_text(f"{before}{start}{table}\n{end}{rest.split(end)[1]}")


def write_document():
    """The tables, between their markers, and the figures."""
    replace_table("results", results_table())
    replace_table("ablations", ablation_table())
    curves_figure()
    ablation_figure()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="what the name of a cell must contain")
    parser.add_argument("--ablations", action="store_true", help="run the ablation study")
    parser.add_argument("--tables", action="store_true", help="train nothing")
    parser.add_argument("--quick", action="store_true", help="repeat four cells and compare")
    arguments = parser.parse_args()
    if arguments.quick:
        sys.exit(0 if repeat_quickly() else 1)
    if arguments.ablations:
        ppo_discrete.use_cores(2)  # before JAX starts; all numbers of seeds are even
        ppo_discrete.straight_threefry()
        for column in ABLATION_ENVS:
            for name in ABLATIONS:
                wanted = arguments.only in f"{name} {column[0]}"
                if wanted and ablation_scores(name, *column) is None:
                    run_ablation(name, *column)
    elif not arguments.tables:
        for cell in cells():
            wanted = arguments.only in " ".join(map(str, cell))
            if wanted and not is_current(result_path(*cell[:3]), configuration(*cell)):
                run_cell(*cell)
    write_document()


if __name__ == "__main__":
    main()
