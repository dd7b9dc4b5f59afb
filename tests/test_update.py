"""One update of each script: the data between its parts, and its metrics, against known values."""

import importlib.util
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Probe
from gymnax.environments import spaces
from jax.flatten_util import ravel_pytree

import ppo_continuous
import ppo_discrete
import ppo_penalty
import trpo

every_script = pytest.mark.parametrize("script", [ppo_discrete, ppo_continuous, ppo_penalty, trpo])
# The code of ppo_continuous is that of ppo_discrete but for the actions (test_shared_code.py).
every_algorithm = pytest.mark.parametrize("script", [ppo_discrete, ppo_penalty, trpo])

PROBES = {
    # Pays 1 in each of ten steps, but a time limit truncates it after five.
    "Cut-test": lambda: Probe(lambda cue, action, time: 1.0, length=10, limit=5),
    # Terminates after five steps, which is also its time limit.
    "EndAndCut-test": lambda: Probe(lambda cue, action, time: 1.0, length=5, limit=5),
}
for name, factory in PROBES.items():
    gymnax.register(name, lambda factory=factory: factory())


def small(script, **fields):
    """A configuration with 64 steps per update."""
    default = dict(num_seeds=2, total_timesteps=3 * 64, num_envs=4, num_steps=16)
    return script.Config(**default | {"hidden_sizes": (8, 8)} | fields)


def started(config, script, key, env=None):
    init, update = script.make_train(config, env)
    return jax.jit(init)(key), update


def still(script, obs):
    """An environment that always shows obs [N, D], never ends, and pays its state [N]."""

    def step(keys, env_state, action):
        never = jnp.zeros(len(obs), bool)
        return obs, env_state, env_state, never, never, obs

    space = spaces.Box(-1.0, 1.0, (1,)) if script is ppo_continuous else spaces.Discrete(2)
    return script.Environment(lambda keys: (obs, jnp.zeros(len(obs))), step, space)


# ---- From the rollout to the advantages ----


