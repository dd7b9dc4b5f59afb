"""The best that any policy can do, by dynamic programming, in environments that are small enough.

    python benchmarks/optimum.py                 # a few minutes; writes results/optimum.csv
    python benchmarks/optimum.py --seed 1000     # for seeds 1000 to 1009, and 1000 to 1099

The largest return of the next k steps is V_k(s) = max_a E[r + γ V_{k-1}(s')], up to the steps that
an episode lasts at most. Pendulum and both MountainCars are deterministic and have a state of two
numbers: V is computed on a grid with linear interpolation. The others have finitely many states and
known probabilities: V is exact.

Printed is the return, not discounted, of playing the best actions by V in the episodes that
`evaluate` plays: for γ = 1 the optimum, confirmed by V of their first states, up to the grid, and
up to chance where the environment has some; for smaller γ what an agent gets that learns perfectly
what it is told to. It is the interquartile mean, for ten seeds (0 to 9 are those of the table in
docs/results.md) and for a hundred. From seed 0 on it is kept for that table.
"""

import argparse
import csv
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gymnax  # noqa: F401  (it makes constants, which must not happen while JAX traces)
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "benchmarks" / "results" / "optimum.csv"
sys.path.insert(0, str(ROOT))
import ppo_continuous
import ppo_discrete

SEEDS = 100  # a hundred episodes each

# ---- Two numbers: a grid -------------------------------------------------------------------------


class Task(NamedTuple):
    script: object  # whose `make_env` and number of episodes count
    step: Callable  # x [...], y [...], action -> next x, next y, reward, ended
    x: jax.Array  # grid points of position or angle, equally spaced
    y: jax.Array  # of the velocity
    actions: jax.Array
    observe: Callable  # the first observation [..., D] -> x, y
    limit: int  # of an episode's steps
    discounts: tuple[float, ...]


def step_pendulum(angle, speed, torque):
    """The angle, 0 when upright, comes back wrapped to [-π, π]."""
    reward = -(angle**2 + 0.1 * speed**2 + 0.001 * torque**2)
    speed = jnp.clip(speed + (15.0 * jnp.sin(angle) + 3.0 * torque) * 0.05, -8.0, 8.0)
    angle = (angle + speed * 0.05 + jnp.pi) % (2 * jnp.pi) - jnp.pi
    return angle, speed, reward, False


def step_mountain_car(position, velocity, action):
    """Actions 0, 1, 2 push left, not at all, right."""
    velocity = velocity + (action - 1) * 0.001 - jnp.cos(3 * position) * 0.0025
    velocity = jnp.clip(velocity, -0.07, 0.07)
    position = jnp.clip(position + velocity, -1.2, 0.6)
    velocity = jnp.where((position == -1.2) & (velocity < 0), 0.0, velocity)
    return position, velocity, -1.0, (position >= 0.5) & (velocity >= 0)


def step_continuous_car(position, velocity, force):
    """Unlike the other car it keeps its velocity at the wall on the left."""
    velocity = velocity + force * 0.0015 - jnp.cos(3 * position) * 0.0025
    velocity = jnp.clip(velocity, -0.07, 0.07)
    position = jnp.clip(position + velocity, -1.2, 0.6)
    ended = (position >= 0.45) & (velocity >= 0)
    velocity = jnp.where((position >= 0.45) & (velocity < 0), 0.0, velocity)
    return position, velocity, 100.0 * ended - 0.1 * force**2, ended


TASKS = {
    "Pendulum-v1": Task(
        script=ppo_continuous,
        step=step_pendulum,
        x=jnp.linspace(-jnp.pi, jnp.pi, 241),
        y=jnp.linspace(-8.0, 8.0, 241),
        actions=jnp.linspace(-2.0, 2.0, 41),
        observe=lambda obs: (jnp.arctan2(obs[..., 1], obs[..., 0]), obs[..., 2]),
        limit=200,
        discounts=(1.0, 0.99),
    ),
    "MountainCar-v0": Task(
        script=ppo_discrete,
        step=step_mountain_car,
        x=jnp.linspace(-1.2, 0.6, 1201),
        y=jnp.linspace(-0.07, 0.07, 601),
        actions=jnp.arange(3.0),
        observe=lambda obs: (obs[..., 0], obs[..., 1]),
        limit=200,
        discounts=(1.0,),  # the shortest way is the best for all
    ),
    "MountainCarContinuous-v0": Task(
        script=ppo_continuous,
        step=step_continuous_car,
        x=jnp.linspace(-1.2, 0.6, 401),
        y=jnp.linspace(-0.07, 0.07, 301),
        actions=jnp.linspace(-1.0, 1.0, 41),
        observe=lambda obs: (obs[..., 0], obs[..., 1]),
        limit=999,
        discounts=(0.999, 0.995, 0.99),  # for 1 there is no reason ever to start
    ),
}


def interpolate(task, table, x, y):
    """`table`, given on the grid, at any points."""
    row = (x - task.x[0]) / (task.x[1] - task.x[0])
    column = (y - task.y[0]) / (task.y[1] - task.y[0])
    return jax.scipy.ndimage.map_coordinates(table, [row, column], order=1, mode="nearest")


