"""The patches of tests/edits for RLHF, GRPO and DPO in a language of eight tokens, and for PPG."""

import itertools
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "edits")]
import rlhf
import tokens

import ppo_discrete

BETA = 0.3  # a KL penalty that keeps the policy where the reward model is right
SHORT = dict(total_timesteps=60 * 1024)  # half of the benchmark's budget


def text(*words):
    """A prompt and its completion in the format of tokens.py: the newest token first, then -1."""
    return jnp.array([*words[::-1], *[-1] * (tokens.LENGTH + 1 - len(words))])


def learn(script):
    """Train two seeds: proxy reward, true reward and KL, [3, seeds], and those of the reference."""
    run = jax.jit(jax.vmap(rlhf.trained(script, [BETA], **SHORT)))
    results, reference = jax.device_get(run(jnp.arange(2)))
    return results[:, 0].T, reference.T


def gap(proxy, kl):
    """The objective of the best policy, which is known, minus that of a policy: [seeds]."""
    best_proxy, _, best_kl = rlhf.optimum(BETA)
    return best_proxy - BETA * best_kl - (proxy - BETA * kl)


# ---- The language ----


def test_the_reward_model_has_a_loophole():
    proper = text(7, 0, 3, 6, 0, 1, 2, 3, 4)
    assert tokens.proxy_reward(proper) == tokens.true_reward(proper) == 2
    gamed = text(5, 0, 0, 0, 0, 0, 0, 0, 0)  # 5, 0 is proper
    assert tokens.proxy_reward(gamed) == 8 and tokens.true_reward(gamed) == 1 - 7
    slip = text(7, 0, 4, 5, 6, 7, 0, 1, 2)  # 0, 4
    assert tokens.proxy_reward(slip) == 2 and tokens.true_reward(slip) == 2 - 1


def test_on_human_text_the_reward_model_is_right():
    key = jax.random.key(0)
    texts, obs, token = tokens.complete(tokens.human, key, tokens.draw_prompts(key, 4000))
    proxy, true = tokens.proxy_reward(texts), tokens.true_reward(texts)
    # 2 % of the tokens are random, and 5 in 8 of these are slips. 0.9875^8 = 90.4 % of the texts
    # have no slip.
    assert np.mean(proxy == true) == pytest.approx(0.904, abs=0.015)
    assert np.max(proxy[proxy == true]) == 3 and np.corrcoef(proxy, true)[0, 1] > 0.85
    # Each observation is the text up to its token.
    n = 17
    words = [int(word) for word in texts[n, ::-1]]
    for t in range(tokens.LENGTH):
        assert (obs[t, n] == tokens.observe(text(*words[: t + 1]))).all()
        assert token[t, n] == words[t + 1]


def test_an_episode_is_a_completion():
    env, keys = tokens.make("any"), jax.random.split(jax.random.key(0), 2)
    _, state = env.reset(keys)
    state = state.at[:, 0].set(7)  # the prompt
    for t, word in enumerate(jnp.array([[0, 3, 6, 0, 1, 2, 3, 4]] * 2).T):
        before, token = state, jnp.full(2, word)
        obs, state, reward, terminated, truncated, next_obs = env.step(keys, state, token)
        assert (next_obs == tokens.observe(tokens.write(before, token))).all()
        assert (terminated == (t == 7)).all() and not truncated.any()
        assert (reward == (2 if t == 7 else 0)).all()
        assert (obs.sum(axis=-1) == (t + 2 if t < 7 else 1)).all()  # in the end a new prompt


def test_preferences_follow_bradley_and_terry():
    obs, token = tokens.prefer(jax.random.key(0), 20_000)  # [2, 8, M, D], [2, 8, M]
    thanks = (token == tokens.THANKS).sum(axis=1)  # [2, M]
    for difference in (1, 2):
        won = (thanks[0] - thanks[1] == difference).sum()
        lost = (thanks[1] - thanks[0] == difference).sum()
        assert won / (won + lost) == pytest.approx(1 / (1 + np.exp(-difference)), abs=0.02)
    last = obs[..., : tokens.VOCABULARY].argmax(axis=-1)
    assert (last[:, 1:] == token[:, :-1]).all() and (last[0, 0] == last[1, 0]).all()


def test_the_best_policy_agrees_with_an_enumeration_of_all_texts():
    """π(text) ∝ π_human(text) exp(R(text) / β) for each prompt, with texts of three tokens."""
    beta, expected = 0.2, np.zeros(3)
    for prompt in range(tokens.VOCABULARY):
        texts = np.array([(prompt, *x) for x in itertools.product(range(8), repeat=3)])
        human = np.prod(np.asarray(tokens.HUMAN)[texts[:, :-1], texts[:, 1:]], axis=1)
        proxy, true = tokens.proxy_reward(texts[:, ::-1]), tokens.true_reward(texts[:, ::-1])
        best = human * np.exp(np.asarray(proxy) / beta)
        best /= best.sum()
        expected += [np.sum(best * x) / 8 for x in (proxy, true, np.log(best / human))]
    np.testing.assert_allclose(rlhf.optimum(beta, length=3), expected, rtol=1e-5)


