"""Environments of Brax, MuJoCo Playground and Craftax for the scripts: adapters, to be copied.

    python ppo_continuous.py --env-id environments:hopper-brax
    python trpo.py --env-id environments:CartpoleBalance-playground
    python ppo_discrete.py --env-id environments:Craftax-Classic-Symbolic

Copy this file beside a script; it needs nothing else of this repository. In the root of the
repository its name is benchmarks.environments:hopper-brax. Install the libraries that you need
(benchmarks/requirements.txt).

An adapter turns a library's environment into two functions of one environment and one key. They
know nothing of time limits and never begin a new episode by themselves:

    reset(key) -> obs, state              step(key, state, action) -> obs, state, reward, terminated

`side_by_side` makes of them what the scripts use: N environments with a time limit.
"""

import contextlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from gymnax.environments import spaces


class Environment(NamedTuple):
    """N environments side by side. The scripts describe it under the same name."""

    reset: Callable  # keys [N] -> obs [N, D], env_state
    # keys [N], env_state, action [N, ...]
    # -> obs [N, D], env_state, reward [N], terminated [N], truncated [N], next_obs [N, D]
    step: Callable
    action_space: Any


class Running(NamedTuple):
    """N environments between two steps."""

    state: Any  # the library's states of the current episodes
    time: jax.Array  # [N] steps of the current episodes
    stock: tuple  # obs and state with which the next episode of each environment will begin
    turn: jax.Array  # number of steps so far, which says whose stock is renewed next


def side_by_side(reset, step, action_space, limit, share=16):
    """N copies of an environment, whose episodes are cut after `limit` steps.

    A reset can cost more than a step, but few steps end an episode. Each environment therefore
    keeps the beginning of its next episode in stock, and each step renews N/share of them, in turn.
    An environment that ends twice within `share` steps can begin twice in the same state; otherwise
    all beginnings differ.
    """

    def begin(key):
        obs, state = reset(key)
        return obs.astype(jnp.float32), state

    def reset_all(keys):
        twice = jax.vmap(jax.random.split)(keys)  # [N, 2]: one to play, one in stock
        beginnings = jax.vmap(jax.vmap(begin))(twice)
        (obs, state), stock = (jax.tree.map(lambda x, i=i: x[:, i], beginnings) for i in (0, 1))
        return obs, Running(state, jnp.zeros(len(keys), jnp.int32), stock, jnp.int32(0))

    def step_all(keys, running, action):
        state, time, stock, turn = running
        keys = jax.vmap(jax.random.split)(keys)
        next_obs, state, reward, terminated = jax.vmap(step)(keys[:, 0], state, action)
        chex.assert_shape([reward, terminated], (len(keys),))
        last = next_obs.astype(jnp.float32), state
        chex.assert_trees_all_equal_shapes_and_dtypes(stock, last)
        truncated = (time + 1 >= limit) & ~terminated
        done = terminated | truncated

        def choose(new, old):
            return jnp.where(done.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

        obs, state = jax.tree.map(choose, stock, last)
        few = -(-len(keys) // share)
        slots = (turn * few + jnp.arange(few)) % len(keys)
        new = jax.vmap(begin)(keys[:few, 1])
        stock = jax.tree.map(lambda old, new: old.at[slots].set(new), stock, new)
        running = Running(state, jnp.where(done, 0, time + 1), stock, turn + 1)
        return obs, running, reward.astype(jnp.float32), terminated, truncated, last[0]

    return Environment(reset_all, step_all, action_space)


def without_empty_arrays(reset, step):
    """The same functions, with the nonempty arrays of the state as a list.

    Orbax cannot save empty arrays, which the states of MuJoCo contain.
    """
    _, state = jax.eval_shape(reset, jax.random.key(0))
    like, structure = jax.tree.flatten(state)

    def pack(obs, state, *others):
        return obs, [x for x in jax.tree.leaves(state) if jnp.size(x)], *others

    def unpack(arrays):
        arrays = iter(arrays)
        leaves = [next(arrays) if x.size else jnp.zeros(x.shape, x.dtype) for x in like]
        return structure.unflatten(leaves)

    return (
        lambda key: pack(*reset(key)),
        lambda key, arrays, action: pack(*step(key, unpack(arrays), action)),
    )


def brax_like(env, limit):
    """An environment with `reset(key) -> State` and `step(State, action) -> State`, unwrapped.

    The libraries' own wrappers restart every episode in the same state, and lose the last
    observation. If there are several observations, policies see the one that is called "state".
    """
    # With several CPU devices, the default partitioner of JAX 0.11 crashes on the loops of both
    # libraries. XLA warns that the other partitioner is old.
    with contextlib.suppress(AttributeError):
        jax.config.update("jax_use_shardy_partitioner", False)

    def observe(state):
        obs = state.obs["state"] if isinstance(state.obs, Mapping) else state.obs
        return obs.ravel()

    def reset(key):
        state = env.reset(key)
        return observe(state), state

    def step(key, state, action):
        state = env.step(state, action)
        terminated = state.done > 0.5
        # Playground terminates an episode whose physics has diverged. Its NaN must not be used.
        clean = lambda x: jnp.where(terminated & ~jnp.isfinite(x), 0.0, x)
        return clean(observe(state)), state, clean(state.reward), terminated

    functions = without_empty_arrays(reset, step)
    return side_by_side(*functions, spaces.Box(-1.0, 1.0, (env.action_size,)), limit)


# ---- The libraries -------------------------------------------------------------------------------


def brax(task):
    """Brax with its fastest physics, and the time limit that Brax trains with."""
    from brax import envs

    return brax_like(envs.get_environment(task, backend="spring"), limit=1000)


def playground(task):
    """MuJoCo Playground, with the physics in JAX. (The alternative, Warp, needs an NVIDIA GPU.)"""
    import warp
    from mujoco_playground import registry

    warp.config.quiet = True
    config = registry.get_default_config(task)
    if config.action_repeat != 1:
        raise ValueError(f"{task} repeats its actions, which this adapter does not support")
    env = registry.load(task, config_overrides={"impl": "jax"})
    return brax_like(env, config.episode_length)


def craftax(task):
    """Craftax. Its own time limit is moved out of reach, so that `done` means death."""
    from craftax.craftax_env import make_craftax_env_from_name

    env = make_craftax_env_from_name(f"{task}-Symbolic-v1", auto_reset=False)
    limit = env.default_params.max_timesteps
    params = env.default_params.replace(max_timesteps=2**30)

    def reset(key):
        return env.reset_env(key, params)

    def step(key, state, action):
        return env.step_env(key, state, action, params)[:4]

    return side_by_side(reset, step, spaces.Discrete(env.num_actions), limit)


ADAPTERS = {"brax": brax, "playground": playground, "Symbolic": craftax}  # by the end of the name


def make(name):
    """The environment of this name. The scripts call this for `--env-id environments:name`."""
    task, _, end = name.rpartition("-")
    if end not in ADAPTERS:
        ends = ", ".join(f"-{end}" for end in ADAPTERS)
        raise KeyError(f"there is no environment {name!r}; names end in {ends}")
    # Libraries compute when they load a model, and Brax warns that it is no longer maintained.
    with jax.ensure_compile_time_eval(), warnings.catch_warnings(action="ignore"):
        return ADAPTERS[end](task)
