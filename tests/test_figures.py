"""What benchmarks/figures.py draws, computed at tiny sizes."""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import figures

import ppo_discrete
import trpo

SMALL = dict(num_envs=4, num_steps=16, num_minibatches=2, update_epochs=2, total_timesteps=256)
ALPHAS = jnp.array([0.0, 0.5, 1.0])


def test_the_gradient_is_zero_exactly_where_the_paper_says():
    ratio = jnp.linspace(0.0, 2.0, 2000)
    for sign, zero in [(1.0, ratio > 1.2), (-1.0, ratio < 0.8)]:
        objective, slope = figures.clipped_objective(ratio, sign, 0.2)
        np.testing.assert_array_equal(slope, np.where(zero, 0.0, sign))
        flat = 1.2 if sign > 0 else -0.8
        np.testing.assert_allclose(objective, np.where(zero, flat, sign * ratio), rtol=1e-6)


def test_the_line_of_ppo_starts_at_the_old_policy_and_passes_through_the_new_one():
    config = ppo_discrete.Config(**SMALL, target_kl=None)
    line = functools.partial(figures.surrogates_on_a_line, config, 1, ALPHAS)
    line = {name: np.asarray(x) for name, x in jax.jit(line)(jax.random.key(0)).items()}
    np.testing.assert_allclose(line["ratio"][0], 1.0, rtol=1e-6)
    for name in ("unclipped", "clipped", "minimum", "kl"):
        np.testing.assert_allclose(line[name][0], 0.0, atol=1e-6)  # Â has mean 0
    assert (line["kl"][1:] > 1e-5).all() and line["kl"][1] < line["kl"][2]
    assert (line["minimum"] <= np.minimum(line["unclipped"], line["clipped"]) + 1e-7).all()
    assert line["minimum"][2] > 0  # the update has improved what it maximises


def test_the_line_of_trpo_starts_at_the_return_of_the_old_policy():
    config = trpo.Config(**SMALL)
    line = functools.partial(figures.return_on_a_line, config, 1, ALPHAS, 32)
    line = {name: np.asarray(x) for name, x in jax.jit(line)(jax.random.key(0)).items()}
    np.testing.assert_allclose([line["kl"][0], line["gain"][0]], 0.0, atol=1e-6)
    assert 0.003 < line["kl"][2] < 0.015  # δ = 0.01 and some damping
    # A random policy lasts some twenty steps.
    assert 15 < line["old"] < 30 and abs(line["returns"][0] - line["old"]) < 10


def test_the_surrogate_is_the_return_where_the_states_do_not_depend_on_the_policy(monkeypatch):
    # The only step of an episode pays the action: η = π(1), and L is exact for every α.
    monkeypatch.setattr(figures, "EPISODE", 1)
    config = trpo.Config(**SMALL, env_id="ProbeAction-test", max_kl=0.1)
    line = functools.partial(figures.return_on_a_line, config, 0, ALPHAS, 20_000)
    line = {name: np.asarray(x) for name, x in jax.jit(line)(jax.random.key(0)).items()}
    assert line["returns"][2] > line["returns"][0] + 0.1
    np.testing.assert_allclose(line["old"] + line["gain"], line["returns"], atol=0.02)


def test_blocks_leave_out_what_is_missing():
    config = trpo.Config(**SMALL)
    x = np.array([[1.0, np.nan, 3.0, 5.0, 7.0]])
    steps, means = figures.in_blocks(config, x, 2)
    np.testing.assert_allclose(steps, [0.128, 0.256])
    np.testing.assert_allclose(means, [[1.0, 4.0]])


def test_a_healthy_run_is_of_the_same_environment():
    commands = [command for *_, command in figures.SYMPTOMS]
    assert {figures.healthy(command) for command in commands} == {
        "ppo_discrete.py",
        "ppo_discrete.py --env-id Acrobot-v1",
        "ppo_discrete.py --env-id MountainCar-v0",
        "ppo_continuous.py",
        "ppo_penalty.py",
        "trpo.py",
    }


@pytest.mark.parametrize("file", figures.FIGURES)
def test_the_pictures_of_the_documents_exist(file):
    path = ROOT / "docs" / file
    assert 5_000 < path.stat().st_size < 400_000
    document = "recipes.md" if file == "symptoms.png" else "derivations.md"
    assert f"({file})" in (ROOT / "docs" / document).read_text()
