"""Stored results, the tables made of them, and the studies that make the results."""

import dataclasses
import importlib
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import common
import edits
import learning
import locomotion
import rlhf

TABLES = {
    "results": learning.result_table,
    "ablations": learning.ablation_table,
    "held out": learning.held_out_table,
    "falls": learning.fall_table,
    "dips": learning.dip_table,
    "locomotion": locomotion.table,
    "edits": edits.table,
}
RESULTS = (common.DOCS / "results.md").read_text()


def all_cells():
    yield from [cell for study in learning.STUDIES.values() for cell in study()]
    yield from [edits.cell_of(x, edited) for x in edits.EXPERIMENTS for edited in (False, True)]
    yield from [rlhf.cell_of(name) for name in rlhf.ALGORITHMS]
    for steps in locomotion.BUDGETS:
        for task in locomotion.TASKS:
            yield from [locomotion.cell_of(name, task, steps) for name in locomotion.LABELS]


@pytest.fixture
def cell(tmp_path):
    """A cell whose seeds are trained one by one; the score of a seed is ten times the seed."""
    config = learning.config_of("trpo", "CartPole-v1", 50_000)
    return common.Cell.of_script(
        tmp_path / "folder" / "cell.csv",
        "trpo",
        config,
        range(3),
        lambda seeds: common.scored(seeds, [10.0 * seed for seed in seeds]),
        chunk=1,
    )


def with_other_config(cell):
    return dataclasses.replace(cell, config=cell.config | {"gamma": 0.9})


def test_every_stored_file_is_the_complete_result_of_a_cell():
    cells = list(all_cells())
    paths = {cell.path for cell in cells}
    assert len(paths) == len(cells)
    for cell in cells:
        assert [int(row["seed"]) for row in cell.rows()] == list(cell.seeds), cell.path
        assert np.isfinite(cell.scores(list(cell.rows()[0])[1])).all()
    stored = {p for p in common.RESULTS.rglob("*.csv") if not p.name.endswith(".curve.csv")}
    assert stored - paths == {common.RESULTS / "optimum.csv"}
    assert all(path.name.isascii() for path in common.RESULTS.rglob("*"))


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_the_document_are_those_of_the_results(name):
    assert f"<!-- {name} -->\n{TABLES[name]()}\n<!-- end of {name} -->" in RESULTS


def test_the_table_of_the_readme_is_that_of_the_results():
    known = {(row[0], common.budget(row[1])): learning.result_row(*row) for row in learning.ROWS}
    for steps in locomotion.BUDGETS:
        for task in locomotion.TASKS:
            cells = [locomotion.cell_of(name, task, steps) for name in locomotion.OURS]
            known[f"{task}-brax", common.budget(steps)] = cells
    found = 0
    for line in (ROOT / "README.md").read_text().splitlines():
        env_id, steps, *texts = [*(text.strip() for text in line.strip("|").split("|")), "", ""]
        if (env_id, steps) in known:
            found += 1
            means = [common.interquartile_mean(x.scores()) for x in known[env_id, steps]]
            assert texts[:3] == [f"{mean:.1f}" for mean in means], line
    assert found > 3


def test_a_result_of_another_configuration_is_stale(cell):
    assert not cell.is_current() and cell.missing_seeds() == [0, 1, 2] and cell.text() == ""
    cell.complete()
    assert cell.is_current() and cell.missing_seeds() == []
    assert cell.text(1).startswith("**10.0** (0.0 to 20.0; worst 0.0, 3 seeds)")
    other = with_other_config(cell)
    assert not other.is_current() and other.missing_seeds() == [0, 1, 2]
    assert other.text() == f"{cell.text()} †"
    other.complete()  # replaces all rows
    assert other.is_current() and len(other.rows()) == 3 and not cell.is_current()


def test_the_seeds_are_no_part_of_the_configuration(cell):
    assert {"script": "trpo", "gamma": 0.99}.items() <= cell.config.items()
    assert not {"seed", "num_seeds"} & set(cell.config)


def test_training_continues_with_the_seeds_that_are_missing(cell):
    trained = []

    def train(seeds):
        trained.extend(seeds)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return common.scored(seeds, seeds)

    cell = dataclasses.replace(cell, train=train)
    with pytest.raises(KeyboardInterrupt):
        cell.complete()
    cell.complete()
    assert trained == [0, 1, 1, 2]
    assert [int(row["seed"]) for row in cell.rows()] == [0, 1, 2]


