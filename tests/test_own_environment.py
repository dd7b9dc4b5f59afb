"""One's own environment: an `Environment` that is passed to `train`, or `module:name`; and the
algorithm without the command line."""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import QUICK_FLAGS, ROOT, USERS_FLAGS
from gymnax.environments import spaces

import ppo_continuous
import ppo_discrete
import ppo_penalty
import trpo

SCRIPTS = [ppo_discrete, ppo_continuous, ppo_penalty, trpo]
every_script = pytest.mark.parametrize("script", SCRIPTS)
SMALL = dict(env_id="nothing of this name", num_envs=4, num_steps=16, hidden_sizes=(8,))


def guess(script):
    """Pays 1 if the action is the number that is shown, one of three. Ends after two steps."""

    def draw(keys):
        cue = jax.vmap(lambda key: jax.random.randint(key, (), 0, 3))(keys)
        return jax.nn.one_hot(cue, 3), cue

    def reset(keys):
        obs, cue = draw(keys)
        return obs, {"cue": cue, "time": jnp.zeros(len(keys), jnp.int32)}

    def step(keys, env_state, action):
        reward = jnp.float32(action == env_state["cue"])
        obs, cue = draw(keys)
        time = env_state["time"] + 1
        done = time == 2
        env_state = {"cue": cue, "time": jnp.where(done, 0, time)}
        next_obs = jnp.where(done[:, None], -jnp.ones(3), obs)
        return obs, env_state, reward, done, done & False, next_obs

    return script.Environment(reset, step, spaces.Discrete(3))


def aim(script):
    """Pays for actions near (1, 30) in [0, 4] x [-100, 100]. The time limit is one step."""

    def reset(keys):
        return jnp.ones((len(keys), 1)), ()

    def step(keys, env_state, action):
        distance = (action - jnp.array([1.0, 30.0])) / jnp.array([4.0, 200.0])
        obs, yes = jnp.ones((len(keys), 1)), jnp.ones(len(keys), bool)
        return obs, (), -jnp.sum(distance**2, axis=-1), ~yes, yes, obs

    box = spaces.Box(jnp.array([0.0, -100.0]), jnp.array([4.0, 100.0]), (2,))
    return script.Environment(reset, step, box)


def solved(script, env, keys, **fields):
    """Train three seeds and play 20 episodes with each: config, returns, lengths, states."""
    config = script.Config(
        **SMALL | dict(total_timesteps=40_000, num_envs=8, num_steps=32, hidden_sizes=(16,))
    )
    config = replace(config, num_minibatches=4, learning_rate=1e-2, gamma=0.5, **fields)

    def run(key):
        state, _ = script.train(config, key, env)
        return *script.evaluate(config, state, key, 20, env), state

    return config, *jax.device_get(jax.jit(jax.vmap(run))(keys(3)))


def test_discrete_actions_of_an_environment_of_ones_own(keys):
    script, plain = ppo_discrete, dict(normalize_reward=False, normalize_obs=False)
    config, returns, lengths, states = solved(script, guess(script), keys, **plain)
    np.testing.assert_array_equal(lengths, 2)
    np.testing.assert_array_equal(returns, 2)
    # The values are 1 + γ and 1, but the observation does not say which, so V lies between them.
    # With a bootstrap after the end it would be 1 / (1 - γ) = 2.
    _, critic = script.make_networks(config, spaces.Discrete(3))
    value = jax.vmap(lambda params: critic.apply(params, jnp.eye(3)))(states.params["critic"])
    # For λ = 0, V = ½ (1 + γV) + ½ · 1; for λ = 1, V is the mean of 1.5 and 1.
    assert (value > 1.15).all() and (value < 1.45).all()


@pytest.mark.parametrize("script", [ppo_continuous, ppo_penalty])
def test_continuous_actions_of_an_environment_of_ones_own(script, keys):
    _, returns, lengths, states = solved(script, aim(script), keys)
    np.testing.assert_array_equal(lengths, 1)
    assert (returns > -0.01).all()  # within a tenth of the box; the middle would get -0.0725
    assert states.params["actor"]["params"]["log_std"].shape == (3, 2)


# ---- Wrong shapes, and NaN ----


