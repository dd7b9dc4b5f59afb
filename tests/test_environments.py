"""benchmarks/environments.py: with stand-ins for the libraries, and with those that are there."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax import struct
from gymnax.environments import spaces

sys.path.insert(0, str(ROOT / "benchmarks"))

import environments

import ppo_continuous
import ppo_discrete
import ppo_penalty
import trpo

# ---- Stand-ins: an environment of Brax, and one of Craftax ----


@struct.dataclass
class State:
    """What Brax and Playground hand over, with a counter that only a reset puts back."""

    pipeline_state: jax.Array
    obs: jax.Array
    reward: jax.Array
    done: jax.Array
    metrics: dict
    info: dict


class Walk:
    """An episode is a random number, its beginning, and ends after a random number of steps.

    What is seen: the beginning, the steps since, and when it ends. The reward is minus the distance
    of the action from half of the beginning.
    """

    action_size = 1

    def __init__(self, shortest=5, longest=30):
        self.shortest, self.longest = shortest, longest

    def reset(self, key):
        start_key, life_key = jax.random.split(key)
        life = jax.random.randint(life_key, (), self.shortest, self.longest + 1)
        begin = jax.random.uniform(start_key, minval=-1.0)
        obs = jnp.array([begin, 0.0, jnp.float32(life)])
        zero = jnp.float32(0)
        return State(begin, obs, zero, zero, {"distance": zero}, {"time": jnp.int32(0)})

    def step(self, state, action):
        info = {"time": state.info["time"] + 1}
        obs = state.obs.at[1].set(info["time"])
        distance = jnp.abs(action[0] - state.obs[0] / 2)
        done = jnp.float32(obs[1] >= obs[2])
        return State(state.pipeline_state, obs, -distance, done, {"distance": distance}, info)


ENDLESS = Walk(10**6, 10**6)


def roll(env, n, steps, seed=0):
    """Random actions: what `step` returned in each step, and the states, as NumPy arrays."""

    def one(carry, key):
        obs, env_state = carry
        action_key, step_key = jax.random.split(key)
        if hasattr(env.action_space, "n"):
            action = jax.random.randint(action_key, (n,), 0, env.action_space.n)
        else:
            action = jax.random.uniform(action_key, (n, 1), minval=-1.0)
        env_state, *results = env.step(jax.random.split(step_key, n), env_state, action)
        return (results[1], env_state), (obs, *results, env_state)

    def all_steps(key):
        start = env.reset(jax.random.split(key, n))
        return jax.lax.scan(one, start, jax.random.split(key, steps))[1]

    names = ("obs", "next_obs", "reset_obs", "reward", "terminated", "truncated", "state")
    results = jax.device_get(jax.jit(all_steps)(jax.random.key(seed)))
    return SimpleNamespace(**dict(zip(names, results, strict=True)))


def beginnings(rollout):
    """First observation of each episode that followed another, for each environment."""
    done = rollout.terminated | rollout.truncated
    return [rollout.reset_obs[done[:, i], i] for i in range(done.shape[1])]


def number_of_different(begun):
    return len(np.unique(begun, axis=0))


# ---- Episodes ----


def test_an_episode_ends_with_its_last_observation_and_the_next_begins_with_a_reset():
    rollout = roll(environments.brax_like(Walk(), limit=20), n=32, steps=200)
    done = rollout.terminated | rollout.truncated
    assert rollout.terminated.sum() > 100 and rollout.truncated.sum() > 50
    # s_{t+1} belongs to the episode of s_t, at its end, too.
    np.testing.assert_array_equal(rollout.next_obs[..., 0], rollout.obs[..., 0])
    np.testing.assert_array_equal(rollout.next_obs[..., 1], rollout.obs[..., 1] + 1)
    life = rollout.obs[..., 2]
    np.testing.assert_array_equal(rollout.terminated, rollout.next_obs[..., 1] == life)
    cut = (rollout.next_obs[..., 1] == 20) & (life > 20)  # dead at the limit is dead
    np.testing.assert_array_equal(rollout.truncated, cut)
    # Afterwards everything is as a reset leaves it, the counter and what hides in `info`.
    np.testing.assert_array_equal(rollout.reset_obs[~done], rollout.next_obs[~done])
    assert (rollout.reset_obs[done][:, 1] == 0).all()
    state = rollout.state.state
    np.testing.assert_array_equal(state.info["time"], rollout.reset_obs[..., 1])
    np.testing.assert_array_equal(state.pipeline_state, rollout.reset_obs[..., 0])
    np.testing.assert_array_equal(state.obs, rollout.reset_obs)
    assert (state.metrics["distance"][done] == 0).all()
    np.testing.assert_array_equal(rollout.state.time, rollout.reset_obs[..., 1])


def test_every_episode_begins_in_a_state_of_its_own():
    # With a mean length of 25 some 2.6 of 64 end in a step, of which 4 are replaced.
    rollout = roll(environments.brax_like(Walk(10, 40), limit=1000), n=64, steps=500)
    begun = np.concatenate([*beginnings(rollout), rollout.obs[0]])
    assert len(begun) > 1000 and number_of_different(begun) == len(begun)
    # They are those of `reset`: uniform from -1 to 1.
    quartiles = np.quantile(begun[:, 0], [0.25, 0.5, 0.75])
    np.testing.assert_allclose(quartiles, [-0.5, 0, 0.5], atol=0.1)


@pytest.mark.parametrize("limit, fresh", [(20, 32), (10, 20)])
def test_environments_that_are_cut_together_do_not_begin_alike(limit, fresh):
    # All 32 end in the same step. In each step from there to the next end two beginnings are made.
    rollout = roll(environments.brax_like(ENDLESS, limit), n=32, steps=2 * limit)
    assert not rollout.terminated.any()
    np.testing.assert_array_equal(rollout.truncated.sum(axis=1), [*[0] * (limit - 1), 32] * 2)
    first, second = np.stack(beginnings(rollout), axis=1)[..., 0]
    assert number_of_different(first) == number_of_different(second) == 32
    assert (second != first).sum() == fresh
    assert not np.isin(second[second != first], first).any()


def test_a_step_makes_only_as_many_beginnings_as_it_shares():
    env = environments.brax_like(Walk(1, 3), limit=1000)  # half of them end in each step
    for n, few in ((33, 3), (4, 1)):
        stock = roll(env, n, steps=20).state.stock[0][..., 0]
        np.testing.assert_array_equal((stock[1:] != stock[:-1]).sum(axis=1), few)


def test_those_that_wait_longest_are_served_first():
    # All end in step 11 and, before all are served, in step 23 again.
    env = environments.brax_like(ENDLESS, limit=12)
    stock = roll(env, n=32, steps=27).state.stock[0][..., 0]
    np.testing.assert_array_equal((stock[11:] != stock[10:-1]).sum(axis=0), 1)


def test_with_a_share_of_one_every_step_resets_all():
    walk = Walk(1, 2)

    def reset(key):
        state = walk.reset(key)
        return state.obs, state

    def step(key, state, action):
        state = walk.step(state, action)
        return state.obs, state, state.reward, state.done > 0.5

    env = environments.side_by_side(reset, step, spaces.Box(-1, 1, (1,)), 1000, share=1)
    rollout = roll(env, n=16, steps=50)
    begun = np.concatenate(beginnings(rollout))
    assert len(begun) > 400 and number_of_different(begun) == len(begun)


def test_seeds_do_not_see_each_other():
    env = environments.brax_like(Walk(), limit=20)
    keys = jax.vmap(jax.random.key)(jnp.arange(3))

    def after_some(key):
        def step(state, key):
            return env.step(jax.random.split(key, 8), state, jnp.ones((8, 1)))[0], None

        return jax.lax.scan(step, env.reset(jax.random.split(key, 8))[1], jax.random.split(key, 50))

    together, alone = jax.jit(jax.vmap(after_some))(keys), jax.jit(after_some)(keys[1])
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[1], y), together, alone)


class Diverging(Walk):
    """The physics breaks down in the third step; `says` tells whether the environment notices."""

    def __init__(self, says):
        super().__init__(10**6, 10**6)
        self.says = says

    def step(self, state, action):
        state = super().step(state, action)
        broken = state.info["time"] >= 3
        nan = lambda x: jnp.where(broken, jnp.nan, x)
        done = jnp.float32(broken & self.says)
        return state.replace(obs=nan(state.obs), reward=nan(state.reward), done=done)


def test_an_episode_whose_physics_diverges_ends_without_a_nan():
    rollout = roll(environments.brax_like(Diverging(True), limit=1000), n=4, steps=6)
    np.testing.assert_array_equal(rollout.terminated[:, 0], [0, 0, 1, 0, 0, 1])
    assert (rollout.next_obs[2] == 0).all() and (rollout.reward[2] == 0).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(vars(rollout)))


def test_a_nan_that_the_environment_does_not_notice_is_not_hidden():
    rollout = roll(environments.brax_like(Diverging(False), limit=1000), n=4, steps=6)
    assert np.isnan(rollout.next_obs[2:]).all() and np.isnan(rollout.reward[2:]).all()


def test_of_several_observations_the_policy_sees_the_state():
    class Parts(Walk):
        def reset(self, key):
            state = super().reset(key)
            return state.replace(obs={"privileged_state": jnp.ones(9), "state": state.obs})

        def step(self, state, action):
            inner = super().step(state.replace(obs=state.obs["state"]), action)
            return inner.replace(obs=state.obs | {"state": inner.obs})

    rollout = roll(environments.brax_like(Parts(), limit=20), n=4, steps=40)
    assert rollout.next_obs.shape == (40, 4, 3)
    np.testing.assert_array_equal(rollout.next_obs[..., 1], rollout.obs[..., 1] + 1)


# ---- Under the names of the libraries ----


class Cave:
    """Craftax's interface: five results of `step`, spaces of its own, a time limit within."""

    num_actions = 3

    @struct.dataclass
    class Params:
        max_timesteps: int = 25

    default_params = Params()

    def reset_env(self, key, params):
        key, cue_key = jax.random.split(key)
        cue = jax.random.randint(cue_key, (), 0, 3)
        return jax.nn.one_hot(cue, 3), (cue, jnp.int32(0))

    def step_env(self, key, state, action, params):
        cue, time = state
        reward = jnp.float32(action == cue)
        cue = jax.random.randint(key, (), 0, 3)
        time = time + 1
        dies = jax.random.uniform(key) < 0.01
        done = dies | (time >= params.max_timesteps)
        return jax.nn.one_hot(cue, 3), (cue, time), reward, done, {"discount": 1.0 - dies}


