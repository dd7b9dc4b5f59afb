"""Learning with the default configuration: several seeds, thresholds that a broken one misses."""

from dataclasses import replace

import jax
import numpy as np

import ppo_discrete


def greedy_returns(script, keys, num_seeds, **config):
    """Train; the mean return of 100 greedy episodes, [num_seeds]."""
    config = replace(script.default_config(config.pop("env_id")), **config)

    @jax.jit
    @jax.vmap
    def run(key):
        state, _ = script.train(config, key)
        return script.evaluate(config, state, jax.random.fold_in(key, 2**31), 100)[0].mean()

    return np.asarray(run(keys(num_seeds)))


def test_ppo_discrete_solves_cartpole_within_50k_steps(keys):
    returns = greedy_returns(ppo_discrete, keys, 5, env_id="CartPole-v1", total_timesteps=50_000)
    assert (returns >= 475).all(), returns


def test_ppo_discrete_swings_the_acrobot_up_within_100k_steps(keys):
    returns = greedy_returns(ppo_discrete, keys, 5, env_id="Acrobot-v1", total_timesteps=100_000)
    assert np.median(returns) >= -90 and (returns > -110).all(), returns


def test_ppo_discrete_catches_every_ball_within_100k_steps(keys):
    returns = greedy_returns(ppo_discrete, keys, 5, env_id="Catch-bsuite", total_timesteps=100_000)
    assert (returns == 1).all(), returns
