"""The pure functions against literals, SciPy, and slow independent computations, in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

import ppo_discrete
import ppo_penalty
import trpo
from trpo import Categorical  # that of ppo_discrete, and `kl` (test_shared_code.py)


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


def test_gae_cuts_a_batch_into_its_episodes():
    reward, value, next_value, terminated, done = random_rollout(N=1)
    whole, _ = ppo_discrete.gae(reward, value, next_value, terminated, done, 0.99, 0.95)
    ends = [*(np.flatnonzero(done[:, 0]) + 1), len(done)]
    start = 0
    for end in ends:
        part = (x[start:end] for x in (reward, value, next_value, terminated, done))
        if end > start:
            advantage, _ = ppo_discrete.gae(*part, 0.99, 0.95)
            np.testing.assert_allclose(whole[start:end], advantage, rtol=1e-10)
        start = end


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


# ---- Losses and normalisation ----


def test_the_clipped_critic_loss_takes_the_larger_error():
    # Old value 1, ε = 0.2: V = 1.5 is clipped to 1.2, V = 1.1 is not.
    f = lambda v, target, *eps: float(
        ppo_discrete.critic_loss(jnp.full(1, v), jnp.full(1, target), jnp.full(1, 1.0), *eps)
    )
    assert f(1.5, 2.0, 0.2) == pytest.approx(0.5 * 0.8**2)  # clipped error is larger
    assert f(1.5, 1.0, 0.2) == pytest.approx(0.5 * 0.5**2)  # plain error is larger
    assert f(1.1, 2.0, 0.2) == pytest.approx(0.5 * 0.9**2)  # inside the band both are equal
    assert f(0.5, 0.0, 0.2) == pytest.approx(0.5 * 0.8**2)  # likewise below: 0.8 instead of 0.5
    assert f(1.5, 2.0) == f(1.5, 2.0, None) == pytest.approx(1 / 8)  # without ε the plain one
    assert f(1.5, 2.0, 0.0) == pytest.approx(0.5)  # ε = 0 is none that is missing


@pytest.mark.parametrize("script", [ppo_discrete, ppo_penalty, trpo])
def test_the_critic_loss_is_half_the_mean_square(script):
    old_value = [jnp.asarray([7.0, 7.0])] if script is ppo_discrete else []
    f = lambda value: script.critic_loss(value, jnp.asarray([2.0, 4.0]), *old_value)
    value = jnp.asarray([1.0, 7.0])
    assert float(f(value)) == pytest.approx(0.5 * (1 + 9) / 2)
    np.testing.assert_allclose(jax.grad(f)(value), [-0.5, 1.5], rtol=1e-12)


@pytest.mark.parametrize(
    "function, shapes",
    [
        (ppo_discrete.clipped_surrogate, [(4,), (4, 1), ()]),
        (ppo_discrete.critic_loss, [(4,), (4, 1), (4,)]),
        (ppo_discrete.critic_loss, [(4,), (4,), (4, 1)]),
        (ppo_penalty.surrogate, [(4,), (4, 1)]),
        (ppo_penalty.critic_loss, [(4,), (4, 1)]),
        (ppo_discrete.gae, [(4,)] * 5 + [(), ()]),  # one environment without its axis
        (ppo_discrete.gae, [(4, 2), (4, 2), (4, 1), (4, 2), (4, 2), (), ()]),
    ],
)
def test_shapes_that_would_broadcast_are_refused(function, shapes):
    with pytest.raises(AssertionError):
        jax.eval_shape(function, *(jax.ShapeDtypeStruct(shape, float) for shape in shapes))


def test_normalize_advantage():
    x = jnp.asarray([1.0, 2.0, 3.0, 4.0])
    expected = np.array([-1.5, -0.5, 0.5, 1.5]) / np.sqrt(1.25)
    normalize = ppo_discrete.normalize_advantage
    np.testing.assert_allclose(normalize(x), expected, rtol=1e-7)
    table = normalize(x.reshape(2, 2))  # over all axes at once
    np.testing.assert_allclose(table, expected.reshape(2, 2), rtol=1e-7)
    np.testing.assert_array_equal(ppo_discrete.normalize_advantage(jnp.full(5, 3.0)), np.zeros(5))


def test_running_stats_equal_the_statistics_of_all_data():
    parts = [random((7, 4, 3), seed) * (seed + 1) + seed for seed in range(3)]
    stats = ppo_discrete.init_stats((3,))
    for part in parts:
        stats = ppo_discrete.update_stats(stats, jnp.asarray(part))
    data = np.concatenate([part.reshape(-1, 3) for part in parts])
    np.testing.assert_allclose(stats.mean, data.mean(0), rtol=1e-4)
    np.testing.assert_allclose(stats.var, data.var(0), rtol=1e-4)
    assert float(stats.count) == pytest.approx(84, abs=1e-3)


def test_statistics_of_nothing_are_nothing():
    assert ppo_discrete.update_stats(None, jnp.ones((2, 3))) is None


def test_normalize_centres_on_request_and_clips_at_ten():
    stats = ppo_discrete.RunningStats(jnp.asarray(1.0), jnp.asarray(4.0), jnp.asarray(1.0))
    x = jnp.asarray([1.0, 3.0, 1e3, -1e3])
    np.testing.assert_allclose(ppo_discrete.normalize(x, stats), [0, 1, 10, -10], rtol=1e-8)
    scaled = ppo_discrete.normalize(x, stats, center=False)
    np.testing.assert_allclose(scaled, [0.5, 1.5, 10, -10], rtol=1e-8)
    assert ppo_discrete.normalize(x, None) is x
    assert ppo_discrete.normalize(x, None, center=False) is x


# ---- Shuffling and initialisation ----


def shuffle(seed, epochs, batch_size, parts):
    config = ppo_discrete.Config(
        num_envs=1, num_steps=batch_size, update_epochs=epochs, num_minibatches=parts
    )
    return ppo_discrete.shuffled_indices(jax.random.key(seed), config)


@pytest.mark.parametrize("batch_size", [1, 6, 64, 1000])
def test_shuffled_indices_are_permutations(batch_size):
    parts = 2 if batch_size % 2 == 0 else 1
    indices = shuffle(0, 3, batch_size, parts)
    assert indices.shape == (3 * parts, batch_size // parts)
    epochs = np.asarray(indices).reshape(3, batch_size)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(batch_size))
    if batch_size == 1000:
        assert (epochs[0] != epochs[1]).mean() > 0.9


def test_shuffled_indices_are_uniform():
    # Each index is equally often at each place: 6000 shuffles of 6, chi-square over 36 cells.
    indices = shuffle(1, 6000, 6, 1)
    counts = np.stack([np.bincount(column, minlength=6) for column in np.asarray(indices).T])
    assert scipy.stats.chisquare(counts.ravel()).pvalue > 1e-3
    # ... and neighbours stay neighbours no more often than chance: 2/6 of the time.
    places = np.argsort(indices, axis=1)
    neighbours = (np.abs(places[:, 0] - places[:, 1]) == 1).mean()
    assert neighbours == pytest.approx(1 / 3, abs=0.03)


@pytest.mark.parametrize("shape", [(4, 64), (64, 64), (400, 64), (64, 1)])
def test_orthogonal_initialiser(shape):
    for seed in range(5):
        w = np.asarray(ppo_discrete.orthogonal(3.0)(jax.random.key(seed), shape, jnp.float64)) / 3
        w = w if shape[0] >= shape[1] else w.T
        np.testing.assert_allclose(w.T @ w, np.eye(w.shape[1]), atol=1e-6)


def test_orthogonal_initialiser_is_uniform():
    # A uniformly distributed rotation has entries of mean 0 and variance 1/n, for every entry.
    init = ppo_discrete.orthogonal(1.0)
    w = jax.vmap(lambda key: init(key, (3, 3), jnp.float64))(
        jax.random.split(jax.random.key(0), 4000)
    )
    np.testing.assert_allclose(w.mean(0), 0, atol=0.04)
    np.testing.assert_allclose((w**2).mean(0), 1 / 3, atol=0.03)
