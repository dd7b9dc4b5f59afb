"""Learning with the default configuration: several seeds, and thresholds that a bug would miss."""

from dataclasses import replace

import jax
import numpy as np
from conftest import as_shipped

import ppo_continuous
import ppo_discrete
import ppo_penalty
import trpo


def learn(script, keys, num_seeds, **config):
    """Train; returns the mean returns of 100 greedy episodes [num_seeds], metrics, and config."""
    config = replace(script.default_config(config.pop("env_id")), **config)

    @as_shipped
    @jax.vmap
    def run(key):
        state, metrics = script.train(config, key)
        returns, _ = script.evaluate(config, state, jax.random.fold_in(key, 2**31), 100)
        return returns.mean(), metrics

    returns, metrics = jax.device_get(run(keys(num_seeds)))
    return returns, metrics, config


def test_ppo_discrete_solves_cartpole_within_50k_steps(keys):
    returns, *_ = learn(ppo_discrete, keys, 5, env_id="CartPole-v1", total_timesteps=50_000)
    assert (returns >= 475).all(), returns


def test_ppo_discrete_swings_the_acrobot_up_within_100k_steps(keys):
    returns, *_ = learn(ppo_discrete, keys, 5, env_id="Acrobot-v1", total_timesteps=100_000)
    assert np.median(returns) >= -90 and (returns > -110).all(), returns


def test_ppo_continuous_swings_the_pendulum_up_within_300k_steps(keys):
    returns, *_ = learn(ppo_continuous, keys, 3, env_id="Pendulum-v1", total_timesteps=300_000)
    assert (returns > -200).all(), returns


def test_trpo_solves_cartpole_within_100k_steps(keys):
    returns, metrics, config = learn(trpo, keys, 3, env_id="CartPole-v1", total_timesteps=100_000)
    assert (returns >= 475).all(), returns
    assert (metrics["kl"] <= config.max_kl).all() and (metrics["step_accepted"] == 1).mean() > 0.9


def test_trpo_swings_the_pendulum_up_within_100k_steps(keys):
    returns, *_ = learn(trpo, keys, 3, env_id="Pendulum-v1", total_timesteps=100_000)
    assert np.median(returns) > -200 and (returns > -300).all(), returns


def test_ppo_penalty_solves_cartpole_within_100k_steps(keys):
    returns, metrics, config = learn(
        ppo_penalty, keys, 4, env_id="CartPole-v1", total_timesteps=100_000
    )
    assert (returns >= 475).all(), returns
    # The KL is near its target after the first tenth of the updates.
    median = np.median(metrics["kl"][:, config.num_updates // 10 :])
    assert 0.5 * config.target_kl < median < 2 * config.target_kl