def stand_in(monkeypatch, name, **attributes):
    module = ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def libraries(monkeypatch):
    """All three libraries, with one environment each; `environments` lies in the current folder."""
    monkeypatch.chdir(ROOT / "benchmarks")
    monkeypatch.setattr(sys, "path", [*sys.path])  # `make_env` adds the folder to it

    def get_environment(name, backend):
        assert backend == "spring"
        return {"walk": Walk}[name]()

    envs = stand_in(monkeypatch, "brax.envs", get_environment=get_environment)
    stand_in(monkeypatch, "brax", envs=envs)

    def load(name, config_overrides):
        assert config_overrides == {"impl": "jax"}
        return Walk(100, 100)

    registry = SimpleNamespace(
        ALL_ENVS=("WalkLong", "WalkTwice"),
        get_default_config=lambda name: SimpleNamespace(
            action_repeat=1 + (name == "WalkTwice"), episode_length=50
        ),
        load=load,
    )
    stand_in(monkeypatch, "mujoco_playground", registry=registry)
    stand_in(monkeypatch, "warp", config=SimpleNamespace())

    def make_craftax_env_from_name(name, auto_reset):
        if name != "Craftax-Classic-Symbolic-v1":
            raise ValueError(f"Unknown craftax environment: {name}")
        assert not auto_reset
        return Cave()

    stand_in(monkeypatch, "craftax")
    stand_in(
        monkeypatch, "craftax.craftax_env", make_craftax_env_from_name=make_craftax_env_from_name
    )
    environments.make.cache_clear()
    yield
    environments.make.cache_clear()


