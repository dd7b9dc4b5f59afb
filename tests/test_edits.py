"""What people copy a script for: each patch in tests/edits applies, and does its work."""

import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, as_shipped

import ppo_discrete

EDITS = ROOT / "tests" / "edits"
BELOW = {"grpo": ["rlhf"], "dpo": ["rlhf"]}  # patches to what another one made


@pytest.fixture(autouse=True)
def environments(monkeypatch):
    """`module:name` finds the modules beside the patches."""
    monkeypatch.syspath_prepend(EDITS)


def learn(script, keys, env_id, num_seeds=3, jit=jax.jit, **fields):
    """Train, then play 100 greedy episodes: the mean return [num_seeds], and the metrics."""
    config = replace(script.default_config(env_id), **fields)

    def run(key):
        state, metrics = script.train(config, key)
        returns, _ = script.evaluate(config, state, jax.random.fold_in(key, 2**31), 100)
        return returns.mean(), metrics

    return jax.device_get(jit(jax.vmap(run))(keys(num_seeds)))


@pytest.mark.parametrize("name", sorted(path.stem for path in EDITS.glob("*.patch")))
def test_the_patch_applies_and_begins_with_three_lines_about_itself(patched, name):
    patched(*BELOW.get(name, []), name)  # fails with the name of the patch
    *about, rest = (EDITS / f"{name}.patch").read_text().split("\n", 3)
    assert [line.split(":")[0] for line in about] == ["# What", "# Why", "# Source"]
    assert rest.startswith("--- a/")


# ---- target_kl ----


def test_target_kl_ends_the_epochs_of_each_seed_by_itself(patched, keys):
    script = patched("target_kl")
    config = dict(num_envs=8, num_steps=32, num_minibatches=1, hidden_sizes=(16,))
    config |= dict(total_timesteps=4 * 8 * 32, learning_rate=1e-2)

    def plain(epochs):
        fields = ppo_discrete.Config(**config, update_epochs=epochs)
        return jax.device_get(jax.jit(jax.vmap(partial(ppo_discrete.train, fields)))(keys(12)))

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None))
    @partial(jax.vmap, in_axes=(None, 0))
    def run(bound, key):
        fields = dict(update_epochs=3, target_kl=bound)
        return script.train(script.Config(**config, **fields), key)

    (three, _), (two, metrics) = plain(3), plain(2)
    kl = 2 * metrics["approx_kl"][:, 0]  # after an epoch; it is the mean of this and of 0 before
    bounds = np.array([1e9, 1e-6, np.median(kl)])
    state, metrics = jax.device_get(run(bounds, keys(12)))
    epochs = metrics["epochs"]  # [3 bounds, 12 seeds, 4 updates]
    # No KL is too large: as without a bound. All are: an epoch to move, one to find it too far.
    for row, expected, number in ((0, three, 3), (1, two, 2)):
        np.testing.assert_array_equal(epochs[row], number)
        given = jax.tree.map(lambda x, row=row: x[row], state.params)
        near = partial(np.testing.assert_allclose, rtol=0.01, atol=0.003)
        jax.tree.map(near, given, expected.params)
    # With a bound between them each seed decides by its KL.
    np.testing.assert_array_equal(epochs[2, :, 0], np.where(kl > bounds[2], 2, 3))


# ---- cnn ----


def test_cnn_sees_the_pictures_of_minatar(patched, keys):
    script = patched("cnn")
    config = replace(script.default_config("Breakout-MinAtar"), num_envs=6)
    init, update = script.make_train(config)
    state, metrics = jax.jit(lambda key: update(init(key), None))(keys(1)[0])
    assert np.isfinite(metrics["policy_loss"]) and state.obs.shape == (6, 10, 10, 4)
    kernels = jax.tree.map(jnp.shape, state.params["actor"]["params"])
    assert kernels["Dense_0"]["kernel"] == (3 * 3 * 4, 16)
    assert kernels["Dense_1"]["kernel"] == (8 * 8 * 16, 64)


