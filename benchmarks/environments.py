"""Environments of Brax, MuJoCo Playground and Craftax for the scripts: adapters, to be copied.

    python ppo_continuous.py --env-id environments:hopper-brax
    python trpo.py --env-id environments:CartpoleBalance-playground
    python ppo_discrete.py --env-id environments:Craftax-Classic-Symbolic

Copy this file beside a script; it needs nothing else of this repository (in whose root it is called
benchmarks.environments:hopper-brax). The libraries are optional: `benchmarks/requirements.txt`.

An adapter turns a library's environment into two functions of one environment and one key, which
know nothing of time limits and never begin a new episode by themselves:

    reset(key) -> obs, state              step(key, state, action) -> obs, state, reward, terminated

`side_by_side` makes of them what the scripts use: N environments, cut by a time limit.
"""

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from gymnax.environments import spaces


class Environment(NamedTuple):
    """N environments side by side, as the scripts describe them under the same name."""

    reset: Callable  # keys [N] -> obs [N, D], env_state
    # keys [N], env_state, action [N, ...] -> env_state, next_obs, reset_obs, reward [N],
    # terminated [N], truncated [N]
    step: Callable
    action_space: Any


def failure(sentence):
    """What ends a script with this sentence and exit code 2; elsewhere it is a ValueError."""
    return getattr(sys.modules["__main__"], "Failure", ValueError)(sentence)


def require(thing, *names):
    """Refuse what has not these attributes."""
    if missing := [name for name in names if not hasattr(thing, name)]:
        raise failure(f"{type(thing).__name__} has no {', no '.join(missing)}")


class Running(NamedTuple):
    """N environments between two steps."""

    state: Any  # the library's, of the current episodes
    time: jax.Array  # [N] steps since they began
    stock: tuple  # obs and state with which each environment's next episode will begin
    waits: jax.Array  # [N] steps since the stock was taken, 0 where it is new


