"""How fast the scripts are: against bare arithmetic, and by number of seeds.

    python benchmarks/speed.py                               # everything, some ten minutes
    python benchmarks/speed.py --scripts trpo --rounds 3
    python benchmarks/speed.py --seeds 1 64 1024 2048        # on a GPU

First table: how much of the time goes into the network arithmetic that no implementation can avoid.
For each script and setting two programs with the same networks, optimizer and sizes are compiled
and then run in turn, in one process: the script's `train` on its default environment, and the bare
arithmetic: the actor's forward passes step by step, the critic's over the rollout, and what the
update does with the networks, on random data, without environment, advantages, shuffling or random
numbers. Printed: steps per second of both, the median of the ratios of neighbouring runs, and the
time the compiler took (no persistent cache is used unless you set one). If Stable-Baselines3 and
sb3-contrib are installed, they train with the same hyperparameters, too.

Second table: `ppo_discrete.py` with more and more seeds of 4 environments x 128 steps: steps per
second, compile time, and the memory that the compiled program says it needs, per seed.
"""

import argparse
import functools
import importlib
import importlib.util
import os
import platform
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SCRIPTS = ["ppo_discrete", "ppo_continuous", "ppo_penalty", "trpo"]
SETTINGS = {  # name: (seeds, environments, steps, updates)
    "4 x 128": (1, 4, 128, 400),
    "64 x 128": (1, 64, 128, 100),
    "2048 x 10": (1, 2048, 10, 40),
    "16 seeds of 4 x 128": (16, 4, 128, 80),
}


def bare_arithmetic(script, config, key):
    """The network arithmetic of `script.train`, without anything else."""
    is_trpo = script.__name__ == "trpo"
    env = script.make_env(config.env_id)
    obs_size = env.reset(jax.random.split(key, 1))[0].shape[-1]
    actor = env.make_actor(config.hidden_sizes, config.activation)
    critic = script.Critic(config.hidden_sizes, config.activation)
    rollout_key, key = jax.random.split(key)
    shape = (config.num_steps, config.num_envs)
    obs = jax.random.normal(rollout_key, (*shape, obs_size))  # [T, N, D]
    params = {"actor": actor.init(key, obs[0]), "critic": critic.init(key, obs[0])}
    clip = [] if is_trpo else [optax.clip_by_global_norm(config.max_grad_norm)]
    optimizer = optax.flatten(optax.chain(*clip, optax.adam(1e-3, eps=1e-5)))
    trained = lambda params: params["critic"] if is_trpo else params  # by Adam

    def policy_loss(params, obs, target):
        policy = actor.apply(params, obs)
        return jnp.mean(policy.log_prob(jax.lax.stop_gradient(policy.mode())) * target)

    def loss(params, obs, target):
        if is_trpo:
            return jnp.mean((critic.apply(params, obs) - target) ** 2)
        value = critic.apply(params["critic"], obs)
        return policy_loss(params["actor"], obs, target) + jnp.mean((value - target) ** 2)

    def natural_gradient(params, target):
        theta, unravel = ravel_pytree(params)
        policy_at = lambda theta: actor.apply(unravel(theta), obs)
        gradient = jax.grad(lambda theta: policy_loss(unravel(theta), obs, target))(theta)
        product = script.fisher_vector_product(policy_at, theta)
        step, _ = script.trust_region_step(
            product, gradient, config.max_kl, config.cg_damping, config.cg_iterations
        )
        tried = policy_loss(unravel(theta + step), obs, target)  # by the line search
        return unravel(theta + 1e-3 * jnp.tanh(tried) * step)

    def update(carry, _):
        params, opt_state = carry

        def env_step(last, obs):
            # Each step waits for the one before, as it does where an environment stands between.
            policy = actor.apply(params["actor"], obs + 1e-6 * last)
            return policy[0].sum(), None

        last, _ = jax.lax.scan(env_step, jnp.zeros(()), obs)
        value = critic.apply(params["critic"], obs)
        target = value + critic.apply(params["critic"], obs + 1e-6 * last)
        if is_trpo:
            params = {**params, "actor": natural_gradient(params["actor"], target)}
        minibatches = lambda x: x.reshape(config.num_minibatches, -1, *x.shape[2:])
        data = minibatches(obs), minibatches(target)

        def minibatch_step(carry, minibatch):
            params, opt_state = carry
            gradient = jax.grad(loss)(params, *minibatch)
            step, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(params, step), opt_state), None

        def epoch(carry, _):
            return jax.lax.scan(minibatch_step, carry, data)

        carry = (trained(params), opt_state)
        (new, opt_state), _ = jax.lax.scan(epoch, carry, None, config.update_epochs)
        return ({**params, "critic": new} if is_trpo else new, opt_state), None

    carry = (params, optimizer.init(trained(params)))
    return jax.lax.scan(update, carry, None, config.num_updates)[0]


def compiled(function, config, keys):
    """The program for these seeds, and the seconds its compilation took."""
    lowered = jax.jit(jax.vmap(functools.partial(function, config))).lower(keys)
    start = time.perf_counter()
    program = lowered.compile()
    return program, time.perf_counter() - start


