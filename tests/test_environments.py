"""benchmarks/environments.py: with stand-ins for the libraries, and with installed libraries."""

import shutil
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax import struct

sys.path.insert(0, str(ROOT / "benchmarks"))

import environments


@struct.dataclass
class State:
    """What Brax and Playground return, with a counter that only a reset sets back."""

    pipeline_state: jax.Array
    obs: jax.Array
    reward: jax.Array
    done: jax.Array
    metrics: dict
    info: dict


class Walk:
    """An episode is a random number, its beginning, and ends after a random number of steps.

    The observation is the beginning, the steps since, and the step in which the episode ends. The
    reward is minus the distance of the action from half of the beginning.
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


def roll(env, n, steps):
    """Random actions: the observations before each step, and its results, as NumPy arrays."""

    def one(carry, key):
        obs, env_state = carry
        action_key, step_key = jax.random.split(key)
        if hasattr(env.action_space, "n"):
            action = jax.random.randint(action_key, (n,), 0, env.action_space.n)
        else:
            action = jax.random.uniform(action_key, (n, 1), minval=-1.0)
        new_obs, state, *results = env.step(jax.random.split(step_key, n), env_state, action)
        return (new_obs, state), (obs, new_obs, state, *results)

    def all_steps(key):
        start = env.reset(jax.random.split(key, n))
        return jax.lax.scan(one, start, jax.random.split(key, steps))[1]

    names = ("obs", "new_obs", "state", "reward", "terminated", "truncated", "next_obs")
    results = jax.device_get(jax.jit(all_steps)(jax.random.key(0)))
    return SimpleNamespace(**dict(zip(names, results, strict=True)))


def beginnings(rollout):
    """First observations of all episodes that followed another."""
    return rollout.new_obs[rollout.terminated | rollout.truncated]


def test_an_episode_ends_with_its_last_observation_and_the_next_begins_with_a_reset():
    rollout = roll(environments.brax_like(Walk(), limit=20), n=32, steps=200)
    done = rollout.terminated | rollout.truncated
    assert rollout.terminated.sum() > 100 and rollout.truncated.sum() > 50
    # s_{t+1} belongs to the episode of s_t, also at its end.
    np.testing.assert_array_equal(rollout.next_obs[..., 0], rollout.obs[..., 0])
    np.testing.assert_array_equal(rollout.next_obs[..., 1], rollout.obs[..., 1] + 1)
    life = rollout.obs[..., 2]
    np.testing.assert_array_equal(rollout.terminated, rollout.next_obs[..., 1] == life)
    cut = (rollout.next_obs[..., 1] == 20) & (life > 20)  # death at the limit is death
    np.testing.assert_array_equal(rollout.truncated, cut)
    # Afterwards everything is as a reset leaves it, also what hides in `info`.
    np.testing.assert_array_equal(rollout.new_obs[~done], rollout.next_obs[~done])
    assert (rollout.new_obs[done][:, 1] == 0).all()
    np.testing.assert_array_equal(rollout.state.time, rollout.new_obs[..., 1])
    leaves = [np.asarray(x, np.float32) for x in rollout.state.state]
    assert any(np.array_equal(x, rollout.new_obs[..., 1]) for x in leaves)  # info["time"]
    assert any(np.array_equal(x, rollout.new_obs[..., 0]) for x in leaves)  # pipeline_state


@pytest.mark.parametrize("walk, limit", [(Walk(16, 40), 1000), (Walk(10**6, 10**6), 20)])
def test_every_episode_begins_in_a_state_of_its_own(walk, limit):
    """Also if all environments are cut in the same step."""
    rollout = roll(environments.brax_like(walk, limit), n=40, steps=200)
    begun = np.concatenate([beginnings(rollout), rollout.obs[0]])
    assert len(begun) > 250 and len(np.unique(begun[:, 0])) == len(begun)
    # Those of `reset`: uniform from -1 to 1.
    np.testing.assert_allclose(
        np.quantile(begun[:, 0], [0.25, 0.5, 0.75]), [-0.5, 0, 0.5], atol=0.2
    )


@pytest.mark.parametrize("n, few", [(33, 3), (4, 1)])
def test_a_step_resets_only_a_share_of_the_environments(n, few):
    stock = roll(environments.brax_like(Walk(1, 3), 1000), n, steps=40).state.stock[0][..., 0]
    changed = stock[1:] != stock[:-1]
    np.testing.assert_array_equal(changed.sum(axis=1), few)
    assert changed[:16].any(axis=0).all()


def test_seeds_do_not_see_each_other():
    env = environments.brax_like(Walk(), limit=20)
    keys = jax.random.split(jax.random.key(0), 3)

    def after_some(key):
        def step(state, key):
            return env.step(jax.random.split(key, 8), state, jnp.ones((8, 1)))[1], None

        return jax.lax.scan(step, env.reset(jax.random.split(key, 8))[1], jax.random.split(key, 50))

    together, alone = jax.jit(jax.vmap(after_some))(keys), jax.jit(after_some)(keys[1])
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[1], y), together, alone)


class Diverging(Walk):
    """The physics diverges in the third step; `says` tells whether the environment notices."""

    def __init__(self, says):
        super().__init__(10**6, 10**6)
        self.says = says

    def step(self, state, action):
        state = super().step(state, action)
        diverged = state.info["time"] >= 3
        nan = lambda x: jnp.where(diverged, jnp.nan, x)
        done = jnp.float32(diverged & self.says)
        return state.replace(obs=nan(state.obs), reward=nan(state.reward), done=done)


def test_a_nan_is_removed_only_if_the_environment_ends_the_episode():
    rollout = roll(environments.brax_like(Diverging(True), limit=1000), n=4, steps=6)
    np.testing.assert_array_equal(rollout.terminated[:, 0], [0, 0, 1, 0, 0, 1])
    assert (rollout.next_obs[2] == 0).all() and (rollout.reward[2] == 0).all()
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


def test_a_state_is_kept_without_its_empty_arrays():
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


class Cave:
    """Craftax's interface: five results of `step`, and a time limit of its own."""

    num_actions = 3

    @struct.dataclass
    class Params:
        max_timesteps: int = 25

    default_params = Params()

    def reset_env(self, key, params):
        return jnp.ones(3), jnp.int32(0)

    def step_env(self, key, time, action, params):
        done = (jax.random.uniform(key) < 0.01) | (time + 1 >= params.max_timesteps)
        return jnp.ones(3), time + 1, jnp.float32(1), done, {}