@pytest.mark.parametrize(
    "field, wrong",
    [
        ("obs", lambda x: x[:1]),
        ("obs", lambda x: x.ravel()),
        ("next_obs", lambda x: x[:, None]),
        ("next_obs", lambda x: x[:, :2]),
        ("reward", lambda x: x[:, None]),
        ("reward", jnp.sum),
        ("reward", lambda x: x[:1]),
        ("terminated", lambda x: x[:, None]),
        ("terminated", jnp.any),
        ("truncated", lambda x: x[:1]),
    ],
)
def test_wrong_shapes_are_refused(field, wrong):
    # The other scripts have the same code (test_shared_code.py).
    env, config = guess(ppo_discrete), ppo_discrete.Config(**SMALL)
    names = ["obs", "env_state", "reward", "terminated", "truncated", "next_obs"]

    def step(*arguments):
        given = dict(zip(names, env.step(*arguments), strict=True))
        return (given | {field: wrong(given[field])}).values()

    with pytest.raises(AssertionError):
        init, update = ppo_discrete.make_train(config, env._replace(step=step))
        jax.eval_shape(lambda key: update(init(key)), jax.random.key(0))


def test_a_wrong_number_of_environments_is_refused():
    env, config = guess(ppo_discrete), ppo_discrete.Config(**SMALL)
    more = lambda keys: env.reset(jnp.concatenate([keys, keys]))
    step = lambda keys, *rest: env.step(jnp.concatenate([keys, keys]), *rest)
    with pytest.raises(AssertionError):
        init, update = ppo_discrete.make_train(config, env._replace(reset=more, step=step))
        jax.eval_shape(lambda key: update(init(key)), jax.random.key(0))


@every_script
def test_images_are_refused_with_a_hint(script):
    box = spaces.Box(-1.0, 1.0, (1,))
    reset = lambda keys: (jnp.zeros((len(keys), 8, 8, 3)), ())
    env = script.Environment(reset, None, box if script is ppo_continuous else spaces.Discrete(2))
    init, _ = script.make_train(script.Config(**SMALL), env)
    with pytest.raises(AssertionError, match=r"flat, \[N, D\].*cnn"):
        jax.eval_shape(init, jax.random.key(0))


@every_script
def test_a_terminated_step_may_have_no_next_observation(script, keys):
    env = aim(script) if script is ppo_continuous else guess(script)

    def step(*arguments):
        obs, env_state, reward, terminated, truncated, next_obs = env.step(*arguments)
        terminated, truncated = terminated | truncated, truncated & False
        next_obs = jnp.where(terminated[:, None], jnp.nan, next_obs)
        return obs, env_state, reward, terminated, truncated, next_obs

    config = script.Config(**SMALL | dict(total_timesteps=128), normalize_obs=True)
    state, metrics = jax.jit(lambda key: script.train(config, key, env._replace(step=step)))(
        keys(1)[0]
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.params, state.obs_stats)))
    assert np.isfinite(metrics["value_loss"]).all()


# ---- In subprocesses: double precision, and without the command line ----

POSITIONS = """
import sys
import jax, jax.numpy as jnp, numpy as np
from gymnax.environments import spaces

def make(script, space):  # pays for a position near zero; a time limit truncates after 20 steps
    def reset(keys):
        x = jax.vmap(jax.random.normal)(keys)
        return x[:, None], (x, jnp.zeros(len(keys)))

    def step(keys, state, action):
        x, time = state[0] + 0.2 * (action.reshape(-1) - 1.0), state[1] + 1
        done = time >= 20
        start = jax.tree.map(lambda new, old: jnp.where(done, new, old), reset(keys)[1], (x, time))
        return start[0][:, None], start, -jnp.abs(x), jnp.zeros_like(done), done, x[:, None]

    return script.Environment(reset, step, space)

discrete, box = spaces.Discrete(3), spaces.Box(0.0, 2.0, (1,))
SPACES = {"ppo_discrete": [discrete], "ppo_continuous": [box]}

def run(script, number_of_spaces=2):
    for space in SPACES.get(script.__name__, [discrete, box])[:number_of_spaces]:
        env = make(script, space)
        config = script.Config(num_envs=4, num_steps=32, total_timesteps=256, hidden_sizes=(8,))

        @jax.jit
        def train_and_evaluate(key):
            state, metrics = script.train(config, key, env)
            return state, metrics, script.evaluate(config, state, key, 3, env)

        state, metrics, (returns, lengths) = train_and_evaluate(jax.random.key(0))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
        assert np.isfinite(metrics["value_loss"]).all() and metrics["value_loss"].shape == (2,)
        assert (lengths == 20).all() and np.isfinite(returns).all()
    return state
"""


def run_python(code, folder, environment, **variables):
    variables = environment | dict(XLA_FLAGS=USERS_FLAGS + QUICK_FLAGS) | variables
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_double_precision(environment):
    code = """
import ppo_discrete, ppo_continuous, ppo_penalty, trpo
for script in (ppo_discrete, ppo_continuous, ppo_penalty, trpo):
    state = run(script)
    assert state.env_state[0].dtype == jnp.float64
"""
    run_python(POSITIONS + code, ROOT, environment, JAX_ENABLE_X64="1")