def test_names_lead_to_the_libraries(libraries):
    env = environments.make("walk-brax")
    assert env.action_space.shape == (1,)
    rollout = roll(env, n=8, steps=100)
    assert rollout.terminated.any() and not rollout.truncated.any()
    rollout = roll(environments.make("WalkLong-playground"), n=8, steps=100)
    assert rollout.truncated[[49, 99]].all() and not rollout.terminated.any()
    assert environments.make("Craftax-Classic-Symbolic").action_space.n == 3


def test_a_state_is_kept_without_its_empty_arrays():
    """The library's own functions get them back; states without such arrays stay as they are."""

    def reset(key):
        return jnp.ones(2), {"a": jnp.zeros((0, 3), jnp.int32), "b": jnp.arange(2.0)}

    def step(key, state, action):
        assert state["a"].shape == (0, 3) and state["a"].dtype == jnp.int32
        return state["b"], state | {"b": state["b"] + action}, jnp.float32(7), False

    packed_reset, packed_step = environments.without_empty_arrays(reset, step)
    obs, state = packed_reset(jax.random.key(0))
    assert obs.shape == (2,) and [x.tolist() for x in state] == [[0, 1]]
    obs, state, reward, terminated = packed_step(jax.random.key(0), state, 5.0)
    assert obs.tolist() == [0, 1] and [x.tolist() for x in state] == [[5, 6]]
    assert reward == 7 and terminated is False
    full = lambda key: (jnp.ones(2), {"b": jnp.ones(2)})
    assert environments.without_empty_arrays(full, step) == (full, step)


