"""How much of the time goes into the network arithmetic that no implementation can avoid.

    python benchmarks/speed.py [--script ppo_continuous] [--rounds 7]

For each setting two programs with the same networks, optimizer and sizes are compiled and then run
in turn, in one process: the script's `train` on its default environment, and the bare arithmetic:
the actor's forward passes step by step, the critic's over the rollout, and the forward and backward
pass and the Adam step of every minibatch, on random data, without environment, advantages,
shuffling or random numbers. Printed: steps per second of both, the median of the ratios of
neighbouring runs, and the time the compiler took (no persistent cache is used unless you set one).
"""

import argparse
import functools
import importlib
import os
import platform
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SETTINGS = {  # name: (seeds, environments, steps, updates)
    "4 x 128": (1, 4, 128, 400),
    "64 x 128": (1, 64, 128, 100),
    "2048 x 10": (1, 2048, 10, 40),
    "16 seeds of 4 x 128": (16, 4, 128, 80),
}


def bare_arithmetic(script, config, key):
    """The network arithmetic of `script.train`, without anything else."""
    env = script.make_env(config.env_id)
    obs_size = env.reset(jax.random.split(key, 1))[0].shape[-1]
    actor = script.Actor(env.action_size, config.hidden_sizes, config.activation)
    critic = script.Critic(config.hidden_sizes, config.activation)
    rollout_key, key = jax.random.split(key)
    shape = (config.num_steps, config.num_envs)
    obs = jax.random.normal(rollout_key, (*shape, obs_size))  # [T, N, D]
    params = {"actor": actor.init(key, obs[0]), "critic": critic.init(key, obs[0])}
    optimizer = optax.flatten(
        optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.adam(1e-3, eps=1e-5))
    )

    def loss(params, obs, target):
        policy = actor.apply(params["actor"], obs)
        value = critic.apply(params["critic"], obs)
        action = jax.lax.stop_gradient(policy.mode())
        return jnp.mean(policy.log_prob(action) * target) + jnp.mean((value - target) ** 2)

    def update(carry, _):
        params, opt_state = carry

        def env_step(last, obs):
            # Each step waits for the one before, as it does where an environment stands between.
            policy = actor.apply(params["actor"], obs + 1e-6 * last)
            return policy[0].sum(), None

        last, _ = jax.lax.scan(env_step, jnp.zeros(()), obs)
        value = critic.apply(params["critic"], obs)
        next_value = critic.apply(params["critic"], obs + 1e-6 * last)
        minibatches = lambda x: x.reshape(config.num_minibatches, -1, *x.shape[2:])
        data = minibatches(obs), minibatches(value + next_value)

        def minibatch_step(carry, minibatch):
            params, opt_state = carry
            gradient = jax.grad(loss)(params, *minibatch)
            step, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(params, step), opt_state), None

        def epoch(carry, _):
            return jax.lax.scan(minibatch_step, carry, data)

        return jax.lax.scan(epoch, (params, opt_state), None, config.update_epochs)[0], None

    carry = (params, optimizer.init(params))
    return jax.lax.scan(update, carry, None, config.num_updates)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="runs of each program per setting")
    parser.add_argument("--script", default="ppo_discrete")
    arguments = parser.parse_args()
    script = importlib.import_module(arguments.script)
    device = jax.devices()[0].device_kind
    print(f"{time.strftime('%Y-%m-%d')}, {device}, {os.cpu_count()} cores, {platform.machine()},")
    print(f"Python {platform.python_version()}, jax {jax.__version__}; {arguments.script}.py\n")
    print("| setting | steps/s | bare arithmetic | ratio | compile |\n|---|---|---|---|---|")
    for name, (num_seeds, num_envs, num_steps, num_updates) in SETTINGS.items():
        config = script.Config(
            num_envs=num_envs,
            num_steps=num_steps,
            total_timesteps=num_updates * num_envs * num_steps,
        )
        keys = jax.vmap(jax.random.key)(jnp.arange(num_seeds))
        programs, seconds = {}, {}
        for which, function in (
            ("script", script.train),
            ("bare", functools.partial(bare_arithmetic, script)),
        ):
            run = jax.jit(jax.vmap(functools.partial(function, config))).lower(keys)
            start = time.perf_counter()
            programs[which] = run.compile()
            seconds[f"compile {which}"] = time.perf_counter() - start
            jax.block_until_ready(programs[which](keys))
            seconds[which] = []
        for _ in range(arguments.rounds):
            for which, program in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(program(keys))
                seconds[which].append(time.perf_counter() - start)
        steps = num_seeds * config.num_updates * config.batch_size
        ratio = np.median(np.divide(seconds["bare"], seconds["script"]))
        print(
            f"| {name} | {steps / np.median(seconds['script']):,.0f} "
            f"| {steps / np.median(seconds['bare']):,.0f} | {ratio:.2f} "
            f"| {seconds['compile script']:.1f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
