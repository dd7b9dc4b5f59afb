"""The best that any policy can do in three environments, by dynamic programming.

    python benchmarks/optimum.py                 # a few minutes
    python benchmarks/optimum.py --seed 1000     # for seeds 1000 to 1009, and 1000 to 1099

The dynamics of Pendulum and both MountainCars are known, deterministic, and have a state of two
numbers. So the largest return of the next k steps, V_k(s) = max_a [r(s, a) + γ V_{k-1}(s')], can be
computed on a grid with linear interpolation, up to the steps that an episode lasts at most. Printed
is the return, not discounted, of playing the best actions by V in the episodes that `evaluate`
plays: for γ = 1 the optimum, confirmed by V of their first states, up to the grid; for smaller γ
what an agent gets that learns perfectly what it is told to. It is the interquartile mean, for ten
seeds (0 to 9 are those of the table in docs/results.md) and for a hundred.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo_continuous
import ppo_discrete

SEEDS = 100  # a hundred episodes each


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


def report(env_id, task, discount, first):
    """Print one line, about ten seeds of the command line and about SEEDS of them."""
    table = jax.jit(lambda: solve(task, discount))()
    one = lambda seed: play(task, env_id, discount, table, seed)
    values, scores = map(np.asarray, jax.lax.map(one, first + jnp.arange(SEEDS)))
    ten, all_seeds = (scipy.stats.trim_mean(some, 0.25) for some in (scores[:10], scores))
    print(
        f"{env_id}, γ = {discount}: seeds {first} to {first + 9} {ten:.2f}, "
        f"{first} to {first + SEEDS - 1} {all_seeds:.2f}"
        + (f" (mean {scores.mean():.2f}, V {values.mean():.2f})" if discount == 1 else ""),
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="the first of them")
    first = parser.parse_args().seed
    ppo_discrete.straight_threefry()
    for env_id, task in TASKS.items():
        for discount in task.discounts:
            report(env_id, task, discount, first)
