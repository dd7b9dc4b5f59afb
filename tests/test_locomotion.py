"""benchmarks/locomotion.py: what is stored, what is done again, and how a policy is scored."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from test_environments import Walk

sys.path.insert(0, str(ROOT / "benchmarks"))

import locomotion

import ppo_continuous

CELL = "brax", "hopper", 1_000_000


@pytest.fixture(autouse=True)
def without_brax(monkeypatch):
    monkeypatch.setattr(locomotion, "version", lambda name: "1.2.3")


def test_rows_replace_older_ones_of_the_same_seed(tmp_path):
    path = tmp_path / "results" / "locomotion.csv"
    locomotion.add_rows(path, CELL, [0, 1], [5.0, 7.0], 1_310_720, 3.2)
    locomotion.add_rows(path, ("trpo", *CELL[1:]), [0], [9.0], 999_424, 3.2)
    locomotion.add_rows(path, CELL, [1, 2], [70.0, 80.0], 1_310_720, 3.2)
    rows = locomotion.read_rows(path)
    assert [row["mean_episodic_return"] for row in rows] == ["5", "9", "70", "80"]
    assert sorted(locomotion.of_cell(rows, CELL)) == [0, 1, 2]
    assert rows[0]["trained_steps"] == "1310720" and rows[0]["brax"] == "1.2.3"


def test_a_kill_while_writing_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "locomotion.csv"
    locomotion.add_rows(path, CELL, [0], [5.0], 1_310_720, 3.2)
    before = path.read_bytes()
    monkeypatch.setattr(locomotion.csv.DictWriter, "writerows", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        locomotion.add_rows(path, CELL, [1], [6.0], 1_310_720, 3.2)
    assert path.read_bytes() == before


@pytest.mark.parametrize("algorithm", ["ppo_penalty", "brax", "purejaxrl"])
def test_results_of_other_settings_count_as_missing(algorithm, tmp_path, monkeypatch):
    cell, path = (algorithm, *CELL[1:]), tmp_path / "locomotion.csv"
    locomotion.add_rows(path, cell, [0, 1], [5.0, 7.0], 1, 3.2)
    assert len(locomotion.of_cell(locomotion.read_rows(path), cell)) == 2
    import ppo_penalty

    changed = dict(gamma=0.5)
    monkeypatch.setitem(ppo_penalty.PRESETS, "brax", changed)
    monkeypatch.setitem(locomotion.BRAX, "hopper", locomotion.PLANAR | changed)
    monkeypatch.setitem(locomotion.PUREJAXRL, "GAMMA", 0.5)
    assert not locomotion.of_cell(locomotion.read_rows(path), cell)
    assert "hopper" not in locomotion.table(locomotion.read_rows(path), [cell])


def test_what_is_complete_is_not_trained_again(tmp_path, monkeypatch):
    path, trained = tmp_path / "locomotion.csv", []

    def train(task, steps, seed, changes):
        trained.append(seed)
        if seed == 2 and len(trained) == 3:
            raise KeyboardInterrupt
        return 10.0 * seed, 1_310_720

    monkeypatch.setattr(locomotion, "train_brax", train)
    with pytest.raises(KeyboardInterrupt):
        locomotion.complete(CELL, path, 4, tmp_path, None)
    locomotion.complete(CELL, path, 4, tmp_path, None)
    locomotion.complete(CELL, path, 4, tmp_path, None)
    assert trained == [0, 1, 2, 2, 3]
    text = locomotion.cell_text(locomotion.read_rows(path), CELL)
    assert text.startswith("**15.0** (") and text.endswith("; worst 0.0, 4 seeds)")


def test_of_ours_the_missing_seeds_are_trained_side_by_side(tmp_path, monkeypatch):
    cell, path, trained = ("trpo", *CELL[1:]), tmp_path / "locomotion.csv", []

    def run(script, env_id, steps, seeds, folder, flags, curve):
        assert {"trpo.py", "environments.py"} == {path.name for path in folder.iterdir()}
        assert curve == tmp_path / "locomotion" / f"trpo__hopper__1000000__{seeds[0]}.curve.csv"
        trained.append((script, env_id, seeds, folder.parent))
        return SimpleNamespace(scores=np.array(seeds) * 10.0, trained_steps=999_424)

    monkeypatch.setattr(locomotion, "run_script", run)
    locomotion.complete(cell, path, 2, tmp_path, None)
    locomotion.complete(cell, path, 5, tmp_path, None)
    hopper = ("trpo", "environments:hopper-brax")
    assert trained == [(*hopper, [0, 1], tmp_path), (*hopper, [2, 3, 4], tmp_path)]
    assert sorted(locomotion.of_cell(locomotion.read_rows(path), cell)) == [0, 1, 2, 3, 4]


def test_a_policy_is_scored_by_its_first_episodes(monkeypatch):
    # Environment i ends after i + 1 steps; an action pays itself.
    def step(keys, time, action):
        n, time = len(keys), time + 1
        done = time % (jnp.arange(n) + 1) == 0
        return (
            time,
            jnp.ones((n, 1)) * time,
            jnp.ones((n, 1)) * time,
            action[:, 0],
            done,
            ~done & done,
        )

    env = SimpleNamespace(reset=lambda keys: (jnp.zeros((len(keys), 1)), 0), step=step)
    monkeypatch.setattr(locomotion, "EPISODES", 5)
    score = lambda **options: locomotion.play(env, lambda obs: obs, jax.random.key(0), **options)
    # Observations count steps: 0, 0 + 1, 0 + 1 + 2, ...
    assert score() == np.mean([0, 1, 3, 6, 10])
    assert score(repeat=2) == np.mean([0, 0, 2, 4, 8])


def test_the_score_of_a_policy_is_that_of_the_scripts():
    # One of our policies, played by both, with other episodes.
    env = locomotion.environments.brax_like(Walk(), limit=20)
    config = ppo_continuous.Config(env_id="nothing", num_envs=4, num_steps=16)
    actor = ppo_continuous.Actor(1, config.hidden_sizes, config.activation)

    def both(key):
        state = ppo_continuous.make_train(config, env)[0](key)

        def policy(obs):
            seen = ppo_continuous.normalize(obs, state.obs_stats)
            action = actor.apply(state.params["actor"], seen).mode()
            return ppo_continuous.bound_action(action, env.action_space)

        returns, _ = ppo_continuous.evaluate(config, state, key, 100, env, max_steps=1000)
        return locomotion.play(env, policy, jax.random.fold_in(key, 1)), returns

    score, returns = jax.jit(both)(jax.random.key(3))
    assert returns.std() > 1 and abs(score - returns.mean()) < 0.4 * returns.std()