def test_a_kill_while_writing_leaves_the_file_as_it_was(cell, monkeypatch):
    cell.complete()
    before = cell.path.read_bytes()
    monkeypatch.setattr(common.csv.DictWriter, "writerow", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        with_other_config(cell).complete()
    assert cell.path.read_bytes() == before


def test_a_cell_of_a_command(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RUNS", tmp_path / "runs")
    path = tmp_path / "cell.csv"
    cell = common.script_cell(
        path, "ppo_discrete", "CartPole-v1", 4096, range(2), flags="--gamma 0.9"
    )
    cell.complete()
    scores = cell.scores()
    assert scores.shape == (2,) and (8 < scores).all() and (scores <= 500).all()
    curve = path.with_suffix(".curve.csv").read_text().splitlines()
    assert curve[0] == "env_step,0,1" and curve[-1].startswith("4096,")
    assert cell.config["total_timesteps"] == 4096 and cell.config["flags"] == "--gamma 0.9"
    assert not [*(tmp_path / "runs").iterdir()]  # nothing is left behind


SCRIPT = """
import os, sys
from pathlib import Path
run = Path("runs/it")
run.mkdir(parents=True, exist_ok=True)
with open("calls", "a") as file:
    print(*sys.argv[1:], file=file)
(run / "config.json").write_text("{}")
if "--resume" not in sys.argv:
    os.kill(os.getpid(), 9)
(run / "evaluation.csv").write_text("")
"""


def test_a_script_that_was_killed_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RUNS", tmp_path)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with pytest.raises(common.subprocess.CalledProcessError):
        common.run_script(script, ["--seed", 3], "name")
    assert common.run_script(script, ["--seed", 3], "name") == tmp_path / "name" / "runs" / "it"
    calls = (tmp_path / "name" / "calls").read_text().splitlines()
    assert calls == ["--seed 3", "--resume runs/it"]


def test_a_replaced_function_comes_back():
    original = learning.ppo_discrete.gae
    with pytest.raises(ZeroDivisionError), common.replaced(learning.ppo_discrete, gae=abs):
        assert learning.ppo_discrete.gae is abs
        raise ZeroDivisionError
    assert learning.ppo_discrete.gae is original


def test_the_ablations_name_functions_of_the_scripts():
    for name, (*_, values, functions) in learning.ABLATIONS.items():
        for env_id, steps, num_seeds in learning.ABLATION_ENVS:
            config = learning.ablation_cell(name, env_id, steps, num_seeds).config
            script = importlib.import_module(config["script"])
            assert all(hasattr(script, function) for function in functions)
            assert values.items() <= config.items()


def test_what_counts_as_a_fall():
    nan = float("nan")
    returns = np.array([300.0, 495, nan, 300, 450, 390, 399])
    # Update 1 solves the task. The first of two successive low updates after it is the fifth.
    assert learning.find_fall(returns, 495, 400) == (1, 5)
    assert learning.find_fall(returns[:6], 495, 400) == (1, -1)  # one low update is no fall
    assert learning.find_fall(returns[:1], 495, 400) == (-1, -1)


def test_how_deep_a_curve_dips():
    nan = float("nan")
    # Means of two points: 2, 4, 2, 1, 5, so that a quarter of 4 is the least; and 1, 2, 3, 4, 5.
    curve = np.array([[nan, nan], [2, 1], [2, 1], [6, 3], [-2, 3], [4, 5], [6, 5]])
    np.testing.assert_array_equal(learning.deepest_dip(curve, 2), [0.25, 1.0])


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_a_policy_returns_in_gymnasium_what_it_returns_in_gymnax(env_id):
    name = learning.script_of("clip", env_id)
    script = importlib.import_module(name)
    config = script.Config(env_id=env_id)
    state = jax.jit(script.make_train(config)[0])(jax.random.key(0))
    there = learning.play_gymnasium(name, config, state)
    returns, _ = script.evaluate(config, state, jax.random.key(1), 100)
    assert abs(there - returns.mean()) < 4 * np.sqrt(2 / 100) * max(returns.std(), 1)


def test_the_table_and_the_picture_of_rlhf(tmp_path):
    cells = {name: rlhf.cell_of(name) for name in rlhf.ALGORITHMS}
    table = rlhf.table(cells).splitlines()
    assert len(table) == 2 + 3 * len(rlhf.BETAS) + 1 + len(rlhf.BETAS) - 1
    rlhf.draw(cells, tmp_path / "rlhf.png")
    assert (tmp_path / "rlhf.png").stat().st_size > 10_000


def test_edits_are_patches_of_scripts():
    for experiment in edits.EXPERIMENTS:
        plain, edited = (edits.cell_of(experiment, x) for x in (False, True))
        assert plain.config | {"patches": [experiment[0]]} == edited.config
        assert re.fullmatch(r"[-.\w]+\.csv", plain.path.name)
