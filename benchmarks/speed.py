"""Measure how fast the scripts are, and print tables for docs/speed.md.

    python benchmarks/speed.py bare              # against the bare arithmetic of the networks
    python benchmarks/speed.py sb3               # against Stable-Baselines3 and sb3-contrib
    python benchmarks/speed.py devices           # a CPU device per core against a single one
    python benchmarks/speed.py sizes             # many seeds and many environments
    python benchmarks/speed.py trpo              # the parts of an update of TRPO
    python benchmarks/speed.py first-minute      # the default command, until CartPole is solved
    python benchmarks/speed.py --purejaxrl PATH  # against a checkout of PureJaxRL
    python benchmarks/speed.py --against PATH    # against the scripts in another folder
    python benchmarks/speed.py whole --purejaxrl PATH     # whole runs, for a GPU

Programs that are compared are compiled first and then run in turn, in one process and for about a
second each, so that other programs on the machine disturb both alike. A ratio is the median
over the rounds, with its quartiles in parentheses; above 1, ours is faster. Hyperparameters
are those of `Config`, without presets. In `devices`, `whole` and the table of PureJaxRL, our seeds
are spread over all devices.

`bare` is what no implementation of PPO can avoid: the same networks, optimizer and sizes on random
data, without environment, advantages, shuffling or random numbers. `first-minute` watches the
default command from outside: when it prints its first line, when it writes its first metrics, and
when every seed has had an update with a mean return of at least 475. With --purejaxrl it takes
turns with PureJaxRL's default training of 8 seeds, which shows no return before its end. `whole`
trains the numbers of seeds and steps that PureJaxRL's README shows for a GPU, once.
"""

import argparse
import contextlib
import dataclasses
import importlib
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import ROOT, circumstances, load_module, markdown, read_columns
from jax.flatten_util import ravel_pytree

import ppo_discrete

SCRIPTS = ("ppo_discrete", "ppo_continuous", "ppo_penalty", "trpo")


def sizes(num_envs, num_steps, num_updates):
    steps = num_envs * num_steps * num_updates
    return dict(num_envs=num_envs, num_steps=num_steps, total_timesteps=steps)


ONE_SEED = {  # name: seeds, values of the configuration
    "4 x 128": (1, sizes(4, 128, 40)),
    "64 x 128": (1, sizes(64, 128, 6)),
    "2048 x 10": (1, sizes(2048, 10, 3)),
}
SETTINGS = ONE_SEED | {"16 seeds of 4 x 128": (16, sizes(4, 128, 6))}
NUMBERS = ((8, 20), (16, 10), (64, 3))  # seeds, updates
MANY_SEEDS = {f"{n} seeds of 4 x 128": (n, sizes(4, 128, updates)) for n, updates in NUMBERS}
CARTPOLE = dict(num_envs=4, num_steps=128, update_epochs=4, num_minibatches=4)
CARTPOLE |= dict(total_timesteps=500_000)
BREAKOUT = dict(num_envs=64, num_steps=128, update_epochs=4, num_minibatches=8, activation="relu")
BREAKOUT |= dict(env_id="Breakout-MinAtar", total_timesteps=10_000_000)
WHOLE = {
    "CartPole, 1 seed of 500k steps": (1, CARTPOLE),
    "CartPole, 64 seeds": (64, CARTPOLE),
    "CartPole, 2048 seeds": (2048, CARTPOLE),
    "Breakout, 64 seeds of 10M steps": (64, BREAKOUT),
}


# ---- Measuring -----------------------------------------------------------------------------------


class Program(NamedTuple):
    run: Callable  # takes no arguments
    steps: int  # environment steps of a run
    compile_seconds: float = math.nan
    compiled: object = None


def program_of(train, config, num_seeds=1, spread=False):
    """Compile the training of some seeds; `spread` distributes them over all devices."""
    function, key = partial(train, config), jax.random.key(0)
    if num_seeds > 1:
        key = jax.random.split(key, num_seeds)
    if spread:
        function = ppo_discrete.over_seeds(function, num_seeds)
    else:
        function = jax.jit(jax.vmap(function) if num_seeds > 1 else function)
    lowered = function.lower(key)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    steps = num_seeds * config.num_updates * config.batch_size
    return Program(partial(compiled, key), steps, seconds, compiled)


