"""Train the scripts on many environments, and write the tables and pictures of docs/results.md.

    python benchmarks/learning.py results      # the main table and the learning curves
    python benchmarks/learning.py ablations    # one detail changed at a time
    python benchmarks/learning.py held-out     # seeds not used for tuning, and Gymnasium
    python benchmarks/learning.py falls        # how often a run collapses after solving its task
    python benchmarks/learning.py --tables     # train nothing, write all tables and pictures
    python benchmarks/learning.py results --only CartPole

Each study trains the cells of its table that have no current result in benchmarks/results. If it is
killed, the same command continues it. The main table runs the documented command; the other studies
call `train` in this process. An ablation changes a value of the configuration, or replaces a public
function of the script; none has an early stop, which does part of the work of the clip.

A run solves its task with the first update whose training episodes return a certain value on
average. It falls if two successive later updates return less than a lower value. A dip is the
lowest training return relative to the best one before it, averaged over a twentieth of a run each.
"""

import argparse
import csv
import importlib

import common
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from common import COLORS, EPISODES, LABELS, RESULTS, Cell, budget, config_of, markdown, script_of
from jax.experimental import io_callback
from matplotlib.figure import Figure

import ppo_discrete
import trpo

# ---- The main table ------------------------------------------------------------------------------

RL_ZOO = "500 (100k, PPO and TRPO, rl-zoo)"
ROWS = [  # environment, steps per seed, seeds of PPO-clip, PPO-penalty and TRPO, best published
    ("CartPole-v1", 50_000, (10, 10, 10), RL_ZOO),
    ("CartPole-v1", 100_000, (10, 10, 10), RL_ZOO),
    ("Acrobot-v1", 100_000, (10, 10, 10), "-83.1 (100k, TRPO, rl-zoo)"),
    ("Acrobot-v1", 500_000, (10, 10, 10), "-73.5 (1M, PPO, rl-zoo)"),
    ("MountainCar-v0", 1_000_000, (10, 10, 10), "-107.3 (100k, TRPO, rl-zoo)"),
    ("Pendulum-v1", 100_000, (10, 10, 10), "-172 (100k, PPO with gSDE, rl-zoo)"),
    ("Pendulum-v1", 300_000, (10, 10, 10), "-175 (300k, PPO, SLM)"),
    ("Pendulum-v1", 1_000_000, (10, 10, 10), "-172 (100k, PPO with gSDE, rl-zoo)"),
    ("MountainCarContinuous-v0", 100_000, (10, 10, 10), "92.5 (50k, TRPO with gSDE, rl-zoo)"),
    ("MountainCarContinuous-v0", 1_000_000, (10, 10, 10), "92.5 (50k, TRPO with gSDE, rl-zoo)"),
    ("Catch-bsuite", 100_000, (10, 10, 10), "1 (README of gymnax)"),
    ("FourRooms-misc", 100_000, (10, 10, 10), "1 (README of gymnax)"),
    ("DeepSea-bsuite", 200_000, (10, 10, 10), "0 (README of gymnax)"),
    ("UmbrellaChain-bsuite", 100_000, (10, 10, 10), "1 (README of gymnax)"),
    ("DiscountingChain-bsuite", 100_000, (10, 10, 10), "1.1 (README of gymnax)"),
    ("FrozenLake-misc", 300_000, (10, 10, 10), "-"),
    ("MetaMaze-misc", 1_000_000, (10, 10, 10), "-"),
    ("Pong-misc", 50_000, (10, 10, 10), "-"),
    ("Reacher-misc", 1_000_000, (10, 10, 10), "-"),
    ("PointRobot-misc", 1_000_000, (10, 10, 10), "-"),
    ("Swimmer-misc", 1_000_000, (10, 10, 10), "-"),
    ("Breakout-MinAtar", 10_000_000, (10, 6, 6), "50.1 (10M, PPO, gymnax-blines)"),
    ("SpaceInvaders-MinAtar", 10_000_000, (10, 6, 6), "170 (10M, PPO, PureJaxRL)"),
    ("Asterix-MinAtar", 10_000_000, (10, 6, 6), "17.8 (10M, PPO, gymnax-blines)"),
    ("Freeway-MinAtar", 10_000_000, (10, 6, 6), "61.8 (10M, PPO, gymnax-blines)"),
    ("Seaquest-MinAtar", 10_000_000, (10, 6, 6), "-"),
]
CURVES = [  # panels of the picture
    ("CartPole-v1", 100_000), ("Acrobot-v1", 500_000), ("MountainCar-v0", 1_000_000),
    ("Pendulum-v1", 1_000_000), ("MountainCarContinuous-v0", 1_000_000),
    ("Reacher-misc", 1_000_000),
]  # fmt: skip


