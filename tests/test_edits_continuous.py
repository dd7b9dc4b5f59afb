"""Edits of ppo_continuous.py: actions squashed by tanh, and one run on several devices."""

import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import USERS_FLAGS, as_shipped
from gymnax.environments import spaces

import ppo_continuous

# ---- squashed_gaussian ----


def test_the_density_and_the_entropy_are_those_of_the_squashed_action(patched):
    script = patched("squashed_gaussian")
    mean, log_std = jnp.array([0.7, -1.2]), jnp.array([0.3, -0.5])
    policy = script.SquashedGaussian(mean[:, None], log_std[:, None])  # of one dimension, twice
    action = np.linspace(-1, 1, 400_001)[1:-1]  # a grid of the interval, its ends left out
    u = np.arctanh(action)
    log_density = np.float64(jax.vmap(policy.log_prob, 1, 1)(jnp.tile(u, (2, 1))[..., None]))
    density = np.exp(log_density)
    np.testing.assert_allclose(np.trapezoid(density, action), 1, atol=2e-3)
    entropy = -np.trapezoid(density * log_density, action)
    np.testing.assert_allclose(policy.entropy(), entropy, atol=2e-3)
    # Where tanh rounds to 1 the density of u = 20 is still finite: log N(u) - log 4 exp(-2u).
    one = script.SquashedGaussian(jnp.zeros(1), jnp.zeros(1)).log_prob(jnp.array([20.0]))
    assert one == pytest.approx(-200 - 0.5 * np.log(2 * np.pi) - np.log(4) + 40, rel=1e-6)


def test_squashed_actions_are_within_the_bounds(patched):
    script, box = patched("squashed_gaussian"), spaces.Box(-2.0, 6.0, (1,))
    action = script.bound_action(jnp.array([[-9.0], [0.0], [0.5493061], [9.0]]), box)
    np.testing.assert_allclose(action[:, 0], [-2, 2, 4, 6], atol=1e-6)  # tanh 0.549 = 1/2


def pendulum(script, keys, seeds, **fields):
    """The return of greedy episodes after training, and the share of torques at a bound."""
    config = replace(script.default_config("Pendulum-v1"), **fields)
    env = script.make_env("Pendulum-v1")

    def run(key):
        state, metrics = script.train(config, key, env)
        score = script.evaluate(config, state, jax.random.fold_in(key, 2**31), 100, env)[0].mean()
        return score, metrics["entropy"]

    return jax.device_get(as_shipped(jax.vmap(run))(keys(seeds)))


def test_squashed_actions_swing_the_pendulum_up(patched, keys):
    score, entropy = pendulum(patched("squashed_gaussian"), keys, 3, total_timesteps=100_000)
    assert np.median(score) > -250, score
    # No action on (-1, 1) has a larger entropy than the uniform one; a Gaussian's starts at 1.42.
    assert (entropy < np.log(2)).all()


# ---- data_parallel ----


def over_shares(function):
    """The axes that the patched script averages over, on one device."""
    shares = jax.vmap(function, axis_name="share")
    return lambda *x: jax.tree.map(
        lambda y: y[0], jax.vmap(shares, axis_name="seed")(*jax.tree.map(lambda y: y[None], x))
    )


def test_statistics_and_advantages_are_those_of_all_shares(patched):
    script = patched("data_parallel")
    # Means that differ between the shares: the mean of the four variances would be far too small.
    x = jax.random.normal(jax.random.key(0), (4, 5, 6, 2)) + jnp.arange(4.0)[:, None, None, None]
    together = x.swapaxes(0, 1).reshape(5, 24, 2)  # [T, all environments, D]
    stats = ppo_continuous.RunningStats(jnp.ones(2), 3 * jnp.ones(2), jnp.float32(7))
    expected = ppo_continuous.update_stats(stats, together)
    copies = jax.tree.map(lambda y: jnp.stack([y] * 4), stats)
    result = over_shares(script.update_stats)(script.RunningStats(*copies), x)
    for ours, alone in zip(result, expected, strict=True):
        np.testing.assert_allclose(ours, jnp.stack([alone] * 4), rtol=1e-5)
    advantage = x[..., 0].reshape(4, 30)
    expected = ppo_continuous.normalize_advantage(advantage.ravel())
    result = over_shares(script.normalize_advantage)(advantage)
    np.testing.assert_allclose(result.ravel(), expected, rtol=1e-4, atol=1e-5)


SHARES = """
import importlib.util, sys
from dataclasses import replace
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

script = load("data_parallel", sys.argv[1])
config = replace(script.default_config(), num_envs=4, num_steps=32, num_minibatches=4)
config = replace(config, num_seeds=4, total_timesteps=3 * config.batch_size)
train = lambda seed: script.train(config, jax.random.key(seed))
state, metrics = script.over_seeds(train)(np.arange(4))
assert len(state.obs.sharding.device_set) == jax.device_count() == 4
first = jax.make_mesh((1,), ("seed",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
script.seed_axis = lambda: NamedSharding(first, PartitionSpec("seed"))
alone, alone_metrics = script.over_seeds(train)(np.arange(4))
assert len(alone.obs.sharding.device_set) == 1
close = lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-4)
numbers = lambda state: jax.device_get(state._replace(key=jax.random.key_data(state.key)))
jax.tree.map(close, numbers(state), numbers(alone))
# All shares have the same weights and statistics, to the bit, and each its own environments.
same = lambda x: (np.asarray(x) == np.asarray(x)[:1]).all()
assert jax.tree.all(jax.tree.map(same, (state.params, state.obs_stats, state.return_stats)))
assert not same(state.obs)
"""


def test_four_devices_do_what_one_does(patched, environment):
    """Shares have keys of their own, on whatever device they are: they act the same."""
    path = patched("data_parallel").__file__
    flags = f"{USERS_FLAGS} --xla_force_host_platform_device_count=4"
    command = [sys.executable, "-c", SHARES, path]
    done = subprocess.run(
        command, env=environment | {"XLA_FLAGS": flags}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
