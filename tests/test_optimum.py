"""The dynamics that benchmarks/optimum.py solves are those of the environments."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


@pytest.mark.parametrize("env_id", optimum.FINITE)
def test_finitely_many_states(env_id):
    """Random actions: all that happens is said to be possible, and as frequent as is said."""
    task, env = optimum.FINITE[env_id], optimum.ppo_discrete.make_env(env_id)
    keys = jax.random.split(jax.random.key(0), (task.limit + 1, 512))
    state_of = lambda obs: jnp.round(task.observe(obs)).astype(jnp.int32)

    def step(carry, keys):
        obs, env_state = carry
        action = jax.random.randint(keys[0], (512,), 0, task.num_actions)
        env_state, next_obs, reset_obs, reward, ended, _ = env.step(keys, env_state, action)
        seen = state_of(obs), action, state_of(next_obs), reward, ended
        return (reset_obs, env_state), seen

    _, seen = jax.jit(lambda: jax.lax.scan(step, env.reset(keys[0]), keys[1:]))()
    state, action, next_state, reward, ended = (np.asarray(x).ravel() for x in seen)
    outcomes = lambda *pair: jnp.broadcast_arrays(*map(jnp.atleast_1d, task.outcomes(*pair)))
    chance, to, gain, end = map(np.asarray, jax.vmap(outcomes)(state, action))
    assert np.allclose(chance.sum(axis=1), 1)

    same_end = end == ended[:, None]
    same_state = (to == next_state[:, None]) | same_end & end  # an end need not be seen in full
    same_reward = np.isclose(gain, reward[:, None])
    if env_id == "UmbrellaChain-bsuite":  # but for the last one rewards are ±1 at random
        same_reward |= ~end & np.isclose(np.abs(reward[:, None]), 1)
    assert ended.any() or env_id == "DiscountingChain-bsuite"
    assert (same_end & same_state & same_reward & (chance > 0)).any(axis=1).all()

    pair = state * task.num_actions + action
    often = pair == np.bincount(pair).argmax()
    for place in np.unique(to[often]):
        expected = (chance[often][0] * (to[often][0] == place)).sum()
        share = (next_state[often] == place).mean()
        assert abs(share - expected) < 4 * np.sqrt(0.25 / often.sum())


@pytest.mark.parametrize(
    "env_id, best", [("FrozenLake-misc", 0.74419), ("DeepSea-bsuite", 0.99), ("Catch-bsuite", 1.0)]
)
def test_known_optima(env_id, best):
    """FrozenLake's within 100 steps is that of value iteration in the literature."""
    task = optimum.FINITE[env_id]
    v, table = optimum.solve_finite(task)
    value, score = optimum.play_finite(task, env_id, v, table, 3)
    assert abs(value - best) < 1e-4
    assert abs(score - best) < 0.15
