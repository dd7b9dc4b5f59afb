"""What is particular to continuous actions: the Gaussian, the bounds, and time limits."""

from dataclasses import replace
from functools import partial

import chex
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from conftest import ContinuousProbe
from gymnax.environments import spaces

import ppo_continuous
import ppo_penalty
import trpo
from ppo_continuous import Config, bound_action, make_train, train
from trpo import DiagGaussian  # that of ppo_continuous, and `kl` (test_shared_code.py)

SMALL = Config(num_seeds=2, total_timesteps=3 * 64, num_envs=4, num_steps=16, hidden_sizes=(8, 8))


PROBES = {
    # Pays 1 for ever whatever one does, but is cut every five steps: V = 1 / (1 - γ).
    "ContinuousTruncated-test": lambda: ContinuousProbe(
        lambda cue, action, time: 1.0, length=5, truncates=True
    ),
    # The best action is 3 in [2, 6] and 40 in [-100, 100]: not ±1 and not the middle.
    "ContinuousTarget-test": lambda: ContinuousProbe(
        lambda cue, action, time: (
            -jnp.sum(((action - jnp.array([3.0, 40.0])) / jnp.array([4.0, 200.0])) ** 2)
        ),
        low=[2.0, -100.0],
        high=[6.0, 100.0],
        shape=(2,),
    ),
    # Says in the reward what arrives: a matrix-shaped action within its bounds.
    "ContinuousShape-test": lambda: ContinuousProbe(
        lambda cue, action, time: jnp.all(jnp.abs(action) <= 0.5) * (action.shape == (2, 3)),
        low=-0.5,
        high=0.5,
        shape=(2, 3),
    ),
}
for name, factory in PROBES.items():
    gymnax.register(name, lambda factory=factory: factory())


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


# ---- DiagGaussian, in float64 ----


def test_gaussian_agrees_with_scipy():
    with jax.enable_x64(True):
        mean, log_std, action = random((5, 3)), 0.5 * random((5, 3), 1), random((5, 3), 2)
        policy = DiagGaussian(jnp.asarray(mean), jnp.asarray(log_std))
        normal = scipy.stats.norm(mean, np.exp(log_std))
        log_prob = normal.logpdf(action).sum(-1)
        np.testing.assert_allclose(policy.log_prob(action), log_prob, rtol=1e-12)
        np.testing.assert_allclose(policy.entropy(), normal.entropy().sum(-1), rtol=1e-12)
        np.testing.assert_array_equal(policy.mode(), mean)


def test_gaussian_kl():
    with jax.enable_x64(True):
        p = DiagGaussian(jnp.asarray(random((4, 2))), jnp.asarray(0.3 * random((4, 2), 1)))
        q = DiagGaussian(jnp.asarray(random((4, 2), 2)), jnp.asarray(0.3 * random((4, 2), 3)))
        # KL(p ‖ q) = E_p[log p - log q], integrated on a fine grid of the first row.
        x = np.linspace(-8, 8, 1001)
        grid = np.stack(np.meshgrid(x, x, indexing="ij"), axis=-1)
        row = lambda d: jax.tree.map(lambda v: v[0], d)
        log_p, log_q = row(p).log_prob(grid), row(q).log_prob(grid)
        integral = (np.exp(log_p) * (log_p - log_q)).sum() * (x[1] - x[0]) ** 2
        np.testing.assert_allclose(p.kl(q)[0], integral, rtol=1e-6)
        assert abs(float(p.kl(q)[0] - q.kl(p)[0])) > 1e-3  # the direction matters
        np.testing.assert_allclose(p.kl(p), 0, atol=1e-15)
        flat = jax.grad(lambda x: p.kl(DiagGaussian(*x)).sum())((p.mean, p.log_std))
        np.testing.assert_allclose(jax.tree.leaves(flat), 0, atol=1e-14)