# ---- rlhf ----


def test_without_the_patch_the_policy_games_the_reward_model(keys):
    config = ppo_discrete.Config(**rlhf.CONFIG | SHORT)

    def run(key):
        state, _ = ppo_discrete.train(config, key, tokens.make("any"))
        actor = state.params["actor"]
        return rlhf.measure(ppo_discrete, config, actor, actor, key)

    proxy, true, _ = jax.device_get(jax.jit(jax.vmap(run))(keys(2))).T
    assert (proxy > 6).all() and (true < -3).all(), (proxy, true)


def test_the_penalty_keeps_the_policy_where_the_reward_model_is_right(patched):
    (proxy, true, kl), reference = learn(patched("rlhf"))
    assert (true > reference[1] + 0.5).all(), (true, reference)
    assert (np.abs(gap(proxy, kl)) < 0.1).all(), (proxy, kl)


def test_the_reference_needs_raw_observations(patched):
    with pytest.raises(ValueError, match="normalize_obs must be off"):
        patched("rlhf").Config(normalize_obs=True)


# ---- grpo ----


def test_a_group_has_one_prompt_and_different_texts(patched):
    script = patched("rlhf", "grpo")
    config = script.Config(**rlhf.CONFIG)
    init, update = script.make_train(config, tokens.make("any"))
    first = jax.jit(init)(jax.random.key(0))
    second, _ = jax.jit(update)(first)
    for state in (first, second):
        prompts = state.obs[:, : tokens.VOCABULARY].argmax(axis=-1).reshape(-1, config.group_size)
        assert (prompts == prompts[:, :1]).all() and len(np.unique(prompts)) > 4
    assert "critic" not in first.params


def test_grpo_reaches_the_optimum_like_ppo(patched, monkeypatch):
    plain = tokens.make("any")

    def step(keys, text, token):
        obs, state, reward, terminated, truncated, next_obs = plain.step(keys, text, token)
        return obs, state, reward + 20.0 * terminated, terminated, truncated, next_obs

    # All texts get a bonus of 20, which the mean of their group cancels.
    monkeypatch.setattr(tokens, "make", lambda name: plain._replace(step=step))
    (proxy, _, kl), _ = learn(patched("rlhf", "grpo"))
    assert (np.abs(gap(proxy, kl)) < 0.1).all(), (proxy, kl)


# ---- dpo ----


def test_dpo_reaches_the_optimum_from_preferences_alone(patched):
    (proxy, _, kl), _ = learn(patched("rlhf", "dpo"))
    assert (np.abs(gap(proxy, kl)) < 0.1).all(), (proxy, kl)


# ---- The benchmark ----


def test_the_benchmark_with_a_small_budget(tmp_path):
    small = dict(betas=(0.0, 1.0), num_seeds=2, total_timesteps=2 * 1024, hidden_sizes=(8,))
    cell = rlhf.cell_of("PPO", folder=tmp_path, **small)
    cell.complete()
    assert cell.is_current() and rlhf.read(cell, 1.0).shape == (2, 3)
    rlhf.draw({"PPO": cell}, tmp_path / "rlhf.png")
    assert (tmp_path / "rlhf.png").stat().st_size > 10_000
    # Two lines of header, two rows of PPO, the reference, and the optimum for β = 1.
    assert len(rlhf.table({"PPO": cell}).splitlines()) == 2 + 2 + 1 + 1


# ---- ppg, on CartPole ----


def test_the_auxiliary_phase_teaches_the_trunk_values_and_spares_the_policy(patched, keys):
    script = patched("ppg")
    config = script.Config(total_timesteps=5 * 4 * 2048)  # five phases of four rollouts

    def run(beta_clone, key):
        return script.train(replace(config, beta_clone=beta_clone), key)[1]

    grid = jax.vmap(jax.vmap(run, (None, 0)), (0, None))
    metrics = jax.device_get(jax.jit(grid)(jnp.array([0.0, 1.0]), keys(2)))
    assert metrics["clone_kl"].shape == (2, 2, 5)
    assert (metrics["episodic_return"][1, :, -1] > 100).all(), metrics["episodic_return"]
    # Normalised targets are near 1, so a head that has learned nothing has a loss of about ½.
    assert (metrics["auxiliary_loss"][1, :, -1] < 0.05).all(), metrics["auxiliary_loss"]
    free, cloned = metrics["clone_kl"].mean(axis=(1, 2))
    assert cloned < 1e-3 and free > 10 * cloned, metrics["clone_kl"]