def test_death_is_told_from_craftax_time_limit(libraries):
    rollout = roll(environments.make("Craftax-Classic-Symbolic"), n=32, steps=200)
    assert rollout.truncated.sum() > 100 and rollout.terminated.sum() > 20
    assert not (rollout.truncated & rollout.terminated).any()
    ends = np.flatnonzero((rollout.truncated | rollout.terminated)[:, 0])
    assert np.diff(ends, prepend=-1).max() == 25


@pytest.mark.parametrize(
    "name, message",
    [
        ("hopper", "no environment 'hopper': names end in -brax, -playground, -Symbolic"),
        ("fly-brax", "Brax has no environment 'fly'"),
        ("Fly-playground", "Playground has no environment 'Fly'; WalkLong, WalkTwice"),
        ("WalkTwice-playground", "WalkTwice repeats actions 2 times: not supported"),
        ("Craftax-Symbolic", "Craftax has no environment Craftax-Symbolic-v1"),
    ],
)
def test_what_a_library_lacks_is_said_in_a_sentence(libraries, name, message):
    with pytest.raises(ValueError, match=message):
        environments.make(name)


@pytest.mark.parametrize("name", ["hopper-brax", "Hop-playground", "Craftax-Classic-Symbolic"])
def test_a_library_that_is_missing_is_named(libraries, name, monkeypatch):
    package = environments.ADAPTERS[name.rpartition("-")[2]][1]
    for module in ("brax", "mujoco_playground", "craftax", "craftax.craftax_env"):
        monkeypatch.setitem(sys.modules, module, None)  # `import` says that it is not there
    with pytest.raises(ValueError, match=f"{name} needs {package}, but .* pip install {package}"):
        environments.make(name)


SMALL = dict(num_envs=8, num_steps=32, hidden_sizes=(16,), total_timesteps=25_600)


@pytest.mark.parametrize("script", [ppo_continuous, ppo_penalty, trpo])
def test_the_scripts_learn_on_it(libraries, script, keys):
    # Made for the first time inside of a compiled function, and again by `evaluate`.
    config = script.default_config("environments:walk-brax")
    config = replace(config, **SMALL, num_minibatches=4, learning_rate=1e-2, gamma=0.5)

    def run(key):
        state, _ = script.train(config, key)
        return script.evaluate(config, state, key, 20)

    returns, lengths = jax.device_get(jax.jit(jax.vmap(run))(keys(3)))
    assert (lengths >= 5).all() and (lengths <= 30).all() and len(np.unique(lengths)) > 10
    assert (returns / lengths).mean() > -0.1  # the middle would give -0.25


@pytest.mark.parametrize("script", [ppo_discrete, trpo])
def test_discrete_actions(libraries, script, keys):
    config = script.Config(env_id="environments:Craftax-Classic-Symbolic", **SMALL)
    config = replace(config, num_minibatches=4, learning_rate=1e-2, gamma=0.5)

    def run(key):
        state, _ = script.train(config, key)
        return script.evaluate(config, state, key, 20)

    returns, lengths = jax.device_get(jax.jit(jax.vmap(run))(keys(2)))
    np.testing.assert_array_equal(returns, lengths)
    assert lengths.max() == 25


# ---- From the command line, in a folder that holds a script, environments.py, and a library ----

