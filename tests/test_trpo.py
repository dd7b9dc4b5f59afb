"""TRPO: Fisher-vector products, conjugate gradient, the step, the line search, and the update."""

from dataclasses import replace
from functools import partial

import chex
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from conftest import ContinuousProbe, Probe
from gymnax.environments import spaces
from jax.flatten_util import ravel_pytree

import trpo
from trpo import Categorical, Config, DiagGaussian, make_train, train

both_distributions = pytest.mark.parametrize("distribution", [Categorical, DiagGaussian])
both_spaces = pytest.mark.parametrize("env_id", ["ProbeAction-test", "OneState-test"])

# One state, two action dimensions; the reward pulls the mean away from 0.
gymnax.register(
    "OneState-test",
    lambda: ContinuousProbe(lambda cue, action, time: action[0] - 2 * action[1], shape=(2,)),
)
gymnax.register("ProbeNothing-test", lambda: Probe(lambda cue, action, time: 0.0))


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def action_space(distribution, size):
    """A space whose policies are of this distribution."""
    return spaces.Discrete(size) if distribution is Categorical else spaces.Box(-1, 1, (size,))


def small_policy(distribution, hidden_sizes=(3,), states=40):
    """A network of at most twenty parameters on random states: policy_at(θ), θ."""
    obs = jnp.asarray(random((states, 2)))
    actor = trpo.Actor(action_space(distribution, 2), hidden_sizes, "tanh", 1.0)
    params = jax.tree.map(lambda x: x.astype(jnp.float64), actor.init(jax.random.key(0), obs))
    theta, unravel = ravel_pytree(params)
    theta = jnp.asarray(0.5 * random(theta.shape, 1))  # no small last layer, deviations not 1
    return lambda theta: actor.apply(unravel(theta), obs), theta


def dense_fisher(policy_at, theta):
    """The Hessian of the mean KL, in full."""
    old = policy_at(theta)
    return jax.hessian(lambda theta: old.kl(policy_at(theta)).mean())(theta)


def policy_gradient(policy_at, theta):
    """The gradient of the surrogate for random advantages."""
    old = policy_at(theta)
    action, advantage = old.sample(jax.random.key(1)), jnp.asarray(random(40, 2))

    def objective(theta):
        ratio = jnp.exp(policy_at(theta).log_prob(action) - old.log_prob(action))
        return jnp.mean(ratio * advantage)

    return jax.grad(objective)(theta)


# ---- Fisher-vector product ----


@both_distributions
def test_fisher_vector_product_is_the_hessian_of_the_kl(float64, distribution):
    policy_at, theta = small_policy(distribution)
    fisher = dense_fisher(policy_at, theta)
    product = trpo.fisher_vector_product(policy_at, theta)
    columns = jax.vmap(product)(jnp.eye(len(theta)))
    np.testing.assert_allclose(columns, fisher, atol=1e-13)
    np.testing.assert_allclose(columns, columns.T, atol=1e-13)
    assert np.linalg.eigvalsh(columns).min() > -1e-12
    u, v = random((2, len(theta)), 3)
    combined = product(2 * u - 3 * v)
    np.testing.assert_allclose(combined, 2 * product(u) - 3 * product(v), atol=1e-12)


@both_distributions
def test_fisher_vector_product_is_the_expected_outer_product_of_scores(float64, distribution):
    policy_at, theta = small_policy(distribution)
    old = policy_at(theta)
    if distribution is Categorical:  # the expectation over actions is a sum
        nodes = [(jnp.full(40, a), jnp.exp(old.log_prob(jnp.full(40, a)))) for a in range(2)]
    else:  # Gauss-Hermite quadrature is exact, because the score is quadratic in the action
        z, weight = np.polynomial.hermite_e.hermegauss(5)
        weight = weight / weight.sum()
        nodes = [
            (old.mean + jnp.exp(old.log_std) * jnp.asarray([z[i], z[j]]), weight[i] * weight[j])
            for i in range(5)
            for j in range(5)
        ]
    expected = 0
    for action, weight in nodes:
        score = jax.jacobian(lambda theta, action=action: policy_at(theta).log_prob(action))(theta)
        expected += jnp.einsum("s,si,sj->ij", weight * jnp.ones(40), score, score) / 40
    product = trpo.fisher_vector_product(policy_at, theta)
    np.testing.assert_allclose(jax.vmap(product)(jnp.eye(len(theta))), expected, atol=1e-12)