def result_cell(column, env_id, steps, num_seeds=10):
    name = script_of(column, env_id)
    path = RESULTS / f"{name}__{env_id}__{steps}.csv"
    return common.script_cell(path, name, env_id, steps, range(num_seeds))


def result_row(env_id, steps, num_seeds, _):
    """The three cells of a row of the table."""
    pairs = zip(LABELS, num_seeds, strict=True)
    return [result_cell(column, env_id, steps, n) for column, n in pairs]


def result_table():
    """Beside ours, the optimum that optimum.py has found, and published returns."""
    rows, optima = [], dict(csv.reader((RESULTS / "optimum.csv").open()))
    for row in ROWS:
        env_id, steps, _, published = row
        texts = [cell.text() for cell in result_row(*row)]
        optimum = f"{float(optima[env_id]):.2f}" if env_id in optima else "-"
        rows.append([env_id, budget(steps), *texts, optimum, published])
    header = ["environment", "steps", *LABELS.values(), "optimum", "published PPO or TRPO"]
    return markdown(header, rows)


def draw_curves():
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    for axes, (env_id, steps) in zip(panels, CURVES, strict=True):
        for column, label in LABELS.items():
            path = result_cell(column, env_id, steps).path.with_suffix(".curve.csv")
            if path.exists():
                common.draw_curve(axes, path, label, COLORS[column])
        axes.set(title=env_id, xlabel="thousand steps per seed", ylabel="return in training")
        axes.grid(alpha=0.3)
    panels[0].legend(loc="lower right")
    figure.savefig(RESULTS / "learning_curves.png", dpi=110)


# ---- Seeds that were not used for tuning, and Gymnasium's environments ---------------------------

CLASSIC = {row[0]: row[1] for row in ROWS if row[0].endswith(("-v0", "-v1"))}  # largest budgets


def play_gymnasium(name, config, state):
    """Mean return of the greedy policy of one seed in Gymnasium's environment of the same name."""
    script = importlib.import_module(name)
    envs = gymnasium.make_vec(config.env_id, num_envs=EPISODES, vectorization_mode="sync")
    obs_like = jax.ShapeDtypeStruct(envs.observation_space.shape, jnp.float32)
    like = [jax.ShapeDtypeStruct((EPISODES,), dtype) for dtype in (jnp.float32, bool, bool)]

    def advance(action):
        obs, reward, terminated, truncated, _ = envs.step(np.asarray(action))
        return np.float32(obs), np.float32(reward), terminated, truncated

    def reset(keys):
        return io_callback(lambda: np.float32(envs.reset(seed=0)[0]), obs_like, ordered=True), ()

    def step(keys, env_state, action):
        obs, *results = io_callback(advance, (obs_like, *like), action, ordered=True)
        return obs, env_state, *results, obs

    env = script.Environment(reset, step, script.load_env(config.env_id).action_space)
    play = jax.jit(lambda state: script.evaluate(config, state, state.key, EPISODES, env)[0])
    return float(play(state).mean())


def held_out_cell(column, env_id):
    name = script_of(column, env_id)
    config = config_of(name, env_id, CLASSIC[env_id])

    def train(seeds):
        states, _, scores = common.train_here(name, config, seeds)
        rows = common.scored(seeds, scores)
        for i, row in enumerate(rows):
            state = jax.tree.map(lambda x, i=i: x[i], states)
            row["gymnasium"] = play_gymnasium(name, config, state)
        return rows

    path = RESULTS / "held_out" / f"{name}__{env_id}.csv"
    return Cell.of_script(path, name, config, range(1000, 1010), train)


