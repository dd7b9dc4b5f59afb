"""PPO-clip, PPO-penalty and TRPO on Brax's locomotion tasks, beside Brax's own PPO and PureJaxRL's.

    python benchmarks/locomotion.py                          # all that has no current result
    python benchmarks/locomotion.py --purejaxrl ~/purejaxrl  # PureJaxRL's, too, from a checkout
    python benchmarks/locomotion.py --only hopper --steps 1000000 --seeds 3
    python benchmarks/locomotion.py --tables                 # train nothing, write the tables
    python benchmarks/locomotion.py --quick                  # does it all work? two minutes

It needs `benchmarks/requirements.txt`. Spring physics, episodes of 1000 steps. Ours are run with
the documented command and no other flag, Brax's and PureJaxRL's with the settings that their
authors published. All are scored by the mean return of 100 greedy episodes per seed, played in our
adapter. Results are rows of benchmarks/results/locomotion.csv, written when a cell of the table is
complete (Brax's PPO: a seed of it). A run that was stopped or killed goes on where it was: a cell
of ours from its last checkpoint, which lies in runs/locomotion/.

What is not the same for all:
- Brax trains in whole iterations of 0.3M to 1.6M steps, and does as many as reach the budget: it
  gets up to 0.64M steps more than the others. The column `trained_steps` has the number.
- Brax has published settings of PPO for four of the tasks, and of SAC for hopper and walker2d;
  there its PPO gets the settings for halfcheetah, the other planar runner.
- Brax and PureJaxRL reset to the state in which an environment began, and PureJaxRL takes a time
  limit for an end. Their policies are scored with fresh beginnings, like ours.
"""

import argparse
import csv
import functools
import hashlib
import json
import shutil
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import environments
import jax
import jax.numpy as jnp
import numpy as np
import purejaxrl
from learning import (
    RESULTS,
    ROOT,
    budget,
    configuration,
    draw_curve,
    interquartile_mean,
    interval,
    replace_table,
    run_script,
)
from matplotlib.figure import Figure

import ppo_discrete  # found through `learning`

TASKS = ("inverted_double_pendulum", "reacher", "hopper", "walker2d", "halfcheetah", "ant")
BUDGETS = (1_000_000, 3_000_000)
OURS = {"ppo_continuous": "PPO-clip", "ppo_penalty": "PPO-penalty", "trpo": "TRPO"}
LABELS = OURS | {"brax": "Brax's PPO", "purejaxrl": "PureJaxRL"}
EPISODES, LIMIT = 100, 1000
COLUMNS = "algorithm environment steps seed mean_episodic_return episodes trained_steps seconds "
COLUMNS = (COLUMNS + "date jax brax settings").split()

# notebooks/training.ipynb of github.com/google/brax; all normalise observations.
PLANAR = dict(reward_scaling=1, unroll_length=20, num_minibatches=32, num_updates_per_batch=8)
PLANAR |= dict(discounting=0.95, learning_rate=3e-4, entropy_cost=1e-3)
PLANAR |= dict(num_envs=2048, batch_size=512, action_repeat=1)
PENDULUM = dict(reward_scaling=10, unroll_length=5, num_minibatches=32, num_updates_per_batch=4)
PENDULUM |= dict(discounting=0.97, learning_rate=3e-4, entropy_cost=1e-2)
PENDULUM |= dict(num_envs=2048, batch_size=1024, action_repeat=1)
REACHER = dict(reward_scaling=5, unroll_length=50, num_minibatches=32, num_updates_per_batch=8)
REACHER |= dict(discounting=0.95, learning_rate=3e-4, entropy_cost=1e-3)
REACHER |= dict(num_envs=2048, batch_size=256, action_repeat=4)
BRAX = dict.fromkeys(TASKS, PLANAR) | dict(inverted_double_pendulum=PENDULUM, reacher=REACHER)
BRAX |= dict(ant=PENDULUM | dict(num_envs=4096, batch_size=2048))

