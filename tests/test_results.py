"""The tables in docs/results.md are those of the stored results, these of the scripts' defaults."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import edits
import falls
import heldout
import learning
import locomotion


def test_every_result_was_made_with_the_current_configuration():
    configurations = {
        learning.result_path(*cell[:3]): learning.configuration(*cell) for cell in learning.cells()
    }
    for column in learning.ABLATION_ENVS:
        for name in learning.ABLATIONS:
            configuration = learning.ablation_configuration(name, *column)
            configurations[learning.ablation_path(name, column[0])] = configuration
    # Others keep rows of their own.
    others = (
        ".curve.csv",
        "locomotion.csv",
        "falls.csv",
        "edits.csv",
        "heldout.csv",
        "optimum.csv",
    )
    stored = {p for p in learning.RESULTS.rglob("*.csv") if not p.name.endswith(others)}
    assert len(stored) > 100
    # A file that belongs to no cell has no configuration to agree with.
    assert not [p.name for p in stored if not learning.is_current(p, configurations.get(p))]


def test_a_result_of_another_configuration_counts_as_missing(tmp_path, monkeypatch):
    cell = "ppo_discrete", "CartPole-v1", 50_000
    path = learning.result_path(*cell, tmp_path)
    assert not learning.is_current(path, learning.configuration(*cell, 10))
    learning.write_scores(path, learning.configuration(*cell, 10, gamma=0.9), [1.0, 3.0], 5, 100)
    assert not learning.is_current(path, learning.configuration(*cell, 10))
    assert learning.is_current(path, learning.configuration(*cell, 10, gamma=0.9))
    assert learning.read_scores(path).tolist() == [1.0, 3.0]
    monkeypatch.setattr(learning, "result_path", lambda *cell: path)
    assert learning.cell_text(*cell, 10) == ""


def test_a_result_that_was_not_written_to_its_end_counts_as_missing(tmp_path, monkeypatch):
    path = tmp_path / "cell.csv"
    config = learning.configuration("trpo", "CartPole-v1", 50_000, 10)
    killed = lambda *_: 1 / 0
    monkeypatch.setattr(learning.Path, "replace", killed)
    with pytest.raises(ZeroDivisionError):
        learning.write_scores(path, config, [1.0, 3.0], 5, 100)
    assert not learning.is_current(path, config)


def test_a_run_of_the_command_line_is_a_result_of_its_configuration(tmp_path, monkeypatch):
    cell, work = ("ppo_discrete", "CartPole-v1", 4096), tmp_path / "work"
    monkeypatch.setattr(learning, "result_path", lambda *_: tmp_path / "cell.csv")
    learning.run_cell(*cell, 2, tmp_path, work)
    path = tmp_path / "cell.csv"
    assert learning.is_current(path, learning.configuration(*cell, 2))
    scores = learning.read_scores(path)
    assert scores.shape == (2,) and (8 < scores).all() and (scores <= 500).all()
    curve = path.with_suffix(".curve.csv").read_text().splitlines()
    assert curve[0] == "env_step,0,1" and curve[-1].startswith("4096,")
    assert not [*work.iterdir()]  # nothing is left behind


SCRIPT = """
import json, os, sys
from pathlib import Path
run = Path("runs/it")
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
with open("calls", "a") as file:
    print(*sys.argv[1:], file=file)
if "--resume" not in sys.argv:
    os.kill(os.getpid(), 9)