def held_out_table():
    rows = []
    for env_id, steps in CLASSIC.items():
        for column, label in LABELS.items():
            cell = held_out_cell(column, env_id)
            first = result_cell(column, env_id, steps).text(brief=True)
            texts = cell.text(brief=True), cell.text(column="gymnasium", brief=True)
            rows.append([env_id, budget(steps), label, first, *texts])
    header = ["environment", "steps", "", "seeds 0-9", "seeds 1000-1009", "these in Gymnasium"]
    return markdown(header, rows)


# ---- Runs that collapse after they solved their task ---------------------------------------------

FALLS = {  # steps per seed, a return that solves the task, a return that is a fall
    "CartPole-v1": (500_000, 495.0, 400.0),
    "Acrobot-v1": (500_000, -100.0, -200.0),
}
FALL_CELLS = [  # script, environment, with its early stop, seeds
    ("ppo_discrete", "CartPole-v1", True, 1000),
    ("ppo_discrete", "CartPole-v1", False, 400),
    ("ppo_discrete", "Acrobot-v1", True, 60),
    ("ppo_penalty", "CartPole-v1", True, 1000),
    ("ppo_penalty", "CartPole-v1", False, 100),
    ("ppo_penalty", "Acrobot-v1", True, 60),
    ("trpo", "CartPole-v1", True, 1000),
    ("trpo", "Acrobot-v1", True, 60),
]
NO_EARLY_STOP = {
    "ppo_discrete": {"target_kl": None},
    "ppo_continuous": {"target_kl": None},
    "ppo_penalty": {"early_stop_kl": None},
    "trpo": {},
}


def find_fall(returns, solved, low):
    """The first update that solves the task and the first of a fall, or -1, from [updates]."""
    reached = np.flatnonzero(returns >= solved)
    if len(reached) == 0:
        return -1, -1
    bad = (returns < low) & (np.arange(len(returns)) > reached[0])
    twice = np.flatnonzero(bad[1:] & bad[:-1])
    return int(reached[0]), int(twice[0]) if len(twice) else -1


def fall_cell(name, env_id, early_stop, num_seeds):
    steps, solved, low = FALLS[env_id]
    config = config_of(name, env_id, steps, **{} if early_stop else NO_EARLY_STOP[name])

    def train(seeds):
        _, returns, scores = common.train_here(name, config, seeds)
        rows = common.scored(seeds, scores)
        for row, curve in zip(rows, returns, strict=True):
            row["solved"], row["fell"] = find_fall(curve, solved, low)
        return rows

    path = RESULTS / "falls" / f"{name}__{env_id}{'' if early_stop else '__no_early_stop'}.csv"
    seeds = range(1000, 1000 + num_seeds)
    return Cell.of_script(path, name, config, seeds, train, chunk=100)


def fall_table():
    rows = []
    for name, env_id, early_stop, num_seeds in FALL_CELLS:
        cell = fall_cell(name, env_id, early_stop, num_seeds)
        if not cell.rows():
            continue
        first, fell = cell.scores("solved"), cell.scores("fell") >= 0
        steps = (first + 1) * cell.config["num_envs"] * cell.config["num_steps"]
        last = f"{steps.max():,.0f}" if (first >= 0).all() else "never"
        low_at_end = cell.scores() < FALLS[env_id][1] - 20
        label = f"`{name}`{'' if early_stop else ', without early stop'}{cell.dagger()}"
        solved = f"{np.median(steps[first >= 0]):,.0f}, {last}"
        share = f"{fell.sum()} ({100 * fell.mean():.1f} %)"
        rows.append([label, env_id, len(first), solved, share, low_at_end.sum()])
    header = ["script", "task", "seeds", "solved after (median, last)", "fell", "below at the end"]
    return markdown(header, rows)


