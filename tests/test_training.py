"""Training as a whole: structure, probe environments with known answers, and independence."""

import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial

import chex
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, Probe, as_shipped
from gymnax.environments import spaces

import ppo_continuous
import ppo_discrete
import ppo_penalty
import trpo
from ppo_discrete import Config, evaluate, make_train, train

DISCRETE = [
    env_id
    for env_id in gymnax.registered_envs
    if env_id
    not in (
        "MNISTBandit-bsuite",  # downloads
        "Pendulum-v1",
        "MountainCarContinuous-v0",
        "PointRobot-misc",
        "Reacher-misc",
        "Swimmer-misc",
    )
    and not env_id.endswith("-test")
]
SMALL = Config(
    num_seeds=2,
    total_timesteps=3 * 64,
    num_envs=4,
    num_steps=16,
    hidden_sizes=(8, 8),
    normalize_obs=True,
)


def plain(tree):
    """PRNG keys as numbers, which can be compared."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def assert_same_bits(a, b):
    chex.assert_trees_all_equal(plain(a), plain(b))


# ---- Structure ----


def test_a_seed_does_not_depend_on_its_neighbours(keys):
    # The same row beside other seeds: the same bits.
    run = as_shipped(jax.vmap(partial(train, SMALL)))
    first, second = run(keys(3)), run(keys(9)[jnp.array([7, 1, 4])])
    row = lambda result: jax.tree.map(lambda x: x[1], result)
    assert_same_bits(row(first), row(second))
    # Alone: the same episodes, and the same numbers up to rounding. (XLA's CPU compiler adds up a
    # row of a batched sum in another order than the same row alone, so bits may differ there.)
    alone = as_shipped(partial(train, SMALL))(keys(3)[1])
    chex.assert_trees_all_close(plain(row(first)), plain(alone), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(first[0].obs[1], alone[0].obs)


def test_segments_equal_one_scan(keys):
    init, update = make_train(SMALL)
    state = as_shipped(init)(keys(1)[0])
    one_update = as_shipped(lambda state: jax.lax.scan(update, state, None, 1), donate_argnums=0)
    metrics = []
    for _ in range(SMALL.num_updates):
        state, segment = one_update(state)
        metrics.append(segment)
    assert one_update._cache_size() == 1, "the state changed its type and update compiled twice"
    metrics = jax.tree.map(lambda *x: jnp.concatenate(x), *metrics)
    assert_same_bits((state, metrics), as_shipped(partial(train, SMALL))(keys(1)[0]))


def test_a_hyperparameter_can_be_vmapped(keys):
    run = lambda lr: train(replace(SMALL, learning_rate=lr), keys(1)[0])[1]["policy_loss"]
    together = jax.jit(jax.vmap(run))(jnp.asarray([1e-3, 1e-2]))
    alone = jax.jit(partial(train, replace(SMALL, learning_rate=1e-2)))(keys(1)[0])
    np.testing.assert_allclose(together[1], alone[1]["policy_loss"], rtol=1e-4, atol=1e-6)
    assert not np.allclose(together[0], together[1])
    floats = [f for f, v in vars(SMALL).items() if isinstance(v, float)]
    for name in floats:  # no Python branch on any of them
        f = lambda x, name=name: train(replace(SMALL, **{name: x}), keys(1)[0])[1]["entropy"]
        jax.eval_shape(jax.vmap(f), jnp.ones(2))


def test_memory_does_not_grow_with_the_budget_and_nothing_calls_the_host(keys):
    def temporary(total_timesteps):
        config = replace(SMALL, total_timesteps=total_timesteps)
        compiled = jax.jit(partial(train, config)).lower(keys(1)[0]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary(64 * 10), temporary(64 * 10_000)
    # The metrics themselves may be held twice: nine floats per update.
    assert large - small < 2 * 9_990 * 9 * 4
    assert "callback" not in str(jax.make_jaxpr(partial(train, SMALL))(keys(1)[0]))


def test_200_vmapped_initialisations_do_not_hang(environment):
    # Batched QR decompositions would, on two cores (jax 0.10): a subprocess, to be able to give up.
    code = (
        "import jax, jax.numpy as jnp, ppo_discrete\n"
        "init = jax.jit(jax.vmap(ppo_discrete.make_train(ppo_discrete.Config())[0]))\n"
        "keys = jax.vmap(jax.random.key)(jnp.arange(16))\n"
        "assert 'lapack' not in init.lower(keys).as_text()\n"
        "for i in range(200):\n"
        "    jax.block_until_ready(init(keys))\n"
    )
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=ROOT, env=environment, timeout=300, check=True)


@pytest.mark.parametrize("env_id", DISCRETE)
def test_every_discrete_environment_trains(env_id, keys):
    config = replace(SMALL, env_id=env_id, total_timesteps=2 * 64)
    state, metrics = jax.jit(partial(train, config))(keys(1)[0])
    assert np.isfinite(metrics["policy_loss"]).all() and np.isfinite(metrics["value_loss"]).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    assert int(state.updates_done) == 2


@pytest.mark.parametrize(
    "env_id, has_weak_types",  # gymnax's own state has, before the first step
    [("CartPole-v1", False), ("MetaMaze-misc", True), ("Asterix-MinAtar", False)],
)
def test_an_update_keeps_the_type_of_the_state(env_id, has_weak_types):
    init, update = ppo_discrete.make_train(ppo_discrete.Config(env_id=env_id))
    before = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
    after = jax.eval_shape(lambda state: update(state, None)[0], before)
    plain = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert plain(before) == plain(after)
    if has_weak_types:
        before, after = before._replace(env_state=None), after._replace(env_state=None)
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)
    assert types(before) == types(after)


def test_a_wrapped_environment_trains(keys):
    # A wrapper that changes `step` only, as sticky actions do: with p = 1 all actions are 0.
    from gymnax.wrappers.purerl import StickyActionWrapper

    probe = gymnax.make("ProbeAction-test")[0]
    if "Sticky-test" not in gymnax.registered_envs:
        gymnax.register("Sticky-test", lambda: StickyActionWrapper(probe, 1.0))
    config = replace(SMALL, env_id="Sticky-test")
    _, metrics = jax.jit(partial(train, config))(keys(1)[0])
    np.testing.assert_array_equal(metrics["episodic_return"], 0.0)


# ---- One update ----


def test_the_first_minibatch_has_ratio_one_and_later_ones_have_not(keys):
    # One epoch of one minibatch: the policy that is updated is still the one that acted, also when
    # the observation statistics have moved on in between (second update).
    config = replace(SMALL, update_epochs=1, num_minibatches=1, learning_rate=1e-2)
    _, metrics = jax.jit(partial(train, config))(keys(1)[0])
    np.testing.assert_array_equal(metrics["clip_fraction"], 0)
    np.testing.assert_allclose(metrics["approx_kl"], 0, atol=1e-6)
    # Mean normalised advantage is 0, so with ratio 1 the surrogate is.
    np.testing.assert_allclose(metrics["policy_loss"], 0, atol=1e-6)
    # log π_old is frozen over the epochs: from the second one on the ratio is not 1.
    config = replace(config, update_epochs=10)
    _, metrics = jax.jit(partial(train, config))(keys(1)[0])
    assert (metrics["approx_kl"] > 1e-4).all() and (metrics["clip_fraction"] > 0).any()


def test_episode_metrics_count_finished_episodes_only(keys):
    # CartPole episodes last at least 8 steps: none ends within 4.
    config = replace(SMALL, num_steps=4, num_envs=16)
    _, metrics = jax.jit(partial(train, config))(keys(1)[0])
    assert np.isnan(metrics["episodic_return"][0]) and np.isnan(metrics["episodic_length"][0])
    # Five rewards of 1 each.
    for env_id in ("ProbeTerminated-test", "ProbeTruncated-test"):
        config = replace(SMALL, env_id=env_id)
        _, metrics = jax.jit(partial(train, config))(keys(1)[0])
        np.testing.assert_array_equal(metrics["episodic_return"], 5)
        np.testing.assert_array_equal(metrics["episodic_length"], 5)


def test_learning_rate_falls_linearly(keys):
    config = replace(SMALL, total_timesteps=4 * 64, learning_rate=0.1)
    metrics = jax.jit(partial(train, config))(keys(1)[0])[1]
    np.testing.assert_allclose(metrics["learning_rate"], [0.1, 0.075, 0.05, 0.025], rtol=1e-6)
    metrics = jax.jit(partial(train, replace(config, anneal_lr=False)))(keys(1)[0])[1]
    np.testing.assert_allclose(metrics["learning_rate"], 0.1, rtol=1e-6)


def test_statistics_are_updated_once_after_each_rollout(keys):
    # Reward 1 five times: the discounted return runs through (1 - γ^k) / (1 - γ), k = 1 ... 5. It
    # is reset after the last step was used; reset before, the last value would be missing.
    config = replace(SMALL, env_id="ProbeTerminated-test", num_steps=20, gamma=0.5)
    init, update = make_train(config)
    state = jax.jit(init)(keys(1)[0])
    after, _ = jax.jit(update)(state, None)
    returns = np.array([1, 1.5, 1.75, 1.875, 1.9375])
    np.testing.assert_allclose(after.return_stats.mean, returns.mean(), rtol=1e-4)
    np.testing.assert_allclose(after.return_stats.var, returns.var(), rtol=1e-4)
    # One set of statistics for all environments, over all of their 20 · 4 observations [1, time].
    assert after.obs_stats.mean.shape == (2,)
    np.testing.assert_allclose(after.obs_stats.count, 80, rtol=1e-4)
    np.testing.assert_allclose(after.obs_stats.mean, [1, 2], rtol=1e-4)
    np.testing.assert_allclose(after.obs_stats.var, [0, 2], atol=1e-4)
    off = replace(config, normalize_obs=False, normalize_reward=False)
    assert make_train(off)[0](keys(1)[0]).obs_stats is None


def test_the_next_observation_is_that_before_the_reset(keys):
    env = ppo_discrete.make_env("ProbeTerminated-test")
    obs, env_state = env.reset(keys(3))
    np.testing.assert_array_equal(obs, [[1, 0]] * 3)
    for time in range(1, 6):  # [cue, time]; the fifth step ends the episode
        env_state, next_obs, reset_obs, reward, terminated, truncated = env.step(
            keys(3), env_state, jnp.zeros(3, int)
        )
        np.testing.assert_array_equal(next_obs, [[1, time]] * 3)
        np.testing.assert_array_equal(reset_obs, [[1, time % 5]] * 3)
        assert (terminated == (time == 5)).all() and not truncated.any() and (reward == 1).all()


# ---- Probe environments: each isolates one part ----

PROBE = Config(
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


def solve(config, keys):
    """Train three seeds; return the values (per seed) of given observations, and the policies."""
    script = sys.modules[type(config).__module__]
    states, _ = jax.jit(jax.vmap(partial(script.train, config)))(keys(3))
    critic = script.Critic(config.hidden_sizes, config.activation)
    actions = 2 if script is ppo_discrete else spaces.Discrete(2)
    actor = script.Actor(actions, config.hidden_sizes, config.activation)

    def value(obs):
        obs = jnp.asarray(obs, jnp.float32)
        return jax.vmap(lambda p: critic.apply(p, obs))(states.params["critic"])

    def probability_of_one(obs):
        obs = jnp.asarray(obs, jnp.float32)
        policy = jax.vmap(lambda p: actor.apply(p, obs))(states.params["actor"])
        return jax.nn.softmax(policy.logits)[..., 1]

    return value, probability_of_one


def test_probe_constant_reward(keys):
    value, _ = solve(replace(PROBE, env_id="ProbeConstant-test"), keys)
    np.testing.assert_allclose(value([1, 0]), 1, atol=0.02)


def test_probe_reward_is_the_observation(keys):
    value, _ = solve(replace(PROBE, env_id="ProbeObservation-test"), keys)
    np.testing.assert_allclose(value([[1, 0], [-1, 0]]), [[1, -1]] * 3, atol=0.05)


def test_probe_delayed_reward_is_discounted(keys):
    value, _ = solve(replace(PROBE, env_id="ProbeDelay-test"), keys)
    np.testing.assert_allclose(value([[1, 0], [1, 1]]), [[0.9, 1]] * 3, atol=0.03)


def test_probe_action_is_learned(keys):
    _, probability = solve(replace(PROBE, env_id="ProbeAction-test"), keys)
    assert (probability([1, 0]) > 0.95).all()


@pytest.mark.parametrize("script", [ppo_discrete, ppo_penalty, trpo], ids=lambda s: s.__name__)
def test_the_entropy_bonus_keeps_the_policy_random(script, keys):
    values = {name: value for name, value in vars(PROBE).items() if hasattr(script.Config, name)}
    config = script.Config(**values | dict(env_id="ProbeAction-test", ent_coef=10.0))
    _, probability = solve(config, keys)
    # The optimum is π ∝ exp(Â / c_2), and with even odds the normalised advantages are ±1.
    np.testing.assert_allclose(probability([1, 0]), 1 / (1 + np.exp(-2 / 10)), atol=0.01)


def test_probe_action_depends_on_the_observation(keys):
    value, probability = solve(replace(PROBE, env_id="ProbeBoth-test"), keys)
    assert (probability([1, 0]) > 0.95).all() and (probability([-1, 0]) < 0.05).all()
    np.testing.assert_allclose(value([[1, 0], [-1, 0]]), 1, atol=0.1)


def test_probe_time_limit_is_bootstrapped(keys):
    # Reward 1 for ever, cut every five steps: V = 1 / (1 - γ) = 10. Without the bootstrap the
    # value of a uniformly random position would be about 2.6.
    value, _ = solve(replace(PROBE, env_id="ProbeTruncated-test", learning_rate=3e-2), keys)
    np.testing.assert_allclose(value([1]), 10, rtol=0.05)


def test_probe_termination_is_not_bootstrapped(keys):
    value, _ = solve(replace(PROBE, env_id="ProbeTerminated-test"), keys)
    finite_sums = [(1 - 0.9 ** (5 - time)) / (1 - 0.9) for time in range(5)]
    np.testing.assert_allclose(
        value([[1, time] for time in range(5)]), [finite_sums] * 3, atol=0.15
    )


# ---- Evaluation ----


def test_evaluation_is_greedy_unscaled_and_of_the_first_episode(keys):
    config = replace(PROBE, env_id="ProbeBoth-test", normalize_obs=True, normalize_reward=True)
    state, _ = jax.jit(partial(train, config))(keys(1)[0])
    returns, lengths = jax.jit(partial(evaluate, config, num_episodes=50))(state, keys(1)[0])
    np.testing.assert_array_equal(returns, 1)
    np.testing.assert_array_equal(lengths, 1)
    config = replace(SMALL, env_id="ProbeTruncated-test")
    state = make_train(config)[0](keys(1)[0])
    returns, lengths = evaluate(config, state, keys(1)[0], 3)
    np.testing.assert_array_equal(returns, [5, 5, 5])
    np.testing.assert_array_equal(lengths, [5, 5, 5])


def test_evaluation_plays_the_mode_of_the_normalised_observation(keys):
    # Even odds, one observation: samples would differ.
    config = replace(PROBE, env_id="ProbeAction-test")
    returns, _ = evaluate(config, make_train(config)[0](keys(1)[0]), keys(1)[0], 50)
    assert len(np.unique(returns)) == 1
    # With these statistics both cues look negative, so that one of them is answered wrongly.
    config = replace(PROBE, env_id="ProbeBoth-test", normalize_obs=True)
    state, _ = jax.jit(partial(train, config))(keys(1)[0])
    shifted = state.obs_stats._replace(mean=jnp.array([3.0, 0.0]), var=jnp.ones(2))
    returns, _ = evaluate(config, state._replace(obs_stats=shifted), keys(1)[0], 50)
    assert 0 < returns.mean() < 1
    # Episodes of different lengths: each counts to its own end.
    returns, lengths = evaluate(SMALL, make_train(SMALL)[0](keys(1)[0]), keys(1)[0], 50)
    assert len(np.unique(lengths)) > 1
    np.testing.assert_array_equal(returns, lengths)


class FirstEpisode(Probe):
    """Pays 1 in the episode that `reset` begins and NaN in those after it; ends at random."""

    def reset(self, key, params=None):
        obs, state = super().reset(key, params)
        return obs, state.replace(cue=jnp.full(1, 2.0))  # those after it begin with a cue of 1

    def step_env(self, key, state, action, params):
        obs, new_state, *_ = super().step_env(key, state, action, params)
        reward = jnp.where(state.cue[0] == 2, 1.0, jnp.nan)
        return obs, new_state.replace(cue=state.cue), reward, jax.random.bernoulli(key), {}


def test_what_follows_an_evaluation_episode_does_not_count(keys):
    gymnax.register("FirstEpisode-test", lambda: FirstEpisode(lambda cue, action, time: 1.0))
    config = replace(SMALL, env_id="FirstEpisode-test")
    returns, lengths = evaluate(config, make_train(config)[0](keys(1)[0]), keys(1)[0], 50)
    assert len(np.unique(lengths)) > 1
    np.testing.assert_array_equal(returns, lengths)


# ---- Configuration ----


def test_defaults_and_presets():
    assert Config().num_updates == 244 and Config().batch_size == 2048
    assert ppo_discrete.default_config("CartPole-v1") == Config(kl_threshold=0.02)
    mountain_car = ppo_discrete.default_config("MountainCar-v0")
    assert mountain_car == Config(env_id="MountainCar-v0", normalize_obs=True)
    minatar = ppo_discrete.default_config("Seaquest-MinAtar")
    assert minatar.num_envs == 64 and minatar.env_id == "Seaquest-MinAtar"
    # What holds for one environment goes before what holds for its family.
    breakout = ppo_discrete.default_config("Breakout-MinAtar")
    assert breakout == replace(
        minatar,
        env_id="Breakout-MinAtar",
        num_envs=128,
        learning_rate=2e-3,
        update_epochs=8,
        ent_coef=0.02,
    )
    for script in (ppo_continuous, ppo_penalty, trpo):
        assert not script.default_config("Swimmer-misc").normalize_obs
        assert script.default_config("Reacher-misc").normalize_obs


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"num_minibatches": 3}, "do not divide into num_minibatches = 3 equal parts"),
        ({"num_minibatches": 2048}, "num_minibatches = 2048"),  # of one transition each
        ({"total_timesteps": 100}, "total_timesteps must be at least .* = 2048"),
        ({"total_timesteps": 2**31}, "total_timesteps must be from more than 0 to 2147483647"),
        ({"update_epochs": 2**21}, r"gradient steps 4093640704 and .* below 2\^31"),
        ({"seed": 2**31 - 8}, r"seed . num_seeds 2147483648 have to be below 2\^31"),
        ({"num_envs": 0}, "num_envs must be from more than 0"),
        ({"num_envs": 4.0}, "num_envs must be of type int, got 4.0"),
        ({"num_envs": True}, "num_envs must be of type int, got True"),
        ({"learning_rate": float("nan")}, "learning_rate must be from more than 0 .* got nan"),
        ({"learning_rate": 0.0}, "learning_rate must be from more than 0"),
        ({"learning_rate": "1e-3"}, "learning_rate must be of type float"),
        ({"kl_threshold": 0.0}, "kl_threshold must be from more than 0"),
        ({"kl_threshold": "no"}, "kl_threshold must be of type float"),
        ({"gamma": 1.5}, "gamma must be from 0 to 1, got 1.5"),
        ({"gae_lambda": -0.1}, "gae_lambda must be from 0 to 1"),
        ({"ent_coef": float("inf")}, "ent_coef must be from 0 to"),
        ({"seed": -1}, "seed must be from 0"),
        ({"anneal_lr": 1}, "anneal_lr must be of type bool"),
        ({"clip_vloss": None}, "clip_vloss must be of type bool"),
        ({"env_id": 7}, "env_id must be of type str"),
        ({"hidden_sizes": (64, 0)}, "hidden_sizes must be from more than 0"),
        ({"hidden_sizes": (64.0,)}, "hidden_sizes must be of type int"),
        ({"hidden_sizes": [64]}, "hidden_sizes must be of type int"),
    ],
)
def test_wrong_values_are_named(wrong, message):
    with pytest.raises(ppo_discrete.Failure, match=message):
        make_train(Config(**wrong))


def test_zeros_and_whole_numbers_that_work_are_accepted():
    zero = dict(seed=0, gamma=0, gae_lambda=0.0, ent_coef=0, vf_coef=0.0)
    ppo_discrete.validate(Config(**zero, learning_rate=1, hidden_sizes=()))


def test_floats_of_numpy_are_floats():
    for rate in (np.float64(0.01), np.float32(0.01)):
        fields = dict(learning_rate=rate, gamma=rate, kl_threshold=rate, total_timesteps=4096)
        jax.eval_shape(partial(train, Config(**fields)), jax.random.key(0))
    # Shapes need Python's integers.
    for name, x in dict(learning_rate=np.float64(-0.01), num_envs=np.int64(4)).items():
        with pytest.raises(ppo_discrete.Failure, match=f"{name} must be .* got"):
            ppo_discrete.validate(Config(**{name: x}))


def test_a_field_of_ones_own_may_be_zero_or_negative_as_its_default_is(monkeypatch):
    @dataclass(frozen=True)
    class Wider(Config):
        log_std_min: float = -5.0
        price: float = 0.0

    monkeypatch.setattr(ppo_discrete, "Config", Wider)
    for fields in ({}, dict(log_std_min=-0.5), dict(log_std_min=0.5, price=2.0)):
        ppo_discrete.validate(Wider(**fields))
    for fields in (dict(price=-1.0), dict(log_std_min=float("nan"))):
        with pytest.raises(ppo_discrete.Failure, match=f"{next(iter(fields))} must be from"):
            ppo_discrete.validate(Wider(**fields))


@pytest.mark.parametrize(
    "env_id, message",
    [("cartpole", "did you mean CartPole-v1"), ("Pendulum-v1", "use ppo_continuous.py")],
)
def test_wrong_environments_are_explained(env_id, message):
    with pytest.raises(ValueError, match=message):
        make_train(Config(env_id=env_id))


def test_observations_of_several_parts_are_refused():
    class Parts(Probe):
        def observation_space(self, params=None):
            return spaces.Dict({"cue": spaces.Discrete(2)})

    gymnax.register("Parts-test", lambda: Parts(lambda cue, action, time: 1.0))
    with pytest.raises(ValueError, match="Parts-test has observations of several parts"):
        make_train(Config(env_id="Parts-test"))


def test_a_failed_download_is_explained(monkeypatch):
    def make(env_id):
        raise OSError("no network")

    monkeypatch.setattr(gymnax, "make", make)
    with pytest.raises(ValueError, match=r"MNISTBandit-bsuite needs data .* no network"):
        ppo_discrete.make_env("MNISTBandit-bsuite")
