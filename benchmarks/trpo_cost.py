"""What one TRPO update costs, part by part, in units of one gradient, and against PPO's update.

    python benchmarks/trpo_cost.py [--rounds 15]

All parts work on the same number of transitions, random ones, with the networks of the default
configuration, and are run in turn in one process; printed are the medians of the ratios to the
gradient that was taken next to them. The policy's parts are made of the script's public functions;
the whole updates, which include their rollouts, are the scripts' own.
"""

import argparse
import functools
import os
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo_discrete
import trpo


def policy_parts(config):
    """name -> function without arguments, on B = config.batch_size random CartPole states."""
    env = trpo.make_env(config.env_id)
    actor = trpo.Actor(env.action_space, config.hidden_sizes, config.activation)
    keys = jax.random.split(jax.random.key(0), 4)
    obs = jax.random.normal(keys[0], (config.batch_size, 4))
    theta, unravel = ravel_pytree(actor.init(keys[1], obs))
    advantage = jax.random.normal(keys[2], (config.batch_size,))
    policy_at = lambda theta: actor.apply(unravel(theta), obs)
    action = policy_at(theta).sample(keys[3])

    def surrogate(theta):
        ratio = jnp.exp(policy_at(theta).log_prob(action) - log_prob)
        return trpo.surrogate(ratio, advantage)

    def many_products(theta, v, number):
        product = trpo.fisher_vector_product(policy_at, theta)
        return jax.lax.scan(lambda v, _: (product(v), None), v, None, number)[0]

    def many_hessian_products(theta, v, number):
        old_policy = policy_at(theta)
        kl = lambda theta: old_policy.kl(policy_at(theta)).mean()
        _, product = jax.linearize(jax.grad(kl), theta)
        return jax.lax.scan(lambda v, _: (product(v), None), v, None, number)[0]

    def step(theta, v):
        product = trpo.fisher_vector_product(policy_at, theta)
        return trpo.trust_region_step(product, v, config.max_kl, 0.1, config.cg_iterations)[0]

    def search(theta, v):
        old_policy = policy_at(theta)
        measure = lambda theta: (jnp.abs(surrogate(theta)), old_policy.kl(policy_at(theta)).mean())
        return trpo.line_search(measure, theta, 1e-4 * v, config.max_kl, 10, 0.8)

    log_prob = policy_at(theta).log_prob(action)
    gradient = jax.jit(jax.grad(surrogate))
    v = gradient(theta)
    ten = config.cg_iterations
    parts = {
        "gradient of the surrogate": (gradient, ()),
        "10 Fisher-vector products": (jax.jit(lambda t, v: many_products(t, v, ten)), (v,)),
        "20 Fisher-vector products": (jax.jit(lambda t, v: many_products(t, v, 2 * ten)), (v,)),
        "10 products of the linearised KL gradient": (
            jax.jit(lambda t, v: many_hessian_products(t, v, ten)),
            (v,),
        ),
        "20 products of the linearised KL gradient": (
            jax.jit(lambda t, v: many_hessian_products(t, v, 2 * ten)),
            (v,),
        ),
        "step: 10 iterations of conjugate gradient": (jax.jit(step), (v,)),
        "line search, first try accepted": (jax.jit(search), (v,)),
    }
    return {name: functools.partial(f, theta, *rest) for name, (f, rest) in parts.items()}


def one_update(script, config):
    """A function without arguments that makes the second update of a run."""
    init, update = script.make_train(config)
    state, _ = jax.jit(update)(jax.jit(init)(jax.random.key(0)), None)
    return functools.partial(jax.jit(update), state, None)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    trpo.straight_threefry()  # as on the command line
    config = trpo.Config()
    ppo = ppo_discrete.Config(num_steps=config.num_steps, num_envs=config.num_envs)
    parts = policy_parts(config)
    first = next(iter(parts))
    parts["whole update of TRPO, with its rollout"] = one_update(trpo, config)
    short = replace(config, update_epochs=1, num_minibatches=1)
    parts["the same with one step instead of fitting the critic"] = one_update(trpo, short)
    parts["whole update of ppo_discrete, with its rollout"] = one_update(ppo_discrete, ppo)
    short = replace(ppo, update_epochs=1, num_minibatches=1)
    parts["the same with one step instead of its epochs"] = one_update(ppo_discrete, short)

    repeats = 20
    seconds = {name: [] for name in parts}
    for function in parts.values():
        jax.block_until_ready(function())
    for _ in range(rounds):
        for name, function in parts.items():
            start = time.perf_counter()
            for _ in range(repeats):
                jax.block_until_ready(function())
            seconds[name].append((time.perf_counter() - start) / repeats)
    units = {name: np.median(np.divide(x, seconds[first])) for name, x in seconds.items()}

    print(f"{time.strftime('%Y-%m-%d')}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores,")
    print(f"{platform.machine()}, Python {platform.python_version()}, jax {jax.__version__};")
    print(f"{config.batch_size} transitions of {config.env_id}\n")
    print("| part | ms | in gradients |\n|---|---|---|")
    for name, unit in units.items():
        print(f"| {name} | {1e3 * np.median(seconds[name]):.2f} | {unit:.1f} |")
    for name in ("Fisher-vector products", "products of the linearised KL gradient"):
        one = (units[f"20 {name}"] - units[f"10 {name}"]) / 10
        print(f"\nOne of the {name} costs {one:.2f} gradients.")


if __name__ == "__main__":
    main()
