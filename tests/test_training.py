"""Training as a whole: structure, probe environments with known answers, and independence."""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import chex
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, Probe, as_shipped

import ppo_continuous
import ppo_discrete
import ppo_penalty
import trpo
from ppo_discrete import Config, evaluate, make_train, train

every_script = pytest.mark.parametrize("script", [ppo_discrete, ppo_continuous, ppo_penalty, trpo])
# The code of ppo_continuous is that of ppo_discrete but for the actions (test_shared_code.py).
every_algorithm = pytest.mark.parametrize("script", [ppo_discrete, ppo_penalty, trpo])
SMALL = Config(
    num_seeds=2,
    total_timesteps=3 * 64,
    num_envs=4,
    num_steps=16,
    hidden_sizes=(8, 8),
    normalize_obs=True,
)


def plain(tree):
    """The tree with PRNG keys replaced by their numbers, which can be compared."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def assert_same_bits(a, b):
    chex.assert_trees_all_equal(plain(a), plain(b))


# ---- Structure ----


def test_the_same_bits_with_other_seeds_and_in_segments(keys):
    # A seed beside other seeds has the same bits.
    run = as_shipped(jax.vmap(partial(train, SMALL)))
    first, second = run(keys(3)), run(keys(9)[jnp.array([7, 1, 4])])
    row = lambda result: jax.tree.map(lambda x: x[1], result)
    assert_same_bits(row(first), row(second))
    # A seed alone has the same numbers up to rounding: XLA may add the terms of a sum in another
    # order if it is not batched.
    alone = as_shipped(partial(train, SMALL))(keys(3)[1])
    chex.assert_trees_all_close(plain(row(first)), plain(alone), rtol=1e-4, atol=1e-5)
    # Update by update it has the same bits as in one scan.
    init, update = make_train(SMALL)
    state = as_shipped(init)(keys(3)[1])
    one_update = as_shipped(lambda state: jax.lax.scan(update, state, None, 1), donate_argnums=0)
    metrics = []
    for _ in range(SMALL.num_updates):
        state, segment = one_update(state)
        metrics.append(segment)
    metrics = jax.tree.map(lambda *x: jnp.concatenate(x), *metrics)
    assert_same_bits((state, metrics), alone)


def test_gamma_can_be_vmapped(keys):
    run = jax.jit(lambda gamma: train(replace(SMALL, gamma=gamma), keys(1)[0])[1])
    gammas = jnp.asarray([0.9, 0.99])
    together = jax.jit(jax.vmap(run))(gammas)
    for i, gamma in enumerate(gammas):
        row = jax.tree.map(lambda x, i=i: x[i], together)
        chex.assert_trees_all_close(row, run(gamma), rtol=1e-3, atol=1e-5)
    assert not np.allclose(together["value_loss"][0], together["value_loss"][1], rtol=0.01)


def test_memory_does_not_grow_with_the_budget_and_nothing_calls_the_host(keys):
    def temporary(total_timesteps):
        config = replace(SMALL, total_timesteps=total_timesteps)
        compiled = jax.jit(partial(train, config)).lower(keys(1)[0]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary(64 * 10), temporary(64 * 10_000)
    # The metrics themselves may be held twice: ten floats per update.
    assert large - small < 2 * 9_990 * 10 * 4
    assert "callback" not in str(jax.make_jaxpr(partial(train, SMALL))(keys(1)[0]))


def test_200_vmapped_initialisations_do_not_hang(environment):
    # Batched QR decompositions can deadlock on two cores with jax 0.10. This needs a subprocess,
    # because a hanging computation cannot be stopped.
    code = (
        "import jax, jax.numpy as jnp, ppo_discrete\n"
        "init = jax.jit(jax.vmap(ppo_discrete.make_train(ppo_discrete.Config())[0]))\n"
        "keys = jax.vmap(jax.random.key)(jnp.arange(16))\n"
        "for i in range(200):\n"
        "    jax.block_until_ready(init(keys))\n"
    )
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=ROOT, env=environment, timeout=200, check=True)


@pytest.mark.parametrize("env_id", ["FrozenLake-misc", "Breakout-MinAtar"])
def test_other_environments_train(env_id, keys):
    # The observation is one of n numbers, or an image.
    config = replace(SMALL, env_id=env_id, total_timesteps=2 * 64)
    state, metrics = jax.jit(partial(train, config))(keys(1)[0])
    assert np.isfinite(metrics["policy_loss"]).all() and np.isfinite(metrics["value_loss"]).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_every_environment_of_gymnax_has_the_right_types(keys):
    # Some have observations or rewards of integers. MNISTBandit downloads a data set.
    names = [name for name in gymnax.registered_envs if not name.endswith("-test")]
    assert len(names) > 20
    for name in set(names) - {"MNISTBandit-bsuite"}:
        env = trpo.make_gymnax(name)
        space = env.action_space
        obs, env_state = jax.eval_shape(env.reset, keys(4))
        action = jax.ShapeDtypeStruct((4, *space.shape), space.dtype)
        step = jax.eval_shape(env.step, keys(4), env_state, action)
        next_obs, _, reward, terminated, truncated, last_obs = step
        assert obs.shape == next_obs.shape == last_obs.shape == (4, obs.size // 4), name
        assert obs.dtype == next_obs.dtype == last_obs.dtype == reward.dtype == jnp.float32, name
        assert reward.shape == terminated.shape == truncated.shape == (4,), name
        assert terminated.dtype == truncated.dtype == bool, name


def test_a_wrapped_environment_trains(keys):
    # Sticky actions repeat the last action with probability p. With p = 1 all actions are 0.
    from gymnax.wrappers.purerl import StickyActionWrapper

    probe = gymnax.make("ProbeAction-test")[0]
    if "Sticky-test" not in gymnax.registered_envs:
        gymnax.register("Sticky-test", lambda: StickyActionWrapper(probe, 1.0))
    config = replace(SMALL, env_id="Sticky-test")
    _, metrics = jax.jit(partial(train, config))(keys(1)[0])
    np.testing.assert_array_equal(metrics["episodic_return"], 0.0)


# ---- One update ----


def test_the_first_minibatch_has_ratio_one_and_later_ones_have_not(keys):
    # With one gradient step, π_θ is still π_old. In the second update this needs the statistics of
    # the observations under which the policy acted, not newer ones.
    config = replace(SMALL, update_epochs=1, num_minibatches=1, learning_rate=1e-2)
    config = replace(config, target_kl=None)
    _, metrics = jax.jit(partial(train, config))(keys(1)[0])
    np.testing.assert_array_equal(metrics["clip_fraction"], 0)
    np.testing.assert_allclose(metrics["approx_kl"], 0, atol=1e-6)
    # Normalised advantages have mean 0, so the surrogate is 0 if all ratios are 1.
    np.testing.assert_allclose(metrics["policy_loss"], 0, atol=1e-6)
    # log π_old is frozen over the epochs: from the second epoch on, ratios are not 1.
    config = replace(config, update_epochs=10)
    _, metrics = jax.jit(partial(train, config))(keys(1)[0])
    assert (metrics["approx_kl"] > 1e-4).all() and (metrics["clip_fraction"] > 0).any()


def test_episode_metrics_count_finished_episodes_only(keys):
    # An episode of CartPole lasts at least 8 steps, so none ends within 4.
    config = replace(SMALL, num_steps=4, num_envs=16)
    _, metrics = jax.jit(partial(train, config))(keys(1)[0])
    assert np.isnan(metrics["episodic_return"][0]) and np.isnan(metrics["episodic_length"][0])
    # Five rewards of 1 each.
    _, metrics = jax.jit(partial(train, replace(SMALL, env_id="ProbeTerminated-test")))(keys(1)[0])
    np.testing.assert_array_equal(metrics["episodic_return"], 5)
    np.testing.assert_array_equal(metrics["episodic_length"], 5)


def test_statistics_are_updated_once_after_each_rollout(keys):
    # Reward 1 five times: the discounted return is (1 - γ^k) / (1 - γ) for k = 1 ... 5. It starts
    # again after the last step of an episode, whose value counts.
    config = replace(SMALL, env_id="ProbeTerminated-test", num_steps=20, gamma=0.5)
    init, update = make_train(config)
    state = jax.jit(init)(keys(1)[0])
    after, _ = jax.jit(update)(state)
    returns = np.array([1, 1.5, 1.75, 1.875, 1.9375])
    np.testing.assert_allclose(after.reward_stats.mean, returns.mean(), rtol=1e-4)
    np.testing.assert_allclose(after.reward_stats.var, returns.var(), rtol=1e-4)
    # All 20 · 4 observations [1, time] of all environments share one set of statistics.
    assert after.obs_stats.mean.shape == (2,)
    np.testing.assert_allclose(after.obs_stats.count, 80, rtol=1e-4)
    np.testing.assert_allclose(after.obs_stats.mean, [1, 2], rtol=1e-4)
    np.testing.assert_allclose(after.obs_stats.var, [0, 2], atol=1e-4)
    off = replace(config, normalize_obs=False, normalize_reward=False)
    assert make_train(off)[0](keys(1)[0]).obs_stats is None


def test_the_next_observation_is_the_last_one_of_the_old_episode(keys):
    env = ppo_discrete.make_gymnax("ProbeTerminated-test")
    obs, env_state = env.reset(keys(3))
    np.testing.assert_array_equal(obs, [[1, 0]] * 3)
    for time in range(1, 6):  # [cue, time]; the fifth step ends the episode
        obs, env_state, reward, terminated, truncated, next_obs = env.step(
            keys(3), env_state, jnp.zeros(3, int)
        )
        np.testing.assert_array_equal(next_obs, [[1, time]] * 3)
        np.testing.assert_array_equal(obs, [[1, time % 5]] * 3)
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


def probe(script, **fields):
    """The configuration PROBE for another script."""
    values = {name: value for name, value in vars(PROBE).items() if hasattr(script.Config, name)}
    values.pop("target_kl", None)  # has another meaning in ppo_penalty
    return script.Config(**values | fields)


def solve(config, keys):
    """Train three seeds. Returns V(obs) and π(1|obs), as functions of obs, for each seed."""
    script = sys.modules[type(config).__module__]
    states, _ = jax.jit(jax.vmap(partial(script.train, config)))(keys(3))
    space = script.make_gymnax(config.env_id).action_space
    actor, critic = script.make_networks(config, space)

    def value(obs):
        obs = jnp.asarray(obs, jnp.float32)
        return jax.vmap(lambda p: critic.apply(p, obs))(states.params["critic"])

    def probability_of_one(obs):
        obs = jnp.asarray(obs, jnp.float32)
        policy = jax.vmap(lambda p: actor.apply(p, obs))(states.params["actor"])
        return jax.nn.softmax(policy.logits)[..., 1]

    return value, probability_of_one


def test_probe_reward_is_the_observation(keys):
    value, _ = solve(replace(PROBE, env_id="ProbeObservation-test"), keys)
    np.testing.assert_allclose(value([[1, 0], [-1, 0]]), [[1, -1]] * 3, atol=0.05)


@every_algorithm
def test_probe_delayed_reward_is_discounted(script, keys):
    # One reward after two steps: V = γ, then 1.
    value, _ = solve(probe(script, env_id="ProbeDelay-test"), keys)
    np.testing.assert_allclose(value([[1, 0], [1, 1]]), [[0.9, 1]] * 3, atol=0.03)


@every_algorithm
def test_the_entropy_bonus_keeps_the_policy_random(script, keys):
    _, probability = solve(probe(script, env_id="ProbeAction-test", ent_coef=10.0), keys)
    # The optimum is π ∝ exp(Â / c_2). With even odds the normalised advantages are ±1.
    np.testing.assert_allclose(probability([1, 0]), 1 / (1 + np.exp(-2 / 10)), atol=0.01)


def test_probe_action_depends_on_the_observation(keys):
    value, probability = solve(replace(PROBE, env_id="ProbeBoth-test"), keys)
    assert (probability([1, 0]) > 0.95).all() and (probability([-1, 0]) < 0.05).all()
    np.testing.assert_allclose(value([[1, 0], [-1, 0]]), 1, atol=0.1)


def test_probe_time_limit_is_bootstrapped(keys):
    # Reward 1 for ever, with a time limit of five steps: V = 1 / (1 - γ) = 10. Without the
    # bootstrap, V would be about 2.6.
    value, _ = solve(replace(PROBE, env_id="ProbeTruncated-test", learning_rate=3e-2), keys)
    np.testing.assert_allclose(value([1]), 10, rtol=0.05)


def test_probe_termination_is_not_bootstrapped(keys):
    value, _ = solve(replace(PROBE, env_id="ProbeTerminated-test"), keys)
    finite_sums = [(1 - 0.9 ** (5 - time)) / (1 - 0.9) for time in range(5)]
    np.testing.assert_allclose(
        value([[1, time] for time in range(5)]), [finite_sums] * 3, atol=0.15
    )


# ---- Evaluation ----


def test_evaluation_normalises_observations_but_not_rewards(keys):
    config = replace(PROBE, env_id="ProbeBoth-test", normalize_obs=True, normalize_reward=True)
    state, _ = jax.jit(partial(train, config))(keys(1)[0])
    returns, lengths = jax.jit(partial(evaluate, config, num_episodes=50))(state, keys(1)[0])
    np.testing.assert_array_equal(returns, 1)
    np.testing.assert_array_equal(lengths, 1)
    # With these statistics both cues look negative, so the answer to one of them is wrong.
    shifted = state.obs_stats._replace(mean=jnp.array([3.0, 0.0]), var=jnp.ones(2))
    returns, _ = evaluate(config, state._replace(obs_stats=shifted), keys(1)[0], 50)
    assert 0 < returns.mean() < 1
    config = replace(SMALL, env_id="ProbeTruncated-test")
    state = make_train(config)[0](keys(1)[0])
    returns, lengths = evaluate(config, state, keys(1)[0], 3)
    np.testing.assert_array_equal(returns, [5, 5, 5])
    np.testing.assert_array_equal(lengths, [5, 5, 5])


def test_evaluation_plays_the_mode_until_each_episode_ends(keys):
    # The policy is still random and there is only one observation, so samples would differ.
    config = replace(PROBE, env_id="ProbeAction-test")
    returns, _ = evaluate(config, make_train(config)[0](keys(1)[0]), keys(1)[0], 50)
    assert len(np.unique(returns)) == 1
    # Episodes of different lengths: each counts to its own end.
    returns, lengths = evaluate(SMALL, make_train(SMALL)[0](keys(1)[0]), keys(1)[0], 50)
    assert len(np.unique(lengths)) > 1
    np.testing.assert_array_equal(returns, lengths)


class FirstEpisode(Probe):
    """Pays 1 in its first episode and NaN in all later ones; episodes end at random."""

    def reset(self, key, params=None):
        obs, state = super().reset(key, params)
        return obs, state.replace(cue=jnp.full(1, 2.0))  # later episodes have a cue of 1

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
    assert Config().num_updates == 48 and Config().batch_size == 2048
    for script in (ppo_discrete, ppo_continuous, ppo_penalty, trpo):
        assert script.Config() == script.default_config(script.Config.env_id)
    mountain_car = ppo_discrete.default_config("MountainCar-v0")
    assert mountain_car == Config(env_id="MountainCar-v0", normalize_obs=True)
    minatar = ppo_discrete.default_config("SpaceInvaders-MinAtar")
    assert minatar.num_envs == 64 and minatar.env_id == "SpaceInvaders-MinAtar"
    # The preset of an environment overrides that of its family.
    freeway = dict(env_id="Freeway-MinAtar", gae_lambda=0.8, normalize_obs=False)
    assert ppo_discrete.default_config("Freeway-MinAtar") == replace(minatar, **freeway)
    for script in (ppo_continuous, ppo_penalty, trpo):
        assert not script.default_config("Swimmer-misc").normalize_obs
        assert script.default_config("Reacher-misc").normalize_obs


@every_script
@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"num_minibatches": 3}, "num_minibatches must divide num_envs x num_steps = "),
        ({"num_minibatches": 4096}, "into parts of at least 2"),  # of one transition each
        ({"total_timesteps": 100}, "total_timesteps must be at least num_envs x num_steps = "),
        ({"num_envs": 0}, "num_envs must be between 1 and inf, not 0"),
        ({"update_epochs": -1}, "update_epochs must be between 1 and inf, not -1"),
        ({"seed": -1}, "seed must be between 0 and inf, not -1"),
        ({"learning_rate": float("nan")}, "learning_rate must be between 0 and inf, not nan"),
        ({"ent_coef": -0.1}, "ent_coef must be between 0 and inf, not -0.1"),
        ({"gamma": 1.5}, "gamma must be between 0 and 1, not 1.5"),
        ({"gae_lambda": -0.1}, "gae_lambda must be between 0 and 1, not -0.1"),
        ({"hidden_sizes": (64, 0)}, r"hidden_sizes must be positive, not \(64, 0\)"),
    ],
)
def test_values_that_cannot_work_are_refused(script, wrong, message):
    with pytest.raises(ValueError, match=message):
        script.Config(**wrong)


def test_zeros_and_arrays_that_work_are_accepted():
    zero = dict(seed=0, gamma=0, gae_lambda=0.0, ent_coef=0, vf_coef=0.0)
    assert Config(**zero, learning_rate=1, hidden_sizes=(), target_kl=None).hidden_sizes == ()
    rate = np.float32(0.01)
    fields = dict(learning_rate=rate, gamma=np.float64(0.9), target_kl=rate, total_timesteps=4096)
    jax.eval_shape(partial(train, Config(**fields)), jax.random.key(0))


@every_script
def test_an_unknown_environment_gets_a_list_of_names(script):
    with pytest.raises(LookupError, match=r"unknown environment 'cartpole'.* CartPole-v1, "):
        script.make_train(script.Config(env_id="cartpole"))
