"""Classic control with ten other seeds than those that chose the defaults, and in Gymnasium.

    python benchmarks/heldout.py                   # seeds 1000 to 1009; a quarter of an hour
    python benchmarks/heldout.py --only Acrobot    # of these, those whose name contains this
    python benchmarks/heldout.py --tables          # train nothing, write the table

Trained are the tasks of classic control, each with its largest budget in the table of results, and
the configuration of the documented command. The trained policies then play as many episodes in
Gymnasium's environment of the same name, which is another program with the same rules: greedily,
with the statistics of the training. benchmarks/results/heldout.csv has a row per seed. It
goes on with the cell that it was at; rows of another configuration count as missing.
"""

import argparse
import csv
import dataclasses
import functools
import importlib
import json
import math
import time
import zlib
from importlib.metadata import version

import gymnasium
import jax
import learning
import numpy as np
from learning import budget, configuration, interquartile_mean, interval, ppo_discrete

STORED = learning.RESULTS / "heldout.csv"
SEEDS = np.arange(1000, 1010)
CLASSIC = [row for row in learning.ROWS if row[0].endswith(("-v0", "-v1"))]
TASKS = {env_id: steps for env_id, steps, *_ in CLASSIC}  # of several budgets the last, largest
COLUMNS = "script environment steps seed mean_episodic_return gymnasium date jax configuration"
COLUMNS = COLUMNS.split()


def checksum(script, env_id):
    """By which rows of a configuration are known."""
    values = configuration(script, env_id, TASKS[env_id], len(SEEDS))
    return str(zlib.crc32(json.dumps(values).encode()))


def read(script, env_id):
    """Scores here and in Gymnasium, both [seeds], or None where there are no current ones."""
    if not STORED.exists():
        return None
    with STORED.open(newline="") as file:
        now = [script, env_id, checksum(script, env_id)]
        rows = [
            (float(row["mean_episodic_return"]), float(row["gymnasium"]))
            for row in csv.DictReader(file)
            if [row["script"], row["environment"], row["configuration"]] == now
        ]
    return np.array(rows).T if rows else None


def greedy(script, config):
    """What acts: state of a seed, obs [E, D] -> actions [E, ...] of the environment."""
    space = script.make_env(config.env_id).action_space
    sizes = {"ppo_discrete": lambda: space.n, "ppo_continuous": lambda: math.prod(space.shape)}
    size = sizes.get(script.__name__, lambda: space)()
    actor = script.Actor(size, config.hidden_sizes, config.activation)
    bound = getattr(script, "bound_action", lambda action, _: action)

    def act(state, obs):
        obs = script.normalize(obs, state.obs_stats)
        return bound(actor.apply(state.params["actor"], obs).mode(), space)

    return act


def play_gymnasium(env_id, act, episodes):
    """Returns [seeds, episodes] of `act`, obs [seeds, episodes, D] -> actions, in Gymnasium."""
    shape = len(SEEDS), episodes
    envs = [gymnasium.make(env_id) for _ in range(math.prod(shape))]
    obs = np.array([env.reset(seed=i)[0] for i, env in enumerate(envs)], np.float32)
    total, playing = np.zeros(len(envs)), np.ones(len(envs), bool)
    while playing.any():
        actions = np.asarray(act(obs.reshape(*shape, -1))).reshape(len(envs), -1)
        for i in np.flatnonzero(playing):
            action = int(actions[i, 0]) if hasattr(envs[i].action_space, "n") else actions[i]
            obs[i], reward, terminated, truncated, _ = envs[i].step(action)
            total[i] += reward
            playing[i] = not (terminated or truncated)
    return total.reshape(shape)


def measure(name, env_id):
    """Train a cell; add its rows."""
    script = importlib.import_module(name)
    config = script.default_config(env_id)
    config = dataclasses.replace(config, total_timesteps=TASKS[env_id])

    def run(seed):
        key = jax.random.key(seed)
        state, _ = script.train(config, key)
        key = jax.random.fold_in(key, 2**31)
        return state, script.evaluate(config, state, key, script.EVALUATION_EPISODES)[0].mean()

    clock = time.perf_counter()
    states, here = jax.device_get(script.over_seeds(run)(SEEDS))
    act = functools.partial(jax.jit(jax.vmap(greedy(script, config))), states)
    there = play_gymnasium(env_id, act, script.EVALUATION_EPISODES).mean(axis=1)
    made = time.strftime("%Y-%m-%d"), version("jax"), checksum(name, env_id)
    is_new = not STORED.exists()
    with STORED.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS] * is_new)
        for seed, *scores in zip(SEEDS, here, there, strict=True):
            scores = (f"{score:.6g}" for score in scores)
            writer.writerow([name, env_id, TASKS[env_id], seed, *scores, *made])
    means = [f"{interquartile_mean(scores):.2f}" for scores in (here, there)]
    seconds = f"{time.perf_counter() - clock:.0f} s"
    print(f"{name} on {env_id}: {means[0]}, in Gymnasium {means[1]}, in {seconds}", flush=True)


def cell(scores):
    low, high = interval(scores)
    return f"**{interquartile_mean(scores):z.2f}** ({low:z.2f} to {high:z.2f})"


def table():
    """A row per task and algorithm: seeds 0-9, seeds 1000-1009, these in Gymnasium."""
    lines = ["| environment | steps | | seeds 0-9 | seeds 1000-1009 | these in Gymnasium |"]
    lines += ["|---" * 6 + "|"]
    for env_id, steps in TASKS.items():
        for column in learning.LABELS:
            script = learning.script_of(column, env_id)
            path = learning.result_path(script, env_id, steps)
            known = learning.is_current(path, configuration(script, env_id, steps, 10))
            texts = [cell(learning.read_scores(path)) if known else ""]
            scores = read(script, env_id)
            texts += ["", ""] if scores is None else [cell(x) for x in scores]
            if any(texts[1:]):
                row = env_id, budget(steps), learning.LABELS[column], *texts
                lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="what the name of a cell must contain")
    parser.add_argument("--tables", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    ppo_discrete.use_cores(len(SEEDS))  # before JAX starts
    ppo_discrete.straight_threefry()
    for env_id in TASKS if not arguments.tables else []:
        for column in learning.LABELS:
            script = learning.script_of(column, env_id)
            if arguments.only in f"{script} {env_id}" and read(script, env_id) is None:
                measure(script, env_id)
    learning.replace_table("held out", table())
    print("\n" + table())


if __name__ == "__main__":
    main()
