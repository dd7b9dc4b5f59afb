"""The dynamics that benchmarks/optimum.py solves are those of the environments."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import optimum

EPISODES, STEPS = 32, 150


def compare(env_id, act):
    """Follow `act(key, x, y) -> the policy's action, the task's`; the share of steps that ended."""
    task = optimum.TASKS[env_id]
    env = task.script.make_env(env_id)
    keys = jax.random.split(jax.random.key(0), (STEPS + 1, EPISODES))

    def step(carry, keys):
        obs, env_state = carry
        x, y = task.observe(obs)
        action, same = jax.vmap(act)(keys, x, y)
        if hasattr(task.script, "bound_action"):
            action = task.script.bound_action(action, env.action_space)
        env_state, next_obs, obs, reward, terminated, _ = env.step(keys, env_state, action)
        ours = list(jnp.broadcast_arrays(*task.step(x, y, same)))
        return (obs, env_state), (*task.observe(next_obs), reward, terminated, ours)

    *theirs, ours = jax.jit(lambda: jax.lax.scan(step, env.reset(keys[0]), keys[1:]))()[1]
    if env_id == "Pendulum-v1":  # π is the same angle as -π
        theirs[0], ours[0] = jnp.exp(1j * theirs[0]), jnp.exp(1j * ours[0])
    for their, our in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(our, their, atol=2e-5)
    return np.mean(theirs[-1])


def test_pendulum():
    def act(key, x, y):
        push = jax.random.uniform(key, (1,), minval=-1, maxval=1)
        return push, 2 * push[0]

    assert compare("Pendulum-v1", act) == 0


def test_mountain_car():
    def act(key, x, y):
        swing = jnp.where(y >= 0, 2, 0)  # with the motion: it reaches the goal
        action = jnp.where(jax.random.bernoulli(key, 0.1), 1, swing)
        return action, action

    assert compare("MountainCar-v0", act) > 0


def test_continuous_mountain_car():
    def act(key, x, y):
        noise = jax.random.uniform(key, (1,), minval=-0.5, maxval=0.2)
        push = jnp.where(y >= 0, 1 + noise, -1 - noise)  # beyond the bounds, too
        return push, jnp.clip(push[0], -1, 1)

    assert compare("MountainCarContinuous-v0", act) > 0
