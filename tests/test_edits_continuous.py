"""The patches of tests/edits for ppo_continuous.py: squashed actions, one run on many devices."""

import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces

import ppo_continuous

# ---- squashed_gaussian ----


def test_density_and_entropy_belong_to_the_squashed_action(patched):
    script = patched("squashed_gaussian")
    mean, log_std = jnp.array([0.7, -1.2]), jnp.array([0.3, -0.5])
    policy = script.SquashedGaussian(mean[:, None], log_std[:, None])  # two of one dimension
    action = np.linspace(-1, 1, 400_001)[1:-1]  # a grid without its ends
    u = np.arctanh(action)
    log_density = np.float64(jax.vmap(policy.log_prob, 1, 1)(jnp.tile(u, (2, 1))[..., None]))
    density = np.exp(log_density)
    np.testing.assert_allclose(np.trapezoid(density, action), 1, atol=2e-3)
    entropy = -np.trapezoid(density * log_density, action)
    np.testing.assert_allclose(policy.entropy(), entropy, atol=2e-3)
    # tanh(20) rounds to 1, but the log-density is still finite: log N(u) - log(4 exp(-2u)).
    one = script.SquashedGaussian(jnp.zeros(1), jnp.zeros(1)).log_prob(jnp.array([20.0]))
    assert one == pytest.approx(-200 - 0.5 * np.log(2 * np.pi) - np.log(4) + 40, rel=1e-6)


def test_squashed_actions_are_within_the_bounds(patched):
    script, box = patched("squashed_gaussian"), spaces.Box(-2.0, 6.0, (1,))
    action = script.bound_action(jnp.array([[-9.0], [0.0], [0.5493061], [9.0]]), box)
    np.testing.assert_allclose(action[:, 0], [-2, 2, 4, 6], atol=1e-6)  # tanh 0.549 = 1/2


def test_squashed_actions_swing_the_pendulum_up(patched, keys):
    script = patched("squashed_gaussian")
    config = replace(script.default_config("Pendulum-v1"), total_timesteps=100_000)
    env = script.load_env("Pendulum-v1")

    def run(key):
        state, metrics = script.train(config, key, env)
        returns, _ = script.evaluate(config, state, jax.random.fold_in(key, 2**31), 100, env)
        return returns.mean(), metrics["entropy"]

    returns, entropy = jax.device_get(jax.jit(jax.vmap(run))(keys(3)))
    assert np.median(returns) > -250, returns
    # On (-1, 1) the uniform distribution has the largest entropy. A Gaussian starts at 1.42.
    assert (entropy < np.log(2)).all()


# ---- data_parallel ----


def over_shares(function):
    """Map a function over the shares of one device, along the axes that the script averages."""
    shares = jax.vmap(function, axis_name="share")
    return lambda *x: jax.tree.map(
        lambda y: y[0], jax.vmap(shares, axis_name="seed")(*jax.tree.map(lambda y: y[None], x))
    )


def test_statistics_and_advantages_are_those_of_all_shares(patched):
    script = patched("data_parallel")
    # The means of the shares differ, so the mean of their variances would be far too small.
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

def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

script = load("data_parallel", sys.argv[1])
config = replace(script.default_config("Pendulum-v1"), num_envs=4, num_steps=32)
config = replace(config, num_minibatches=4, num_seeds=4, target_kl=0.003)
config = replace(config, total_timesteps=3 * config.batch_size)
train = lambda seed: script.train(config, jax.random.key(seed))
state, metrics = script.over_seeds(train, 4)(np.arange(4))
assert len(state.obs.sharding.device_set) == jax.device_count() == 4
script.largest_divisor = lambda number, limit: 1  # of the devices, use one
alone, alone_metrics = script.over_seeds(train, 4)(np.arange(4))
assert len(alone.obs.sharding.device_set) == 1
close = lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-4)
numbers = lambda state: jax.device_get(state._replace(key=jax.random.key_data(state.key)))
jax.tree.map(close, numbers(state), numbers(alone))
# All shares stop at the same minibatch, and have the same weights and statistics bit for bit.
# Each share has its own environments.
assert 0 < metrics["stopped"].mean() < 1
same = lambda x: (np.asarray(x) == np.asarray(x)[:1]).all()
assert jax.tree.all(jax.tree.map(same, (state.params, state.obs_stats, state.reward_stats)))
assert not same(state.obs)
"""


def test_four_devices_do_what_one_does(patched, environment):
    """The keys of a share do not depend on its device, so neither do its actions."""
    path = patched("data_parallel").__file__
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    command = [sys.executable, "-c", SHARES, path]
    done = subprocess.run(
        command, env=environment | {"XLA_FLAGS": flags}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