# purejaxrl/ppo_continuous_action.py of github.com/luchris429/purejaxrl, as it stands.
PUREJAXRL = dict(NUM_ENVS=2048, NUM_STEPS=10, UPDATE_EPOCHS=4, NUM_MINIBATCHES=32, LR=3e-4)
PUREJAXRL |= dict(GAMMA=0.99, GAE_LAMBDA=0.95, CLIP_EPS=0.2, ENT_COEF=0.0, VF_COEF=0.5)
PUREJAXRL |= dict(MAX_GRAD_NORM=0.5, ACTIVATION="tanh", ANNEAL_LR=False, NORMALIZE_ENV=True)

# What --quick changes: everything is small.
QUICK = ["--num-envs", "8", "--num-steps", "64", "--num-minibatches", "4", "--update-epochs", "2"]
QUICK_BRAX = dict(num_envs=16, batch_size=16, num_minibatches=4, unroll_length=5)
QUICK_PUREJAXRL = dict(NUM_ENVS=16, NUM_STEPS=16, NUM_MINIBATCHES=4)


# ---- Results on disk ----


def settings(algorithm, task, steps):
    """A short name of the configuration: results of another one count as missing."""
    if algorithm in OURS:
        values = configuration(algorithm, env_id(task), steps, 1)
    else:
        values = BRAX[task] if algorithm == "brax" else PUREJAXRL
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def read_rows(path):
    """All rows, each a dictionary of strings."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def of_cell(rows, cell):
    """Seed and row of the current results of (algorithm, task, steps)."""
    expected = [*map(str, cell), settings(*cell)]
    names = ("algorithm", "environment", "steps", "settings")
    return {int(row["seed"]): row for row in rows if [row[name] for name in names] == expected}


def curve_path(path, cell, first):
    """Beside the results: the learning curve of a cell of ours, of the seeds from the first on."""
    return path.with_suffix("") / f"{'__'.join(map(str, cell))}__{first}.curve.csv"


def add_rows(path, cell, seeds, scores, trained_steps, seconds):
    """Add a row per seed in place of older ones. The file is exchanged as a whole: a kill leaves
    it as it was, or complete."""
    common = dict(zip(COLUMNS, map(str, cell), strict=False), settings=settings(*cell))
    common |= dict(episodes=EPISODES, trained_steps=trained_steps, seconds=f"{seconds:.0f}")
    common |= dict(date=time.strftime("%Y-%m-%d"), jax=version("jax"), brax=version("brax"))
    new = [
        common | dict(seed=str(seed), mean_episodic_return=f"{score:.6g}")
        for seed, score in zip(seeds, scores, strict=True)
    ]
    key = lambda row: [row[name] for name in COLUMNS[:4]]
    replaced = [key(row) for row in new]
    rows = [row for row in read_rows(path) if key(row) not in replaced] + new
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(path)


# ---- Training ----


def env_id(task):
    return f"environments:{task}-brax"


def play(env, policy, key, repeat=1):
    """Mean return of EPISODES greedy ones; `policy` is obs [N, D] -> action [N, A], which is kept
    for `repeat` steps."""
    reset_key, step_key = jax.random.split(key)
    obs, env_state = env.reset(jax.random.split(reset_key, EPISODES))

    def step(carry, inputs):
        obs, env_state, action, playing, total = carry
        time, key = inputs
        action = jnp.where(time % repeat == 0, policy(obs), action)
        keys = jax.random.split(key, EPISODES)
        env_state, _, obs, reward, terminated, truncated = env.step(keys, env_state, action)
        total += jnp.where(playing, reward, 0.0)
        return (obs, env_state, action, playing & ~(terminated | truncated), total), None

    start = obs, env_state, jnp.zeros_like(policy(obs)), jnp.ones(EPISODES, bool)
    inputs = jnp.arange(LIMIT), jax.random.split(step_key, LIMIT)
    (*_, total), _ = jax.lax.scan(step, (*start, jnp.zeros(EPISODES)), inputs)
    return total.mean()


def score_key(seed):
    """The key that our scripts evaluate this seed with."""
    return jax.random.fold_in(jax.random.key(seed), 2**31)


def train_brax(task, steps, seed, changes):
    """Brax's PPO with its own wrappers: the score of a seed, and the steps that it trained."""
    from brax import envs
    from brax.training.agents.ppo import train as ppo

    # What Brax 0.14.2 calls and JAX 0.11 has no more.
    jax.device_put_replicated = lambda x, devices: jax.tree.map(
        lambda leaf: jnp.stack([leaf] * len(devices)), x
    )
    options = BRAX[task] | changes
    make_policy, params, _ = ppo.train(
        environment=envs.get_environment(task, backend="spring"),
        num_timesteps=steps,
        episode_length=LIMIT,
        normalize_observations=True,
        seed=seed,
        max_devices_per_host=1,
        run_evals=False,
        **options,
    )
    policy = make_policy(params, deterministic=True)
    env = environments.make(f"{task}-brax")
    act = lambda obs: policy(obs, jax.random.key(0))[0]
    score = jax.jit(functools.partial(play, env, act, repeat=options["action_repeat"]))
    names = ("batch_size", "unroll_length", "num_minibatches", "action_repeat")
    iteration = np.prod([options[name] for name in names])
    return float(score(score_key(seed))), int(-(-steps // iteration) * iteration)


def train_purejaxrl(checkout, task, steps, seeds, changes):
    """PureJaxRL's script for continuous actions on spring physics: scores, and steps trained."""
    module = purejaxrl.load_module(checkout, "ppo_continuous")
    module.BraxGymnaxWrapper = functools.partial(module.BraxGymnaxWrapper, backend="spring")
    options = PUREJAXRL | changes | dict(TOTAL_TIMESTEPS=steps, ENV_NAME=task)
    env = environments.make(f"{task}-brax")
    size = env.action_space.shape[0]
    network = module.ActorCritic(size, activation=options["ACTIVATION"])

    def score(seed):
        key = jax.random.key(seed)
        trained, env_state, *_ = module.make_train(options)(key)["runner_state"]
        stats = env_state.env_state  # of observations, inside of those of rewards; all rows alike
        mean, deviation = stats.mean[0], jnp.sqrt(stats.var[0] + 1e-8)

        def policy(obs):
            gaussian, _ = network.apply(trained.params, (obs - mean) / deviation)
            return jnp.clip(gaussian.loc, -1.0, 1.0)

        return play(env, policy, score_key(seed))

    even = len(seeds) % jax.device_count() == 0
    spread = ppo_discrete.over_seeds if even else lambda function: jax.jit(jax.vmap(function))
    batch = options["NUM_ENVS"] * options["NUM_STEPS"]
    return np.asarray(spread(score)(np.array(seeds))), steps // batch * batch


def complete(cell, path, num_seeds, work, checkout, quick=False):
    """Train the seeds of a cell that have no current result."""
    algorithm, task, steps = cell
    missing = [seed for seed in range(num_seeds) if seed not in of_cell(read_rows(path), cell)]
    if not missing:
        return
    print(f"\n{LABELS[algorithm]} on {task}, {budget(steps)} steps, seeds {missing}", flush=True)
    if algorithm in OURS:  # which count seeds up from the first
        missing = list(range(missing[0], num_seeds))
    groups = [[seed] for seed in missing] if algorithm == "brax" else [missing]
    for seeds in groups:
        clock = time.perf_counter()
        if algorithm == "brax":
            score, trained_steps = train_brax(task, steps, *seeds, QUICK_BRAX if quick else {})
            scores = [score]
        elif algorithm == "purejaxrl":
            changes = QUICK_PUREJAXRL if quick else {}
            scores, trained_steps = train_purejaxrl(checkout, task, steps, seeds, changes)
        else:
            name = "_".join(map(str, (*cell, settings(*cell), seeds[0], len(seeds))))
            (folder := work / name).mkdir(parents=True, exist_ok=True)
            for source in (ROOT / f"{algorithm}.py", ROOT / "benchmarks" / "environments.py"):
                shutil.copy(source, folder)
            flags = QUICK if quick else []
            curve = curve_path(path, cell, seeds[0])
            curve.parent.mkdir(parents=True, exist_ok=True)
            run = run_script(algorithm, env_id(task), steps, seeds, folder, flags, curve)
            scores, trained_steps = run.scores, run.trained_steps
        seconds = time.perf_counter() - clock
        add_rows(path, cell, seeds, scores, trained_steps, seconds)
        print(f"{interquartile_mean(np.array(scores)):.2f} in {seconds:.0f} s", flush=True)


# ---- Tables ----


def cell_text(rows, cell):
    """Interquartile mean over seeds, its 95 % bootstrap interval, and the worst seed."""
    found = of_cell(rows, cell).values()
    scores = np.array([float(row["mean_episodic_return"]) for row in found])
    if len(scores) < 2:
        return " ".join(f"{score:z.1f} (1 seed)" for score in scores)
    low, high = interval(scores)
    middle = f"**{interquartile_mean(scores):z.1f}** ({low:z.1f} to {high:z.1f}"
    return f"{middle}; worst {scores.min():z.1f}, {len(scores)} seeds)"


def table(rows, cells):
    """One row per task and budget, one column per algorithm."""
    lines = [f"| task | steps | {' | '.join(LABELS.values())} |", "|---" * (2 + len(LABELS)) + "|"]
    for task, steps in dict.fromkeys((task, steps) for _, task, steps in cells):
        texts = [cell_text(rows, (algorithm, task, steps)) for algorithm in LABELS]
        if any(texts):
            lines.append(f"| {task} | {budget(steps)} | {' | '.join(texts)} |")
    return "\n".join(lines)


def document_table():
    """The table in docs/results.md: all cells."""
    cells = [(name, task, steps) for steps in BUDGETS for task in TASKS for name in LABELS]
    return table(read_rows(RESULTS / "locomotion.csv"), cells)


def curves_figure(path):
    """One panel per task, for the largest budget that has results: ours in training, and what the
    policies of the others return at the end."""
    rows = read_rows(path)
    steps = max(int(row["steps"]) for row in rows)
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    for axes, task in zip(figure.subplots(2, 3).ravel(), TASKS, strict=True):
        for algorithm, label in LABELS.items():
            cell, color = (algorithm, task, steps), f"C{[*LABELS].index(algorithm)}"
            found = of_cell(rows, cell)
            if algorithm in OURS and found:
                curves = [curve_path(path, cell, seed) for seed in found]
                draw_curve(axes, [c for c in curves if c.exists()], label, color)
            elif found:
                scores = [float(row["mean_episodic_return"]) for row in found.values()]
                middle = interquartile_mean(np.array(scores))
                axes.plot(steps / 1000, middle, "o", color=color, label=f"{label}, at the end")
        axes.set(title=task, xlabel="thousand steps per seed", ylabel="return")
        axes.grid(alpha=0.3)
    each = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes]
    known = {label: handle for pairs in each for handle, label in pairs}
    figure.axes[1].legend(known.values(), known.keys(), loc="lower right")  # there is room
    figure.savefig(path.with_suffix(".png"), dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="what the name of a cell must contain")
    parser.add_argument("--steps", type=int, nargs="*", default=BUDGETS, help="budgets")
    parser.add_argument("--seeds", type=int, default=10, help="how many")
    parser.add_argument("--purejaxrl", type=Path, help="a checkout of PureJaxRL")
    parser.add_argument("--results", type=Path, default=RESULTS / "locomotion.csv")
    parser.add_argument("--tables", action="store_true", help="train nothing")
    parser.add_argument("--quick", action="store_true", help="see whether it works")
    arguments = parser.parse_args()
    algorithms = [name for name in LABELS if name != "purejaxrl" or arguments.purejaxrl]
    cells = [(name, task, s) for s in arguments.steps for task in TASKS for name in algorithms]
    cells = [cell for cell in cells if arguments.only in " ".join(map(str, cell))]
    path, work = arguments.results, ROOT / "runs" / "locomotion"
    ppo_discrete.use_cores(2 if arguments.quick else arguments.seeds)  # before JAX starts
    ppo_discrete.straight_threefry()
    if arguments.quick:
        cells = [(name, "inverted_double_pendulum", 8192) for name in algorithms]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "locomotion.csv"
            for cell in cells:
                complete(cell, path, 2, Path(folder), arguments.purejaxrl, quick=True)
            print("\n" + table(read_rows(path), cells))
        return
    if not arguments.tables:
        for cell in cells:
            complete(cell, path, arguments.seeds, work, arguments.purejaxrl)
    print("\n" + table(read_rows(path), cells))
    if path == RESULTS / "locomotion.csv":
        replace_table("locomotion", document_table())
        curves_figure(path)


if __name__ == "__main__":
    main()
