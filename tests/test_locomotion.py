"""benchmarks/locomotion.py: what is stored, and how a policy is scored."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from conftest import ROOT
from test_environments import Walk

sys.path.insert(0, str(ROOT / "benchmarks"))

import common
import environments
import locomotion

import ppo_continuous


def test_a_policy_is_scored_by_its_first_episodes(monkeypatch):
    # Environment i ends after i + 1 steps; an action is its own reward.
    def step(keys, time, action):
        n, time = len(keys), time + 1
        done = time % (jnp.arange(n) + 1) == 0
        obs = jnp.ones((n, 1)) * time
        return obs, time, action[:, 0], done, ~done & done, obs

    env = SimpleNamespace(reset=lambda keys: (jnp.zeros((len(keys), 1)), 0), step=step)
    monkeypatch.setattr(locomotion, "EPISODES", 5)
    score = lambda **options: locomotion.play(env, lambda obs: obs, jax.random.key(0), **options)
    # Observations count the steps: 0, 0 + 1, 0 + 1 + 2, ...
    assert score() == np.mean([0, 1, 3, 6, 10])
    assert score(repeat=2) == np.mean([0, 0, 2, 4, 8])


def test_the_score_of_a_policy_is_that_of_the_scripts():
    env = environments.brax_like(Walk(), limit=20)
    config = ppo_continuous.Config(env_id="nothing", num_envs=4, num_steps=16, num_minibatches=2)
    actor = ppo_continuous.Actor(1, config.hidden_sizes, config.activation, config.initial_std)

    def both(key):
        state = ppo_continuous.make_train(config, env)[0](key)

        def policy(obs):
            seen = ppo_continuous.normalize(obs, state.obs_stats)
            action = actor.apply(state.params["actor"], seen).mode()
            return ppo_continuous.bound_action(action, env.action_space)

        returns, _ = ppo_continuous.evaluate(config, state, key, 100, env, max_steps=1000)
        return locomotion.play(env, policy, jax.random.fold_in(key, 1)), returns

    score, returns = jax.jit(both)(jax.random.key(3))
    assert returns.std() > 1 and abs(score - returns.mean()) < 0.4 * returns.std()


def test_the_configuration_of_each_algorithm_is_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(locomotion, "RESULTS", tmp_path)
    ours = locomotion.cell_of("trpo", "hopper", 1_000_000)
    assert ours.config["env_id"] == "benchmarks.environments:hopper-brax"
    for algorithm, name in (("brax", "discounting"), ("purejaxrl", "GAMMA")):
        cell = locomotion.cell_of(algorithm, "ant", 1_000_000)
        cell.add_rows(common.scored([0, 1], [5.0, 7.0]))
        assert cell.is_current() and not cell.missing_seeds()
        options = locomotion.BRAX["ant"] if algorithm == "brax" else locomotion.PUREJAXRL
        with monkeypatch.context() as context:
            context.setitem(options, name, 0.5)
            assert not locomotion.cell_of(algorithm, "ant", 1_000_000).is_current()


def test_brax_is_trained_a_seed_at_a_time(tmp_path, monkeypatch):
    trained = []

    def train(task, steps, options, seeds):
        trained.append((task, steps, options["num_envs"], *seeds))
        return common.scored(seeds, [1.0])

    monkeypatch.setattr(locomotion, "RESULTS", tmp_path)
    monkeypatch.setattr(locomotion, "train_brax", train)
    locomotion.cell_of("brax", "ant", 1_000_000).complete()
    assert trained == [("ant", 1_000_000, 4096, 0), ("ant", 1_000_000, 4096, 1)]
