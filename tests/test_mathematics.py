"""The pure functions against literals, SciPy, and slow independent computations, in float64."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

import ppo_discrete
import ppo_penalty
from ppo_penalty import Categorical  # the same as in ppo_discrete, with `kl` in addition


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


# ---- Categorical ----


def test_categorical_agrees_with_scipy():
    logits = 3 * random((5, 4))
    p = scipy.special.softmax(logits, axis=-1)
    policy = Categorical(jnp.asarray(logits))
    np.testing.assert_allclose(policy.entropy(), scipy.stats.entropy(p, axis=-1), rtol=1e-12)
    for action in range(4):
        log_prob = policy.log_prob(jnp.full(5, action))
        np.testing.assert_allclose(log_prob, np.log(p[:, action]), rtol=1e-12)
    q = scipy.special.softmax(logits[::-1], axis=-1)
    other = Categorical(jnp.asarray(logits[::-1]))
    np.testing.assert_allclose(policy.kl(other), scipy.stats.entropy(p, q, axis=-1), rtol=1e-10)
    np.testing.assert_array_equal(policy.mode(), np.argmax(logits, axis=-1))
    chex.assert_numerical_grads(lambda x: Categorical(x).entropy().sum(), (policy.logits,), 2)
    chex.assert_numerical_grads(lambda x: Categorical(x).kl(other).sum(), (policy.logits,), 2)
    log_prob = lambda x: Categorical(x).log_prob(jnp.arange(5) % 4).sum()
    chex.assert_numerical_grads(log_prob, (policy.logits,), 2)


def test_categorical_kl_to_itself_is_zero_and_flat():
    policy = Categorical(jnp.asarray(random((6, 3))))
    np.testing.assert_array_equal(policy.kl(policy), np.zeros(6))
    gradient = jax.grad(lambda logits: policy.kl(Categorical(logits)).sum())(policy.logits)
    np.testing.assert_allclose(gradient, 0, atol=1e-15)


def test_categorical_kl_is_never_negative_and_finite_at_extremes():
    for seed in range(20):
        p, q = (Categorical(jnp.asarray(10 * random((100, 5), seed + 50 * i))) for i in (0, 1))
        assert (p.kl(q) >= 0).all()
    extreme = Categorical(jnp.asarray([[1e4, 0.0, -1e4]]))
    uniform = Categorical(jnp.zeros((1, 3)))
    np.testing.assert_allclose(extreme.kl(uniform), np.log(3), rtol=1e-12)
    assert np.isfinite(uniform.kl(extreme)).all()
    gradient = jax.grad(lambda x: (uniform.kl(Categorical(x)) + Categorical(x).entropy()).sum())
    assert np.isfinite(gradient(extreme.logits)).all()


def test_categorical_samples_with_its_probabilities():
    policy = Categorical(jnp.log(jnp.asarray([0.1, 0.2, 0.7])))
    keys = jax.random.split(jax.random.key(0), 20_000)
    counts = np.bincount(jax.vmap(policy.sample)(keys), minlength=3)
    assert scipy.stats.chisquare(counts, 20_000 * np.array([0.1, 0.2, 0.7])).pvalue > 1e-3


# ---- The clipped objective: the two worked tables, ε = 0.2 ----

TABLE = [  # ratio, objective for A = +1, its slope, objective for A = -1, its slope
    (0.5, 0.5, 1.0, -0.8, 0.0),
    (0.7, 0.7, 1.0, -0.8, 0.0),
    (0.9, 0.9, 1.0, -0.9, -1.0),
    (1.0, 1.0, 1.0, -1.0, -1.0),
    (1.1, 1.1, 1.0, -1.1, -1.0),
    (1.5, 1.2, 0.0, -1.5, -1.0),
    (2.0, 1.2, 0.0, -2.0, -1.0),
]


@pytest.mark.parametrize("row", TABLE)
def test_clipped_surrogate_table(row):
    ratio, *expected = row
    for advantage, value, slope in ((1.0, *expected[:2]), (-1.0, *expected[2:])):
        f = lambda r, a=advantage: ppo_discrete.clipped_surrogate(r[None], jnp.full(1, a), 0.2)
        np.testing.assert_allclose(f(jnp.asarray(ratio)), value, rtol=1e-12)
        np.testing.assert_allclose(jax.grad(f)(jnp.asarray(ratio)), slope, atol=1e-12)
    # At the edges of the band the value is the ratio itself, whatever the advantage.
    for edge in (0.8, 1.2):
        f = ppo_discrete.clipped_surrogate(jnp.full(2, edge), jnp.asarray([1.0, -1.0]), 0.2)
        np.testing.assert_allclose(f, 0.0, atol=1e-12)


def test_clipped_surrogate_has_the_policy_gradient_at_the_old_policy():
    logits, advantage = random((50, 4)), random(50, 1)
    action = np.random.default_rng(2).integers(4, size=50)
    old = Categorical(jnp.asarray(logits)).log_prob(action)

    def surrogate(logits):
        ratio = jnp.exp(Categorical(logits).log_prob(action) - old)
        return ppo_discrete.clipped_surrogate(ratio, advantage, 0.2)

    # ∇ E[log π(a) A] by hand: (1[a] - π) A / B.
    expected = np.eye(4)[action] - scipy.special.softmax(logits, axis=-1)
    expected *= advantage[:, None] / 50
    np.testing.assert_allclose(jax.grad(surrogate)(jnp.asarray(logits)), expected, rtol=1e-10)


# ---- GAE ----


def gae_by_definition(reward, value, next_value, terminated, done, gamma, lam):
    """Eq. 11 as a double sum for one environment, [T]."""
    delta = reward + gamma * next_value * (1 - terminated) - value
    advantage = np.zeros(len(reward))
    for t in range(len(reward)):
        for later in range(t, len(reward)):
            advantage[t] += (gamma * lam) ** (later - t) * delta[later]
            if done[later]:
                break
    return advantage


def random_rollout(T=40, N=3, seed=0):
    rng = np.random.default_rng(seed)
    terminated = rng.random((T, N)) < 0.1
    done = terminated | (rng.random((T, N)) < 0.1)
    reward, value, next_value = rng.normal(size=(3, T, N))
    return reward, value, next_value, terminated, done


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_gae_equals_the_double_sum(lam):
    rollout = random_rollout()
    advantage, target = ppo_discrete.gae(*rollout, 0.9, lam)
    for n in range(3):
        expected = gae_by_definition(*(x[:, n] for x in rollout), 0.9, lam)
        np.testing.assert_allclose(advantage[:, n], expected, rtol=1e-10)
    np.testing.assert_allclose(target, advantage + rollout[1], rtol=1e-12)


def test_gae_on_a_worked_example():
    # Three steps, reward 1, V = 10 everywhere, γ = ½, λ = ½; the second step ends the episode.
    # δ = 1 + 5 - 10 = -4 with bootstrap, 1 - 10 = -9 without.
    one, ten = np.ones((3, 1)), np.full((3, 1), 10.0)
    ends, never = np.array([[False], [True], [False]]), np.zeros((3, 1), bool)
    terminated, _ = ppo_discrete.gae(one, ten, ten, ends, ends, 0.5, 0.5)
    np.testing.assert_allclose(terminated[:, 0], [-4 - 9 / 4, -9, -4])
    truncated, _ = ppo_discrete.gae(one, ten, ten, never, ends, 0.5, 0.5)
    np.testing.assert_allclose(truncated[:, 0], [-4 - 4 / 4, -4, -4])


def test_gae_with_lambda_one_is_the_discounted_return_minus_the_value():
    reward, value = random((6, 1)), random((6, 1), 1)
    next_value = np.vstack([value[1:], [[7.0]]])
    never = np.zeros((6, 1), bool)
    advantage, _ = ppo_discrete.gae(reward, value, next_value, never, never, 0.9, 1.0)
    for t in range(6):
        expected = sum(0.9 ** (k - t) * reward[k, 0] for k in range(t, 6)) + 0.9 ** (6 - t) * 7.0
        np.testing.assert_allclose(advantage[t, 0], expected - value[t, 0], rtol=1e-10)


def test_gae_is_unchanged_by_potential_based_shaping():
    # Ng, Harada & Russell 1999: r + γΦ(s') - Φ(s) with V - Φ gives the same advantages.
    reward, value, next_value, terminated, done = random_rollout()
    phi, next_phi = random((2, 40, 3), 5)
    shaped = reward + 0.9 * next_phi * (1 - terminated) - phi
    plain, _ = ppo_discrete.gae(reward, value, next_value, terminated, done, 0.9, 0.8)
    other, _ = ppo_discrete.gae(
        shaped, value - phi, next_value - next_phi, terminated, done, 0.9, 0.8
    )
    np.testing.assert_allclose(other, plain, rtol=1e-9, atol=1e-12)


def test_gae_ignores_the_value_after_the_end_and_keeps_episodes_apart():
    reward, value, next_value, terminated, done = random_rollout()
    clean, _ = ppo_discrete.gae(reward, value, next_value, terminated, done, 0.9, 0.8)
    # An environment may return anything as the observation after a terminated step.
    after_the_end = np.where(terminated, np.nan, next_value)
    advantage, _ = ppo_discrete.gae(reward, value, after_the_end, terminated, done, 0.9, 0.8)
    np.testing.assert_array_equal(advantage, clean)
    # A NaN reward affects its own step and the earlier steps of the same episode.
    step, env = 20, 1
    start = np.flatnonzero(done[:step, env]).max() + 1
    assert 0 < start < step and done[step:, env].any()
    reward[step, env] = np.nan
    advantage, _ = ppo_discrete.gae(reward, value, next_value, terminated, done, 0.9, 0.8)
    clean = np.array(clean)
    clean[start : step + 1, env] = np.nan
    np.testing.assert_allclose(advantage, clean, rtol=1e-12)


# ---- Losses ----


def test_value_clipping_takes_the_larger_error():
    # Old value 1, ε = 0.2: V = 1.5 is clipped to 1.2, V = 1.1 is not.
    f = lambda v, target, *eps: float(
        ppo_discrete.value_loss(jnp.full(1, v), jnp.full(1, target), jnp.full(1, 1.0), *eps)
    )
    assert f(1.5, 2.0, 0.2) == pytest.approx(0.5 * 0.8**2)  # the clipped error is larger
    assert f(1.5, 1.0, 0.2) == pytest.approx(0.5 * 0.5**2)  # the plain error is larger
    assert f(1.1, 2.0, 0.2) == pytest.approx(0.5 * 0.9**2)  # inside the band both are equal
    assert f(0.5, 0.0, 0.2) == pytest.approx(0.5 * 0.8**2)  # below the band: 0.8 instead of 0.5
    assert f(1.5, 2.0) == f(1.5, 2.0, None) == pytest.approx(1 / 8)  # without ε
    assert f(1.5, 2.0, 0.0) == pytest.approx(0.5)  # ε = 0 clips, and is not the same as no ε


@pytest.mark.parametrize("script", [ppo_discrete, ppo_penalty])
def test_the_value_loss_is_half_the_mean_square(script):
    old_value = [jnp.asarray([7.0, 7.0])] if script is ppo_discrete else []
    f = lambda value: script.value_loss(value, jnp.asarray([2.0, 4.0]), *old_value)
    value = jnp.asarray([1.0, 7.0])
    assert float(f(value)) == pytest.approx(0.5 * (1 + 9) / 2)
    np.testing.assert_allclose(jax.grad(f)(value), [-0.5, 1.5], rtol=1e-12)


@pytest.mark.parametrize(
    "function, shapes",
    [
        (ppo_discrete.clipped_surrogate, [(4,), (4, 1), ()]),
        (ppo_discrete.value_loss, [(4,), (4, 1), (4,)]),
        (ppo_discrete.value_loss, [(4,), (4,), (4, 1)]),
        (ppo_penalty.surrogate, [(4,), (4, 1)]),
        (ppo_penalty.value_loss, [(4,), (4, 1)]),
        (ppo_discrete.gae, [(4,)] * 5 + [(), ()]),  # one environment without its axis
        (ppo_discrete.gae, [(4, 2), (4, 2), (4, 1), (4, 2), (4, 2), (), ()]),
    ],
)
def test_shapes_that_would_broadcast_are_refused(function, shapes):
    with pytest.raises(AssertionError):
        jax.eval_shape(function, *(jax.ShapeDtypeStruct(shape, float) for shape in shapes))


# ---- Normalisation ----


def test_normalize_advantage():
    x = jnp.asarray([1.0, 2.0, 3.0, 4.0])
    expected = np.array([-1.5, -0.5, 0.5, 1.5]) / np.sqrt(1.25)
    normalize = ppo_discrete.normalize_advantage
    np.testing.assert_allclose(normalize(x), expected, rtol=1e-7)
    table = normalize(x.reshape(2, 2))  # over all axes at once
    np.testing.assert_allclose(table, expected.reshape(2, 2), rtol=1e-7)
    np.testing.assert_array_equal(normalize(jnp.full(5, 3.0)), np.zeros(5))


def test_running_stats_equal_the_statistics_of_all_data():
    parts = [random((7, 4, 3), seed) * (seed + 1) + seed for seed in range(3)]
    stats = ppo_discrete.init_stats((3,))
    for part in parts:
        stats = ppo_discrete.update_stats(stats, jnp.asarray(part))
    data = np.concatenate([part.reshape(-1, 3) for part in parts])
    np.testing.assert_allclose(stats.mean, data.mean(0), rtol=1e-6)  # the count is a float32
    np.testing.assert_allclose(stats.var, data.var(0), rtol=1e-6)
    assert float(stats.count) == 84
    assert ppo_discrete.update_stats(None, parts[0]) is None


def test_running_stats_survive_large_numbers_in_float32():
    with jax.enable_x64(False):
        # A component that never changes is normalised to 0, although its variance is 0.
        constant = jnp.full((16, 16, 1), 12345.678, jnp.float32)
        stats = ppo_discrete.init_stats((1,))
        for _ in range(3):
            stats = ppo_discrete.update_stats(stats, constant)
            np.testing.assert_allclose(ppo_discrete.normalize(constant, stats), 0, atol=1e-3)
        # At 1e6 neighbouring floats are 1/16 apart; E[x²] - E[x]² would be off by thousands.
        x = jnp.float32(1e6 + random((16, 16, 1)))
        stats = ppo_discrete.update_stats(ppo_discrete.init_stats((1,)), x)
        np.testing.assert_allclose(stats.var, np.var(np.float64(x)), rtol=0.01)
        np.testing.assert_allclose(ppo_discrete.normalize(x, stats).var(), 1, rtol=0.03)
        np.testing.assert_allclose(ppo_discrete.normalize(x, stats).mean(), 0, atol=0.05)


def test_normalize_centres_on_request_and_clips_at_ten():
    stats = ppo_discrete.RunningStats(jnp.asarray(1.0), jnp.asarray(4.0), jnp.asarray(1.0))
    x = jnp.asarray([1.0, 3.0, 1e3, -1e3])
    np.testing.assert_allclose(ppo_discrete.normalize(x, stats), [0, 1, 10, -10], rtol=1e-8)
    scaled = ppo_discrete.normalize(x, stats, center=False)
    np.testing.assert_allclose(scaled, [0.5, 1.5, 10, -10], rtol=1e-8)
    assert ppo_discrete.normalize(x, None) is x
    assert ppo_discrete.normalize(x, None, center=False) is x


# ---- Random orders and initial weights ----


@pytest.mark.parametrize("size", [1, 6, 64, 1000, 2**15, 2**17])
def test_random_orders_are_permutations(size):
    orders = np.asarray(ppo_discrete.random_orders(jax.random.key(0), 3, size))
    np.testing.assert_array_equal(np.sort(orders, axis=1), [np.arange(size)] * 3)
    if size >= 1000:  # each row is another order
        assert (orders[0] != orders[1]).mean() > 0.9
    if size > 2**15:  # half of the steps go up, which ties that stay in order would increase
        assert (np.diff(orders) > 0).mean() == pytest.approx(0.5, abs=0.01)


def test_random_orders_are_uniform():
    # Each index is equally often in each place: 6000 orders of 6, chi-square over 36 cells.
    orders = np.asarray(ppo_discrete.random_orders(jax.random.key(1), 6000, 6))
    counts = np.stack([np.bincount(column, minlength=6) for column in orders.T])
    assert scipy.stats.chisquare(counts.ravel()).pvalue > 1e-3
    # Two indices are neighbours in 2/6 of all orders.
    places = np.argsort(orders, axis=1)
    neighbours = (np.abs(places[:, 0] - places[:, 1]) == 1).mean()
    assert neighbours == pytest.approx(1 / 3, abs=0.03)


def test_orthogonal_weights_do_not_depend_on_vmap():
    init = ppo_discrete.orthogonal(3.0)
    keys = jax.random.split(jax.random.key(0), 3)
    weights = jax.vmap(lambda key: init(key, (6, 4), jnp.float64))(keys)
    for key, w in zip(keys, weights, strict=True):
        np.testing.assert_allclose(w.T @ w, 9 * np.eye(4), atol=1e-12)
        np.testing.assert_allclose(w, init(key, (6, 4), jnp.float64), rtol=1e-12)
    assert not np.allclose(weights[0], weights[1])
    # With jax >= 0.10, a QR decomposition of several matrices at once can deadlock.
    program = jax.jit(jax.vmap(lambda key: init(key, (6, 4), jnp.float64))).lower(keys).as_text()
    assert re.findall(r"@lapack_dgeqrf.* : \(tensor<(\w+)xf64>\)", program) == ["6x4"]