def side_by_side(reset, step, action_space, limit, share=16):
    """N copies of an environment, whose episodes are cut after `limit` steps.

    A reset may cost as much as a step, or much more, and few steps end an episode. Therefore each
    environment has the beginning of its next episode in stock, and a step makes only N/share new
    ones, first for those whose stock was taken longest ago. What is shared is the computation, not
    the states: no two environments begin alike, also if all are cut in the same step. Only one
    that ends again before it got its new one begins where it did before. For that more than
    N/share environments have to end in a step, on average. With share=1 it never happens.
    """

    def begin(key):
        obs, state = reset(key)
        return obs.astype(jnp.float32), state

    def reset_all(keys):
        twice = jax.vmap(jax.random.split)(keys)  # [N, 2]: one to play, one in stock
        beginnings = jax.vmap(jax.vmap(begin))(twice)
        (obs, state), stock = (jax.tree.map(lambda x, i=i: x[:, i], beginnings) for i in (0, 1))
        zeros = jnp.zeros(len(keys), jnp.int32)
        return obs, Running(state, zeros, stock, zeros)

    def step_all(keys, running, action):
        state, time, stock, waits = running
        twice = jax.vmap(jax.random.split)(keys)
        next_obs, state, reward, terminated = jax.vmap(step)(twice[:, 0], state, action)
        chex.assert_shape([reward, terminated], (len(keys),))
        ended = next_obs.astype(jnp.float32), state
        chex.assert_trees_all_equal_shapes_and_dtypes(stock, ended)
        truncated = (time + 1 >= limit) & ~terminated
        done = terminated | truncated

        def choose(new, old):
            return jnp.where(done.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

        reset_obs, state = jax.tree.map(choose, stock, ended)
        waits = jnp.where(done | (waits > 0), waits + 1, 0)
        few = -(-len(keys) // share)
        _, slots = jax.lax.top_k(waits, few)
        new = jax.vmap(begin)(twice[:few, 1])
        stock = jax.tree.map(lambda old, new: old.at[slots].set(new), stock, new)
        running = Running(state, jnp.where(done, 0, time + 1), stock, waits.at[slots].set(0))
        return running, ended[0], reset_obs, reward.astype(jnp.float32), terminated, truncated

    return Environment(reset_all, step_all, action_space)


def without_empty_arrays(reset, step):
    """The same functions, with a state that is a list of the arrays that have elements.

    MuJoCo's states have some without, which Orbax does not save. Other states stay as they are.
    """
    _, state = jax.eval_shape(reset, jax.random.key(0))
    like, structure = jax.tree.flatten(state)
    if all(x.size for x in like):
        return reset, step

    def pack(obs, state, *others):
        return obs, [x for x in jax.tree.leaves(state) if x.size], *others

    def unpack(arrays):
        arrays = iter(arrays)
        leaves = [next(arrays) if x.size else jnp.zeros(x.shape, x.dtype) for x in like]
        return structure.unflatten(leaves)

    def packed_step(key, arrays, action):
        return pack(*step(key, unpack(arrays), action))

    return lambda key: pack(*reset(key)), packed_step


def brax_like(env, limit):
    """An environment with `reset(key) -> State` and `step(State, action) -> State`, unwrapped.

    The libraries' own wrappers end an episode by putting back its first state, and lose the last
    observation. Of observations in several parts, policies see the one that is called "state".
    """
    require(env, "reset", "step", "action_size")
    # With several CPU devices the default partitioner of JAX 0.11 crashes on the loops of both. The
    # one before does not, but XLA prints a line that it is old; on CartPole the bits were the same.
    with contextlib.suppress(AttributeError):
        jax.config.update("jax_use_shardy_partitioner", False)

    def look(state):
        require(state, "obs", "reward", "done")
        obs = state.obs["state"] if isinstance(state.obs, Mapping) else state.obs
        return obs.ravel()

    def reset(key):
        state = env.reset(key)
        return look(state), state

    def step(key, state, action):
        state = env.step(state, action)
        obs = look(state)
        chex.assert_shape([state.reward, state.done], ())
        terminated = state.done > 0.5
        # Playground ends an episode whose physics has diverged; its NaN must not get out.
        clean = lambda x: jnp.where(terminated & ~jnp.isfinite(x), 0.0, x)
        return clean(obs), state, clean(state.reward), terminated

    functions = without_empty_arrays(reset, step)
    return side_by_side(*functions, spaces.Box(-1.0, 1.0, (env.action_size,)), limit)


# ---- The libraries -------------------------------------------------------------------------------


def brax(task):
    """Brax with its fastest physics, and the time limit that its own training has."""
    from brax import envs

    try:
        env = envs.get_environment(task, backend="spring")
    except KeyError:
        raise failure(f"Brax has no environment {task!r}") from None
    return brax_like(env, limit=1000)


def playground(task):
    """MuJoCo Playground. Its physics in JAX runs everywhere; "warp" needs a GPU of NVIDIA's."""
    import warp
    from mujoco_playground import registry

    warp.config.quiet = True
    if task not in registry.ALL_ENVS:
        known = ", ".join(sorted(registry.ALL_ENVS))
        raise failure(f"MuJoCo Playground has no environment {task!r}; {known}")
    config = registry.get_default_config(task)
    if config.action_repeat != 1:
        raise failure(f"{task} repeats actions {config.action_repeat} times: not supported")
    env = registry.load(task, config_overrides={"impl": "jax"})
    return brax_like(env, config.episode_length)


def craftax(task):
    """Craftax, whose own time limit is moved out of reach, so that `done` means death."""
    from craftax.craftax_env import make_craftax_env_from_name

    try:
        env = make_craftax_env_from_name(f"{task}-Symbolic-v1", auto_reset=False)
    except ValueError:
        raise failure(f"Craftax has no environment {task}-Symbolic-v1") from None
    limit = env.default_params.max_timesteps
    params = env.default_params.replace(max_timesteps=2**30)

    def reset(key):
        return env.reset_env(key, params)

    def step(key, state, action):
        return env.step_env(key, state, action, params)[:4]

    return side_by_side(reset, step, spaces.Discrete(env.num_actions), limit)


# The end of a name: its adapter, which gets what stands before, and the package to install.
ADAPTERS = {
    "brax": (brax, "brax"),
    "playground": (playground, "playground"),
    "Symbolic": (craftax, "craftax"),
}


@functools.cache  # a script asks twice, the second time inside of a compiled function
def make(name):
    """The environment of this name: what the scripts call for `--env-id environments:name`."""
    task, _, end = name.rpartition("-")
    if end not in ADAPTERS:
        ends = ", ".join(f"-{end}" for end in ADAPTERS)
        raise failure(f"there is no environment {name!r}: names end in {ends}")
    adapter, package = ADAPTERS[end]
    try:
        # Libraries compute when they load a model, and Brax says that its maintenance has ended.
        with jax.ensure_compile_time_eval(), warnings.catch_warnings(action="ignore"):
            return adapter(task)
    except ModuleNotFoundError as error:
        lacks = f"{error.name} is not installed"
        raise failure(f"{name} needs {package}, but {lacks}: pip install {package}") from None
