"""How fast the scripts are: against bare arithmetic, and by number of seeds.

    python benchmarks/speed.py                              # everything; 20 minutes for `bare`
    python benchmarks/speed.py --tables bare --scripts trpo --rounds 10
    python benchmarks/speed.py --tables bare --scripts ppo_continuous --activation relu
    python benchmarks/speed.py --tables sizes --seeds 1 64 1024 2048     # on a GPU

First table, `bare`: how much of the time goes into the network arithmetic that no implementation
can avoid. For each script and setting two programs with the same networks, optimizer and sizes are
compiled and then run in turn, in one process: the script's `train` on its default environment, and
the bare arithmetic: the actor's forward passes step by step, the critic's over the rollout, and
what the update does with the networks, on random data, without environment, advantages, shuffling
or random numbers. Hyperparameters are those of `Config`, without presets. A run lasts half a second
or so and there are many: on a machine that is busy with other things, two neighbouring short runs
are disturbed alike, two long ones are not. Printed: steps per second of both, the median and the
quartiles of the ratios of neighbouring runs, and the time the compiler took (no persistent cache is
used unless you set one). If Stable-Baselines3 and sb3-contrib are installed, they train with the
same hyperparameters, in the same turns.

Second table, `sizes`: more and more seeds of 4 environments, and one seed with more and more
environments: steps per second, compile time, and memory per seed. It is drawn, too, as
benchmarks/results/speed.png.
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
SB3_ITERATIONS = 1  # rollouts and updates of Stable-Baselines3 per turn
SETTINGS = {  # name: (seeds, environments, steps, updates)
    "4 x 128": (1, 4, 128, 40),
    "64 x 128": (1, 64, 128, 6),
    "2048 x 10": (1, 2048, 10, 3),
    "16 seeds of 4 x 128": (16, 4, 128, 6),
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


def baseline_run(script, config):
    """The same training by Stable-Baselines3 or sb3-contrib, or None without such a thing.

    Returns a function that trains for SB3_ITERATIONS rollouts. Its vectorised environment is
    Gymnasium's of the same name; observations and rewards are normalised as the script does.
    """
    classes = {"ppo_discrete": "PPO", "ppo_continuous": "PPO", "trpo": "TRPO"}
    package = "sb3_contrib" if script.__name__ == "trpo" else "stable_baselines3"
    if script.__name__ not in classes or importlib.util.find_spec(package) is None:
        return None
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    env = VecNormalize(make_vec_env(config.env_id, config.num_envs), gamma=config.gamma)
    options = dict(
        n_steps=config.num_steps,
        batch_size=config.minibatch_size,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        learning_rate=config.learning_rate,  # of the critic in TRPO
        device="cpu",  # as SB3 advises for small networks
    )
    if script.__name__ == "trpo":
        options |= dict(
            n_critic_updates=config.update_epochs,
            target_kl=config.max_kl,
            cg_max_steps=config.cg_iterations,
            cg_damping=config.cg_damping,
        )
    else:
        options |= dict(
            n_epochs=config.update_epochs,
            clip_range=config.clip_eps,
            max_grad_norm=config.max_grad_norm,
            vf_coef=config.vf_coef,
            ent_coef=config.ent_coef,
        )
    algorithm = getattr(importlib.import_module(package), classes[script.__name__])
    model = algorithm("MlpPolicy", env, **options)
    return functools.partial(model.learn, SB3_ITERATIONS * config.batch_size)


def against_bare_arithmetic(scripts, rounds, activation):
    print("| script | setting | steps/s | bare arithmetic | ratio | compile | Stable-Baselines3 |")
    print("|---|---|---|---|---|---|---|")
    for script in map(importlib.import_module, scripts):
        for name, (num_seeds, num_envs, num_steps, num_updates) in SETTINGS.items():
            config = script.Config(
                num_envs=num_envs,
                num_steps=num_steps,
                total_timesteps=num_updates * num_envs * num_steps,
                activation=activation,
            )
            keys = jax.vmap(jax.random.key)(jnp.arange(num_seeds))
            ours, compile_seconds = compiled(script.train, config, keys)
            bare, _ = compiled(functools.partial(bare_arithmetic, script), config, keys)
            comparable = num_seeds == 1 and activation == "tanh"  # as "MlpPolicy" has
            other = baseline_run(script, config) if comparable else None
            times = {"ours": [], "bare": [], "other": []}
            seconds_of(ours, keys), seconds_of(bare, keys)
            for _ in range(rounds):
                times["ours"].append(seconds_of(ours, keys))
                times["bare"].append(seconds_of(bare, keys))
                if other:
                    times["other"].append(seconds_of(other))
            steps = num_seeds * config.num_updates * config.batch_size
            low, ratio, high = np.percentile(np.divide(times["bare"], times["ours"]), [25, 50, 75])
            theirs = SB3_ITERATIONS * config.batch_size / np.median(times["other"] or [np.inf])
            print(
                f"| `{script.__name__}` | {name} | {steps / np.median(times['ours']):,.0f} "
                f"| {steps / np.median(times['bare']):,.0f} | {ratio:.2f} ({low:.2f}-{high:.2f}) "
                f"| {compile_seconds:.1f} s | {f'{theirs:,.0f}' if other else '-'} |",
                flush=True,
            )


def by_number(scripts, seeds, environments, rounds):
    """Table and figure of steps/s, compile time and memory against what runs side by side."""
    by_seeds = [(number, 4) for number in seeds]
    by_environments = [(1, number) for number in environments]
    print("Steps per second (compile time; memory per seed that the compiled program asks for)\n")
    print("| seeds x environments |", " | ".join(f"`{script}`" for script in scripts), "|")
    print("|---" * (len(scripts) + 1) + "|")
    speeds = {script: {} for script in scripts}
    for num_seeds, num_envs in dict.fromkeys(by_seeds + by_environments):  # each once
        cells = []
        for name in scripts:
            script = importlib.import_module(name)
            num_updates = max(2, 256 // (num_seeds * num_envs))
            config = script.Config(
                num_envs=num_envs, num_steps=128, total_timesteps=num_updates * num_envs * 128
            )
            keys = jax.vmap(jax.random.key)(jnp.arange(num_seeds))
            program, compile_seconds = compiled(script.train, config, keys)
            seconds_of(program, keys)
            seconds = np.median([seconds_of(program, keys) for _ in range(rounds)])
            memory = program.memory_analysis()
            mebibytes = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20
            speed = num_seeds * config.total_timesteps / seconds
            speeds[name][num_seeds, num_envs] = speed
            cells.append(f"{speed:,.0f} ({compile_seconds:.1f} s; {mebibytes / num_seeds:.2f} MiB)")
        print(f"| {num_seeds} x {num_envs} | {' | '.join(cells)} |", flush=True)

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for name in scripts:
        default = importlib.import_module(name).Config().env_id
        of_seeds = [speeds[name][size] for size in by_seeds]
        panels[0].loglog(seeds, of_seeds, "o-", label=f"{name}, {default}")
        panels[1].loglog(environments, [speeds[name][size] for size in by_environments], "o-")
    panels[0].set(
        xlabel="seeds at once, each with 4 environments", ylabel="environment steps per second"
    )
    panels[1].set(xlabel="environments of a single seed")
    for axes in panels:
        axes.grid(alpha=0.3)
    panels[1].legend(*panels[0].get_legend_handles_labels(), loc="lower right")
    figure.suptitle(f"128 steps per update, {jax.devices()[0].device_kind}")
    figure.savefig(ROOT / "benchmarks" / "results" / "speed.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS, choices=SCRIPTS)
    parser.add_argument("--tables", nargs="+", default=["bare", "sizes"], choices=["bare", "sizes"])
    parser.add_argument(
        "--activation", default="tanh", choices=["tanh", "relu"], help="of the first table"
    )
    numbers = dict(nargs="+", type=int, help="of the second table")
    parser.add_argument("--seeds", default=[1, 8, 64, 512, 2048], **numbers)
    parser.add_argument("--environments", default=[4, 64, 512, 2048], **numbers)
    parser.add_argument(
        "--rounds", type=int, help="runs of each program per setting [default: 30 and 3]"
    )
    arguments = parser.parse_args()
    device = jax.devices()[0].device_kind
    print(f"{time.strftime('%Y-%m-%d')}, {device}, {os.cpu_count()} cores, {platform.machine()},")
    print(f"Python {platform.python_version()}, jax {jax.__version__}\n")
    if "bare" in arguments.tables:
        against_bare_arithmetic(arguments.scripts, arguments.rounds or 30, arguments.activation)
        print()
    if "sizes" in arguments.tables:
        by_number(arguments.scripts, arguments.seeds, arguments.environments, arguments.rounds or 3)


if __name__ == "__main__":
    main()
