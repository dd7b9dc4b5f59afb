"""The README's tables are those of the stored results, and these of the scripts' defaults."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import learning  # noqa: E402


def test_every_result_was_made_with_the_current_configuration():
    configurations = {
        learning.result_path(*cell[:3]): learning.configuration(*cell) for cell in learning.cells()
    }
    for env_id, steps in learning.ABLATION_ENVS:
        for name in learning.ABLATIONS:
            configuration = learning.ablation_configuration(name, env_id, steps)
            configurations[learning.ablation_path(name, env_id)] = configuration
    stored = {p for p in learning.RESULTS.rglob("*.csv") if not p.name.endswith(".curve.csv")}
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


def test_the_tables_of_the_readme_are_those_of_the_results():
    readme = (ROOT / "README.md").read_text()
    assert f"<!-- results -->\n{learning.results_table()}\n<!-- end of results -->" in readme
    assert f"<!-- ablations -->\n{learning.ablation_table()}\n<!-- end of ablations -->" in readme
