"""One update of each script: what is handed from part to part, against values known by hand."""

from dataclasses import replace
from functools import partial

import chex
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import Probe
from jax.flatten_util import ravel_pytree

import ppo_continuous
import ppo_discrete
import ppo_penalty
import trpo

# ppo_continuous trains as ppo_discrete does, but skips no minibatch (test_shared_code.py).
every_algorithm = pytest.mark.parametrize("script", [ppo_discrete, ppo_penalty, trpo])

PROBES = {
    # Pays 1 in each of ten steps, but is cut after five.
    "Cut-test": lambda: Probe(lambda cue, action, time: 1.0, length=10, limit=5),
    # Ends after five steps, just when it would be cut.
    "EndAndCut-test": lambda: Probe(lambda cue, action, time: 1.0, length=5, limit=5),
}
for name, factory in PROBES.items():
    gymnax.register(name, lambda factory=factory: factory())


def small(script, **fields):
    """A configuration of 64 steps an update."""
    env_id = "Pendulum-v1" if script is ppo_continuous else "CartPole-v1"
    default = dict(env_id=env_id, num_seeds=2, total_timesteps=3 * 64, num_envs=4, num_steps=16)
    return script.Config(**default | {"hidden_sizes": (8, 8)} | fields)


def started(config, script, key):
    init, update = script.make_train(config)
    return jax.jit(init)(key), lambda state: update(state, None)