def take_turns(runs, rounds):
    """The seconds of each run [rounds]. The first run of each is not counted."""
    seconds = [[] for _ in runs]
    for i in range(rounds + 1):
        for j in range(len(runs)) if i % 2 else reversed(range(len(runs))):
            start = time.perf_counter()
            jax.block_until_ready(runs[j]())
            seconds[j].append(time.perf_counter() - start)
    return np.array(seconds)[:, 1:]


def print_row(*cells):
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def compare(label, rival, scripts, settings, rounds, spread=False, overrides=None):
    """Print a table of the scripts beside rival(script, config, num_seeds) -> Program.

    `overrides` are further values of the configuration, by the name of the script.
    """
    print(markdown(["script", "setting", "steps/s", label, "ratio", "compile", label], []))
    for script in map(importlib.import_module, scripts):
        for setting, (num_seeds, values) in settings.items():
            config = script.Config(**values | (overrides or {}).get(script.__name__, {}))
            ours = program_of(script.train, config, num_seeds, spread and num_seeds > 1)
            programs = ours, rival(script, config, num_seeds)
            seconds = take_turns([program.run for program in programs], rounds)
            ours, theirs = (x.steps / seconds[i] for i, x in enumerate(programs))
            low, ratio, high = np.percentile(ours / theirs, [25, 50, 75])
            print_row(
                f"`{script.__name__}`",
                setting,
                *(f"{np.median(speed):,.0f}" for speed in (ours, theirs)),
                f"{ratio:.2f} ({low:.2f}-{high:.2f})",
                *(f"{program.compile_seconds:.1f} s" for program in programs),
            )


# ---- Rivals --------------------------------------------------------------------------------------


def other_version(folder, script, config, num_seeds):
    """The script of the same name in another folder, with all hyperparameters that both have."""
    other = load_module(Path(folder) / f"{script.__name__}.py", f"other_{script.__name__}")
    names = [field.name for field in dataclasses.fields(other.Config)]
    values = {name: getattr(config, name) for name in names if hasattr(config, name)}
    if "kl_threshold" in names:  # the name of the early stop up to commit d1a7a2f
        name = "early_stop_kl" if hasattr(config, "early_stop_kl") else "target_kl"
        values["kl_threshold"] = getattr(config, name)
    return program_of(other.train, other.Config(**values), num_seeds)


def purejaxrl_train(checkout, script, config, num_seeds):
    import purejaxrl  # not at the top, because it starts JAX, which use_cores has to precede

    return program_of(purejaxrl.load_train(checkout, script.__name__), config, num_seeds)


def one_device(script, config, num_seeds):
    return program_of(script.train, config, num_seeds)


def stable_baselines3(script, config, num_seeds):
    """A rollout and an update with the same hyperparameters, normalisation included."""
    from sb3_contrib import TRPO
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    options = dict(
        n_steps=config.num_steps,
        batch_size=config.batch_size // config.num_minibatches,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        learning_rate=config.learning_rate,
        device="cpu",  # as SB3 advises for small networks
    )
    if script.__name__ == "trpo":
        options |= dict(n_critic_updates=config.update_epochs, target_kl=config.max_kl)
        options |= dict(cg_max_steps=config.cg_iterations, cg_damping=config.cg_damping)
    else:
        options |= dict(n_epochs=config.update_epochs, clip_range=config.clip_eps)
        options |= dict(max_grad_norm=config.max_grad_norm, vf_coef=config.vf_coef)
    env = VecNormalize(make_vec_env(config.env_id, config.num_envs), gamma=config.gamma)
    model = (TRPO if script.__name__ == "trpo" else PPO)("MlpPolicy", env, **options)
    return Program(partial(model.learn, config.batch_size), config.batch_size)


def mlp(config, num_outputs):
    activation = getattr(nn, config.activation)
    hidden = [layer for size in config.hidden_sizes for layer in (nn.Dense(size), activation)]
    return nn.Sequential([*hidden, nn.Dense(num_outputs)])