def seconds_of(program, *arguments):
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - start


def baseline_program(script, config):
    """The same training by Stable-Baselines3 or sb3-contrib, or None where they are missing."""
    package = "sb3_contrib" if script.__name__ == "trpo" else "stable_baselines3"
    known = script.__name__ in ("ppo_discrete", "ppo_continuous", "trpo")
    if not known or importlib.util.find_spec(package) is None:
        return None
    module = importlib.import_module(package)
    from stable_baselines3.common.env_util import make_vec_env

    common = dict(
        n_steps=config.num_steps,
        batch_size=config.minibatch_size,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        learning_rate=config.learning_rate,
        device="cpu",
    )
    env = make_vec_env(config.env_id, config.num_envs)
    if script.__name__ == "trpo":
        model = module.TRPO(
            "MlpPolicy",
            env,
            n_critic_updates=config.update_epochs,
            target_kl=config.max_kl,
            **common,
        )
    else:
        model = module.PPO("MlpPolicy", env, n_epochs=config.update_epochs, **common)
    return functools.partial(model.learn, 5 * config.batch_size)


def against_bare_arithmetic(scripts, rounds):
    print("| script | setting | steps/s | bare arithmetic | ratio | compile | Stable-Baselines3 |")
    print("|---|---|---|---|---|---|---|")
    for script in map(importlib.import_module, scripts):
        for name, (num_seeds, num_envs, num_steps, num_updates) in SETTINGS.items():
            config = script.Config(
                num_envs=num_envs,
                num_steps=num_steps,
                total_timesteps=num_updates * num_envs * num_steps,
            )
            keys = jax.vmap(jax.random.key)(jnp.arange(num_seeds))
            ours, compile_seconds = compiled(script.train, config, keys)
            bare, _ = compiled(functools.partial(bare_arithmetic, script), config, keys)
            other = baseline_program(script, config) if num_seeds == 1 else None
            times = {"ours": [], "bare": [], "other": []}
            seconds_of(ours, keys), seconds_of(bare, keys)
            for _ in range(rounds):
                times["ours"].append(seconds_of(ours, keys))
                times["bare"].append(seconds_of(bare, keys))
                if other:
                    times["other"].append(seconds_of(other))
            steps = num_seeds * config.num_updates * config.batch_size
            ratio = np.median(np.divide(times["bare"], times["ours"]))
            theirs = 5 * config.batch_size / np.median(times["other"]) if other else None
            print(
                f"| `{script.__name__}` | {name} | {steps / np.median(times['ours']):,.0f} "
                f"| {steps / np.median(times['bare']):,.0f} | {ratio:.2f} "
                f"| {compile_seconds:.1f} s | {f'{theirs:,.0f}' if other else 'not installed'} |",
                flush=True,
            )


def by_number_of_seeds(numbers, rounds):
    script = importlib.import_module("ppo_discrete")
    config = script.Config(num_envs=4, num_steps=128, total_timesteps=10 * 512)
    print("| seeds | steps/s | compile | memory per seed |\n|---|---|---|---|")
    speeds = []
    for number in numbers:
        keys = jax.vmap(jax.random.key)(jnp.arange(number))
        program, compile_seconds = compiled(script.train, config, keys)
        seconds_of(program, keys)
        seconds = np.median([seconds_of(program, keys) for _ in range(rounds)])
        memory = program.memory_analysis()
        total = memory.temp_size_in_bytes + memory.output_size_in_bytes
        speeds.append(number * config.num_updates * config.batch_size / seconds)
        print(
            f"| {number} | {speeds[-1]:,.0f} | {compile_seconds:.1f} s "
            f"| {total / number / 2**20:.2f} MiB |",
            flush=True,
        )
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.loglog(numbers, speeds, "o-")
    axes.set(
        title=f"ppo_discrete.py, CartPole-v1, 4 x 128, {jax.devices()[0].device_kind}",
        xlabel="seeds at once",
        ylabel="environment steps per second",
    )
    axes.grid(alpha=0.3)
    figure.savefig(ROOT / "benchmarks" / "results" / "speed.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scripts", nargs="*", default=SCRIPTS, help="for the first table")
    parser.add_argument(
        "--seeds", nargs="*", type=int, default=[1, 8, 64, 512, 2048], help="for the second table"
    )
    parser.add_argument("--rounds", type=int, default=5, help="runs of each program per setting")
    arguments = parser.parse_args()
    device = jax.devices()[0].device_kind
    print(f"{time.strftime('%Y-%m-%d')}, {device}, {os.cpu_count()} cores, {platform.machine()},")
    print(f"Python {platform.python_version()}, jax {jax.__version__}\n")
    if arguments.scripts:
        against_bare_arithmetic(arguments.scripts, arguments.rounds)
        print()
    if arguments.seeds:
        by_number_of_seeds(arguments.seeds, arguments.rounds)


if __name__ == "__main__":
    main()