def test_gaussian_gradients():
    with jax.enable_x64(True):
        mean, log_std, action = random((5, 3)), 0.5 * random((5, 3), 1), random((5, 3), 2)
        other = DiagGaussian(jnp.asarray(random((5, 3), 3)), jnp.asarray(0.3 * random((5, 3), 4)))
        for function in (
            lambda *p: DiagGaussian(*p).log_prob(action).sum(),
            lambda *p: DiagGaussian(*p).entropy().sum(),
            lambda *p: DiagGaussian(*p).kl(other).sum(),
            lambda *p: other.kl(DiagGaussian(*p)).sum(),
        ):
            chex.assert_numerical_grads(function, (jnp.asarray(mean), jnp.asarray(log_std)), 2)


def test_gaussian_samples():
    policy = DiagGaussian(jnp.array([1.0, -2.0]), jnp.log(jnp.array([0.5, 3.0])))
    x = jax.vmap(policy.sample)(jax.random.split(jax.random.key(0), 20_000))
    for i, (mean, std) in enumerate([(1.0, 0.5), (-2.0, 3.0)]):
        assert scipy.stats.kstest(x[:, i], scipy.stats.norm(mean, std).cdf).pvalue > 1e-3


# ---- The bounds ----


@pytest.mark.parametrize("script", [ppo_continuous, trpo])
def test_bound_action(script):
    low = jnp.array([-2.0, 0.0, -jnp.inf, 100.0, -3.4e38])
    high = jnp.array([2.0, 10.0, jnp.inf, jnp.inf, 3.4e38])
    space = spaces.Box(low, high, (5,))
    action = jnp.array([0.0, 0.5, 7.0, -7.0])[:, None] * jnp.ones(5)  # [N, A]
    expected = [
        [0, 5, 0, 101, 0],
        [1, 7.5, 0.5, 101.5, 0.5],
        [2, 10, 7, 108, 7],
        [-2, 0, -7, 100, -7],
    ]
    np.testing.assert_allclose(script.bound_action(action, space), expected)
    # One number may stand for the bounds of all dimensions, which may have any shape.
    upper = script.bound_action(jnp.array([[-7.0], [0.0], [7.0]]), spaces.Box(-jnp.inf, 5.0, (1,)))
    np.testing.assert_allclose(upper, [[-3], [4], [5]])
    number = script.bound_action(jnp.array([[-7.0], [0.0]]), spaces.Box(2.0, 6.0, ()))
    np.testing.assert_allclose(number, [2, 4])
    table = script.bound_action(jnp.arange(12.0).reshape(2, 6) / 4 - 1, spaces.Box(-4, 4, (2, 3)))
    np.testing.assert_allclose(table, [[[-4, -3, -2], [-1, 0, 1]], [[2, 3, 4], [4, 4, 4]]])


def test_discrete_actions_have_no_bounds():
    action = jnp.array([0, 3, 2])
    assert trpo.bound_action(action, spaces.Discrete(4)) is action


def test_the_first_ratio_is_one(keys):
    # With a deviation of 1 a third of all actions leaves ±1. Were they clipped on one side only,
    # in the rollout or in the loss, the first ratio would not be 1.
    config = replace(SMALL, update_epochs=1, num_minibatches=1)
    _, metrics = jax.jit(partial(train, config))(keys(1)[0])
    np.testing.assert_allclose(metrics["approx_kl"], 0, atol=1e-6)
    np.testing.assert_array_equal(metrics["clip_fraction"], 0)


def test_the_rollout_stores_the_raw_action_and_its_density(keys, monkeypatch):
    rollout = []
    original = ppo_continuous.Transition
    record = lambda *fields: rollout.append(original(*fields)) or rollout[-1]
    monkeypatch.setattr(ppo_continuous, "Transition", record)
    config = replace(SMALL, update_epochs=1, num_minibatches=1, num_steps=4, num_envs=16)
    init, update = make_train(config)
    state = jax.jit(init)(keys(1)[0])
    with jax.disable_jit():  # so that what is recorded are numbers
        update(state, None)
    assert len(rollout) == 4
    action = np.concatenate([step.action for step in rollout])
    log_prob = np.concatenate([step.log_prob for step in rollout])
    assert (np.abs(action) > 1).mean() > 0.2
    # The first policy is N(0, 1) but for its tiny last layer.
    np.testing.assert_allclose(log_prob, scipy.stats.norm.logpdf(action).sum(-1), atol=0.15)


