"""What benchmarks/figures.py draws: computed at tiny sizes, compared with what the papers say."""

import functools
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import figures

import ppo_discrete
import ppo_penalty
import trpo

SMALL = dict(num_envs=4, num_steps=16, num_minibatches=2, update_epochs=2, total_timesteps=256)
ALPHAS = jnp.array([0.0, 0.5, 1.0])


def test_the_gradient_is_zero_exactly_where_the_paper_says():
    data = figures.objective()
    ratio = np.asarray(data["ratio"])
    assert 0.8 not in ratio and 1.2 not in ratio
    for sign, zero in [(1.0, ratio > 1.2), (-1.0, ratio < 0.8)]:
        objective, slope = data["curves"][sign]
        np.testing.assert_array_equal(slope, np.where(zero, 0.0, sign))
        flat = 1.2 if sign > 0 else -0.8
        np.testing.assert_allclose(objective, np.where(zero, flat, sign * ratio), rtol=1e-6)
    # The picture marks the same regions.
    marked = [figures.runs_of(data["curves"][sign][1] != 0) for sign in (1.0, -1.0)]
    ends = [[ratio[i] for run in runs for i in run] for runs in marked]
    np.testing.assert_allclose(ends, [[0.0, 1.2], [0.8, 2.0]], atol=1e-3)


def test_the_line_of_ppo_starts_at_the_old_policy_and_passes_through_the_new_one(monkeypatch):
    config = replace(ppo_discrete.Config(), **SMALL)
    line = functools.partial(figures.surrogates_on_a_line, config, 1, ALPHAS)
    line = {name: np.asarray(x) for name, x in jax.jit(line)(jax.random.key(0)).items()}
    np.testing.assert_allclose(line["ratio"][0], 1.0, rtol=1e-6)
    for name in ("unclipped", "clipped", "minimum", "kl"):
        np.testing.assert_allclose(line[name][0], 0.0, atol=1e-6)  # Â has mean 0
    assert (line["kl"][1:] > 1e-5).all() and line["kl"][1] < line["kl"][2]
    assert (line["minimum"] <= np.minimum(line["unclipped"], line["clipped"]) + 1e-7).all()
    # α = 1 is what the script's own update leads to.
    kept, make_take = [], ppo_discrete.make_take

    def two_updates(key):
        init, update = ppo_discrete.make_train(config)
        state, _ = update(init(key), None)
        return state, update(state, None)[0], kept[-1]["obs"]

    monkeypatch.setattr(
        ppo_discrete, "make_take", lambda batch: kept.append(batch) or make_take(batch)
    )
    state, new_state, obs = jax.jit(two_updates)(jax.random.key(0))
    actor = ppo_discrete.Actor(2, config.hidden_sizes, config.activation)
    logits = [np.asarray(actor.apply(x.params["actor"], obs).logits) for x in (state, new_state)]
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in logits)
    np.testing.assert_allclose(line["kl"][2], np.sum(p * np.log(p / q), axis=1).mean(), rtol=1e-2)


def test_the_line_of_trpo_starts_at_the_return_of_the_old_policy():
    config = replace(trpo.Config(), **SMALL)
    line = functools.partial(figures.return_on_a_line, config, 1, ALPHAS, 32)
    line = {name: np.asarray(x) for name, x in jax.jit(line)(jax.random.key(0)).items()}
    np.testing.assert_allclose([line["kl"][0], line["seen"][0], line["gain"][0]], 0.0, atol=1e-6)
    assert 0.003 < line["kl"][2] < 0.015  # δ = 0.01 and some damping
    assert line["seen"][2] > line["seen"][1] > 0
    # Random play lasts some twenty steps, however it is drawn.
    assert 15 < line["old"] < 30 and abs(line["returns"][0] - line["old"]) < 10


def test_the_surrogate_is_the_return_where_the_states_do_not_depend_on_the_policy(monkeypatch):
    # One step, which pays the action: η = π(1), and L is exact for every α.
    monkeypatch.setattr(figures, "EPISODE", 1)
    config = replace(trpo.Config(), **SMALL | dict(env_id="ProbeAction-test", max_kl=0.1))
    line = functools.partial(figures.return_on_a_line, config, 0, ALPHAS, 20_000)
    line = {name: np.asarray(x) for name, x in jax.jit(line)(jax.random.key(0)).items()}
    assert line["returns"][2] > line["returns"][0] + 0.1
    np.testing.assert_allclose(line["old"] + line["gain"], line["returns"], atol=0.02)


def test_each_beta_and_each_damping_has_its_run():
    config = replace(ppo_penalty.Config(), **SMALL)
    betas = jnp.array([0.1, 10.0])
    metrics = jax.jit(functools.partial(figures.adapted_betas, config))(betas, figures.keys_of(2))
    assert metrics["beta"].shape == (2, 2, 4)
    np.testing.assert_allclose(metrics["beta"][:, :, 0], [[0.1, 0.1], [10.0, 10.0]], rtol=1e-6)
    config = replace(trpo.Config(), **SMALL)
    run = functools.partial(figures.damped_runs, config)
    metrics = jax.jit(run)(jnp.array([0.1, 1e-3]), figures.keys_of(2))
    residual = np.asarray(metrics["cg_residual"])[:, :, 0]  # CG likes damping
    assert residual.shape == (2, 2) and (residual[0] < 0.5 * residual[1]).all()


@pytest.mark.parametrize("name", ["a", "b", "c", "d", "e"])
def test_the_pictures_of_the_documents_exist_and_are_small(name):
    file = ROOT / "docs" / "figures" / figures.FIGURES[name][2]
    assert 5_000 < file.stat().st_size < 120_000
    assert file.name in (ROOT / "docs" / "derivations.md").read_text()