def train_bare(script, config, key):
    """The network arithmetic of a PPO script, and nothing else."""
    env = script.load_env(config.env_id)
    obs_size = env.reset(jax.random.split(key, 1))[0].shape[-1]
    space = env.action_space
    actor = mlp(config, space.n if hasattr(space, "n") else math.prod(space.shape))
    critic = mlp(config, 1)
    obs = jax.random.normal(key, (config.num_steps, config.num_envs, obs_size))
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    optimizer = optax.chain(clip, optax.adam(1e-3, eps=1e-5))

    def loss(params, obs, target):
        value = critic.apply(params[1], obs)[..., 0]
        return jnp.mean(actor.apply(params[0], obs)[..., 0] * target + (value - target) ** 2)

    def update(carry, _):
        params, _ = carry

        def env_step(last, obs):  # waits for the previous step, as with an environment between them
            return actor.apply(params[0], obs + 1e-6 * last).sum(), None

        last, _ = jax.lax.scan(env_step, jnp.zeros(()), obs)
        next_value = critic.apply(params[1], obs + 1e-6 * last)[..., 0]
        target = critic.apply(params[1], obs)[..., 0] + next_value
        parts = config.num_minibatches
        minibatches = [x.reshape(parts, -1, *x.shape[2:]) for x in (obs, target)]

        def train_step(carry, minibatch):
            params, opt_state = carry
            gradient = jax.grad(loss)(params, *minibatch)
            change, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(params, change), opt_state), None

        epoch = lambda carry, _: jax.lax.scan(train_step, carry, minibatches)
        return jax.lax.scan(epoch, carry, None, config.update_epochs)[0], None

    params = actor.init(key, obs), critic.init(key, obs)
    carry = (params, optimizer.init(params))
    return jax.lax.scan(update, carry, None, config.num_updates)[0]


def bare_arithmetic(script, config, num_seeds):
    return program_of(partial(train_bare, script), config, num_seeds)


# ---- Sizes ---------------------------------------------------------------------------------------