def returns(task, discount, table, x, y):
    """r + γ V(s') of every action, [..., actions]."""
    x, y, reward, ended = task.step(x[..., None], y[..., None], task.actions)
    return reward + discount * jnp.where(ended, 0.0, interpolate(task, table, x, y))


def solve(task, discount):
    """V on the grid, with all steps of an episode to go."""
    x, y = jnp.meshgrid(task.x, task.y, indexing="ij")
    backwards = lambda _, table: returns(task, discount, table, x, y).max(axis=-1)
    return jax.lax.fori_loop(0, task.limit, backwards, jnp.zeros(x.shape))


def play(task, env_id, discount, table, seed):
    """For the evaluation episodes of a seed: mean of V at the start, mean return of playing."""
    reset_key, _ = jax.random.split(jax.random.fold_in(jax.random.key(seed), 2**31))
    keys = jax.random.split(reset_key, task.script.EVALUATION_EPISODES)
    obs, _ = task.script.make_env(env_id).reset(keys)

    def forwards(carry):
        x, y, playing, steps, score = carry
        best = returns(task, discount, table, x, y).argmax(axis=-1)
        x, y, reward, ended = task.step(x, y, task.actions[best])
        return x, y, playing & jnp.logical_not(ended), steps + 1, score + reward * playing

    start = task.observe(obs)
    playing, score = jnp.ones(start[0].shape, bool), jnp.zeros(start[0].shape)
    *_, score = jax.lax.while_loop(
        lambda carry: carry[2].any() & (carry[3] < task.limit),
        forwards,
        (*start, playing, 0, score),
    )
    return interpolate(task, table, *start).mean(), score.mean()


# ---- Finitely many states: exact -----------------------------------------------------------------


class Finite(NamedTuple):
    """A task whose states are the numbers from 0 to num_states - 1."""

    # state, action -> probability, next state, reward, ended: [outcomes], or what broadcasts to it
    outcomes: Callable
    observe: Callable  # obs [N, D] -> states [N]
    num_states: int
    num_actions: int
    limit: int  # of an episode's steps


