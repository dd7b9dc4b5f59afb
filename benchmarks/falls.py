"""How often a run loses what it had learned: solved tasks on which the return falls again.

    python benchmarks/falls.py                       # seeds 1000 to 1999, hours; goes on if killed
    python benchmarks/falls.py --seeds 100 --scripts ppo_discrete --no-preset
    python benchmarks/falls.py --tables              # train nothing, write the table

Each script trains with the documented command's configuration, or, with --no-preset, with its
defaults alone. A run has solved its task with the
first update whose episodes return `solved` or more on average. It falls if later, in two updates
running, four or more ended episodes return less than `low` on average. Per script and task
benchmarks/results/falls.csv has a row per seed: the update that solved it, the first update of a
fall, or nothing, and the mean return of the greedy evaluation at the end.

The games of MinAtar have no return that solves them. For these a second table tells how deep the
learning curves of learning.py dip below what they had reached.
"""

import argparse
import csv
import dataclasses
import functools
import importlib
import sys
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))
import learning

FILE = learning.RESULTS / "falls.csv"
TASKS = {  # steps per seed, return that solves it, return that is a fall
    "CartPole-v1": (500_000, 495.0, 400.0),
    "Acrobot-v1": (500_000, -100.0, -200.0),
}
SCRIPTS = ["ppo_discrete", "ppo_penalty", "trpo"]
CHUNK = 20  # seeds that train side by side


class Counted(NamedTuple):
    """The state of N environments, and how many episodes each has ended."""

    env_state: Any
    ended: jax.Array  # [N]


def counted(script, env):
    """The same environments, which count the episodes that they end."""

    def reset(keys):
        obs, env_state = env.reset(keys)
        return obs, Counted(env_state, jnp.zeros(len(keys), jnp.int32))

    def step(keys, state, action):
        env_state, next_obs, reset_obs, reward, terminated, truncated = env.step(
            keys, state.env_state, action
        )
        state = Counted(env_state, state.ended + (terminated | truncated))
        return state, next_obs, reset_obs, reward, terminated, truncated

    return script.Environment(reset, step, env.action_space)


def fall(returns, ended, solved, low):
    """First update that solves and first of a fall, or -1, of one seed: arrays [updates]."""
    first = np.flatnonzero(returns >= solved)  # a NaN is neither: no episode ended
    if not len(first):
        return -1, -1
    bad = (returns < low) & (ended >= 4) & (np.arange(len(returns)) > first[0])
    twice = np.flatnonzero(bad[1:] & bad[:-1])
    return first[0], twice[0] if len(twice) else -1


def configuration(name, env_id, preset):
    """The script, its configuration for a task, and a number by which rows of it are known."""
    script = importlib.import_module(name)
    config = script.default_config(env_id) if preset else script.Config(env_id=env_id)
    config = dataclasses.replace(config, total_timesteps=TASKS[env_id][0])
    return script, config, zlib.crc32(repr(config).encode())


@functools.cache
def runs(name, env_id, preset):
    """The program that trains some seeds: returns and ended episodes per update, greedy return."""
    script, config, _ = configuration(name, env_id, preset)
    env = counted(script, script.make_env(env_id))
    init, update = script.make_train(config, env)

    def run(seed):
        def step(state, _):
            before = state.env_state.ended.sum()
            state, metrics = update(state, None)
            return state, (metrics["episodic_return"], state.env_state.ended.sum() - before)

        key = jax.random.key(seed)
        state, (returns, ended) = jax.lax.scan(step, init(key), None, config.num_updates)
        key = jax.random.fold_in(key, 2**31)
        greedy, _ = script.evaluate(config, state, key, script.EVALUATION_EPISODES, env)
        return returns, ended, greedy.mean()

    return script.over_seeds(run)


def measure(name, env_id, preset, seeds):
    """Rows of falls.csv for some seeds of a script."""
    checksum = configuration(name, env_id, preset)[2]
    _, solved, low = TASKS[env_id]
    returns, ended, greedy = jax.device_get(runs(name, env_id, preset)(seeds))
    for i, seed in enumerate(seeds):
        when = fall(returns[i], ended[i], solved, low)
        yield [name, env_id, seed, *when, f"{greedy[i]:.2f}", jax.__version__, checksum]


