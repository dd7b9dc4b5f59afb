"""benchmarks/speed.py: what is compared, and the table that comes of it."""

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import ppo_discrete
import ppo_penalty

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import speed

SMALL = speed.sizes(2, 16, 2) | dict(update_epochs=1, num_minibatches=2, hidden_sizes=(8,))


def test_a_script_against_bare_arithmetic(capsys):
    settings = {"2 seeds": (2, SMALL)}
    speed.compare("bare", speed.bare_arithmetic, ["ppo_discrete"], settings, rounds=1)
    header, _, *rows = capsys.readouterr().out.splitlines()
    (cells,) = ([cell.strip() for cell in row.strip("|").split(" | ")] for row in rows)
    assert len(cells) == len(header.strip("|").split(" | "))
    assert cells[:2] == ["`ppo_discrete`", "2 seeds"]
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


def test_the_phases_of_the_first_minute(tmp_path, monkeypatch):
    """A stand-in for the script prints a line, and writes metrics twice."""
    script = """
import time
from pathlib import Path
time.sleep(0.3)
print("begun", flush=True)
folder = Path("runs/it")
folder.mkdir(parents=True)
for returns in (("nan", 500), (480, 20)):
    time.sleep(0.5)
    with (folder / "metrics.csv").open("a") as file:
        if file.tell() == 0:
            file.write("seed,env_step,episodic_return\\n")
        for seed, value in enumerate(returns):
            file.write(f"{seed},1,{value}\\n")
time.sleep(0.5)
"""
    (tmp_path / "ppo_discrete.py").write_text(script)
    monkeypatch.setattr(speed, "ROOT", tmp_path)
    ends = speed.our_first_minute()
    assert list(ends) == ["imports", "compiling", "475", "everything"]
    assert 0.3 < ends["imports"] < ends["compiling"] < ends["475"] < ends["everything"]
    assert ends["475"] - ends["compiling"] > 0.4