def slide(state, action):
    """FrozenLake: as wanted or to one of the sides, a third each. 0, 1, 2, 3: left, down, ..."""
    direction = (action + jnp.arange(-1, 2)) % 4
    row = jnp.clip(state // 4 + jnp.array([0, 1, 0, -1])[direction], 0, 3)
    column = jnp.clip(state % 4 + jnp.array([-1, 0, 1, 0])[direction], 0, 3)
    tile = jnp.array([*b"SFFFFHFHFFFHHFFG"])[row * 4 + column]
    return 1 / 3, row * 4 + column, tile == ord("G"), (tile == ord("G")) | (tile == ord("H"))


WALLS = """
xxxxxxxxxxxxx
x     x     x
x     x     x
x           x
x     x     x
x     x     x
xx xxxx     x
x     xxx xxx
x     x     x
x     x     x
x           x
x     x     x
xxxxxxxxxxxxx"""


def walk(state, action):
    """FourRooms: with probability 4/9 a direction at random, up, right, down or left."""
    direction = jnp.arange(4)
    next_state = state + jnp.array([-13, 1, 13, -1])
    wall = jnp.array([*"".join(WALLS.split("\n")).encode()])[next_state] == ord("x")
    next_state = jnp.where(wall, state, next_state)
    goal = next_state == 8 * 13 + 9
    return 1 / 9 + 5 / 9 * (direction == action), next_state, goal, goal


def catch(state, action):
    """Catch: row of the ball, its column, column of the paddle, which moves in 0 to 4."""
    row, ball, paddle = state // 25 + 1, state // 5 % 5, jnp.clip(state % 5 + action - 1, 0, 4)
    ended = row == 9
    return 1.0, row * 25 + ball * 5 + paddle, ended * jnp.where(ball == paddle, 1, -1), ended


def dive(state, action):
    """DeepSea: which action leads to the right is drawn once, and is the environment's secret."""
    row, column = state // 8, state % 8
    right = action == jax.random.bernoulli(jax.random.key(0), 0.5, (8, 8))[row, column]
    reward = (right & (column == 7)) - right * 0.01 / 8
    column = jnp.clip(column + jnp.where(right, 1, -1), 0, 7)
    return 1.0, (row + 1) * 8 + column, reward, row + 1 == 8


def forecast(state, action):
    """UmbrellaChain: 1 if taken where needed; other rewards are ±1 at random, whatever one does."""
    time, need, has = state // 4, state // 2 % 2, jnp.where(state < 4, action, state % 2)
    ended = time + 1 == 10
    return 1.0, (time + 1) * 4 + need * 2 + has, ended * jnp.where(need == has, 1, -1), ended


def choose(state, action):
    """DiscountingChain: the first action says when the reward comes, and how large it is."""
    time, chosen = state // 6 + 1, jnp.where(state < 6, action, state % 6)
    due = jnp.array([1, 3, 10, 30, 100])[chosen] == time
    return 1.0, time * 6 + chosen, due * jnp.where(chosen == 0, 1.1, 1.0), False


def where_one(obs):
    """Index of the largest entry."""
    return obs.argmax(axis=-1)


def look_at_catch(obs):
    """The ball is the first one, the paddle the last one, in the last row."""
    return where_one(obs) * 5 + where_one(obs[..., -5:])


FINITE = {
    "FrozenLake-misc": Finite(slide, where_one, 16, 4, 100),
    "FourRooms-misc": Finite(walk, lambda obs: obs[..., 0] * 13 + obs[..., 1], 169, 4, 500),
    "Catch-bsuite": Finite(catch, look_at_catch, 250, 3, 9),
    "DeepSea-bsuite": Finite(dive, where_one, 72, 2, 8),
    # need, has, 1 - time / 10
    "UmbrellaChain-bsuite": Finite(
        forecast, lambda obs: (1 - obs[..., 2]) * 40 + obs[..., 0] * 2 + obs[..., 1], 44, 2, 10
    ),
    # the action chosen, or -1, which counts as 5; time / 100
    "DiscountingChain-bsuite": Finite(
        choose, lambda obs: obs[..., 1] * 600 + obs[..., 0] % 6, 606, 5, 100
    ),
}


def solve_finite(task):
    """V [states] with all steps of an episode to go, and the best actions [limit, states]."""
    outcomes = lambda *pair: jnp.broadcast_arrays(*map(jnp.atleast_1d, task.outcomes(*pair)))
    table = jax.vmap(jax.vmap(outcomes, (None, 0)), (0, None))
    states, actions = jnp.arange(task.num_states), jnp.arange(task.num_actions)
    probability, next_state, reward, ended = table(states, actions)  # [states, actions, outcomes]

    def backwards(v, _):
        q = (probability * (reward + jnp.where(ended, 0.0, v[next_state]))).sum(axis=-1)
        return q.max(axis=1), q.argmax(axis=1)

    v, best = jax.lax.scan(backwards, jnp.zeros(len(states)), length=task.limit)
    return v, best[::-1]


class Guided(NamedTuple):
    """N environments, and what says which action is the best."""

    env_state: Any
    obs: jax.Array
    time: jax.Array


def guided(task, env, best):
    """The same environments, in which whatever a policy wants the best action is taken."""

    def reset(keys):
        obs, env_state = env.reset(keys)
        return obs, Guided(env_state, obs, jnp.int32(0))

    def step(keys, state, _):
        action = best[state.time, jnp.round(task.observe(state.obs)).astype(jnp.int32)]
        env_state, next_obs, obs, *rest = env.step(keys, state.env_state, action)
        return Guided(env_state, obs, state.time + 1), next_obs, obs, *rest

    return ppo_discrete.Environment(reset, step, env.action_space)


def play_finite(task, env_id, v, best, seed):
    """For the evaluation episodes of a seed: mean of V at the start, mean return of playing."""
    key = jax.random.fold_in(jax.random.key(seed), 2**31)
    env = ppo_discrete.make_env(env_id)
    config = ppo_discrete.default_config(env_id)
    init, _ = ppo_discrete.make_train(config)
    episodes = ppo_discrete.EVALUATION_EPISODES
    settings = episodes, guided(task, env, best), task.limit
    score, _ = ppo_discrete.evaluate(config, init(key), key, *settings)
    obs, _ = env.reset(jax.random.split(jax.random.split(key)[0], episodes))
    return v[jnp.round(task.observe(obs)).astype(jnp.int32)].mean(), score.mean()


# ---- Command line --------------------------------------------------------------------------------


def report(env_id, discount, play, first):
    """Print a line about ten seeds of the command line and about SEEDS; return a row of STORED."""
    values, scores = map(np.asarray, jax.lax.map(play, first + jnp.arange(SEEDS)))
    ten, all_seeds = (scipy.stats.trim_mean(some, 0.25) for some in (scores[:10], scores))
    print(
        f"{env_id}, γ = {discount}: seeds {first} to {first + 9} {ten:.2f}, "
        f"{first} to {first + SEEDS - 1} {all_seeds:.2f}"
        + (f" (mean {scores.mean():.2f}, V {values.mean():.2f})" if discount == 1 else ""),
        flush=True,
    )
    return env_id, discount, f"{ten:.6g}", f"{all_seeds:.6g}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="the first of them")
    first, rows = parser.parse_args().seed, []
    ppo_discrete.straight_threefry()
    for env_id, task in TASKS.items():
        for discount in task.discounts:
            table = jax.jit(partial(solve, task, discount))()
            rows += [report(env_id, discount, partial(play, task, env_id, discount, table), first)]
    for env_id, task in FINITE.items():
        rows += [
            report(env_id, 1.0, partial(play_finite, task, env_id, *solve_finite(task)), first)
        ]
    if first == 0:
        with STORED.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("environment", "discount", "seeds_0_to_9", "seeds_0_to_99"))
            writer.writerows(rows)


if __name__ == "__main__":
    main()