def read(name, env_id, preset):
    """Rows of falls.csv that the current configuration made, as dictionaries."""
    if not FILE.exists():
        return []
    now = name, env_id, str(configuration(name, env_id, preset)[2])
    with FILE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [x for x in rows if (x["script"], x["env_id"], x["configuration"]) == now]


def table():
    """Markdown: a row per script, task and configuration."""
    lines = [
        "| script | task | seeds | solved after (median, last) | fell | below at the end |",
        "|---|---|---|---|---|---|",
    ]
    for name in SCRIPTS:
        for env_id in TASKS:
            _, config, checksum = configuration(name, env_id, preset=True)
            lines += row(f"`{name}`", env_id, read(name, env_id, True), config.batch_size)
            if checksum != configuration(name, env_id, preset=False)[2]:
                label = f"`{name}`, without its preset"
                lines += row(label, env_id, read(name, env_id, False), config.batch_size)
    return "\n".join(lines)


def row(label, env_id, rows, batch_size):
    """One line of the table, or none where there are no rows."""
    if not rows:
        return []
    first = np.array([int(x["solved"]) for x in rows])
    steps = np.where(first < 0, 10**9, (first + 1) * batch_size)
    last = f"{steps.max():,}" if steps.max() < 10**9 else "never"
    fell = sum(int(x["fell"]) >= 0 for x in rows)
    end = sum(float(x["greedy"]) < TASKS[env_id][1] - 20 for x in rows)
    cells = [label, env_id, len(rows), f"{np.median(steps):,.0f}, {last}"]
    cells += [f"{fell} ({100 * fell / len(rows):.1f} %)", end]
    return ["| " + " | ".join(map(str, cells)) + " |"]


def deepest_dip(returns, window=5):
    """How much was left at worst: [points, seeds] -> [seeds].

    The least ratio of a mean over `window` points of the curve to the largest such mean up to then.
    """
    complete = returns[~np.isnan(returns).any(axis=1)]  # at first no episode may have ended
    means = np.lib.stride_tricks.sliding_window_view(complete, window, axis=0).mean(axis=-1)
    return (means / np.maximum.accumulate(means)).min(axis=0)


def dips_table():
    """Markdown: a row per game of MinAtar, median and worst seed of each algorithm."""
    lines = ["| game | PPO-clip | PPO-penalty | TRPO |", "|---|---|---|---|"]
    for env_id, steps, _, _ in learning.MINATAR:
        cells = []
        for name in SCRIPTS:
            curve = learning.result_path(name, env_id, steps).with_suffix(".curve.csv")
            dips = deepest_dip(np.genfromtxt(curve, delimiter=",", skip_header=1)[:, 1:])
            cells.append(f"{np.median(dips):.2f} ({dips.min():.2f}, {len(dips)} seeds)")
        lines.append(f"| {env_id} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=1000, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1000, help="how many, counted up from it")
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS, choices=SCRIPTS)
    parser.add_argument("--tasks", nargs="+", default=["CartPole-v1"], choices=list(TASKS))
    parser.add_argument("--no-preset", action="store_true", help="the script's defaults alone")
    parser.add_argument("--tables", action="store_true", help="train nothing")
    flags = parser.parse_args()
    if not flags.tables:
        learning.ppo_discrete.use_cores(CHUNK)
        learning.ppo_discrete.straight_threefry()
        for name in flags.scripts:
            for env_id in flags.tasks:
                seeds = range(flags.first, flags.first + flags.seeds)
                run_missing(name, env_id, not flags.no_preset, seeds)
    for name, text in (("falls", table()), ("dips", dips_table())):
        print(text)
        learning.replace_table(name, text)


def run_missing(name, env_id, preset, seeds):
    """Train the seeds that falls.csv does not have, a chunk at a time."""
    done = {int(x["seed"]) for x in read(name, env_id, preset)}
    missing = [seed for seed in seeds if seed not in done]
    for i in range(0, len(missing), CHUNK):
        rows = list(measure(name, env_id, preset, np.array(missing[i : i + CHUNK])))
        is_new = not FILE.exists()
        with FILE.open("a", newline="") as file:
            columns = ["script", "env_id", "seed", "solved", "fell", "greedy", "jax"]
            columns.append("configuration")
            csv.writer(file).writerows([columns] * is_new + rows)
        fell = [int(row[2]) for row in rows if row[4] >= 0]
        print(f"{name} {env_id}: seeds {rows[0][2]} to {rows[-1][2]}, fell: {fell}", flush=True)


if __name__ == "__main__":
    main()
