"""Continuous actions: the normal distribution, the bounds of actions, and training."""

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
from trpo import DiagGaussian  # the same as in ppo_continuous, with `kl` in addition

SMALL = Config(num_seeds=2, total_timesteps=3 * 64, num_envs=4, num_steps=16, hidden_sizes=(8, 8))


PROBES = {
    # The best action is 3 in [2, 6] and 40 in [-100, 100]: not ±1 and not the middle.
    "ContinuousTarget-test": lambda: ContinuousProbe(
        lambda cue, action, time: (
            -jnp.sum(((action - jnp.array([3.0, 40.0])) / jnp.array([4.0, 200.0])) ** 2)
        ),
        low=[2.0, -100.0],
        high=[6.0, 100.0],
        shape=(2,),
    ),
    # Pays 1 for an action of shape [2, 3] within its bounds.
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


def test_the_rollout_stores_raw_actions_and_their_density(keys, monkeypatch):
    rollout, transition = [], ppo_continuous.Transition

    def record(**fields):
        jax.debug.callback(lambda *x: rollout.append(x), fields["action"], fields["log_prob"])
        return transition(**fields)

    monkeypatch.setattr(ppo_continuous, "Transition", record)
    config = replace(SMALL, update_epochs=1, num_minibatches=1)
    init, update = make_train(config)
    _, metrics = jax.jit(lambda key: update(init(key)))(keys(1)[0])
    jax.effects_barrier()
    action, log_prob = (np.concatenate(x) for x in zip(*rollout, strict=True))
    assert action.shape == (64, 1) and (np.abs(action) > 1).mean() > 0.2
    # The first policy is close to N(0, 1), because its last layer is tiny.
    expected = scipy.stats.norm.logpdf(action).sum(-1)
    np.testing.assert_allclose(log_prob, expected, atol=0.15)
    # With a standard deviation of 1, a third of all actions are outside ±1. If they were clipped in
    # the rollout but not in the loss, or the other way round, the first ratios would not be 1.
    np.testing.assert_allclose(metrics["approx_kl"], 0, atol=1e-6)
    np.testing.assert_array_equal(metrics["clip_fraction"], 0)


@pytest.mark.parametrize("script", [ppo_continuous, ppo_penalty, trpo])
def test_the_first_actions_have_the_std_that_is_asked_for(script, keys):
    stds = jnp.array([1.0, 0.5, 0.1])
    config = script.Config("Pendulum-v1", num_envs=4, hidden_sizes=(8,))
    first = lambda std, key: script.make_train(replace(config, initial_std=std))[0](key)
    params = jax.vmap(first)(stds, keys(3)).params["actor"]["params"]
    np.testing.assert_allclose(np.exp(params["log_std"]), stds[:, None], rtol=1e-6)
    assert script.default_config("environments:ant-brax").initial_std == 0.5


def test_the_environment_gets_the_bounded_action_in_its_shape(keys):
    # Raw actions have a standard deviation of 1, and the bounds are ±0.5: first in the rollout ...
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


def test_the_best_action_is_found_in_the_units_of_the_environment(keys):
    config = replace(PROBE, env_id="ContinuousTarget-test")
    states, _ = jax.jit(jax.vmap(partial(train, config)))(keys(3))
    space = spaces.Box(jnp.array([2.0, -100.0]), jnp.array([6.0, 100.0]), (2,))
    actor, _ = ppo_continuous.make_networks(config, space)
    policy = jax.vmap(lambda p: actor.apply(p, jnp.array([1.0, 0.0])))(states.params["actor"])
    action = bound_action(policy.mode(), space)
    np.testing.assert_allclose(action / jnp.array([4, 200]), [[0.75, 0.2]] * 3, atol=0.05)
    assert (policy.log_std < -1).all()  # the policy has become almost deterministic