def deepest_dip(returns, window=5):
    """The least ratio of a windowed mean to the largest one before it: [points, seeds] -> [seeds].

    A stored learning curve has 100 points, so that five are a twentieth of the run.
    """
    complete = returns[~np.isnan(returns).any(axis=1)]  # at first, no episode may have ended
    means = np.lib.stride_tricks.sliding_window_view(complete, window, axis=0).mean(axis=-1)
    return (means / np.maximum.accumulate(means)).min(axis=0)


def dip_table():
    """The games of MinAtar, which no return solves."""
    rows = []
    for row in ROWS:
        paths = [cell.path.with_suffix(".curve.csv") for cell in result_row(*row)]
        if row[0].endswith("MinAtar") and all(path.exists() for path in paths):
            curves = [np.genfromtxt(p, delimiter=",", skip_header=1)[:, 1:] for p in paths]
            dips = [deepest_dip(curve) for curve in curves]
            texts = [f"{np.median(x):.2f} ({x.min():.2f}, {len(x)} seeds)" for x in dips]
            rows.append([row[0], *texts])
    return markdown(["game", *LABELS.values()], rows)


# ---- Ablations -----------------------------------------------------------------------------------

ABLATION_ENVS = [  # environment, steps, seeds; hopper needs benchmarks/requirements.txt
    ("CartPole-v1", 100_000, 10),
    ("Acrobot-v1", 300_000, 10),
    ("Pendulum-v1", 300_000, 10),
    ("MountainCarContinuous-v0", 100_000, 10),
    ("benchmarks.environments:hopper-brax", 1_000_000, 6),
    ("Breakout-MinAtar", 2_000_000, 6),
]


def only_clipped(ratio, advantage, clip_eps):
    return jnp.mean(jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps) * advantage)


def unclipped(ratio, advantage, clip_eps):
    return jnp.mean(ratio * advantage)


def accept_always(measure, theta, step, *_):
    improvement, kl = measure(theta + step)
    return trpo.LineSearch(theta + step, jnp.asarray(True), jnp.asarray(1), improvement, kl)


gae = ppo_discrete.gae  # the same in all scripts


def terminate_at_limits(reward, value, next_value, terminated, done, *rest):
    return gae(reward, value, next_value, done, done, *rest)


RAW_ADVANTAGE = {"normalize_advantage": lambda advantage: advantage}
TERMINATE = {"gae": terminate_at_limits}
ABLATIONS = {  # file: label, column, values of the configuration, functions of the script
    "clip_default": ("PPO-clip: default (ε = 0.2)", "clip", {}, {}),
    "clip_eps_0.1": ("ε = 0.1", "clip", {"clip_eps": 0.1}, {}),
    "clip_eps_0.3": ("ε = 0.3", "clip", {"clip_eps": 0.3}, {}),
    "clip_eps_0.5": ("ε = 0.5", "clip", {"clip_eps": 0.5}, {}),
    "epochs_1": ("1 epoch", "clip", {"update_epochs": 1}, {}),
    "epochs_4": ("4 epochs", "clip", {"update_epochs": 4}, {}),
    "epochs_10": ("10 epochs", "clip", {"update_epochs": 10}, {}),
    "epochs_30": ("30 epochs", "clip", {"update_epochs": 30}, {}),
    "normalized_obs": ("normalised observations", "clip", {"normalize_obs": True}, {}),
    "raw_obs": ("raw observations", "clip", {"normalize_obs": False}, {}),
    "tanh": ("tanh", "clip", {"activation": "tanh"}, {}),
    "relu": ("ReLU", "clip", {"activation": "relu"}, {}),
    "raw_advantage": ("no advantage normalisation", "clip", {}, RAW_ADVANTAGE),
    "no_minimum": ("only the clipped term", "clip", {}, {"clipped_surrogate": only_clipped}),
    "no_clip": ("no clip", "clip", {}, {"clipped_surrogate": unclipped}),
    "limits_terminate": ("time limits as terminations", "clip", {}, TERMINATE),
    "limits_terminate_tanh": ("the same, tanh", "clip", {"activation": "tanh"}, TERMINATE),
    "clip_vloss": ("value clipping", "clip", {"clip_vloss": True}, {}),
    "penalty_default": ("PPO-penalty: default (adaptive β)", "ppo_penalty", {}, {}),
    "beta_0.3": ("fixed β = 0.3", "ppo_penalty", {"adaptive_beta": False, "beta": 0.3}, {}),
    "beta_3": ("fixed β = 3", "ppo_penalty", {"adaptive_beta": False, "beta": 3.0}, {}),
    "trpo_default": ("TRPO: default", "trpo", {}, {}),
    "no_line_search": ("TRPO without line search", "trpo", {}, {"line_search": accept_always}),
}