def test_the_algorithm_works_without_the_command_line(tmp_path, environment):
    for script in SCRIPTS:
        name = f"{script.__name__}.py"
        above, _ = (ROOT / name).read_text().split("# ==== The command line.")
        (tmp_path / name).write_text(above)
    check = ["ruff", "check", "--isolated", "--select", "F", "."]
    result = subprocess.run(
        [sys.executable, "-m", *check], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    code = """
for name in ("tyro", "orbax", "tqdm", "matplotlib"):
    sys.modules[name] = None  # importing it raises ImportError
import ppo_discrete, ppo_continuous, ppo_penalty, trpo
for script in (ppo_discrete, ppo_continuous, ppo_penalty, trpo):
    assert not hasattr(script, "main")
    run(script, number_of_spaces=1)
"""
    run_python(POSITIONS + code, tmp_path, environment)


# ---- Episodes that never end ----


@every_script
def test_evaluation_cuts_an_endless_episode(script, keys):
    # The first of five environments ends after 3 steps, the others never.
    def reset(keys):
        return jnp.zeros((len(keys), 1)), jnp.zeros(len(keys), jnp.int32)

    def step(keys, time, action):
        obs, time = jnp.zeros((len(keys), 1)), time + 1
        terminated = (jnp.arange(len(keys)) == 0) & (time == 3)
        never = jnp.zeros(len(keys), bool)
        return obs, time, jnp.full(len(keys), 0.5), terminated, never, obs

    box = spaces.Box(-1.0, 1.0, (1,))
    space = box if script is ppo_continuous else spaces.Discrete(2)
    env = script.Environment(reset, step, space)
    config = script.Config(**SMALL)
    state = script.make_train(config, env)[0](keys(1)[0])
    for most in (7, 2):
        returns, lengths = script.evaluate(config, state, keys(1)[0], 5, env, max_steps=most)
        np.testing.assert_array_equal(lengths, [min(3, most), most, most, most, most])
        np.testing.assert_array_equal(returns, lengths / 2)


# ---- module:name ----

MAKES = """
import jax, jax.numpy as jnp
from gymnax.environments import spaces
from ppo_discrete import Environment

def make(name):
    if name != "coin-v0":
        raise LookupError(f"only coin-v0, not {name}")
    obs = lambda keys: jnp.full((len(keys), 2), 3.0)
    yes = lambda keys: jnp.ones(len(keys), bool)
    step = lambda keys, state, action: (
        obs(keys), state, jnp.float32(action), yes(keys), ~yes(keys), obs(keys))
    return Environment(lambda keys: (obs(keys), ()), step, spaces.Discrete(2))
"""
REGISTERS = """
import gymnax
from gymnax.environments.classic_control import cartpole
gymnax.register("Registered-test", cartpole.CartPole)
"""
FAULTY = "import nothing_of_this_name"


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Modules in the current folder, which is not on sys.path."""
    monkeypatch.chdir(tmp_path)
    texts = dict(makes_it=MAKES, registers_it=REGISTERS, faulty_one=FAULTY)
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(sys, "path", [*sys.path])  # `load_env` adds the folder to it
    yield
    for name in ("makes_it", "faulty_one"):  # the other one has registered its name with gymnax
        sys.modules.pop(name, None)


def test_a_module_may_make_the_environment(modules, keys):
    env = ppo_discrete.load_env("makes_it:coin-v0")
    config = ppo_discrete.Config(**SMALL, total_timesteps=128)
    state, metrics = jax.jit(partial(ppo_discrete.train, config, env=env))(keys(1)[0])
    np.testing.assert_array_equal(state.obs, 3 * np.ones((4, 2)))
    np.testing.assert_array_equal(metrics["episodic_length"], 1)


def test_a_module_may_register_the_environment(modules, keys):
    env = ppo_discrete.load_env("./registers_it:Registered-test")
    obs, _ = env.reset(keys(3))
    assert obs.shape == (3, 4) and env.action_space.n == 2


@pytest.mark.parametrize(
    "env_id, message",
    [
        ("not_there:coin-v0", "cannot make not_there:coin-v0: No module named 'not_there'"),
        ("faulty_one:coin-v0", "No module named 'nothing_of_this_name'"),
        ("makes_it:coin-v1", "only coin-v0, not coin-v1"),
        ("registers_it:Registered-tests", "unknown environment 'Registered-tests'; gymnax has"),
    ],
)
def test_an_environment_that_cannot_be_made(modules, env_id, message):
    with pytest.raises(ppo_discrete.UserError, match=message):
        ppo_discrete.load_env(env_id)