(run / "config.json").write_text(json.dumps(dict(num_envs=16, num_steps=256, format=3)))
rows = ["3,0,1.0,9", "3,1,2.0,9", "4,0,5.0,9", "4,1,7.0,9"]
text = "\\n".join(["seed,episode,episodic_return,episodic_length", *rows])
(run / "evaluation.csv").write_text(text)
rows = ["3,4096,", "4,4096,7", "3,8192,8", "4,8192,9"]
(run / "metrics.csv").write_text("\\n".join(["seed,env_step,episodic_return", *rows]))
"""


def test_a_script_that_was_killed_is_resumed(tmp_path):
    (work := tmp_path / "work" / "cell").mkdir(parents=True)
    script = SCRIPT + "Path('../../calls').write_text(open('calls').read())"
    (work / "trpo.py").write_text(script)
    cell = ("trpo", "environments:ant-brax", 1_000_000, [3, 4], work)
    with pytest.raises(SystemExit):
        learning.run_script(*cell)
    curve = tmp_path / "curve.csv"
    run = learning.run_script(*cell, curve=curve)
    assert run.scores.tolist() == [1.5, 6.0] and run.episodes == 2 and not work.exists()
    assert run.trained_steps == 999_424 and run.config == dict(num_envs=16, num_steps=256)
    assert curve.read_text() == "env_step,0,1\n4096,,7\n8192,8,9\n"
    first, second = (tmp_path / "calls").read_text().splitlines()
    flags = "--env-id environments:ant-brax --total-timesteps 1000000 --num-seeds 2 --seed 3"
    assert first == flags and second == "--resume runs/it"


def test_the_tables_of_the_document_are_those_of_the_results():
    text = learning.DOCUMENT.read_text()
    assert f"<!-- results -->\n{learning.results_table()}\n<!-- end of results -->" in text
    assert f"<!-- ablations -->\n{learning.ablation_table()}\n<!-- end of ablations -->" in text
    links = re.findall(r"\]\((\.\./[^)#]+)", text)
    assert links and all((learning.DOCUMENT.parent / link).exists() for link in links)


def test_the_table_of_falls_is_that_of_the_stored_rows():
    text = learning.DOCUMENT.read_text()
    assert f"<!-- falls -->\n{falls.table()}\n<!-- end of falls -->" in text
    assert len(falls.table().splitlines()) > 2
    assert f"<!-- dips -->\n{falls.dips_table()}\n<!-- end of dips -->" in text


def test_the_table_of_edits_is_that_of_the_stored_rows():
    text = learning.DOCUMENT.read_text()
    assert f"<!-- edits -->\n{edits.table()}\n<!-- end of edits -->" in text


def test_the_table_of_other_seeds_is_that_of_the_stored_rows():
    text = learning.DOCUMENT.read_text()
    assert f"<!-- held out -->\n{heldout.table()}\n<!-- end of held out -->" in text


def test_the_table_of_locomotion_is_that_of_the_stored_rows():
    text = learning.DOCUMENT.read_text()
    assert f"<!-- locomotion -->\n{locomotion.document_table()}\n<!-- end of locomotion -->" in text


def test_the_table_of_the_readme_is_that_of_the_stored_results():
    text = (ROOT / "README.md").read_text().partition("## Results")[2].partition("## Speed")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    table = [*learning.ROWS, *learning.MINATAR]
    known = {(row[0], learning.budget(row[1])): learning.cells_of(row) for row in table}
    brax_steps = {learning.budget(steps): steps for steps in locomotion.BUDGETS}
    locomotion_rows = locomotion.read_rows(learning.RESULTS / "locomotion.csv")

    def scores(env_id, steps):
        """Of the seeds of each algorithm, on Brax of the two others', too."""
        if not env_id.endswith("-brax"):
            paths = [learning.result_path(*cell[:3]) for cell in known[env_id, steps]]
            return [learning.read_scores(path) for path in paths]
        task, steps = env_id.removesuffix("-brax"), brax_steps[steps]
        cells = [(name, task, steps) for name in locomotion.LABELS]
        found = [locomotion.of_cell(locomotion_rows, cell).values() for cell in cells]
        return [[float(row["mean_episodic_return"]) for row in each] for each in found]

    assert len(rows) == 9
    for env_id, steps, *ours, compared in rows[1:]:
        others = re.findall(r"(?:Brax's PPO|PureJaxRL) (-?[\d.]+)", compared)
        means = [learning.interquartile_mean(np.array(x)) for x in scores(env_id, steps)]
        assert ours + others == [f"{mean:.1f}" for mean in means]


def test_a_policy_plays_in_gymnasium():
    """Pushed the way it moves, the car arrives after some hundred steps; pushed right, never."""
    swing = lambda obs: 2 * (obs[..., 1] >= 0)
    returns = heldout.play_gymnasium("MountainCar-v0", swing, 2)
    assert returns.shape == (10, 2) and ((-160 < returns) & (returns < -80)).all()
    right = lambda obs: np.full(obs.shape[:2], 2)
    assert (heldout.play_gymnasium("MountainCar-v0", right, 1) == -200).all()
    rest = lambda obs: np.zeros((*obs.shape[:2], 1), np.float32)
    assert np.allclose(heldout.play_gymnasium("MountainCarContinuous-v0", rest, 1), 0)


def test_script_and_edited_script_run_the_same_command(tmp_path, monkeypatch):
    runs, experiment = [], ("cnn", "Breakout-MinAtar", 2_000_000, 2, "--seed 7")

    def run(script, env_id, steps, seeds, folder, flags):
        runs.append(
            [(script, env_id, steps, [*seeds], flags), (folder / f"{script}.py").read_text()]
        )
        return SimpleNamespace(scores=np.array([len(runs), 10.0]), trained_steps=1_998_848)

    monkeypatch.setattr(edits, "run_script", run)
    monkeypatch.setattr(edits, "STORED", tmp_path / "edits.csv")
    monkeypatch.setattr(edits, "EXPERIMENTS", [experiment])
    monkeypatch.setattr(edits, "WORK", tmp_path)
    for edited in (False, True):
        edits.train(experiment, edited)
    (command, plain), (again, changed) = runs
    assert (
        command == again == ("ppo_discrete", "Breakout-MinAtar", 2_000_000, [0, 1], ["--seed", "7"])
    )
    assert plain == (edits.ROOT / "ppo_discrete.py").read_text()
    assert "def convolve" in changed and "def convolve" not in plain
    assert edits.scores_of(experiment, False).tolist() == [1, 10]
    assert edits.scores_of(experiment, True).tolist() == [2, 10]
    assert (
        edits.table().splitlines()[2].startswith("| `cnn` | Breakout-MinAtar | 2M | `--seed 7` |")
    )


def test_what_counts_as_a_fall():
    nan = float("nan")
    ended = np.array([5, 5, 0, 5, 3, 5, 5, 5])
    returns = np.array([300.0, 495, nan, 300, 300, 450, 390, 399])
    # Update 1 solves it. Of the low updates after it, 3, 4, 6 and 7, the fourth has too few ends.
    assert falls.fall(returns, ended, 495, 400) == (1, 6)
    assert falls.fall(returns[:7], ended[:7], 495, 400) == (1, -1)  # one alone is none
    assert falls.fall(returns[:1], ended[:1], 495, 400) == (-1, -1)


def test_how_deep_a_curve_dips():
    nan = float("nan")
    # Means of two: 2, 4, 2, 1, 5 (at worst a quarter of 4 is left), and 1, 2, 3, 4, 5.
    curve = np.array([[nan, nan], [2, 1], [2, 1], [6, 3], [-2, 3], [4, 5], [6, 5]])
    np.testing.assert_array_equal(falls.deepest_dip(curve, 2), [0.25, 1.0])