def ablation_cell(ablation, env_id, steps, num_seeds):
    _, column, values, functions = ABLATIONS[ablation]
    name = script_of(column, env_id)
    config = config_of(name, env_id, steps, **NO_EARLY_STOP[name], **values)

    def train(seeds):
        with common.replaced(importlib.import_module(name), **functions):
            scores = common.train_here(name, config, seeds)[2]
        return common.scored(seeds, scores)

    path = RESULTS / "ablations" / f"{ablation}__{env_id.rpartition(':')[2]}.csv"
    return Cell.of_script(path, name, config, range(num_seeds), train)


def ablation_title(env_id, steps, num_seeds):
    few = "" if num_seeds == 10 else f", {num_seeds} seeds"
    return f"{env_id.rpartition(':')[2]}, {budget(steps)}{few}"


def ablation_table():
    rows = []
    for name, (label, *_) in ABLATIONS.items():
        cells = [ablation_cell(name, *env) for env in ABLATION_ENVS]
        rows.append([label, *(cell.text(1, brief=True) for cell in cells)])
    return markdown(["", *(ablation_title(*env) for env in ABLATION_ENVS)], rows)


def draw_ablations():
    """A panel per environment, with a bar for the interval of each ablation."""
    figure = Figure(figsize=(2 + 2.5 * len(ABLATION_ENVS), 4.6), layout="constrained")
    panels = figure.subplots(1, len(ABLATION_ENVS), sharey=True)
    for axes, env in zip(panels, ABLATION_ENVS, strict=True):
        for i, (name, (_, column, *_)) in enumerate(ABLATIONS.items()):
            scores = ablation_cell(name, *env).scores()
            if len(scores):
                axes.plot(
                    common.interval(scores), [i, i], color=COLORS[column], linewidth=4, alpha=0.4
                )
                axes.plot(common.interquartile_mean(scores), i, "o", color=COLORS[column])
        axes.set_title(ablation_title(*env), fontsize="small")
        axes.set_xlabel("return")
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(ABLATIONS)), [label for label, *_ in ABLATIONS.values()])
    panels[0].invert_yaxis()
    figure.savefig(RESULTS / "ablations.png", dpi=110)


# ---- The command line ----------------------------------------------------------------------------

STUDIES = {
    "results": lambda: [cell for row in ROWS for cell in result_row(*row)],
    "ablations": lambda: [ablation_cell(name, *x) for x in ABLATION_ENVS for name in ABLATIONS],
    "held-out": lambda: [held_out_cell(column, env_id) for env_id in CLASSIC for column in LABELS],
    "falls": lambda: [fall_cell(*cell) for cell in FALL_CELLS],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", choices=[[], *STUDIES], metavar="STUDY")
    parser.add_argument("--only", default="", help="train only cells whose file name contains this")
    parser.add_argument("--tables", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    ppo_discrete.use_cores(20)
    for study in arguments.studies if not arguments.tables else []:
        for cell in STUDIES[study]():
            if arguments.only in cell.path.stem:
                cell.complete()
    common.publish("results", result_table())
    common.publish("ablations", ablation_table())
    common.publish("held out", held_out_table())
    common.publish("falls", fall_table())
    common.publish("dips", dip_table())
    draw_curves()
    draw_ablations()


if __name__ == "__main__":
    main()
