"""The best that any policy can do on Pendulum-v1's evaluation episodes, by dynamic programming.

    python benchmarks/pendulum_optimum.py

The dynamics are known and the state has two numbers, so V_t(s) = max_a [r(s, a) + V_{t+1}(s')] can
be computed backwards from the end of the 200 steps, on a grid of angles and speeds with linear
interpolation. Playing its best actions from the states in which `evaluate` starts gives the return
to which the README's table can be compared: that of the table's ten seeds, and of many.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo_continuous as script

STEPS, SEEDS = 200, 300
ANGLES = jnp.linspace(-jnp.pi, jnp.pi, 241)
SPEEDS = jnp.linspace(-8.0, 8.0, 241)
COARSE, FINE = jnp.linspace(-2.0, 2.0, 41), jnp.linspace(-2.0, 2.0, 201)  # torques


def step(angle, speed, torque):
    """gymnax's Pendulum-v1: the next angle and speed, and the reward."""
    wrapped = (angle + jnp.pi) % (2 * jnp.pi) - jnp.pi
    reward = -(wrapped**2 + 0.1 * speed**2 + 0.001 * torque**2)
    speed = jnp.clip(speed + (15.0 * jnp.sin(angle) + 3.0 * torque) * 0.05, -8.0, 8.0)
    return angle + speed * 0.05, speed, reward


def value_of(values, angle, speed):
    """Linear interpolation in the table `values` [angles, speeds]."""
    row = (angle + jnp.pi) % (2 * jnp.pi) / (ANGLES[1] - ANGLES[0])
    column = (speed - SPEEDS[0]) / (SPEEDS[1] - SPEEDS[0])
    return jax.scipy.ndimage.map_coordinates(values, [row, column], order=1, mode="nearest")


def returns_of(values, angle, speed, torques):
    """r + V(s') for each torque, [..., torques]."""
    next_angle, next_speed, reward = step(angle[..., None], speed[..., None], torques)
    return reward + value_of(values, next_angle, next_speed)


@jax.jit
def solve():
    """V_1 ... V_200, what can still be had after each step, [200, angles, speeds]."""
    angle, speed = jnp.meshgrid(ANGLES, SPEEDS, indexing="ij")

    def backwards(values, _):
        return returns_of(values, angle, speed, COARSE).max(axis=-1), values

    _, tables = jax.lax.scan(backwards, jnp.zeros(angle.shape), None, STEPS)
    return tables[::-1]


@jax.jit
def play(tables, seed):
    """Mean return of the best actions in the evaluation episodes of the command line's `seed`."""
    reset_key, _ = jax.random.split(jax.random.fold_in(jax.random.key(seed), 2**31))
    keys = jax.random.split(reset_key, script.EVALUATION_EPISODES)
    obs, _ = script.make_env("Pendulum-v1").reset(keys)  # cos, sin, speed

    def forwards(state, values):
        torque = FINE[returns_of(values, *state, FINE).argmax(axis=-1)]
        *state, reward = step(*state, torque)
        return state, reward

    start = [jnp.arctan2(obs[:, 1], obs[:, 0]), obs[:, 2]]
    return jax.lax.scan(forwards, start, tables)[1].sum(axis=0).mean()


if __name__ == "__main__":
    tables = solve()
    scores = np.asarray(jax.lax.map(lambda seed: play(tables, seed), jnp.arange(SEEDS)))
    error = scores.std() / SEEDS**0.5
    print(f"interquartile mean of seeds 0 to 9: {scipy.stats.trim_mean(scores[:10], 0.25):.2f}")
    print(f"mean of {SEEDS} seeds: {scores.mean():.2f} (standard error {error:.2f})")
