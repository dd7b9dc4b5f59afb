"""Environments that are not gymnax's: an `Environment` handed to `train`, and `module:name`."""

import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces

import ppo_continuous
import ppo_discrete
import ppo_penalty
import trpo

SMALL = dict(env_id="nothing of this name", num_envs=4, num_steps=16, hidden_sizes=(8,))


def guess(script):
    """Vectorised: say which of three is seen. Pays 1 for a right answer, ends after two."""

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
        return (
            env_state,
            jnp.where(done[:, None], -jnp.ones(3), obs),
            obs,
            reward,
            done,
            done & False,
        )

    return script.Environment(reset, step, spaces.Discrete(3))


def aim(script):
    """Vectorised: hit (1, 30) in a box of [0, 4] x [-100, 100]. Cut after one step, for ever."""

    def reset(keys):
        return jnp.ones((len(keys), 1)), ()

    def step(keys, env_state, action):
        distance = (action - jnp.array([1.0, 30.0])) / jnp.array([4.0, 200.0])
        obs, yes = jnp.ones((len(keys), 1)), jnp.ones(len(keys), bool)
        return (), obs, obs, -jnp.sum(distance**2, axis=-1), ~yes, yes

    box = spaces.Box(jnp.array([0.0, -100.0]), jnp.array([4.0, 100.0]), (2,))
    return script.Environment(reset, step, box)


def solved(script, env, keys, **fields):
    """Train three seeds on it and play 20 episodes with each: returns, lengths, states."""
    config = script.Config(
        **SMALL | dict(total_timesteps=40_000, num_envs=8, num_steps=32, hidden_sizes=(16,))
    )
    config = replace(config, num_minibatches=4, learning_rate=1e-2, gamma=0.5, **fields)

    def run(key):
        state, _ = script.train(config, key, env)
        return *script.evaluate(config, state, key, 20, env), state

    return config, *jax.device_get(jax.jit(jax.vmap(run))(keys(3)))


@pytest.mark.parametrize("script", [ppo_discrete, ppo_penalty, trpo])
def test_discrete_actions_of_an_environment_of_ones_own(script, keys):
    plain = dict(normalize_reward=False, normalize_obs=False)
    config, returns, lengths, states = solved(script, guess(script), keys, **plain)
    np.testing.assert_array_equal(lengths, 2)
    np.testing.assert_array_equal(returns, 2)
    # Before each of two answers: 1, and 1 + γ. What is seen does not say which, so that V lies
    # between them; and with a bootstrap after the end it would be 1 / (1 - γ) = 2.
    critic = script.Critic(config.hidden_sizes, config.activation)
    value = jax.vmap(lambda params: critic.apply(params, jnp.eye(3)))(states.params["critic"])
    # V = ½ (1 + γV) + ½ · 1 would hold for λ = 0; for λ = 1 it is the mean of 1.5 and 1.
    assert (value > 1.15).all() and (value < 1.45).all()


@pytest.mark.parametrize("script", [ppo_continuous, ppo_penalty, trpo])
def test_continuous_actions_of_an_environment_of_ones_own(script, keys):
    _, returns, lengths, states = solved(script, aim(script), keys)
    np.testing.assert_array_equal(lengths, 1)
    assert (returns > -0.01).all()  # within a tenth of the box; the middle would give -0.0725
    assert states.params["actor"]["params"]["log_std"].shape == (3, 2)


# ---- Wrong shapes ----


@pytest.mark.parametrize(
    "field, wrong",
    [
        ("next_obs", lambda x: x[:, None]),
        ("next_obs", lambda x: x[:, :2]),
        ("reset_obs", lambda x: x[:1]),
        ("reset_obs", lambda x: x.ravel()),
        ("reward", lambda x: x[:, None]),
        ("reward", jnp.sum),
        ("reward", lambda x: x[:1]),
        ("terminated", lambda x: x[:, None]),
        ("terminated", jnp.any),
        ("truncated", lambda x: x[:1]),
    ],
)
@pytest.mark.parametrize("script", [ppo_discrete, ppo_penalty, trpo])
def test_wrong_shapes_are_refused_when_the_program_is_traced(script, field, wrong):
    env = guess(script)
    names = ["env_state", "next_obs", "reset_obs", "reward", "terminated", "truncated"]

    def step(*arguments):
        given = dict(zip(names, env.step(*arguments), strict=True))
        return (given | {field: wrong(given[field])}).values()

    trace = lambda env: jax.eval_shape(
        partial(script.train, script.Config(**SMALL), env=env), jax.random.key(0)
    )
    trace(env)
    with pytest.raises(AssertionError):
        trace(env._replace(step=step))