def test_the_standard_deviations_have_their_own_fisher_block(float64):
    obs = jnp.asarray(random((10, 2)))
    actor = trpo.Actor(action_space(DiagGaussian, 3), (4,), "tanh", 1.0)
    params = jax.tree.map(lambda x: x.astype(jnp.float64), actor.init(jax.random.key(0), obs))
    theta, unravel = ravel_pytree(params)
    product = trpo.fisher_vector_product(lambda theta: actor.apply(unravel(theta), obs), theta)
    fisher = np.asarray(jax.vmap(product)(jnp.eye(len(theta))))
    is_std = jax.tree.map(jnp.zeros_like, params)
    is_std["params"]["log_std"] = jnp.ones(3)
    is_std = np.asarray(ravel_pytree(is_std)[0], bool)
    # The KL is summed over action dimensions, not averaged, so the block is 2I.
    np.testing.assert_allclose(fisher[np.ix_(is_std, is_std)], 2 * np.eye(3), atol=1e-12)
    np.testing.assert_allclose(fisher[np.ix_(is_std, ~is_std)], 0, atol=1e-12)


# ---- Conjugate gradient ----


def positive_definite(n, seed=0):
    a = random((n, n), seed)
    return jnp.asarray(a @ a.T + np.eye(n))


def test_conjugate_gradient_equals_a_dense_solve(float64):
    matrix, b = positive_definite(12), jnp.asarray(random(12, 1))
    x, residual = trpo.conjugate_gradient(lambda v: matrix @ v, b, 12)
    np.testing.assert_allclose(x, scipy.linalg.solve(matrix, b), rtol=1e-7)
    np.testing.assert_allclose(residual, 0, atol=1e-8)