@pytest.mark.parametrize("script", [ppo_continuous, ppo_penalty, trpo])
def test_the_first_actions_have_the_std_that_is_asked_for(script, keys):
    stds = jnp.array([1.0, 0.5, 0.1])  # vmapped, as in a sweep
    config = script.Config("Pendulum-v1", num_envs=4, hidden_sizes=(8,))
    first = lambda std, key: script.make_train(replace(config, initial_std=std))[0](key)
    params = jax.vmap(first)(stds, keys(3)).params["actor"]["params"]
    np.testing.assert_allclose(np.exp(params["log_std"]), stds[:, None], rtol=1e-6)
    assert script.default_config("environments:ant-brax").initial_std == 0.5


def test_the_environment_gets_the_bounded_action_in_its_shape(keys):
    # Pays 1 for a [2, 3] within ±0.5, which raw actions of deviation 1 leave: in the rollout ...
    config = replace(SMALL, env_id="ContinuousShape-test", learning_rate=1e-30)
    state, metrics = jax.jit(partial(train, config))(keys(1)[0])
    assert state.params["actor"]["params"]["log_std"].shape == (6,)
    np.testing.assert_array_equal(metrics["episodic_return"], 1)
    # ... and in the evaluation of a policy whose mode is far outside.
    layer = state.params["actor"]["params"]["Dense_2"]
    layer["bias"] = jnp.array([5.0, -5.0, 5.0, -5.0, 5.0, -5.0])
    returns, _ = ppo_continuous.evaluate(config, state, keys(1)[0], 4)
    np.testing.assert_array_equal(returns, 1)


# ---- Training ----


@pytest.mark.parametrize(
    "env_id",
    [
        "Pendulum-v1",
        "MountainCarContinuous-v0",
        "Reacher-misc",
        "Swimmer-misc",
        "PointRobot-misc",
        "ContinuousShape-test",
    ],
)
def test_every_continuous_environment_trains(env_id, keys):
    config = replace(SMALL, env_id=env_id, total_timesteps=2 * 64)
    state, metrics = jax.jit(partial(train, config))(keys(1)[0])
    assert np.isfinite(metrics["policy_loss"]).all() and np.isfinite(metrics["value_loss"]).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_a_discrete_environment_names_the_other_script():
    with pytest.raises(ValueError, match=r"use ppo_discrete\.py"):
        make_train(Config(env_id="CartPole-v1"))


PROBE = Config(
    total_timesteps=40_000,
    num_envs=8,
    num_steps=20,
    num_minibatches=2,
    gamma=0.9,
    learning_rate=1e-2,
    hidden_sizes=(16,),
    normalize_obs=False,
    normalize_reward=False,
)


def test_time_limits_are_bootstrapped(keys):
    config = replace(PROBE, env_id="ContinuousTruncated-test", learning_rate=3e-2)
    states, _ = jax.jit(jax.vmap(partial(train, config)))(keys(3))
    critic = ppo_continuous.Critic(config.hidden_sizes, config.activation)
    value = jax.vmap(lambda p: critic.apply(p, jnp.ones(1)))(states.params["critic"])
    np.testing.assert_allclose(value, 10, rtol=0.05)


def test_the_best_action_is_found_in_the_units_of_the_environment(keys):
    config = replace(PROBE, env_id="ContinuousTarget-test")
    states, _ = jax.jit(jax.vmap(partial(train, config)))(keys(3))
    actor = ppo_continuous.Actor(2, config.hidden_sizes, config.activation)
    policy = jax.vmap(lambda p: actor.apply(p, jnp.array([1.0, 0.0])))(states.params["actor"])
    space = spaces.Box(jnp.array([2.0, -100.0]), jnp.array([6.0, 100.0]), (2,))
    action = bound_action(policy.mode(), space)
    np.testing.assert_allclose(action / jnp.array([4, 200]), [[0.75, 0.2]] * 3, atol=0.05)
    assert (policy.log_std < -1).all()  # and the policy has become sure of it