def test_a_wrong_number_of_environments_is_refused():
    env = guess(ppo_discrete)
    more = lambda keys: env.reset(jnp.concatenate([keys, keys]))
    step = lambda keys, *rest: env.step(jnp.concatenate([keys, keys]), *rest)
    wrong = env._replace(reset=more, step=step)
    with pytest.raises(AssertionError):
        config = ppo_discrete.Config(**SMALL)
        jax.eval_shape(partial(ppo_discrete.train, config, env=wrong), jax.random.key(0))


# ---- Episodes without an end ----


@pytest.mark.parametrize("script", [ppo_discrete, ppo_continuous, ppo_penalty, trpo])
def test_evaluation_cuts_an_endless_episode(script, keys):
    # The first of five environments ends after 3 steps, the others never.
    def reset(keys):
        return jnp.zeros((len(keys), 1)), jnp.zeros(len(keys), jnp.int32)

    def step(keys, time, action):
        obs, time = jnp.zeros((len(keys), 1)), time + 1
        terminated = (jnp.arange(len(keys)) == 0) & (time == 3)
        return time, obs, obs, jnp.full(len(keys), 0.5), terminated, jnp.zeros(len(keys), bool)

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
    step = lambda keys, time, action: (
        time, obs(keys), obs(keys), jnp.float32(action), yes(keys), ~yes(keys))
    return Environment(lambda keys: (obs(keys), ()), step, spaces.Discrete(2))
"""
REGISTERS = """
import gymnax
from gymnax.environments.classic_control import cartpole
gymnax.register("Registered-test", cartpole.CartPole)
"""
FAULTY = "import nothing_of_this_name"
EXITS = "import sys; sys.exit('no licence')"
PAIR = "from gymnax import make"  # which returns an environment of gymnax and its parameters
FLAGS = MAKES.replace("yes(keys), ~yes(keys)", "yes(keys), 0 * yes(keys)")  # an int
GYMNAX = "import gymnax; make = lambda name: gymnax.make(name)[0]"


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Modules in the current folder, which is on no path."""
    monkeypatch.chdir(tmp_path)
    texts = dict(makes_it=MAKES, registers_it=REGISTERS, faulty_one=FAULTY)
    texts |= dict(a_pair=PAIR, of_gymnax=GYMNAX, exits=EXITS, flags_it=FLAGS)
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(sys, "path", [*sys.path])  # `make_env` adds the folder to it
    yield
    for name in texts.keys() - {"registers_it"}:  # what this one has registered stays
        sys.modules.pop(name, None)


def test_a_module_may_make_the_environment(modules, keys):
    config = ppo_discrete.Config(**SMALL | dict(env_id="makes_it:coin-v0", total_timesteps=128))
    state, metrics = jax.jit(partial(ppo_discrete.train, config))(keys(1)[0])
    np.testing.assert_array_equal(state.obs, 3 * np.ones((4, 2)))
    np.testing.assert_array_equal(metrics["episodic_length"], 1)
    returns, lengths = ppo_discrete.evaluate(config, state, keys(1)[0], 3)
    np.testing.assert_array_equal(lengths, 1)
    assert len(np.unique(returns)) == 1 and returns[0] in (0, 1)


def test_a_module_may_register_the_environment(modules, keys):
    env = ppo_discrete.make_env("registers_it:Registered-test")
    obs, _ = env.reset(keys(3))
    assert obs.shape == (3, 4) and env.action_space.n == 2


