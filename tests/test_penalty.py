"""The KL penalty: how β is adapted, the optimum of the objective, and the measured KL."""

from dataclasses import replace
from functools import partial

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from conftest import ContinuousProbe
from gymnax.environments import spaces

import ppo_penalty
from ppo_penalty import Categorical, Config, adapt_beta, make_train, surrogate, train

# One state, two action dimensions; the reward pulls the mean away from 0.
gymnax.register(
    "Slope-test",
    lambda: ContinuousProbe(lambda cue, action, time: action[0] - 2 * action[1], shape=(2,)),
)
SMALL = Config(num_seeds=2, total_timesteps=3 * 64, num_envs=4, num_steps=16, hidden_sizes=(8, 8))


# ---- Adapting β ----


@pytest.mark.parametrize(
    "beta, kl, expected",
    [
        (1.0, 0.0, 0.5),
        (1.0, 0.0199, 0.5),
        (1.0, 0.03 / 1.5, 1.0),  # the inequalities are strict
        (1.0, 0.03, 1.0),
        (1.0, 0.03 * 1.5, 1.0),
        (1.0, 0.0451, 2.0),
        (1.0, 100.0, 2.0),
        (3.0, 0.0, 1.5),
        (3.0, 1.0, 6.0),
        (1e-4, 0.0, 1e-4),  # the bounds
        (1.5e-4, 0.0, 1e-4),
        (1e4, 1.0, 1e4),
        (9e3, 1.0, 1e4),
        (3.0, np.nan, 3.0),  # not finite: β does not change
        (3.0, np.inf, 3.0),
        (3.0, -np.inf, 3.0),
    ],
)
def test_adapt_beta(beta, kl, expected):
    with jax.enable_x64(True):
        new_beta = adapt_beta(jnp.asarray(beta), jnp.asarray(kl), 0.03)
    np.testing.assert_allclose(new_beta, expected, rtol=1e-12)


def test_beta_is_adapted_once_per_update_and_used_in_the_next(keys):
    config = replace(SMALL, total_timesteps=64 * 12, learning_rate=1e-2, beta=0.7, target_kl=0.01)
    state, metrics = jax.jit(jax.vmap(partial(train, config)))(keys(4))
    beta, kl = np.asarray(metrics["beta"]), np.asarray(metrics["kl"])
    np.testing.assert_allclose(beta[:, 0], 0.7, rtol=1e-6)
    following = np.column_stack([beta[:, 1:], state.beta])
    factor = np.where(kl < 0.01 / 1.5, 0.5, np.where(kl > 0.01 * 1.5, 2.0, 1.0))
    np.testing.assert_allclose(following, beta * factor, rtol=1e-6)
    # β was halved and doubled, and each seed has its own.
    assert {0.5, 2.0} <= {*factor.ravel()} and len({*beta[:, -1]}) > 1


def test_beta_is_the_multiplier_of_the_constraint():
    # For small steps β* = √(gᵀF⁻¹g / 2d), the multiplier of TRPO's constraint with δ = d.
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        old = Categorical(jnp.asarray(rng.normal(size=(6, 3))))
        advantage = jnp.asarray(rng.normal(size=(6, 3)))

        def gain(x):  # the expected surrogate over all states and actions
            p, q = jax.nn.log_softmax(old.logits), jax.nn.log_softmax(x.reshape(6, 3))
            return surrogate(jnp.exp(q - p), jnp.exp(p) * advantage * 3)

        cost = lambda x: old.kl(Categorical(x.reshape(6, 3))).mean()
        x = old.logits.ravel()
        np.testing.assert_allclose(
            gain(x), (jnp.exp(jax.nn.log_softmax(old.logits)) * advantage).sum(1).mean()
        )
        gradient, fisher = jax.grad(gain)(x), jax.hessian(cost)(x)
        squared = gradient @ np.linalg.pinv(fisher, rtol=1e-10) @ gradient
        for d in (1e-4, 1e-6):
            beta = float(np.sqrt(squared / (2 * d)))
            result = scipy.optimize.minimize(
                jax.jit(jax.value_and_grad(lambda x, b=beta: cost(x) - gain(x) / b)),
                x,
                jac=True,
                method="BFGS",
                options={"gtol": 1e-10},
            )
            np.testing.assert_allclose(cost(result.x), d, rtol=30 * np.sqrt(d))