LIBRARY = """
from types import SimpleNamespace
import jax, jax.numpy as jnp
from flax import struct

@struct.dataclass
class State:
    pipeline_state: jax.Array
    obs: jax.Array
    reward: jax.Array
    done: jax.Array
    metrics: dict
    info: dict

class Walk:
    action_size = 1

    def __init__(self, fault):
        self.fault = fault

    def reset(self, key):
        obs, zero = jnp.array([jax.random.uniform(key), 0.0]), jnp.float32(0)
        return State(None, obs, zero, zero, {}, {"key": key})

    def step(self, state, action):
        if self.fault == "raises":
            raise KeyError("my own mistake")
        obs = state.obs + jnp.array([0.0, 1.0])
        if self.fault == "observation":
            obs = obs[:1]
        reward = -jnp.abs(action - obs[0])
        reward = reward if self.fault == "reward" else reward[0]
        done = jnp.float32(obs[-1] >= 10)
        if self.fault == "done":
            done = jnp.array([done, done])
        if self.fault == "state":
            return state.replace(obs=obs, reward=reward, done=done, info={})
        if self.fault == "missing":
            return SimpleNamespace(obs=obs)
        return state.replace(obs=obs, reward=reward, done=done)

def get_environment(name, backend):
    walk = Walk(name)
    return SimpleNamespace(reset=walk.reset, step=walk.step) if name == "size" else walk
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "brax").mkdir()
    (tmp_path / "brax" / "__init__.py").touch()
    (tmp_path / "brax" / "envs.py").write_text(LIBRARY)
    shutil.copy(ROOT / "ppo_continuous.py", tmp_path)
    shutil.copy(ROOT / "benchmarks" / "environments.py", tmp_path)
    return tmp_path


FLAGS = "--num-seeds 2 --num-envs 4 --num-steps 16 --hidden-sizes 8 --num-minibatches 2".split()
FLAGS += "--update-epochs 2 --total-timesteps 12800".split()


@pytest.fixture
def launch(folder, environment):
    """Start the script in its folder; nothing outlives the test."""
    started = []

    def launch(*arguments):
        process = subprocess.Popen(
            [sys.executable, "ppo_continuous.py", *map(str, arguments)],
            cwd=folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield launch
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finish(process):
    _, err = process.communicate(timeout=140)
    return process.returncode, err


def test_a_run_is_stopped_and_resumed_to_the_same_bytes(launch, folder):
    code, err = finish(launch("--env-id", "environments:good-brax", *FLAGS))
    assert code == 0, err
    (whole,) = (folder / "runs").iterdir()
    shutil.move(whole, folder / "whole")
    process = launch("--env-id", "environments:good-brax", *FLAGS)
    deadline = time.monotonic() + 100
    rows = 0
    while rows < 20 and process.poll() is None and time.monotonic() < deadline:
        rows = sum(path.read_bytes().count(b"\n") for path in folder.glob("runs/*/metrics.csv"))
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 128 + signal.SIGTERM
    (cut,) = (folder / "runs").iterdir()
    finished = (folder / "whole" / "metrics.csv").read_bytes()
    assert 0 < (cut / "metrics.csv").stat().st_size < len(finished)
    code, err = finish(launch("--resume", cut.relative_to(folder)))
    assert code == 0, err
    assert (cut / "metrics.csv").read_bytes() == finished
    evaluation = (folder / "whole" / "evaluation.csv").read_bytes()
    assert (cut / "evaluation.csv").read_bytes() == evaluation


@pytest.fixture
def main(folder, monkeypatch, capsys):
    """Call `main` in this process, which costs less: exit code and what it said."""

    def found():
        return [x for x in sys.modules if x.split(".")[0] in ("brax", "environments")]

    for name in found():
        monkeypatch.delitem(sys.modules, name)  # until this fixture ends
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.setitem(sys.modules, "__main__", ppo_continuous)  # where `failure` looks

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["ppo_continuous.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            ppo_continuous.main()
        return end.value.code, capsys.readouterr().err

    yield main
    for name in found():  # those of the folder, for good
        del sys.modules[name]


@pytest.mark.parametrize(
    "fault, code, message",
    [
        ("observation", 2, "an array has another shape than it should"),
        ("size", 2, "SimpleNamespace has no action_size"),
        ("missing", 2, "SimpleNamespace has no reward, no done"),
        ("raises", 1, "the program, or the environment, failed"),
    ],
)
def test_a_broken_environment(fault, code, message, main, folder):
    found, err = main("--env-id", f"environments:{fault}-brax", *FLAGS)
    assert found == code and f"error: {message}" in err, err
    assert ("Traceback" in err) == (fault == "raises")
    if fault == "raises":
        assert "my own mistake" in err and "brax/envs.py" in err
    else:
        assert len(err.splitlines()) == 1, err
    assert not (folder / "runs").exists()


def test_a_missing_library_ends_the_script_with_a_sentence(launch, folder):
    missing = 'raise ModuleNotFoundError("No module named brax", name="brax")'
    (folder / "brax" / "__init__.py").write_text(missing)
    code, err = finish(launch("--env-id", "environments:hopper-brax", *FLAGS))
    sentence = "error: hopper-brax needs brax, but brax is not installed: pip install brax\n"
    assert code == 2 and err == sentence
    assert not (folder / "runs").exists()


# ---- The libraries themselves, where they are installed ----


@pytest.fixture
def installed():
    environments.make.cache_clear()  # of stand-ins
    return environments.make


def at_the_limit(env, n, limit):
    """The first observations, and the results of a later step in which the limit cuts all."""
    keys = jax.random.split(jax.random.key(1), n)
    action = jnp.zeros((n, *env.action_space.shape), env.action_space.dtype)

    def run():
        obs, running = env.reset(keys)
        running, *_ = env.step(keys, running, action)
        running = running._replace(time=jnp.full(n, limit - 1))
        return obs, env.step(keys, running, action)

    return jax.device_get(jax.jit(run)())


def test_brax_itself(installed):
    pytest.importorskip("brax.envs")
    from brax import envs

    env, brax = installed("hopper-brax"), envs.get_environment("hopper", backend="spring")
    obs, results = at_the_limit(env, 4, 1000)
    running, last_obs, reset_obs, _, terminated, truncated = results
    assert truncated.all() and not terminated.any()
    # A hopper stands at 1.25 m, give or take 5 mm, when it begins, and has fallen somewhat then.
    assert (np.abs(reset_obs[:, 1:]) < 0.006).all() and (np.abs(obs[:, 1:]) < 0.006).all()
    assert len(np.unique(reset_obs[:, 0])) == 4
    assert (np.abs(last_obs[:, 5:]) > 0.006).any(axis=1).all()
    # Its own step, from the state that ours ended with, gives what ours gives.
    action = jnp.full((4, 3), 0.5)
    expected = jax.jit(jax.vmap(brax.step))(running.state, action)
    _, found, _, reward, *_ = jax.jit(env.step)(
        jax.random.split(jax.random.key(0), 4), running, action
    )
    np.testing.assert_allclose(found, expected.obs, atol=1e-5)
    np.testing.assert_allclose(reward, expected.reward, atol=1e-4)


@pytest.mark.parametrize(
    "package, name",
    [
        ("brax.envs", "inverted_double_pendulum-brax"),
        ("mujoco_playground", "CartpoleBalance-playground"),
    ],
)
def test_a_library_with_its_seeds_on_two_devices(package, name, folder, environment):
    """The whole command: JAX's default partitioner compiles neither, Orbax saves no empty array."""
    pytest.importorskip(package)
    shutil.rmtree(folder / "brax")  # the stand-in
    command = [sys.executable, "ppo_continuous.py", *FLAGS[:-1], "128"]
    command += ["--env-id", f"environments:{name}"]
    environment = {**environment, "JAX_NUM_CPU_DEVICES": "2"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "on 2 x cpu" in done.stdout, done.stderr


def test_playground_itself(installed):
    pytest.importorskip("mujoco_playground")
    env = installed("CartpoleBalance-playground")
    obs, (_, last_obs, reset_obs, reward, terminated, truncated) = at_the_limit(env, 4, 1000)
    assert truncated.all() and not terminated.any() and obs.shape == (4, 5)
    assert (reward > 0.5).all()  # upright
    assert len(np.unique(reset_obs[:, 0])) == 4 and (last_obs[:, 0] != reset_obs[:, 0]).all()


def test_craftax_itself(installed):
    pytest.importorskip("craftax.craftax_env")
    env = installed("Craftax-Classic-Symbolic")
    obs, (running, _, _, _, terminated, truncated) = at_the_limit(env, 2, 10_000)
    assert obs.shape == (2, 1345) and env.action_space.n == 17
    assert truncated.all() and not terminated.any()
    np.testing.assert_array_equal(running.state.timestep, 0)
    assert len(np.unique(running.state.map, axis=0)) == 2  # two worlds