@pytest.mark.parametrize("env_id", ["Cut-test", "EndAndCut-test"])
def test_the_arguments_of_gae(env_id, keys, monkeypatch):
    script = ppo_discrete  # the other scripts have the same text up to here (test_shared_code.py)
    seen, gae = [], script.gae
    monkeypatch.setattr(script, "gae", lambda *rows: seen.append(rows) or gae(*rows))
    config = small(script, env_id=env_id, num_steps=15, num_minibatches=1, gamma=0.5)
    config = replace(config, total_timesteps=config.batch_size, normalize_obs=True)
    state, update = started(config, script, keys(1)[0])
    # Observations are [1, time]; these statistics make them [0, (time - 3) / 2], and weigh so much
    # that the update cannot move them far.
    mean, variance, count = jnp.array([1.0, 3.0]), jnp.full(2, 4.0), jnp.asarray(1e6)
    state = state._replace(obs_stats=script.RunningStats(mean, variance, count))
    given = jax.jit(lambda state: (update(state), seen[-1]))(state)[1]
    reward, value, next_value, terminated, done = (np.asarray(rows)[:, 0] for rows in given[:5])
    _, critic = script.make_networks(config, spaces.Discrete(2))
    obs = jnp.stack([jnp.zeros(6), (jnp.arange(6) - 3) / 2], axis=-1)
    expected = np.asarray(critic.apply(state.params["critic"], obs))
    assert np.ptp(expected) > 0.1
    # After the last step, the next value is that of time 5, not that of the first observation.
    np.testing.assert_allclose(value, np.tile(expected[:5], 3), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(next_value, np.tile(expected[1:], 3), rtol=1e-3, atol=1e-5)
    last = [False, False, False, False, True] * 3
    np.testing.assert_array_equal(done, last)
    np.testing.assert_array_equal(terminated, last if env_id == "EndAndCut-test" else [False] * 15)
    # Rewards are divided by the standard deviation of the discounted return, which takes these
    # five values.
    deviation = np.std([1, 1.5, 1.75, 1.875, 1.9375])
    np.testing.assert_allclose(reward, 1 / deviation, rtol=1e-3)
    assert given[5:] == (0.5, config.gae_lambda)


# ---- The optimizer ----


@every_algorithm
def test_the_learning_rate_is_zero_after_the_last_update(script, keys):
    config = small(script, total_timesteps=2 * 64, update_epochs=2, num_minibatches=4)
    state, update = started(config, script, keys(1)[0])
    states, update = [state], jax.jit(update)
    for _ in range(3):
        states.append(update(states[-1])[0])
    critics = [ravel_pytree(x.params["critic"])[0] for x in states]
    assert not np.allclose(critics[1], critics[2], atol=1e-5)
    np.testing.assert_array_equal(critics[2], critics[3])


@pytest.mark.parametrize("script", [ppo_discrete, ppo_penalty])
def test_the_norm_of_the_whole_gradient_is_clipped(script, keys):
    # Adam's first step is lr g / (|g| + ε). With lr = 1 and ε = 1e-5 we can compute g from it.
    one_step = dict(update_epochs=1, num_minibatches=1, learning_rate=1.0, max_grad_norm=1e-5)
    state, update = started(small(script, **one_step), script, keys(1)[0])
    after, _ = jax.jit(update)(state)
    step = np.abs(ravel_pytree(after.params)[0] - ravel_pytree(state.params)[0])
    gradient = 1e-5 * step / (1 - step)
    np.testing.assert_allclose(np.linalg.norm(gradient), 1e-5, rtol=1e-3)
    # The norm is that of both networks together, so neither gradient vanishes.
    size = ravel_pytree(state.params["actor"])[0].size  # the actor comes first
    assert (gradient[:size] > 0).any() and (gradient[size:] > 0).any()


@every_algorithm
def test_every_flag_changes_the_program(script, keys):
    # A flag that nothing reads would not change it.
    trace = lambda config: str(jax.make_jaxpr(partial(script.train, config))(keys(1)[0]))
    config = small(script, num_steps=4, num_minibatches=2, update_epochs=2)
    program = trace(config)
    assert trace(config) == program
    for name, value in vars(config).items():
        if name in ("env_id", "seed", "num_seeds"):
            continue
        if name == "initial_std" and script is not ppo_continuous:  # discrete actions have none
            config = replace(config, env_id="Pendulum-v1")
            program = trace(config)
        if value is None:
            different = 0.5
        elif isinstance(value, bool):
            different = not value
        elif isinstance(value, tuple):
            different = (8, 4)
        elif isinstance(value, float):
            different = value / 2 + 0.07
        else:
            different = "relu" if isinstance(value, str) else 2 * value
        assert trace(replace(config, **{name: different})) != program, name


@pytest.mark.parametrize("script", [ppo_discrete, trpo])
def test_no_noise_is_used_twice(script, keys):
    # The policy hardly changes, so two updates only differ by their noise.
    frozen = dict(max_kl=1e-30) if script is trpo else dict(max_grad_norm=1e-30)
    env_id = "Pendulum-v1" if script is trpo else "CartPole-v1"
    config = small(script, env_id=env_id, num_steps=128, total_timesteps=1024, **frozen)
    config = replace(config, normalize_obs=False)
    N, T = config.num_envs, config.num_steps
    env = script.make_gymnax(config.env_id)

    # A wrapper that writes a diary: all keys, actions and observations, step by step.
    def reset(keys):
        obs, env_state = env.reset(keys)
        page = dict(obs=obs, key=jax.random.key_data(keys))
        page |= dict(action=jnp.zeros((N, *env.action_space.shape), env.action_space.dtype))
        diary = jax.tree.map(lambda x: jnp.zeros((2 * T, *x.shape), x.dtype), page)
        return obs, (env_state, jnp.int32(0), diary)

    def step(keys, env_state, action):
        env_state, time, diary = env_state
        obs, env_state, *rest = env.step(keys, env_state, action)
        page = dict(obs=obs, key=jax.random.key_data(keys), action=action)
        diary = jax.tree.map(lambda pages, page: pages.at[time].set(page), diary, page)
        return obs, (env_state, time + 1, diary), *rest

    init, update = script.make_train(config, script.Environment(reset, step, env.action_space))
    both = lambda key: jax.lax.scan(update, init(key), None, 2)[0].env_state
    _, time, diary = jax.jit(both)(keys(1)[0])
    assert time == 2 * T
    # Each environment gets another key in each step.
    assert len(np.unique(np.reshape(diary["key"], (2 * T * N, -1)), axis=0)) == 2 * T * N
    # No two observations are the same, including the first ones of new episodes.
    assert len(np.unique(np.reshape(diary["obs"], (2 * T * N, -1)), axis=0)) == 2 * T * N
    # Actions are mostly noise, which differs between updates, environments and steps.
    action = np.reshape(diary["action"], (2, T, N)).astype(float)
    assert abs(np.corrcoef(action.reshape(2, -1))[0, 1]) < 0.2
    assert (np.abs(np.corrcoef(action[0].T) - np.eye(N)) < 0.5).all()
    assert np.abs(np.corrcoef(action[0, 1:].ravel(), action[0, :-1].ravel())[0, 1]) < 0.2
    assert (action.std(axis=1) > 0.4).all()


# ---- Metrics ----


@every_script
def test_explained_variance_and_value_loss(script, keys, monkeypatch):
    # V is 1, 2, 3, 4, and the targets are the rewards, which are the state of the environment.
    monkeypatch.setattr(script, "gae", lambda reward, *_: (jnp.zeros_like(reward), reward))
    one_step = dict(num_steps=1, update_epochs=1, num_minibatches=1, total_timesteps=4)
    config = small(script, hidden_sizes=(), normalize_obs=False, normalize_reward=False, **one_step)
    if script in (ppo_discrete, ppo_continuous):  # V is still its old value, so nothing is clipped
        config = replace(config, clip_vloss=True)
    state, update = started(config, script, keys(1)[0], still(script, jnp.arange(1.0, 5)[:, None]))
    critic = {"params": {"Dense_0": {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}}}
    state = state._replace(params=state.params | {"critic": critic})
    update = jax.jit(update)
    metrics = lambda targets: update(state._replace(env_state=targets))[1]
    # The errors 1, 0, -1, 2 have variance 5/4, the targets have variance 3: 1 - 5/12.
    known = metrics(jnp.array([2.0, 2.0, 2.0, 6.0]))
    np.testing.assert_allclose(known["explained_variance"], 7 / 12, rtol=1e-6)
    np.testing.assert_allclose(known["value_loss"], (1 + 0 + 1 + 4) / 4 / 2, rtol=1e-6)
    # Targets without variance leave nothing to explain.
    assert np.isnan(metrics(jnp.full(4, 7.0))["explained_variance"])


@pytest.mark.parametrize("script", [ppo_discrete, ppo_continuous])
def test_the_metrics_of_given_ratios(script, keys, monkeypatch):
    # With a learning rate of 0, π_θ is always π_old. To give log π_θ - log π_old any value, we
    # change the log π_old that the rollout stores.
    transition, given = script.Transition, {}

    def with_another_old_policy(log_prob, **fields):
        return transition(log_prob=log_prob - given["log_ratio"], **fields)

    monkeypatch.setattr(script, "Transition", with_another_old_policy)
    config = small(script, num_envs=256, num_steps=1, total_timesteps=256, update_epochs=6)
    config = replace(config, num_minibatches=8, learning_rate=0.0, target_kl=1.0)
    state, update = started(config, script, keys(1)[0], still(script, jnp.ones((256, 1))))

    @jax.jit
    def measure(log_ratio):
        given["log_ratio"] = log_ratio
        return update(state)[1]

    ratio = np.tile([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0, 1.0], 32)
    metrics = measure(jnp.log(ratio))
    # ρ - 1 - log ρ: 0.193147, 0.025722, 0.020721, 0, 0.016047, 0.019380, 0.306853, 0
    np.testing.assert_allclose(metrics["approx_kl"], 0.581870 / 8, rtol=1e-4)
    # Further than 0.2 from 1 are 0.5, 0.79, 1.21 and 2.
    np.testing.assert_allclose(metrics["clip_fraction"], 0.5, rtol=1e-6)
    assert metrics["stopped"] == 0
    # Small changes: half the mean square of log ρ, 5e-9. In float32, exp(x) - 1 - x would have
    # rounding errors of 6e-8 for x = 1e-4.
    log_ratio = 1e-4 * np.random.default_rng(0).normal(size=256)
    expected = np.mean(np.expm1(log_ratio) - log_ratio)
    assert 4e-9 < expected < 6e-9
    approx_kl = measure(jnp.asarray(log_ratio, jnp.float32))["approx_kl"]
    np.testing.assert_allclose(approx_kl, expected, rtol=0.03)
    # One sample with a large ratio is in one minibatch of each epoch. The first one of these
    # minibatches stops the actor for the rest of the update: for 41 to 48 of 48 minibatches.
    stopped = measure(jnp.zeros(256).at[0].set(np.log(100.0)))["stopped"]
    assert 41 / 48 - 1e-6 < stopped <= 1


# ---- The early stop ----


@pytest.mark.parametrize("script", [ppo_discrete, ppo_penalty])
def test_the_actor_stops_for_the_rest_of_an_update(script, keys):
    limit, kl = "target_kl", "approx_kl"
    if script is ppo_penalty:
        limit, kl = "early_stop_kl", "minibatch_kl"
    config = small(script, update_epochs=6, num_minibatches=1, learning_rate=0.01, anneal_lr=False)
    state, _ = started(config, script, keys(1)[0])
    update = lambda value, state: script.make_train(replace(config, **{limit: value}))[1](state)
    update = jax.jit(update)
    moved = lambda network, new, old: np.abs(
        ravel_pytree(new.params[network])[0] - ravel_pytree(old.params[network])[0]
    ).max()

    # Each epoch is one gradient step. The first step moves the actor by at most the learning rate,
    # because it is Adam's first. The second step measures a KL above the limit: the actor stops.
    # The critic takes all six steps.
    stopped, metrics = update(1e-9, state)
    np.testing.assert_allclose(metrics["stopped"], 5 / 6, rtol=1e-6)
    assert 0.009 < moved("actor", stopped, state) < 0.01001
    assert moved("critic", stopped, state) > 0.03
    # The next update starts again.
    again, metrics = update(1e-9, stopped)
    np.testing.assert_allclose(metrics["stopped"], 5 / 6, rtol=1e-6)
    assert moved("actor", again, stopped) > 0.002
    # Without a limit the actor takes all six steps, and in between it stops near the limit.
    free, metrics = update(np.inf, state)
    assert metrics["stopped"] == 0 and moved("actor", free, state) > 0.03
    _, limited = update(1e-3, state)
    assert 0 < limited["stopped"] < 5 / 6 and 1e-4 < limited[kl] < 0.5 * metrics[kl]


# ---- Structure ----


@every_algorithm
def test_advantages_are_normalised_where_they_are_used(script, keys, monkeypatch):
    shapes, normalize = [], script.normalize_advantage
    record = lambda advantage: shapes.append(advantage.shape) or normalize(advantage)
    monkeypatch.setattr(script, "normalize_advantage", record)
    config = small(script)
    init, update = script.make_train(config)
    jax.eval_shape(update, jax.eval_shape(init, keys(1)[0]))
    # PPO normalises each minibatch; TRPO takes one step and normalises the rollout.
    rollout = (config.num_steps, config.num_envs)
    assert set(shapes) == {rollout if script is trpo else (64 // config.num_minibatches,)}


@every_script
def test_initial_weights(script, keys):
    env_id = "CartPole-v1" if script is ppo_discrete else "PointRobot-misc"  # both have A = 2
    params = script.make_train(small(script, env_id=env_id))[0](keys(1)[0]).params
    for network, of_head in (("actor", 0.01), ("critic", 1.0)):
        layers = dict(params[network]["params"])
        if script is not ppo_discrete and network == "actor":
            np.testing.assert_array_equal(layers.pop("log_std"), [0, 0])
        assert {*layers} == {"Dense_0", "Dense_1", "Dense_2"}
        for i, gain in enumerate((2**0.5, 2**0.5, of_head)):
            singular_values = np.linalg.svd(layers[f"Dense_{i}"]["kernel"], compute_uv=False)
            np.testing.assert_allclose(singular_values, gain, rtol=1e-3)
            assert not layers[f"Dense_{i}"]["bias"].any()


@pytest.mark.parametrize(
    "script, env_id",
    [
        (ppo_discrete, "CartPole-v1"),
        (ppo_discrete, "Asterix-MinAtar"),
        (ppo_continuous, "Reacher-misc"),
        (ppo_penalty, "CartPole-v1"),
        (ppo_penalty, "Pendulum-v1"),
        (trpo, "CartPole-v1"),
        (trpo, "Pendulum-v1"),
    ],
)
def test_an_update_in_a_loop_is_compiled_once(script, env_id):
    # This needs an update to keep the types of the state. The first update may change weak types
    # of gymnax's own state: `jax.lax.scan`, which trains, allows it.
    init, update = script.make_train(small(script, env_id=env_id))
    first = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
    second = jax.eval_shape(lambda state: update(state)[0], first)
    third = jax.eval_shape(lambda state: update(state)[0], second)
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)
    assert types(second) == types(third)
    assert types(first._replace(env_state=None)) == types(second._replace(env_state=None))
    strong = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert strong(first) == strong(second)


@every_script
def test_the_optimizer_can_have_weight_decay(script, keys, tmp_path, monkeypatch):
    # AdamW raises an error if `optimizer.update` does not get the parameters.
    text, adam = Path(script.__file__).read_text(), "optax.adam(learning_rate, eps=1e-5)"
    assert text.count(adam) == 1
    name = f"{script.__name__}_with_weight_decay"
    file = tmp_path / f"{name}.py"
    file.write_text(text.replace(adam, "optax.adamw(learning_rate, eps=1e-5, weight_decay=0.5)"))
    spec = importlib.util.spec_from_file_location(name, file)
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, copy)
    spec.loader.exec_module(copy)

    init, update = copy.make_train(small(copy))
    jax.eval_shape(lambda key: update(init(key)), keys(1)[0])