def test_death_is_told_from_the_time_limit_of_craftax(monkeypatch):
    module = ModuleType("craftax.craftax_env")
    module.make_craftax_env_from_name = lambda name, auto_reset: Cave()
    monkeypatch.setitem(sys.modules, "craftax", ModuleType("craftax"))
    monkeypatch.setitem(sys.modules, "craftax.craftax_env", module)
    rollout = roll(environments.make("Craftax-Classic-Symbolic"), n=32, steps=200)
    assert rollout.truncated.sum() > 100 and rollout.terminated.sum() > 20
    ends = np.flatnonzero((rollout.truncated | rollout.terminated)[:, 0])
    assert np.diff(ends, prepend=-1).max() == 25


BRAX = """
import sys
sys.path.insert(0, {tests!r})
from test_environments import Walk
def get_environment(name, backend):
    return {{"walk": Walk}}[name]()
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with a script, a copy of environments.py, and a stand-in for Brax."""
    (tmp_path / "brax").mkdir()
    (tmp_path / "brax" / "__init__.py").touch()
    (tmp_path / "brax" / "envs.py").write_text(BRAX.format(tests=str(ROOT / "tests")))
    shutil.copy(ROOT / "ppo_continuous.py", tmp_path)
    shutil.copy(ROOT / "benchmarks" / "environments.py", tmp_path)
    return tmp_path


def launch(folder, environment, env_id):
    flags = "--num-seeds 2 --num-envs 4 --num-steps 16 --hidden-sizes 8 --num-minibatches 2"
    command = [sys.executable, "ppo_continuous.py", "--env-id", env_id, *flags.split()]
    command += ["--update-epochs", "2", "--total-timesteps", "640"]
    environment = environment | {"JAX_NUM_CPU_DEVICES": "2"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_script_trains_on_a_copy_of_the_file(folder, environment):
    done = launch(folder, environment, "environments:walk-brax")
    assert done.returncode == 0, done.stderr
    (evaluation,) = folder.glob("runs/*/evaluation.csv")
    lengths = np.genfromtxt(evaluation, delimiter=",", names=True)["episodic_length"]
    assert lengths.min() >= 5 and lengths.max() <= 30 and len(np.unique(lengths)) > 10


@pytest.mark.parametrize("missing", [True, False])
def test_a_wrong_name_and_a_missing_library_end_with_a_sentence(missing, folder, environment):
    name, message = "hopper", "names end in -brax, -playground, -Symbolic"
    if missing:
        name, message = "hopper-brax", "No module named 'brax'"
        error = 'raise ModuleNotFoundError("No module named \'brax\'", name="brax")'
        (folder / "brax" / "__init__.py").write_text(error)
    done = launch(folder, environment, f"environments:{name}")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(folder.glob("runs/*/config.json"))


# ---- The libraries themselves, where they are installed ----


def at_the_limit(env, n, limit):
    """The first observations, and the results of a later step that the limit truncates."""
    keys = jax.random.split(jax.random.key(1), n)
    action = jnp.zeros((n, *env.action_space.shape), env.action_space.dtype)

    def run():
        obs, running = env.reset(keys)
        _, running, *_ = env.step(keys, running, action)
        running = running._replace(time=jnp.full(n, limit - 1))
        return obs, env.step(keys, running, action)

    return jax.device_get(jax.jit(run)())


@pytest.mark.parametrize(
    "package, name, limit, size",
    [
        ("brax.envs", "hopper-brax", 1000, 11),
        ("mujoco_playground", "CartpoleBalance-playground", 1000, 5),
        ("craftax.craftax_env", "Craftax-Classic-Symbolic", 10_000, 1345),
    ],
)
def test_a_library_itself(package, name, limit, size):
    pytest.importorskip(package)
    env = environments.make(name)
    obs, (new_obs, *_, terminated, truncated, next_obs) = at_the_limit(env, 4, limit)
    assert obs.shape == (4, size) and truncated.all() and not terminated.any()
    assert len(np.unique(new_obs, axis=0)) == 4 and (new_obs != next_obs).any(axis=1).all()


def test_a_library_with_seeds_on_two_devices(folder, environment):
    """JAX's default partitioner does not compile Brax, and Orbax saves no empty array."""
    pytest.importorskip("brax.envs")
    shutil.rmtree(folder / "brax")  # the stand-in
    done = launch(folder, environment, "environments:inverted_double_pendulum-brax")
    assert done.returncode == 0, done.stderr
