"""The dynamics that benchmarks/optimum.py solves are those of the environments."""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import optimum

import ppo_discrete

EPISODES, STEPS = 32, 150


def compare(env_id, act):
    """Follow act(key, x, y) -> the policy's action, the task's; the share of steps that ended."""
    task = optimum.TASKS[env_id]
    env = task.script.load_env(env_id)
    keys = jax.random.split(jax.random.key(0), (STEPS + 1, EPISODES))

    def step(carry, keys):
        obs, env_state = carry
        x, y = task.observe(obs)
        action, same = jax.vmap(act)(keys, x, y)
        if hasattr(task.script, "bound_action"):
            action = task.script.bound_action(action, env.action_space)
        obs, env_state, reward, terminated, _, next_obs = env.step(keys, env_state, action)
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
        swing = jnp.where(y >= 0, 2, 0)  # with the motion, so that it reaches the goal
        action = jnp.where(jax.random.bernoulli(key, 0.1), 1, swing)
        return action, action

    assert compare("MountainCar-v0", act) > 0


def test_frozen_lake():
    """All slides that happen are possible, and equally frequent; the optimum is a known one."""
    env = ppo_discrete.load_env("FrozenLake-misc")
    keys = jax.random.split(jax.random.key(0), (200, 256))

    def step(carry, keys):
        obs, env_state = carry
        action = jax.random.randint(keys[0], (256,), 0, 4)
        new_obs, env_state, reward, terminated, _, next_obs = env.step(keys, env_state, action)
        seen = obs.argmax(axis=-1), action, next_obs.argmax(axis=-1), reward, terminated
        return (new_obs, env_state), seen

    _, seen = jax.jit(lambda: jax.lax.scan(step, env.reset(keys[0]), keys[1:]))()
    state, action, next_state, reward, ended = (np.asarray(x).ravel() for x in seen)
    outcomes = jax.vmap(optimum.slide)(state, action)  # [samples, 3]
    same = [x == y[:, None] for x, y in zip(outcomes, (next_state, reward, ended), strict=True)]
    which = np.logical_and.reduce(same)
    assert which.any(axis=1).all() and ended.any() and reward.any()
    places = np.sort(outcomes[0], axis=1)
    different = (np.diff(places, axis=1) > 0).all(axis=1)  # three different next states
    np.testing.assert_allclose(which[different].mean(axis=0), 1 / 3, atol=0.02)
    # That of value iteration in the literature, for 100 steps.
    assert abs(optimum.solve_frozen_lake() - 0.74419) < 1e-5


def test_the_best_actions_earn_what_v_promises():
    task = optimum.TASKS["MountainCar-v0"]._replace(
        x=jnp.linspace(-1.2, 0.6, 301), y=jnp.linspace(-0.07, 0.07, 201)
    )
    obs, _ = task.script.load_env("MountainCar-v0").reset(jax.random.split(jax.random.key(0), 100))
    table = jax.jit(partial(optimum.solve, task))()
    value, score = jax.jit(partial(optimum.play, task, table))(obs)
    assert -104 < score < -96 and abs(value - score) < 3