def test_the_convolution_is_that_of_xla(patched, keys):
    script = patched("cnn")

    class Convolution(script.nn.Module):
        @script.nn.compact
        def __call__(self, picture):
            return script.convolve(picture)

    picture = jax.random.normal(keys(1)[0], (5, 10, 10, 4))
    network = Convolution()
    params = network.init(keys(1)[0], picture)
    kernel = params["params"]["Dense_0"]["kernel"].reshape(3, 3, 4, 16)
    layout = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(
        picture, kernel, (1, 1), "VALID", dimension_numbers=layout
    )
    expected = jnp.maximum(expected, 0.0).reshape(5, -1)
    np.testing.assert_allclose(network.apply(params, picture), expected, rtol=1e-4, atol=1e-5)


# ---- shared_trunk ----


def test_shared_trunk_learns_what_vf_coef_lets_it(patched, keys):
    """Without scaled rewards CartPole's value loss is in the thousands, the policy's below one."""

    def returns(script, vf_coef):
        config = script.Config(total_timesteps=40_960, normalize_reward=False, kl_threshold=0.02)

        @as_shipped
        @partial(jax.vmap, in_axes=(0, None))
        @partial(jax.vmap, in_axes=(None, 0))
        def run(vf_coef, key):
            state, _ = script.train(replace(config, vf_coef=vf_coef), key)
            return script.evaluate(config, state, key, 20)[0].mean()

        return jax.device_get(run(jnp.array(vf_coef), keys(3)))

    small, large = returns(patched("shared_trunk"), [1e-4, 0.5])
    assert (small > 450).all() and (large < 400).all(), (small, large)
    (separate,) = returns(ppo_discrete, [0.5])
    assert (separate > 450).all(), separate


# ---- action_mask ----


def test_an_impossible_action_has_probability_zero(patched, keys):
    script = patched("action_mask")
    actor = script.Actor(4, (8,), "tanh")
    obs = jax.random.normal(keys(1)[0], (6, 3))
    mask = jnp.array([[1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1], [1, 0, 1, 1]], bool)
    mask = jnp.concatenate([mask, mask[:1]])
    params = actor.init(keys(2)[1], obs, mask)
    params = jax.tree.map(lambda x: 30 * jax.random.normal(keys(3)[2], x.shape), params)
    policy = actor.apply(params, obs, mask)

    # The softmax of the possible ones alone, in double precision.
    free = np.float64(actor.apply(params, obs, jnp.ones_like(mask)).logits)
    weights = np.where(mask, np.exp(free - np.where(mask, free, -1e9).max(-1)[:, None]), 0)
    expected = weights / weights.sum(-1)[:, None]
    actions = jnp.broadcast_to(jnp.arange(4)[:, None], (4, 6))
    log_prob = policy.log_prob(actions).T  # [6, 4]
    np.testing.assert_allclose(np.exp(log_prob), expected, atol=1e-5)
    np.testing.assert_array_equal(np.exp(log_prob)[~mask], 0)
    entropy = -np.sum(expected * np.log(np.where(expected > 0, expected, 1)), axis=-1)
    np.testing.assert_allclose(policy.entropy(), entropy, atol=1e-4)
    samples = jax.vmap(policy.sample)(keys(500))  # [500, 6]
    assert np.take_along_axis(np.asarray(mask), np.asarray(samples).T, axis=1).all()

    def objective(params):
        policy = actor.apply(params, obs, mask)
        return policy.entropy().sum() + policy.log_prob(jnp.array([0, 1, 0, 3, 2, 1])).sum()

    gradient = jax.tree.leaves(jax.grad(objective)(params))
    assert all(np.isfinite(x).all() for x in gradient) and any(x.any() for x in gradient)


