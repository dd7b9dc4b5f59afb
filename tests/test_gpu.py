"""The table of whole runs on an accelerator (benchmarks/gpu.py), tried on the CPU."""

import itertools
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

import ppo_discrete

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu

CONFIG = ppo_discrete.Config(**gpu.TINY | dict(num_seeds=1, total_timesteps=8 * 16))  # 8 updates


def test_what_takes_too_long_is_extrapolated_from_the_part_that_was_measured():
    ticks = lambda: itertools.count().__next__  # a clock on which everything takes a second
    # A second to compile, one to start; stopped in the second of eight segments: 1 + 2 · 8/2.
    part = gpu.measure(ppo_discrete, CONFIG, longest=5, enough=1.5, clock=ticks())
    assert (part.compile_seconds, part.part, part.seconds) == (1, 0.25, 9)
    assert part.mebibytes > 0
    whole = gpu.measure(ppo_discrete, CONFIG, longest=8, enough=1.5, clock=ticks())
    assert (whole.part, whole.seconds) == (1, 9)


def test_another_program_makes_the_same_part():
    made = []

    def train(config, key):
        made.append(config.num_updates)
        return ppo_discrete.train(config, key)

    measured = gpu.measure_other(train, CONFIG, part=0.25)
    assert (measured.part, made) == (0.25, [2])


@pytest.fixture
def document(tmp_path):
    """A copy of docs/speed.md."""
    copy = tmp_path / "speed.md"
    copy.write_text(gpu.DOCUMENT.read_text())
    return copy


def test_end_to_end_on_the_cpu(document, monkeypatch, capsys):
    monkeypatch.setattr(gpu.purejaxrl, "load_train", lambda folder, name: ppo_discrete.train)
    monkeypatch.setattr(gpu, "has_ant", lambda: False)
    before = document.read_text()
    gpu.table("on a test", "a folder", minutes=9, quick=True, document=document)
    text = document.read_text()
    begin, end = gpu.MARKS
    assert text.split(begin)[0] == before.split(begin)[0]
    assert text.split(end)[1] == before.split(end)[1]
    part = text.split(begin)[1].split(end)[0]
    assert "on a test" in part and "missing" not in part
    table = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
    names = [(row[0], row[2]) for row in table[2:]]
    assert names == [("CartPole-v1", "1"), ("CartPole-v1", "2"), ("Breakout-MinAtar", "1")]
    for row in table[2:]:
        steps, seconds = int(row[2]) * 64, float(row[5].removesuffix(" s"))
        assert len(row) == len(table[0])
        assert float(row[4].replace(",", "")) == pytest.approx(steps / seconds, rel=0.1)
        assert re.fullmatch(r"\d+\.\d\d", row[11])
    assert " | ".join(table[-1]) in capsys.readouterr().out


def test_the_most_important_rows_come_first_and_the_others_are_counted(document, monkeypatch):
    now, done = [0.0], []

    def line_of(row, folder):
        now[0] += 100
        done.append((row.env_id, row.num_seeds))
        if len(done) == 2:
            raise RuntimeError
        return f"| {row.env_id} {row.num_seeds} |"

    monkeypatch.setattr(gpu, "line_of", line_of)
    monkeypatch.setattr(gpu, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(gpu, "has_ant", lambda: False)
    gpu.table("", None, minutes=9, quick=False, document=document)
    assert done[:2] == [("CartPole-v1", 2048), ("Breakout-MinAtar", 256)]
    assert len(done) == 5  # begun at 0, 100, ... 400 s, each with 100 s before the end
    text = document.read_text()
    assert "8 rows are missing" in text and "Failed: Breakout-MinAtar with 256 seeds." in text


def test_too_little_memory_is_a_cell():
    def fails(kind, text):
        raise kind(text)

    for kind, text in [
        (jax.errors.JaxRuntimeError, "RESOURCE_EXHAUSTED: out of memory"),
        (ppo_discrete.Failure, "this takes 9 GiB per device, which has 1: use fewer seeds"),
    ]:
        assert gpu.cells(gpu.if_it_fits(fails, kind, text))[0] == "too little memory"
    with pytest.raises(ValueError):
        gpu.if_it_fits(fails, ValueError, "another one")
