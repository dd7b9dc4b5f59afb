"""The patches of tests/edits for ppo_discrete.py: each applies and does what it says."""

import difflib
import itertools
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

import ppo_discrete

EDITS = ROOT / "tests" / "edits"
APPLIED_BEFORE = {"grpo": ["rlhf"], "dpo": ["rlhf"]}


@pytest.fixture(autouse=True)
def environments(monkeypatch):
    """Let `module:name` find the modules beside the patches."""
    monkeypatch.syspath_prepend(EDITS)


def learn(script, keys, env_id, **fields):
    """Train, then play 100 greedy episodes: the mean return [num_seeds], and the metrics."""
    config = replace(script.default_config(env_id), **fields)
    env = script.load_env(env_id)

    def run(key):
        state, metrics = script.train(config, key, env)
        returns, _ = script.evaluate(config, state, jax.random.fold_in(key, 2**31), 100, env)
        return returns.mean(), metrics

    return jax.device_get(jax.jit(jax.vmap(run))(keys(3)))


@pytest.mark.parametrize("name", sorted(path.stem for path in EDITS.glob("*.patch")))
def test_the_patch_applies_and_describes_itself(patched, name):
    script = patched(*APPLIED_BEFORE.get(name, []), name).__file__
    for command in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *command, "--config", ROOT / ".ruff.toml", script]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    *about, rest = (EDITS / f"{name}.patch").read_text().split("\n", 3)
    assert [line.split(":")[0] for line in about] == ["# What", "# Why", "# Source"]
    assert rest.startswith("--- a/")


# ---- refresh.py ----


def test_refresh_merges_an_edit_into_a_changed_script(tmp_path):
    """A script of 20 lines. One patch changes line 10, another one after it changes line 15."""

    def write_patch(name, about, before, after):
        diff = difflib.unified_diff(before, after, "a/script.py", "b/script.py")
        (folder / f"{name}.patch").write_text(f"# {about}\n" + "".join(diff))

    def git(*command):
        identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
        return subprocess.run(["git", *identity, *command], cwd=tmp_path, capture_output=True)

    def refresh():
        command = [sys.executable, folder / "refresh.py"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def replaced(lines, number, text):
        return [*lines[: number - 1], f"{text}\n", *lines[number:]]

    folder, script = tmp_path / "tests" / "edits", tmp_path / "script.py"
    folder.mkdir(parents=True)
    shutil.copy(EDITS / "refresh.py", folder)
    lines = [f"line = {number}\n" for number in range(1, 21)]
    ten = replaced(lines, 10, "ten")
    write_patch("first", "What: line 10", lines, ten)
    write_patch("second", "What: line 15, after first.patch", ten, replaced(ten, 15, "fifteen"))
    script.write_text("".join(lines))
    git("init")
    git("add", ".")
    assert git("commit", "-m", "Both patches apply").returncode == 0

    # Changes of the lines around the edits: the patches no longer apply, but there is no conflict.
    lines = ["new = 1\n", *replaced(replaced(lines, 8, "eight"), 17, "seventeen")]
    script.write_text("".join(lines))
    assert git("apply", "--check", "tests/edits/first.patch").returncode != 0
    assert refresh() == "first: done\nsecond: done\n"
    assert (folder / "first.patch").read_text().startswith("# What: line 10\n--- a/script.py\n")
    assert git("apply", "tests/edits/first.patch", "tests/edits/second.patch").returncode == 0
    edited = replaced(replaced(lines, 11, "ten"), 16, "fifteen")
    assert script.read_text() == "".join(edited)

    # A change of the same line as the first patch.
    script.write_text("".join(replaced(lines, 11, "other")))
    kept = (folder / "first.patch").read_text()
    git("commit", "-am", "A conflict")
    assert refresh() == "first: remake it by hand\nsecond: remake it by hand\n"
    assert (folder / "first.patch").read_text() == kept


# ---- cnn ----


def test_cnn_sees_the_pictures_of_minatar(patched, keys):
    script = patched("cnn")
    config = replace(script.default_config("Breakout-MinAtar"), num_envs=6, num_minibatches=4)
    init, update = script.make_train(config)
    state, metrics = jax.jit(lambda key: update(init(key)))(keys(1)[0])
    assert np.isfinite(metrics["policy_loss"]) and state.obs.shape == (6, 10, 10, 4)
    kernels = jax.tree.map(jnp.shape, state.params["actor"]["params"])
    assert kernels["Dense_0"]["kernel"] == (3 * 3 * 4, 16)
    assert kernels["Dense_1"]["kernel"] == (8 * 8 * 16, 64)


def test_the_convolution_equals_that_of_xla(patched, keys):
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


def test_shared_trunk_needs_a_small_vf_coef_for_unscaled_rewards(patched, keys):
    """Without scaled rewards, the value loss of CartPole is a thousand times the policy loss."""

    def returns(script, vf_coef):
        config = script.Config(total_timesteps=40_960, normalize_reward=False)

        @jax.jit
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

    # The softmax over the possible actions alone, in double precision.
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


def test_action_mask_finds_the_best_of_the_possible_actions(patched, keys):
    env_id = "masked_environment:Masked-test"
    returns, metrics = learn(patched("action_mask"), keys, env_id, total_timesteps=32_768)
    # Each of ten steps pays the largest possible number, whose expectation is Σ P(number >= n).
    best = 10 * sum(1 - n / 6 * 0.6 ** (6 - n) for n in range(1, 6))
    np.testing.assert_allclose(returns, best, atol=1.5)  # four standard deviations
    # No episode ended early, so the agent never chose an impossible action.
    assert (metrics["episodic_length"] == 10).all()
    # The observation does not show the mask, so the plain script ends its episodes early.
    returns, metrics = learn(ppo_discrete, keys, env_id, total_timesteps=16_384)
    assert (returns < -50).all() and (metrics["episodic_length"][:, -1] < 9).all()


# ---- multi_discrete ----


def test_multi_discrete_is_the_product_of_its_choices(patched, keys):
    script = patched("multi_discrete")
    space = script.load_env("two_dials_environment:TwoDials-test").action_space
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
    returns, _ = learn(patched("multi_discrete"), keys, env_id, total_timesteps=20_480)
    assert (returns == 1).all(), returns
    with pytest.raises(ppo_discrete.UserError, match=r"multi_discrete\.patch"):
        ppo_discrete.load_env(env_id)


# ---- recurrent ----


def test_recurrent_replays_the_rollout(patched, keys):
    """Episodes of six steps in rollouts of ten: some memories end within a rollout, some do not."""
    script = patched("recurrent")
    fields = dict(num_envs=4, num_steps=10, num_minibatches=1, hidden_sizes=(16,))
    config = script.Config(env_id="MemoryChain-bsuite", total_timesteps=40 * 8, **fields)
    config = replace(config, update_epochs=1, learning_rate=1e-2)
    _, metrics = jax.jit(partial(script.train, config))(keys(1)[0])
    # Before the first gradient step of an update, π is π_old.
    np.testing.assert_allclose(metrics["approx_kl"], 0, atol=1e-9)


def test_recurrent_remembers_where_the_plain_script_can_only_guess(patched, keys):
    fields = dict(env_id="MemoryChain-bsuite", total_timesteps=20_480)
    fields |= dict(num_steps=64, update_epochs=4, num_minibatches=2, hidden_sizes=(32,))
    returns, _ = learn(patched("recurrent"), keys, **fields)
    assert (returns > 0.9).all(), returns
    returns, _ = learn(ppo_discrete, keys, **fields)  # the mean of a hundred times 1 or -1
    assert (abs(returns) < 0.4).all(), returns