def test_action_mask_takes_the_best_of_the_possible_actions(patched, keys):
    env_id = "masked_environment:Masked-test"
    fields = dict(total_timesteps=16_384, jit=as_shipped)
    returns, metrics = learn(patched("action_mask"), keys, env_id, **fields)
    # Ten steps, each of which pays the largest number possible: the expectation is Σ P(one >= n).
    best = 10 * sum(1 - n / 6 * 0.6 ** (6 - n) for n in range(1, 6))
    np.testing.assert_allclose(returns, best, atol=1.5)  # four deviations
    assert (metrics["episodic_length"] == 10).all()  # no impossible one in all of training
    # What is possible is not to be seen: the plain script ends its episodes soon.
    returns, metrics = learn(ppo_discrete, keys, env_id, **fields)
    assert (returns < -50).all() and (metrics["episodic_length"][:, -1] < 9).all()


# ---- multi_discrete ----


def test_multi_discrete_is_the_product_of_its_choices(patched, keys):
    script = patched("multi_discrete")
    space = script.make_env("two_dials_environment:TwoDials-test").action_space
    actor = script.Actor(space, (8,), "tanh")
    obs = jax.random.normal(keys(1)[0], (7, 8))
    params = actor.init(keys(2)[1], obs)
    params = jax.tree.map(lambda x: 2 * jax.random.normal(keys(3)[2], x.shape), params)
    policy = actor.apply(params, obs)
    actions = jnp.array(list(itertools.product(range(3), range(5))))  # [15, 2]
    log_prob = jax.vmap(lambda action: policy.log_prob(jnp.tile(action, (7, 1))))(actions)
    probability = np.exp(np.float64(log_prob))  # [15, 7]
    np.testing.assert_allclose(probability.sum(axis=0), 1, rtol=1e-5)
    entropy = -np.sum(probability * np.float64(log_prob), axis=0)
    np.testing.assert_allclose(policy.entropy(), entropy, rtol=1e-4)
    np.testing.assert_array_equal(policy.mode(), actions[log_prob.argmax(axis=0)])
    samples = np.asarray(jax.vmap(policy.sample)(keys(4000)))  # [4000, 7, 2]
    counts = np.stack([(samples == action).all(-1).mean(axis=0) for action in np.asarray(actions)])
    np.testing.assert_allclose(counts, probability, atol=0.04)


def test_multi_discrete_turns_both_dials(patched, keys):
    env_id = "two_dials_environment:TwoDials-test"
    script = patched("multi_discrete")
    returns, _ = learn(script, keys, env_id, total_timesteps=20_480, jit=as_shipped)
    assert (returns == 1).all(), returns
    with pytest.raises(ppo_discrete.Failure, match="no discrete actions"):
        ppo_discrete.make_env(env_id)


# ---- recurrent ----


def test_recurrent_replays_what_the_rollout_did(patched, keys):
    """Episodes of six steps in rollouts of ten: memories end within a rollout, and outlast it."""
    script = patched("recurrent")
    fields = dict(num_envs=4, num_steps=10, num_minibatches=1, hidden_sizes=(16,))
    config = script.Config(env_id="MemoryChain-bsuite", total_timesteps=40 * 8, **fields)
    config = replace(config, update_epochs=1, learning_rate=1e-2)
    _, metrics = jax.jit(partial(script.train, config))(keys(1)[0])
    np.testing.assert_allclose(metrics["approx_kl"], 0, atol=1e-9)  # π is π_old in the first step


def test_recurrent_remembers_where_the_plain_script_can_only_guess(patched, keys):
    fields = dict(env_id="MemoryChain-bsuite", total_timesteps=40_960, jit=as_shipped)
    returns, _ = learn(patched("recurrent"), keys, **fields)
    assert (returns > 0.9).all(), returns
    returns, _ = learn(ppo_discrete, keys, **fields)  # a hundred times 1 or -1
    assert (abs(returns) < 0.4).all(), returns