@pytest.mark.parametrize("iterations", [1, 3, 6])
def test_conjugate_gradient_agrees_with_jax(float64, iterations):
    matrix, b = positive_definite(12), jnp.asarray(random(12, 1))
    x, residual = trpo.conjugate_gradient(lambda v: matrix @ v, b, iterations)
    expected, _ = jax.scipy.sparse.linalg.cg(lambda v: matrix @ v, b, tol=0, maxiter=iterations)
    np.testing.assert_allclose(x, expected, rtol=1e-9)
    np.testing.assert_allclose(residual, b - matrix @ x, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_conjugate_gradient_is_linear_in_the_scale_of_b(float64, scale):
    matrix, b = positive_definite(12), jnp.asarray(random(12, 1))
    x, _ = trpo.conjugate_gradient(lambda v: matrix @ v, scale * b, 5)
    expected, _ = trpo.conjugate_gradient(lambda v: matrix @ v, b, 5)
    np.testing.assert_allclose(x, scale * expected, rtol=1e-10)


def test_conjugate_gradient_at_the_limits():
    for dtype in (jnp.float32, jnp.float64):
        with jax.enable_x64(dtype == jnp.float64):
            matrix, b = positive_definite(6).astype(dtype), jnp.asarray(random(6, 1), dtype)
            x, residual = trpo.conjugate_gradient(lambda v, m=matrix: m @ v, 0 * b, 10)
            np.testing.assert_array_equal(x, 0)
            np.testing.assert_array_equal(residual, 0)
            # More iterations than necessary change nothing.
            x, _ = trpo.conjugate_gradient(lambda v, m=matrix: m @ v, b, 100)
            solution = scipy.linalg.solve(matrix, b)
            np.testing.assert_allclose(x, solution, rtol=1e-3 if dtype == jnp.float32 else 1e-9)


# ---- The step ----


@both_distributions
@pytest.mark.parametrize("iterations", [3, 50])
def test_the_step_fills_the_quadratic_trust_region(float64, distribution, iterations):
    policy_at, theta = small_policy(distribution)
    gradient = policy_gradient(policy_at, theta)
    product = trpo.fisher_vector_product(policy_at, theta)
    step, residual = trpo.trust_region_step(product, gradient, 0.01, 0.1, iterations)
    damped = dense_fisher(policy_at, theta) + 0.1 * np.eye(len(theta))
    np.testing.assert_allclose(0.5 * step @ damped @ step, 0.01, rtol=1e-9)
    if iterations == 50:
        natural = scipy.linalg.solve(damped, gradient)
        expected = np.sqrt(2 * 0.01 / (gradient @ natural)) * natural
        np.testing.assert_allclose(step, expected, rtol=1e-6, atol=1e-12)
        assert residual < 1e-9
    else:
        assert 1e-3 < residual < 1


@both_distributions
def test_without_damping_the_kl_of_small_steps_is_delta(float64, distribution):
    policy_at, theta = small_policy(distribution, hidden_sizes=())  # F is well conditioned
    gradient = policy_gradient(policy_at, theta)
    product = trpo.fisher_vector_product(policy_at, theta)
    errors = []
    for max_kl in (1e-2, 1e-4, 1e-6):
        step, _ = trpo.trust_region_step(product, gradient, max_kl, 0.0, 60)
        kl = policy_at(theta).kl(policy_at(theta + step)).mean()
        errors.append(abs(float(kl / max_kl - 1)))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.02, errors


@both_distributions
def test_the_step_does_not_depend_on_the_scale_of_the_advantages(float64, distribution):
    policy_at, theta = small_policy(distribution)
    gradient = policy_gradient(policy_at, theta)
    product = trpo.fisher_vector_product(policy_at, theta)
    step = lambda scale: trpo.trust_region_step(product, scale * gradient, 0.01, 0.1, 10)[0]
    for scale in (1e-6, 1e6):
        np.testing.assert_allclose(step(scale), step(1.0), rtol=1e-8, atol=1e-14)


@both_distributions
def test_the_new_policy_does_not_depend_on_the_parameterisation(float64, distribution):
    policy_at, theta = small_policy(distribution)
    transform = jnp.asarray(np.eye(len(theta)) + 0.3 * random((len(theta), len(theta)), 4))
    other_at = lambda phi: policy_at(transform @ phi)
    other = jnp.linalg.solve(transform, theta)

    def new_policy(policy_at, theta):
        gradient = policy_gradient(policy_at, theta)
        product = trpo.fisher_vector_product(policy_at, theta)
        return policy_at(theta + trpo.trust_region_step(product, gradient, 1e-3, 0.0, 200)[0])

    one, two = new_policy(policy_at, theta), new_policy(other_at, other)
    assert policy_at(theta).kl(one).mean() > 5e-4  # it moved ...
    np.testing.assert_allclose(one.kl(two).mean(), 0, atol=1e-9)  # ... to the same place
    # A step along the plain gradient does depend on it.
    plain = lambda at, theta: at(theta + 0.1 * policy_gradient(at, theta))
    assert plain(policy_at, theta).kl(plain(other_at, other)).mean() > 1e-7


def test_a_useless_model_gives_no_step():
    g = jnp.asarray(random(5), jnp.float32)
    for product, gradient in (
        (lambda v: v, 0 * g),
        (lambda v: -v, g),
        (lambda v: jnp.nan * v, g),
        (lambda v: v, g * jnp.nan),
        (lambda v: 0 * v, g),
    ):
        step, _ = trpo.trust_region_step(product, gradient, 0.01, 0.0, 10)
        np.testing.assert_array_equal(step, 0)


# ---- The line search ----


def search(improvement, kl, max_kl=0.01, num_tries=10, ratio=0.8):
    """A line search from 0 with step 1. Both measures are functions of the step's length."""
    measure = lambda theta: (jnp.asarray(improvement(theta[0])), jnp.asarray(kl(theta[0])))
    return trpo.line_search(measure, jnp.zeros(1), jnp.ones(1), max_kl, num_tries, ratio)


def test_the_first_acceptable_step_is_taken(float64):
    # KL x²/40 ≤ 0.01 for x ≤ 0.632: of 1, 0.8, 0.64, 0.512 the fourth.
    result = search(lambda x: x, lambda x: x**2 / 40)
    assert result.accepted and result.tries == 4
    np.testing.assert_allclose(result.theta, 0.512, rtol=1e-12)
    np.testing.assert_allclose(result.kl, 0.512**2 / 40, rtol=1e-12)
    np.testing.assert_allclose(result.improvement, 0.512, rtol=1e-12)
    # The surrogate x (0.7 - x) is positive for x < 0.7: the third.
    result = search(lambda x: x * (0.7 - x), lambda x: 0 * x)
    assert result.accepted and result.tries == 3
    # The full step, exactly on the edge of the trust region.
    result = search(lambda x: x, lambda x: 0.01 * x)
    assert result.accepted and result.tries == 1 and result.theta == 1


@pytest.mark.parametrize(
    "improvement, kl",
    [
        (lambda x: x, lambda x: 0 * x + 0.0101),  # always outside the trust region
        (lambda x: -x, lambda x: 0 * x),  # never better
        (lambda x: 0 * x, lambda x: 0 * x),  # always equal
        (lambda x: x * jnp.nan, lambda x: 0 * x),
        (lambda x: x, lambda x: x * jnp.nan),
        (lambda x: x * jnp.inf, lambda x: 0 * x),
    ],
)
def test_a_rejected_step_leaves_the_bits(improvement, kl):
    theta = jnp.asarray(random(7), jnp.float32)
    measure = lambda theta: (improvement(theta[0] ** 2), kl(theta[0] ** 2))
    result = trpo.line_search(measure, theta, jnp.asarray(random(7, 1)), 0.01, 10, 0.8)
    assert not result.accepted and result.tries == 10
    np.testing.assert_array_equal(result.theta, theta)
    assert result.improvement == 0 and result.kl == 0


def test_no_step_is_no_improvement():
    # The measured improvement of 1e-9 can only be a rounding error.
    result = trpo.line_search(lambda theta: (1e-9, 0.0), jnp.ones(2), jnp.zeros(2), 0.01, 10, 0.8)
    assert not result.accepted and result.tries == 10 and result.improvement == 0


def test_a_gradient_that_is_not_finite_gives_no_step_and_a_nan_error():
    step, error = trpo.trust_region_step(lambda v: v, jnp.array([1.0, jnp.nan]), 0.01, 0.1, 10)
    assert (step == 0).all() and jnp.isnan(error)


def test_the_step_of_the_actor_uses_full_precision(keys):
    # GPUs and TPUs multiply float32 matrices less precisely by default. A CPU does not.
    init, update = make_train(Config(num_envs=2, num_steps=8))
    program = str(jax.make_jaxpr(update)(jax.eval_shape(init, keys(1)[0])))
    exact = program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")
    # The other products are those of the actor in the rollout, of the critic for V(s_t) and
    # V(s_{t+1}), and of the critic's gradient: three products forwards, five backwards.
    assert program.count("dot_general[") - exact == 3 + 2 * 3 + (3 + 5) < exact


def test_a_step_that_is_not_finite_is_rejected():
    measure = lambda theta: (jnp.asarray(1.0), jnp.asarray(0.0))
    result = trpo.line_search(measure, jnp.zeros(2), jnp.array([1.0, jnp.inf]), 0.01, 10, 0.8)
    assert not result.accepted
    np.testing.assert_array_equal(result.theta, 0)


# ---- The update ----


def network_of(config):
    return trpo.make_networks(config, trpo.make_gymnax(config.env_id).action_space)[0]


SMALL = Config(num_seeds=2, total_timesteps=3 * 64, num_envs=4, num_steps=16, hidden_sizes=(8, 8))


@both_spaces
def test_the_kl_is_from_old_to_new_and_within_delta(keys, env_id):
    # In a large trust region the two directions of the KL differ clearly.
    config = replace(SMALL, env_id=env_id, max_kl=0.5, cg_damping=1e-3, num_steps=48)
    init, update = make_train(config)
    state = jax.jit(init)(keys(1)[0])
    # The first policy shall depend on the observation, which is always [1, 0]. The KL is measured
    # with the statistics under which the policy acted, which this rollout has not changed yet.
    actor = jax.tree.map(lambda x: 3 * x, state.params["actor"])
    state = state._replace(params={"actor": actor, "critic": state.params["critic"]})
    new_state, metrics = jax.jit(update)(state)
    network = network_of(config)
    old, new = (network.apply(s.params["actor"], jnp.array([1.0, 0.0])) for s in (state, new_state))
    np.testing.assert_allclose(metrics["entropy"], old.entropy(), rtol=1e-5)
    if env_id == "ProbeAction-test":
        p, q = jax.nn.softmax(old.logits), jax.nn.softmax(new.logits)
        forward, backward = (p * np.log(p / q)).sum(), (q * np.log(q / p)).sum()
    else:
        s, t = np.exp(old.log_std), np.exp(new.log_std)
        shift = (old.mean - new.mean) ** 2
        forward = (np.log(t / s) + (s**2 + shift) / (2 * t**2) - 0.5).sum()
        backward = (np.log(s / t) + (t**2 + shift) / (2 * s**2) - 0.5).sum()
    assert metrics["step_accepted"] == 1 and abs(forward - backward) > 0.01
    np.testing.assert_allclose(metrics["kl"], forward, rtol=1e-3)
    assert 0.1 < metrics["kl"] <= 0.5 and metrics["surrogate_improvement"] > 0


@pytest.mark.parametrize("env_id, scale", [("ProbeAction-test", -1.0), ("OneState-test", 30.0)])
def test_the_update_takes_what_the_search_found(keys, env_id, scale, monkeypatch):
    # A step in the wrong direction is rejected, and a step that is much too long is shortened.
    original = trpo.trust_region_step

    def propose(*arguments):
        step, residual = original(*arguments)
        return scale * step, residual

    monkeypatch.setattr(trpo, "trust_region_step", propose)
    config = replace(SMALL, env_id=env_id, normalize_obs=False, line_search_ratio=0.5)
    init, update = make_train(config)
    state = jax.jit(init)(keys(1)[0])
    after, metrics = jax.jit(update)(state)
    network = network_of(config)
    old, new = (network.apply(s.params["actor"], jnp.array([1.0, 0.0])) for s in (state, after))
    np.testing.assert_allclose(old.kl(new), metrics["kl"], rtol=1e-2, atol=1e-7)
    assert metrics["kl"] <= config.max_kl and metrics["line_search_tries"] > 1
    assert metrics["step_accepted"] == (scale > 0)
    same = jax.tree.map(np.array_equal, state.params["actor"], after.params["actor"])
    assert all(jax.tree.leaves(same)) == (scale < 0)


def test_the_fisher_matrix_can_be_that_of_every_fifth_step(keys, monkeypatch):
    original, seen = trpo.fisher_vector_product, []

    def recorded(policy_at, theta):
        seen.append(policy_at(theta).logits)
        return original(policy_at, theta)

    monkeypatch.setattr(trpo, "fisher_vector_product", recorded)

    def run(stride):
        init, update = make_train(replace(SMALL, fisher_stride=stride))
        metrics = update(init(keys(1)[0]))[1]
        return seen.pop(), metrics["step_accepted"]

    (every, accepted), (fifth, accepted_too) = (jax.jit(run, static_argnums=0)(n) for n in (1, 5))
    assert accepted and accepted_too and every.shape == (16, 4, 2)
    np.testing.assert_allclose(fifth, every[np.array([0, 5, 10, 15])], rtol=1e-4, atol=1e-8)


def test_zero_advantages_leave_the_policy(keys):
    # There is no reward, and the critic predicts none.
    config = replace(SMALL, env_id="ProbeNothing-test")
    init, update = make_train(config)
    state = jax.jit(init)(keys(1)[0])
    zero = jax.tree.map(jnp.zeros_like, state.params["critic"])
    state = state._replace(params={"actor": state.params["actor"], "critic": zero})
    new_state, metrics = jax.jit(update)(state)
    chex.assert_trees_all_equal(state.params["actor"], new_state.params["actor"])
    assert metrics["step_accepted"] == 0 and metrics["kl"] == 0
    assert metrics["line_search_tries"] == config.line_search_tries
    assert np.isfinite(metrics["cg_error"])


def test_the_critic_does_not_move_the_policy(keys):
    after = []
    for config in (SMALL, replace(SMALL, learning_rate=0.1, update_epochs=3)):
        init, update = make_train(config)
        after.append(
            jax.jit(lambda key, init=init, update=update: update(init(key))[0])(keys(1)[0])
        )
    chex.assert_trees_all_equal(*(state.params["actor"] for state in after))
    assert not np.array_equal(*(jax.tree.leaves(state.params["critic"])[0] for state in after))


def test_a_rejected_step_does_not_touch_the_neighbours(keys):
    init, update = make_train(SMALL)
    state = jax.jit(jax.vmap(init))(keys(3))
    # A NaN in the second seed's critic makes its policy gradient NaN.
    critic = jax.tree.map(lambda x: x.at[1].set(jnp.nan), state.params["critic"])
    broken = state._replace(params={"actor": state.params["actor"], "critic": critic})
    run = jax.jit(jax.vmap(update))
    (after, metrics), (after_broken, metrics_broken) = run(state), run(broken)
    np.testing.assert_array_equal(metrics["step_accepted"], 1)
    np.testing.assert_array_equal(metrics_broken["step_accepted"], [1, 0, 1])
    chex.assert_trees_all_equal(
        *(jax.tree.map(lambda x: x[::2], s.params) for s in (after, after_broken))
    )
    chex.assert_trees_all_equal(
        *(jax.tree.map(lambda x: x[1], s.params["actor"]) for s in (broken, after_broken))
    )


def test_the_kl_never_exceeds_delta(keys):
    config = replace(SMALL, total_timesteps=64 * 30, max_kl=0.02)
    _, metrics = jax.jit(jax.vmap(partial(train, config)))(keys(3))
    assert (metrics["kl"] <= 0.02).all()
    accepted = metrics["step_accepted"] == 1
    assert accepted.mean() > 0.5
    assert (metrics["surrogate_improvement"][accepted] > 0).all()
    assert (metrics["kl"][~accepted] == 0).all()