@pytest.mark.parametrize(
    "env_id, message",
    [
        ("not_there:coin-v0", "there is no module 'not_there'"),
        ("not.there:coin-v0", "there is no module 'not.there'"),
        ("registers_it:Registered-tests", "did you mean Registered-test"),
        (":CartPole", "did you mean CartPole-v1"),
        ("registers_it:Registered-tests", r"module that defines make\(name\) or registers name"),
        ("registers_it.py:Registered-test", r"no module 'registers_it.py', .* \(leave out .py\)"),
        ("./registers_it:Registered-test", "no module './registers_it'"),
    ],
)
def test_what_is_not_there_is_explained(modules, env_id, message):
    with pytest.raises(ppo_discrete.Failure, match=message):
        ppo_discrete.make_env(env_id)


def test_what_fails_in_a_module_is_shown_as_it_is(modules):
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        ppo_discrete.make_env("faulty_one:coin-v0")
    with pytest.raises(LookupError, match="only coin-v0, not coin-v1"):
        ppo_discrete.make_env("makes_it:coin-v1")
    with pytest.raises(RuntimeError, match="exits:coin-v0 cannot be made"):
        ppo_discrete.make_env("exits:coin-v0")


@pytest.mark.parametrize("script", [ppo_discrete, ppo_continuous, ppo_penalty, trpo])
@pytest.mark.parametrize("module, kind", [("a_pair", "tuple"), ("of_gymnax", "CartPole")])
def test_what_a_module_makes_has_to_be_an_environment(modules, script, module, kind):
    with pytest.raises(script.Failure, match=f"of {module} returned a {kind}, not an Environment"):
        script.make_env(f"{module}:CartPole-v1")


@pytest.mark.parametrize("script", [ppo_discrete, ppo_continuous, ppo_penalty, trpo])
@pytest.mark.parametrize(
    "mistake, message",
    [
        (dict(), None),
        (dict(kind=list), None),  # which unpacks as well
        (dict(reset=lambda keys: jnp.zeros((len(keys), 3))), r"reset .* returned float32 \[2, 3\]"),
        (dict(size=()), r"reset .* obs \[N, D\].* returned float32 \[2\], int32 \[2\]"),
        (dict(size=(0,)), r"reset .* returned float32 \[2, 0\], int32 \[2\]"),
        (dict(flag=int), r"step .* terminated \[N\] \(bool\).* int32 \[2\], int32 \[2\]"),
        (dict(order=[1, 0, 2, 3, 4, 5]), r"step .* returned float32 \[2, 3\], int32 \[2\], .*"),
        (dict(order=[0, 1, 2, 3, 4]), r"step .* float32 \[2, 3\], float32 \[2\], bool \[2\]"),
    ],
)
def test_what_an_environment_returns_is_checked(script, mistake, message):
    zeros = lambda keys, *size: jnp.zeros((len(keys), *size))
    size, flag = mistake.get("size", (3,)), mistake.get("flag", bool)

    def reset(keys):
        return zeros(keys, *size), zeros(keys).astype(int)

    def step(keys, time, action):
        obs, end = zeros(keys, *size), zeros(keys).astype(flag)
        result = time + 1, obs, obs, zeros(keys), end, end
        return mistake.get("kind", tuple)(result[i] for i in mistake.get("order", range(6)))

    space = spaces.Box(-1.0, 1.0, (2,)) if script is ppo_continuous else spaces.Discrete(2)
    env = script.Environment(mistake.get("reset", reset), step, space)
    if message is None:
        script.check_environment(env, "own:name")
    else:
        with pytest.raises(script.Failure, match=f"^{message}$"):
            script.check_environment(env, "own:name")


def test_what_a_module_makes_is_checked(modules):
    with pytest.raises(
        ppo_discrete.Failure, match=r"step of flags_it:coin-v0 .* bool \[2\], int32"
    ):
        ppo_discrete.make_env("flags_it:coin-v0")


def test_actions_of_the_other_kind_name_the_other_script(modules):
    with pytest.raises(ppo_continuous.Failure, match=r"coin-v0 .* use ppo_discrete\.py"):
        ppo_continuous.make_env("makes_it:coin-v0")
    with pytest.raises(ppo_discrete.Failure, match=r"Pendulum-v1 .* use ppo_continuous\.py"):
        ppo_discrete.make_env("Pendulum-v1")
