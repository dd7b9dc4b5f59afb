"""benchmarks/speed.py: what is compared, and the table that comes of it."""

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import ppo_continuous
import ppo_discrete
import ppo_penalty

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import speed

SMALL = speed.sizes(2, 16, 2) | dict(update_epochs=1, num_minibatches=2, hidden_sizes=(8,))


def test_a_script_against_bare_arithmetic(capsys):
    settings = {"1 seed": (1, SMALL), "2 seeds": (2, SMALL)}
    speed.compare("bare", speed.bare_arithmetic, ["ppo_discrete"], settings, rounds=2)
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[1] for row in rows] == ["1 seed", "2 seeds"]
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == len(header.strip("|").split(" | "))
        ours, bare = (float(cell.replace(",", "")) for cell in cells[2:4])
        assert float(cells[4].split()[0]) == pytest.approx(ours / bare, abs=0.02)


def test_programs_take_turns_and_the_first_runs_do_not_count(monkeypatch):
    order = []
    runs = [lambda: order.append("a"), lambda: order.append("b")]
    ticks = itertools.count()
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    seconds = speed.take_turns(runs, rounds=3)
    assert "".join(order) == "baabbaab"
    np.testing.assert_array_equal(seconds, np.ones((2, 3)))


@pytest.mark.parametrize("script", [ppo_discrete, ppo_penalty])
def test_another_version_gets_the_same_hyperparameters(script, tmp_path, monkeypatch):
    text = """
from dataclasses import dataclass

@dataclass
class Config:
    env_id: str = "?"
    total_timesteps: int = 0
    kl_threshold: float | None = None
    retired: int = 3

train = None
"""
    (tmp_path / f"{script.__name__}.py").write_text(text)
    monkeypatch.setattr(speed, "program_of", lambda train, config, num_seeds: config)
    config = speed.other_version(tmp_path, script, script.Config(total_timesteps=5000), 1)
    assert (config.env_id, config.total_timesteps, config.retired) == ("CartPole-v1", 5000, 3)
    assert config.kl_threshold == 0.02


def test_the_seeds_of_a_program_are_those_of_train():
    config = ppo_continuous.Config(**SMALL)
    program = speed.program_of(ppo_continuous.train, config, num_seeds=2, spread=True)
    assert program.steps == 2 * 64 and program.compile_seconds > 0
    state, _ = program.run()
    keys = jax.random.split(jax.random.key(0), 2)
    other, _ = jax.jit(jax.vmap(lambda key: ppo_continuous.train(config, key)))(keys)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5),
        state.params["actor"],
        other.params["actor"],
    )