@pytest.mark.parametrize("env_id", ["Cut-test", "EndAndCut-test"])
def test_what_the_advantages_are_made_of(env_id, keys, monkeypatch):
    script = ppo_discrete  # test_shared_code.py: the others have the same text up to here
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
    critic = script.Critic(config.hidden_sizes, config.activation)
    obs = jnp.stack([jnp.zeros(6), (jnp.arange(6) - 3) / 2], axis=-1)
    expected = np.asarray(critic.apply(state.params["critic"], obs))
    assert np.ptp(expected) > 0.1
    # Also after the last step the next value is that of the time 5, not that of the reset.
    np.testing.assert_allclose(value, np.tile(expected[:5], 3), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(next_value, np.tile(expected[1:], 3), rtol=1e-3, atol=1e-5)
    last = [False, False, False, False, True] * 3
    np.testing.assert_array_equal(done, last)
    np.testing.assert_array_equal(terminated, last if env_id == "EndAndCut-test" else [False] * 15)
    # The discounted return runs through 1, 1.5, 1.75, 1.875, 1.9375: its deviation scales rewards.
    deviation = np.std([1, 1.5, 1.75, 1.875, 1.9375])
    np.testing.assert_allclose(reward, 1 / deviation, rtol=1e-3)
    assert given[5:] == (0.5, config.gae_lambda)


@every_algorithm
def test_adam_follows_the_schedule(script, keys):
    # The second of two updates is one with half the learning rate, which does not fall.
    config = small(script, total_timesteps=2 * 64, learning_rate=1e-2)
    half = replace(config, total_timesteps=64, learning_rate=5e-3, anneal_lr=False)
    state, first = started(config, script, keys(1)[0])
    second = script.make_train(half)[1]

    def both(state):
        state = first(state)[0]
        return state, first(state)[0], second(state, None)[0]

    before, ours, theirs = (
        np.asarray(ravel_pytree(state.params["critic"])[0]) for state in jax.jit(both)(state)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert not np.allclose(ours, before)


@pytest.mark.parametrize("script", [ppo_discrete, ppo_penalty])
def test_the_norm_of_the_whole_gradient_is_clipped(script, keys):
    # Adam's first step is lr g / (|g| + ε), so with lr = 1 the step tells g for ε = 1e-5.
    one_step = dict(update_epochs=1, num_minibatches=1, learning_rate=1.0, max_grad_norm=1e-5)
    state, update = started(small(script, **one_step), script, keys(1)[0])
    after, _ = jax.jit(update)(state)
    step = np.abs(ravel_pytree(after.params)[0] - ravel_pytree(state.params)[0])
    gradient = 1e-5 * step / (1 - step)
    np.testing.assert_allclose(np.linalg.norm(gradient), 1e-5, rtol=1e-3)
    # Both networks share it, in the proportions of their gradients.
    size = ravel_pytree(state.params["actor"])[0].size  # it comes first
    assert (gradient[:size] > 0).any() and (gradient[size:] > 0).any()


@every_algorithm
def test_every_flag_changes_the_program(script, keys):
    # A flag that nothing reads would leave it as it is.
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


def test_value_clipping_is_centred_on_the_old_value(keys):
    # In the first gradient step V is still the old one, and nothing is clipped.
    config = small(ppo_discrete, update_epochs=1, num_minibatches=1, total_timesteps=64)

    def first_loss(config):
        return jax.jit(partial(ppo_discrete.train, config))(keys(1)[0])[1]["value_loss"][0]

    plain, clipped = (first_loss(replace(config, clip_vloss=clip)) for clip in (False, True))
    assert plain > 0.01
    np.testing.assert_allclose(clipped, plain, rtol=1e-6)


@pytest.mark.parametrize("script", [ppo_discrete, ppo_continuous, ppo_penalty, trpo])
def test_no_noise_is_used_twice(script, keys):
    # Nothing is learned, so that what two updates do differs by the noise alone.
    still = dict(max_kl=1e-30) if script is trpo else dict(max_grad_norm=1e-30)
    config = small(script, num_steps=128, total_timesteps=1024, normalize_obs=False, **still)
    N, T = config.num_envs, config.num_steps
    env = script.make_env(config.env_id)

    def reset(keys):
        obs, env_state = env.reset(keys)
        pages = dict(obs=obs, key=jax.random.key_data(keys))
        pages |= dict(action=jnp.zeros((N, *env.action_space.shape), env.action_space.dtype))
        pages = jax.tree.map(lambda x: jnp.zeros((2 * T, *x.shape), x.dtype), pages)
        return obs, (env_state, jnp.int32(0), pages)

    def step(keys, env_state, action):
        env_state, time, pages = env_state
        env_state, next_obs, reset_obs, *rest = env.step(keys, env_state, action)
        page = dict(obs=reset_obs, key=jax.random.key_data(keys), action=action)
        pages = jax.tree.map(lambda pages, page: pages.at[time].set(page), pages, page)
        return (env_state, time + 1, pages), next_obs, reset_obs, *rest

    init, update = script.make_train(config, script.Environment(reset, step, env.action_space))
    both = lambda key: jax.lax.scan(update, init(key), None, 2)[0].env_state
    _, time, diary = jax.jit(both)(keys(1)[0])
    assert time == 2 * T
    # Each environment gets another key in each step.
    assert len(np.unique(np.reshape(diary["key"], (2 * T * N, -1)), axis=0)) == 2 * T * N
    # Poles fall often, and each time the start is drawn anew.
    assert len(np.unique(np.reshape(diary["obs"], (2 * T * N, -1)), axis=0)) == 2 * T * N
    # Actions are little else than noise: that of one update, environment or step is no other's.
    action = np.reshape(diary["action"], (2, T, N)).astype(float)
    assert abs(np.corrcoef(action.reshape(2, -1))[0, 1]) < 0.2
    assert (np.abs(np.corrcoef(action[0].T) - np.eye(N)) < 0.5).all()
    assert np.abs(np.corrcoef(action[0, 1:].ravel(), action[0, :-1].ravel())[0, 1]) < 0.2
    assert (action.std(axis=1) > 0.4).all()


@pytest.mark.parametrize("script", [ppo_penalty, trpo])
def test_the_critic_learns_known_values(script, keys):
    # One reward after two steps: V = γ, then 1. (ppo_discrete: test_training.py)
    config = small(
        script,
        env_id="ProbeDelay-test",
        total_timesteps=40_000,
        num_envs=8,
        num_steps=20,
        num_minibatches=2,
        gamma=0.9,
        learning_rate=1e-2,
        hidden_sizes=(16,),
        normalize_obs=False,
        normalize_reward=False,
    )
    states, _ = jax.jit(jax.vmap(partial(script.train, config)))(keys(3))
    critic = script.Critic(config.hidden_sizes, config.activation)
    obs = jnp.array([[1.0, 0.0], [1.0, 1.0]])
    value = jax.vmap(lambda params: critic.apply(params, obs))(states.params["critic"])
    np.testing.assert_allclose(value, [[0.9, 1.0]] * 3, atol=0.03)


@pytest.mark.parametrize("script", [ppo_discrete, trpo])
def test_explained_variance_of_a_critic_that_knows_nothing(script, keys):
    config = small(script, normalize_reward=False)
    state, update = started(config, script, keys(1)[0])
    nothing = jax.tree.map(jnp.zeros_like, state.params["critic"])
    state = state._replace(params={"actor": state.params["actor"], "critic": nothing})
    _, metrics = jax.jit(update)(state)
    np.testing.assert_allclose(metrics["explained_variance"], 0, atol=1e-6)


@every_algorithm
def test_advantages_are_normalised_where_they_are_used(script, keys, monkeypatch):
    shapes, normalize = [], script.normalize_advantage
    record = lambda advantage: shapes.append(advantage.shape) or normalize(advantage)
    monkeypatch.setattr(script, "normalize_advantage", record)
    config = small(script)
    init, update = script.make_train(config)
    jax.eval_shape(update, jax.eval_shape(init, keys(1)[0]), None)
    # In PPO over a minibatch; in TRPO, which takes one step, over the rollout.
    rollout = (config.num_steps, config.num_envs)
    assert set(shapes) == {rollout if script is trpo else (64 // config.num_minibatches,)}


@pytest.mark.parametrize("script", [ppo_discrete, ppo_continuous, ppo_penalty, trpo])
def test_initial_weights(script, keys):
    env_id = "CartPole-v1" if script is ppo_discrete else "PointRobot-misc"  # two actions, both
    params = script.make_train(small(script, env_id=env_id))[0](keys(1)[0]).params
    for network, of_head in (("actor", 0.01), ("critic", 1.0)):
        layers = dict(params[network]["params"])
        if script is not ppo_discrete and network == "actor":
            np.testing.assert_array_equal(layers.pop("log_std"), [0, 0])
        assert {*layers} == {"Dense_0", "Dense_1", "Dense_2"}  # nothing else depends on the state
        for i, gain in enumerate((2**0.5, 2**0.5, of_head)):
            singular_values = np.linalg.svd(layers[f"Dense_{i}"]["kernel"], compute_uv=False)
            np.testing.assert_allclose(singular_values, gain, rtol=1e-3)
            assert not layers[f"Dense_{i}"]["bias"].any()


@pytest.mark.parametrize("script", [ppo_discrete, ppo_continuous, ppo_penalty, trpo])
def test_updates_run_where_numbers_are_double_by_default(script):
    with jax.enable_x64(True):
        init, update = script.make_train(small(script))
        state = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
        jax.eval_shape(lambda state: jax.lax.scan(update, state, None, 2), state)


# Where gymnax's own state has weak types the second call would trace again: the first update makes
# them strong. (One scan, as `train` and the command line use it, traces once in any case.)
@pytest.mark.parametrize(
    "script, env_id",
    [
        (ppo_discrete, "CartPole-v1"),
        (ppo_discrete, "Asterix-MinAtar"),
        (ppo_continuous, "Reacher-misc"),
        (ppo_penalty, "CartPole-v1"),
        (trpo, "CartPole-v1"),
    ],
)
def test_an_update_in_a_loop_is_traced_once(script, env_id, keys):
    init, update = script.make_train(small(script, env_id=env_id))
    state = jax.jit(init)(keys(1)[0])
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(update, n=1))
    for _ in range(3):
        state, _ = update(state, None)
    assert state.updates_done == 3


@pytest.mark.parametrize("script", [ppo_discrete, ppo_penalty])
def test_the_actor_skips_minibatches_far_from_the_old_policy(script, keys):
    measured = {ppo_discrete: "approx_kl", ppo_penalty: "minibatch_kl"}[script]

    def after(epochs, limit):
        fields = {"kl_threshold": limit, "update_epochs": epochs, "learning_rate": 0.01}
        state, update = started(small(script, num_minibatches=1, **fields), script, keys(1)[0])
        state, metrics = jax.jit(update)(state)
        return state.params, metrics[measured]

    once, free = after(1, 1e-9), after(6, 1.0)
    # Every epoch is one step on all data. After the first one the KL stays above the threshold.
    skipped = after(6, 1e-9)
    chex.assert_trees_all_close(skipped[0]["actor"], once[0]["actor"], atol=1e-6)
    difference = lambda x, y: np.abs(ravel_pytree(x)[0] - ravel_pytree(y)[0]).max()
    assert difference(free[0]["actor"], once[0]["actor"]) > 0.01
    assert difference(skipped[0]["critic"], once[0]["critic"]) > 0.01  # which skips none
    # Without minibatches the actor stops there: the KL stays near the threshold.
    kept = after(6, 1e-3)
    assert 1e-4 < kept[1] < 0.5 * free[1]


@pytest.mark.parametrize("width, vectors", [(64, 1), (128, 0)])
def test_packed_changes_how_an_optimizer_stores_and_not_what_it_does(width, vectors):
    config = small(ppo_discrete, hidden_sizes=(width, width))
    adam = optax.adam(0.1)
    keys = iter(jax.random.split(jax.random.key(0), 4))
    params, gradient = (
        {"a": jax.random.normal(next(keys), (3, 2)), "b": jax.random.normal(next(keys), (5,))}
        for _ in range(2)
    )
    changes = []
    for optimizer in (adam, ppo_discrete.packed(adam, config)):
        _, state = optimizer.update(gradient, optimizer.init(params))
        changes.append(optimizer.update(gradient, state)[0])
        sizes = [x.size for x in jax.tree.leaves(state)]
    chex.assert_trees_all_close(*changes, rtol=1e-6)
    assert sizes.count(11) == 2 * vectors  # both moments of all eleven weights