# ---- The penalty ----


def test_the_optimum_of_the_objective(keys):
    # One state, two actions, reward = action. We optimise on one rollout until nothing changes.
    # The mean of ρ Â over the rollout is Σ_a π(a) A(a) with A(a) = Â(a) · frequency(a) / π_old(a),
    # and Σ_a π(a) A(a) - β KL(π_old ‖ π) is largest at π(a) = β π_old(a) / (ν - A(a)).
    beta = 1.0
    config = Config(
        env_id="ProbeAction-test",
        total_timesteps=64,
        num_envs=4,
        num_steps=16,
        update_epochs=1000,
        num_minibatches=1,
        learning_rate=2e-3,
        anneal_lr=False,
        beta=beta,
        hidden_sizes=(8,),
        normalize_obs=False,
        early_stop_kl=None,
    )
    init, _ = make_train(config)
    before = jax.jit(init)(keys(1)[0])
    after, metrics = jax.jit(partial(train, config))(keys(1)[0])
    actor, _ = ppo_penalty.make_networks(config, spaces.Discrete(2))
    policy = lambda state: np.asarray(
        jax.nn.softmax(actor.apply(state.params["actor"], jnp.array([1.0, 0.0])).logits)
    )
    old, new = policy(before), policy(after)

    ones = float(metrics["episodic_return"][0])  # how often action 1 was taken
    frequency = np.array([1 - ones, ones])
    # Advantages have mean 0 and variance 1 over the rollout, and take two values.
    normalised = np.array([-np.sqrt(ones / (1 - ones)), np.sqrt((1 - ones) / ones)])
    A = normalised * frequency / old
    excess = lambda nu: (beta * old / (nu - A)).sum() - 1
    nu = scipy.optimize.brentq(excess, A.max() + 1e-9, A.max() + 100)
    np.testing.assert_allclose(new, beta * old / (nu - A), atol=3e-3)
    # With the reverse KL(π ‖ π_old) the optimum would be another one.
    reverse = old * np.exp(A / beta)
    assert np.abs(new - reverse / reverse.sum()).max() > 0.03
    # The metric is measured after the update, in the same direction.
    np.testing.assert_allclose(metrics["kl"][0], (old * np.log(old / new)).sum(), rtol=1e-3)


def test_the_kl_of_gaussians_is_from_old_to_new(keys):
    config = replace(SMALL, env_id="Slope-test", total_timesteps=64, learning_rate=2e-2, beta=0.01)
    config = replace(config, early_stop_kl=None, normalize_obs=True)
    init, update = make_train(config)
    state = jax.jit(init)(keys(1)[0])
    # The first policy shall depend on the observation, which is always [1, 0]. The KL is measured
    # with the statistics under which the policy acted, which this rollout has not changed yet.
    actor = jax.tree.map(lambda x: 3 * x, state.params["actor"])
    state = state._replace(params={"actor": actor, "critic": state.params["critic"]})
    new_state, metrics = jax.jit(update)(state)
    network, _ = ppo_penalty.make_networks(
        config, ppo_penalty.make_gymnax("Slope-test").action_space
    )
    old, new = (network.apply(s.params["actor"], jnp.array([1.0, 0.0])) for s in (state, new_state))
    s, t, shift = np.exp(old.log_std), np.exp(new.log_std), (old.mean - new.mean) ** 2
    forward = (np.log(t / s) + (s**2 + shift) / (2 * t**2) - 0.5).sum()
    backward = (np.log(s / t) + (t**2 + shift) / (2 * s**2) - 0.5).sum()
    assert abs(forward - backward) > 0.05 * forward > 0.005
    np.testing.assert_allclose(metrics["kl"], forward, rtol=1e-3)


def test_a_huge_penalty_holds_the_policy_and_none_lets_it_go(keys):
    config = replace(SMALL, adaptive_beta=False, learning_rate=1e-2, early_stop_kl=None)
    run = lambda beta: train(replace(config, beta=beta), keys(1)[0])[1]
    metrics = jax.jit(jax.vmap(run))(jnp.array([0.0, 1000.0]))
    free, held = metrics["kl"]
    assert free.max() > 0.02 and held.max() < 0.002
    np.testing.assert_array_equal(metrics["beta"], [[0] * 3, [1000] * 3])  # it is not adapted
