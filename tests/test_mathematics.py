"""The pure functions against literals, SciPy, and slow independent computations, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

import ppo_discrete
from ppo_discrete import Categorical


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


def test_clipped_value_loss_takes_the_larger_error():
    # old value 1, ε = 0.2: V = 1.5 is clipped to 1.2, V = 1.1 is not.
    f = lambda v, target: float(
        ppo_discrete.clipped_value_loss(jnp.full(1, v), jnp.full(1, 1.0), jnp.full(1, target), 0.2)
    )
    assert f(1.5, 2.0) == pytest.approx(0.5 * 0.8**2)  # clipped error is larger
    assert f(1.5, 1.0) == pytest.approx(0.5 * 0.5**2)  # plain error is larger
    assert f(1.1, 2.0) == pytest.approx(0.5 * 0.9**2)  # inside the band both are equal
    loss = ppo_discrete.value_loss(jnp.full(3, 1.5), jnp.full(3, 2.0))
    assert float(loss) == pytest.approx(1 / 8)


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


def test_normalize_and_scale_reward_clip_at_ten():
    stats = ppo_discrete.RunningStats(jnp.asarray(1.0), jnp.asarray(4.0), jnp.asarray(1.0))
    x = jnp.asarray([1.0, 3.0, 1e3, -1e3])
    np.testing.assert_allclose(ppo_discrete.normalize(x, stats), [0, 1, 10, -10], rtol=1e-8)
    np.testing.assert_allclose(ppo_discrete.scale_reward(x, stats), [0.5, 1.5, 10, -10], rtol=1e-8)
    assert ppo_discrete.normalize(x, None) is x
    assert ppo_discrete.scale_reward(x, None) is x


# ---- Shuffling and initialisation ----


@pytest.mark.parametrize("batch_size", [1, 6, 64, 1000])
def test_shuffled_indices_are_permutations(batch_size):
    parts = 2 if batch_size % 2 == 0 else 1
    indices = ppo_discrete.shuffled_indices(jax.random.key(0), 3, batch_size, parts)
    assert indices.shape == (3 * parts, batch_size // parts)
    epochs = np.asarray(indices).reshape(3, batch_size)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(batch_size))
    if batch_size == 1000:
        assert (epochs[0] != epochs[1]).mean() > 0.9


def test_taking_transitions_by_rows_is_taking_them_from_each_array():
    numbers = np.arange(40, dtype=np.float32)
    batch = {
        "obs": jnp.asarray(numbers.reshape(8, 5) / 3),
        "action": jnp.arange(8, dtype=jnp.int32) * 2_000_001,  # the last needs all of 24 bits
        "policy": (jnp.asarray(numbers[:16].reshape(8, 2, 1)), jnp.asarray(numbers[:8]) / 7),
    }
    indices = jnp.asarray([7, 0, 3, 3])
    taken = jax.jit(ppo_discrete.make_take(batch))(indices)
    expected = jax.tree.map(lambda x: np.asarray(x)[[7, 0, 3, 3]], batch)
    assert jax.tree.structure(taken) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(taken), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_shuffled_indices_are_uniform():
    # Each index is equally often at each place: 6000 shuffles of 6, chi-square over 36 cells.
    indices = ppo_discrete.shuffled_indices(jax.random.key(1), 6000, 6, 1)
    counts = np.stack([np.bincount(column, minlength=6) for column in np.asarray(indices).T])
    assert scipy.stats.chisquare(counts.ravel()).pvalue > 1e-3
    # ... and neighbours stay neighbours no more often than chance: 2/6 of the time.
    places = np.argsort(indices, axis=1)
    neighbours = (np.abs(places[:, 0] - places[:, 1]) == 1).mean()
    assert neighbours == pytest.approx(1 / 3, abs=0.03)


# The known answers of Random123, whose authors invented Threefry (tests/kat_vectors there).
@pytest.mark.parametrize(
    "key, count, answer",
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((2**32 - 1, 2**32 - 1), (2**32 - 1, 2**32 - 1), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_known_answers(key, count, answer):
    words = [jnp.uint32(word) for word in (*key, *count)]
    assert tuple(map(int, ppo_discrete.threefry2x32(*words))) == answer
    assert tuple(map(int, jax.jit(ppo_discrete.threefry2x32)(*words))) == answer


def test_random_numbers_are_those_of_jax():
    # The literals come from jax.random in a process that had imported no script.
    bits = jax.vmap(lambda seed: jax.random.bits(jax.random.key(seed), (2,), jnp.uint32))
    np.testing.assert_array_equal(
        bits(jnp.asarray([0, 42])), [[0xF29A4FA7, 0xFA843692], [0x7D1C13A2, 0xAE0730D9]]
    )
    key = jax.random.key(7)
    np.testing.assert_array_equal(
        jax.random.key_data(jax.random.split(key, 2)),
        [[3625411723, 1954958720], [195045567, 4062205631]],
    )
    np.testing.assert_array_equal(
        jax.random.key_data(jax.random.fold_in(key, 5)), [3583082021, 1947592014]
    )


def test_random_numbers_are_compiled_without_loops():
    def draw(key):  # as gymnax does: split, split again, draw, under vmap
        keys = jax.random.split(jax.random.split(key)[1], 4)
        return jax.vmap(lambda key: jax.random.uniform(key, (4,)))(keys)

    keys = jax.random.split(jax.random.key(0), 2)
    program = jax.jit(jax.vmap(draw)).lower(keys).compile().as_text()
    assert "fusion(" in program and "while(" not in program


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
