"""Compute the best expected return that any policy can have, by dynamic programming.

    python benchmarks/optimum.py     # two minutes; writes results/optimum.csv

The largest return of the next k steps is V_k(s) = max_a E[r + V_{k-1}(s')], for k up to the time
limit. Pendulum and MountainCar are deterministic and have a state of two numbers: V is computed on
a grid, with linear interpolation. Stored is the return of the best actions, averaged over 100,000
initial states; the mean of V over these states, which is printed too, should agree up to the error
of the grid. FrozenLake has 16 states and known probabilities: V is exact. The optima in `KNOWN`
follow from the rules of the environments.
"""

import argparse
import csv
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from common import RESULTS

import ppo_continuous
import ppo_discrete

STATES = 100_000
KNOWN = {
    "Catch-bsuite": 1.0,  # the paddle can always reach the ball
    "FourRooms-misc": 1.0,  # 500 steps suffice to reach the goal
    "DeepSea-bsuite": 0.99,  # 1 for the goal, and -0.01 for the way to the right
    "UmbrellaChain-bsuite": 1.0,  # 1 for the right choice; the other rewards have mean 0
    "DiscountingChain-bsuite": 1.1,  # the largest of the five rewards
}


class Task(NamedTuple):
    script: object  # whose environment draws the initial states
    step: Callable  # x [...], y [...], action -> next x, next y, reward, ended
    x: jax.Array  # grid points of the position or angle, equally spaced
    y: jax.Array  # grid points of the velocity
    actions: jax.Array
    observe: Callable  # first observation [..., D] -> x, y
    limit: int  # steps of an episode


def step_pendulum(angle, speed, torque):
    """The angle is 0 when upright, and wrapped to [-π, π]."""
    reward = -(angle**2 + 0.1 * speed**2 + 0.001 * torque**2)
    speed = jnp.clip(speed + (15.0 * jnp.sin(angle) + 3.0 * torque) * 0.05, -8.0, 8.0)
    angle = (angle + speed * 0.05 + jnp.pi) % (2 * jnp.pi) - jnp.pi
    return angle, speed, reward, False


def step_mountain_car(position, velocity, action):
    """Action 0 pushes to the left, 1 does nothing, 2 pushes to the right."""
    velocity = velocity + (action - 1) * 0.001 - jnp.cos(3 * position) * 0.0025
    velocity = jnp.clip(velocity, -0.07, 0.07)
    position = jnp.clip(position + velocity, -1.2, 0.6)
    velocity = jnp.where((position == -1.2) & (velocity < 0), 0.0, velocity)
    return position, velocity, -1.0, (position >= 0.5) & (velocity >= 0)


TASKS = {
    "Pendulum-v1": Task(
        script=ppo_continuous,
        step=step_pendulum,
        x=jnp.linspace(-jnp.pi, jnp.pi, 241),
        y=jnp.linspace(-8.0, 8.0, 241),
        actions=jnp.linspace(-2.0, 2.0, 41),
        observe=lambda obs: (jnp.arctan2(obs[..., 1], obs[..., 0]), obs[..., 2]),
        limit=200,
    ),
    "MountainCar-v0": Task(
        script=ppo_discrete,
        step=step_mountain_car,
        x=jnp.linspace(-1.2, 0.6, 1201),
        y=jnp.linspace(-0.07, 0.07, 601),
        actions=jnp.arange(3.0),
        observe=lambda obs: (obs[..., 0], obs[..., 1]),
        limit=200,
    ),
}


def interpolate(task, table, x, y):
    """Values of `table`, which is given on the grid, at any points."""
    row = (x - task.x[0]) / (task.x[1] - task.x[0])
    column = (y - task.y[0]) / (task.y[1] - task.y[0])
    return jax.scipy.ndimage.map_coordinates(table, [row, column], order=1, mode="nearest")


def action_values(task, table, x, y):
    """r + V(s') of every action: [..., actions]."""
    x, y, reward, ended = task.step(x[..., None], y[..., None], task.actions)
    return reward + jnp.where(ended, 0.0, interpolate(task, table, x, y))


def solve(task):
    """V on the grid, with all steps of an episode left."""
    x, y = jnp.meshgrid(task.x, task.y, indexing="ij")
    backwards = lambda _, table: action_values(task, table, x, y).max(axis=-1)
    return jax.lax.fori_loop(0, task.limit, backwards, jnp.zeros(x.shape))


def play(task, table, obs):
    """From first observations [N, D]: the mean of V, and the mean return of the best actions."""

    def forwards(_, carry):
        x, y, playing, total = carry
        best = action_values(task, table, x, y).argmax(axis=-1)
        x, y, reward, ended = task.step(x, y, task.actions[best])
        return x, y, playing & jnp.logical_not(ended), total + reward * playing

    start = task.observe(obs)
    playing, total = jnp.ones(len(obs), bool), jnp.zeros(len(obs))
    *_, total = jax.lax.fori_loop(0, task.limit, forwards, (*start, playing, total))
    return interpolate(task, table, *start).mean(), total.mean()


def slide(state, action):
    """FrozenLake: moves as intended or to one of the sides, with probability 1/3 each."""
    direction = (action + jnp.arange(-1, 2)) % 4  # left, down, right, up
    row = jnp.clip(state // 4 + jnp.array([0, 1, 0, -1])[direction], 0, 3)
    column = jnp.clip(state % 4 + jnp.array([-1, 0, 1, 0])[direction], 0, 3)
    tile = jnp.array([*b"SFFFFHFHFFFHHFFG"])[row * 4 + column]
    return row * 4 + column, tile == ord("G"), (tile == ord("G")) | (tile == ord("H"))


def solve_frozen_lake(limit=100):
    """The probability of reaching the goal from the start within the time limit."""
    slides = jax.vmap(jax.vmap(slide, (None, 0)), (0, None))
    next_state, reward, ended = slides(jnp.arange(16), jnp.arange(4))  # [states, actions, 3]
    v = jnp.zeros(16)
    for _ in range(limit):
        v = (reward + jnp.where(ended, 0.0, v[next_state])).mean(axis=-1).max(axis=-1)
    return float(v[0])


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    optima = {}
    for env_id, task in TASKS.items():
        keys = jax.random.split(jax.random.key(0), STATES)
        obs, _ = task.script.load_env(env_id).reset(keys)
        table = jax.jit(partial(solve, task))()
        value, score = jax.jit(partial(play, task, table))(obs)
        optima[env_id] = round(float(score), 4)
        print(f"{env_id}: {score:.2f}, mean of V {value:.2f}", flush=True)
    optima |= {"FrozenLake-misc": round(solve_frozen_lake(), 4)} | KNOWN
    with (RESULTS / "optimum.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("environment", "optimum"), *optima.items()])


if __name__ == "__main__":
    main()