def by_size(scripts, rounds):
    """Steps per second, compile time and memory of many seeds, and of many environments."""
    print("Steps per second (compile time; memory per seed)\n")
    print(markdown(["seeds x environments", *(f"`{name}`" for name in scripts)], []))
    numbers = [(n, 4) for n in (1, 8, 64, 512, 2048)] + [(1, n) for n in (64, 512, 2048)]
    for num_seeds, num_envs in numbers:
        cells = []
        for script in map(importlib.import_module, scripts):
            config = script.Config(**sizes(num_envs, 128, max(2, 256 // (num_seeds * num_envs))))
            program = program_of(script.train, config, num_seeds)
            speed = program.steps / np.median(take_turns([program.run], rounds))
            memory = program.compiled.memory_analysis()
            mebibytes = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20
            costs = f"{program.compile_seconds:.1f} s; {mebibytes / num_seeds:.2f} MiB"
            cells.append(f"{speed:,.0f} ({costs})")
        print_row(f"{num_seeds} x {num_envs}", *cells)


# ---- The parts of an update of TRPO --------------------------------------------------------------


def trpo_parts(rounds):
    """Milliseconds of each part, and its cost in units of a gradient of the surrogate."""
    import trpo

    config = trpo.Config()
    space = trpo.load_env(config.env_id).action_space
    actor = trpo.Actor(space, config.hidden_sizes, config.activation, config.initial_std)
    keys = jax.random.split(jax.random.key(0), 4)
    obs = jax.random.normal(keys[0], (config.batch_size, 4))
    theta, unravel = ravel_pytree(actor.init(keys[1], obs))
    policy_at = lambda theta: actor.apply(unravel(theta), obs)
    old_policy = policy_at(theta)
    action = old_policy.sample(keys[2])
    advantage = jax.random.normal(keys[3], action.shape)

    def surrogate(theta):
        log_ratio = policy_at(theta).log_prob(action) - old_policy.log_prob(action)
        return jnp.mean(jnp.exp(log_ratio) * advantage)

    def repeat(product, v):
        return jax.lax.scan(lambda v, _: (product(v), None), v, None, 10)[0]

    def fisher_products(theta, v):
        return repeat(trpo.fisher_vector_product(policy_at, theta), v)

    def kl_products(theta, v):
        kl = lambda theta: old_policy.kl(policy_at(theta)).mean()
        return repeat(jax.linearize(jax.grad(kl), theta)[1], v)

    gradient = jax.jit(jax.grad(surrogate))
    v = gradient(theta)
    init, update = trpo.make_train(config)
    parts = {
        "gradient of the surrogate": partial(gradient, theta),
        "10 Fisher-vector products": partial(jax.jit(fisher_products), theta, v),
        "10 products of the linearised KL gradient": partial(jax.jit(kl_products), theta, v),
        "whole update, with its rollout": partial(jax.jit(update), jax.jit(init)(keys[0])),
    }
    milliseconds = 1e3 * np.median(take_turns(list(parts.values()), 20 * rounds), axis=1)
    print(f"{config.batch_size} transitions of {config.env_id}\n")
    print(markdown(["part", "ms", "in gradients"], []))
    for name, x in zip(parts, milliseconds, strict=True):
        print_row(name, f"{x:.2f}", f"{x / milliseconds[0]:.1f}")


# ---- The first minute ----------------------------------------------------------------------------


def our_first_minute():
    """When each phase of the default command ends, in seconds after the start of the process."""
    with tempfile.TemporaryDirectory() as folder:
        start, ends = time.time(), {}
        command = [sys.executable, "-u", ROOT / "ppo_discrete.py"]
        streams = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        process = subprocess.Popen(command, cwd=folder, **streams)
        process.stdout.readline()
        ends["imports"] = time.time()
        while process.poll() is None:
            time.sleep(0.02)
            for path in Path(folder).glob("runs/*/metrics.csv"):
                if not path.stat().st_size:
                    continue
                written = path.stat().st_mtime
                with contextlib.suppress(ValueError):  # the last row is half written
                    returns = read_columns(path.parent)["episodic_return"]
                    ends.setdefault("compiling", written)
                    if (returns >= 475).any(axis=0).all():
                        ends.setdefault("475", written)
        process.stdout.close()
        ends["everything"] = time.time()
    return {name: end - start for name, end in ends.items()}


def their_first_minute(checkout):
    start = time.time()
    command = [sys.executable, Path(__file__).with_name("purejaxrl.py"), checkout]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = dict(line.split() for line in done.stdout.splitlines())
    solved = "trained" if float(lines["best"]) >= 475 else "never"
    names = {"imports": "imported", "compiling": "compiled", "475": solved, "everything": "trained"}
    return {name: float(lines.get(line, math.nan)) - start for name, line in names.items()}


def first_minute(checkout, rounds):
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(our_first_minute())
        theirs.append(their_first_minute(checkout) if checkout else {})
    print(markdown(["seconds until the end of", "`ppo_discrete.py`", "PureJaxRL"], []))
    for name in ("imports", "compiling", "475", "everything"):
        times = [np.median([run.get(name, math.nan) for run in runs]) for runs in (ours, theirs)]
        print_row(name, *(f"{x:.1f}" for x in times))


# ---- The command line ----------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tables = ("bare", "sb3", "devices", "sizes", "trpo", "first-minute", "whole")
    parser.add_argument("table", nargs="?", choices=tables)
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS, choices=SCRIPTS)
    parser.add_argument("--against", metavar="PATH", help="a folder with other versions of them")
    parser.add_argument("--purejaxrl", metavar="PATH", help="a checkout of PureJaxRL")
    parser.add_argument("--rounds", type=int, help="runs of each program")
    arguments = parser.parse_args()
    table, scripts = arguments.table, arguments.scripts
    rounds = arguments.rounds or {"sizes": 3, "first-minute": 3, "whole": 1}.get(table, 20)
    spread = table in ("devices", "whole") or (arguments.purejaxrl and table is None)
    if spread:
        ppo_discrete.use_cores(64)
    cores, device = len(os.sched_getaffinity(0)), jax.devices()[0].device_kind
    print(f"{circumstances()}, {cores} cores, {device}\n")
    if table == "sizes":
        by_size(scripts, rounds)
    elif table == "trpo":
        trpo_parts(rounds)
    elif table == "first-minute":
        first_minute(arguments.purejaxrl, rounds)
    elif table == "bare":
        scripts = [name for name in scripts if name != "trpo"]
        compare("bare", bare_arithmetic, scripts, SETTINGS, rounds)
    elif table == "devices":
        compare("one device", one_device, scripts, MANY_SEEDS, rounds, spread)
    elif table == "sb3":
        scripts = [name for name in scripts if name != "ppo_penalty"]
        compare("Stable-Baselines3", stable_baselines3, scripts, ONE_SEED, rounds)
    elif arguments.against:
        rival = partial(other_version, arguments.against)
        compare("other", rival, scripts, ONE_SEED, rounds)
    elif arguments.purejaxrl:
        from purejaxrl import OURS

        rival = partial(purejaxrl_train, arguments.purejaxrl)
        scripts = [name for name in scripts if name in OURS]
        settings = WHOLE if table == "whole" else SETTINGS
        compare("PureJaxRL", rival, scripts, settings, rounds, spread, OURS)
    else:
        parser.error("choose a table, --against or --purejaxrl; whole needs --purejaxrl")


if __name__ == "__main__":
    main()
