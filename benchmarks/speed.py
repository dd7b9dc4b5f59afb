"""How fast the scripts are: against bare arithmetic, other programs, and by number of devices.

    python benchmarks/speed.py                              # the first three tables; half an hour
    python benchmarks/speed.py --tables bare --scripts trpo --rounds 10
    python benchmarks/speed.py --tables bare --scripts ppo_continuous --activation relu
    python benchmarks/speed.py --tables sizes --seeds 1 64 1024 2048     # on a GPU
    python benchmarks/speed.py --tables devices --devices 1 2 4 8        # more than there are cores
    python benchmarks/speed.py --gpu --purejaxrl PATH        # whole runs on a GPU, ten minutes
    python benchmarks/speed.py --against PATH                # a folder with other such scripts
    python benchmarks/speed.py --purejaxrl PATH              # a checkout of PureJaxRL

All print Markdown, for docs/speed.md. What is compared is compiled first and then run in turn, in
runs of half a second or so: on a machine that is busy with other things, two neighbouring short
runs are disturbed alike, two long ones are not. A ratio is the median over neighbouring runs, with
the quartiles in parentheses. Hyperparameters are those of `Config`, without presets. Compile times
are those of XLA (no persistent cache is used unless you set one). As on the command line, Threefry
is compiled to straight code. All but the tables of devices and of PureJaxRL run on one CPU device.

`bare`: how much of the time goes into the network arithmetic that no implementation can avoid. For
each script and setting there are two programs with the same networks, optimizer and sizes: the
script's `train` on its default environment, and the bare arithmetic: the actor's forward passes
step by step, the critic's over the rollout, and what the update does with the networks, on random
data, without environment, advantages, shuffling or random numbers. If Stable-Baselines3 and
sb3-contrib are installed, they train with the same hyperparameters, in the same turns.

`sizes`: more and more seeds of 4 environments, and one seed with more and more environments: steps
per second, compile time, and memory per seed. Also drawn, as benchmarks/results/speed.png.

`devices`: seeds of 4 x 128, spread over 1, 2, 4, ... CPU devices, up to one per core that this
process may use, or as many as `--devices` asks for. The number is fixed when JAX starts, so each
has a process of its own; all are there at once, and run in turn.

`--against`: `train` of these scripts and of those in another folder, in one process.

`--purejaxrl`: PPO-clip of these scripts and PureJaxRL's in one process, with the same networks and
hyperparameters; benchmarks/purejaxrl.py says what is changed in it, in memory.

`--gpu`: whole runs on an accelerator, up to 2048 seeds, and with `--purejaxrl` its own beside them;
benchmarks/gpu.py has the details.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import math
import os
import platform
import subprocess
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

import ppo_discrete

SCRIPTS = ["ppo_discrete", "ppo_continuous", "ppo_penalty", "trpo"]
SB3_ITERATIONS = 1  # rollouts and updates of Stable-Baselines3 per turn
SETTINGS = {  # name: (seeds, environments, steps, updates)
    "4 x 128": (1, 4, 128, 40),
    "64 x 128": (1, 64, 128, 6),
    "2048 x 10": (1, 2048, 10, 3),
    "16 seeds of 4 x 128": (16, 4, 128, 6),
}
SEEDS_ON_DEVICES = {8: 20, 16: 10, 64: 3}  # of 4 x 128: updates
TABLES = {"bare": 30, "sizes": 3, "devices": 10}  # name: rounds
ROUNDS = 30  # of `--against` and `--purejaxrl`


def bare_arithmetic(script, config, key):
    """The network arithmetic of `script.train`, without anything else."""
    is_trpo = script.__name__ == "trpo"
    env = script.make_env(config.env_id)
    obs_size = env.reset(jax.random.split(key, 1))[0].shape[-1]
    space = env.action_space
    if script.__name__ == "ppo_discrete":
        space = space.n
    elif script.__name__ == "ppo_continuous":
        space = math.prod(space.shape)
    actor = script.Actor(space, config.hidden_sizes, config.activation)
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


def compiled(function, config, keys, transform=lambda f: jax.jit(jax.vmap(f))):
    """The program for these seeds, and the seconds its compilation took."""
    lowered = transform(functools.partial(function, config)).lower(keys)
    start = time.perf_counter()
    program = lowered.compile()
    return program, time.perf_counter() - start


def seed_keys(number):
    return jax.vmap(jax.random.key)(jnp.arange(number))


def configured(script, setting, **values):
    """The default configuration with the sizes of a setting, and the number of seeds."""
    num_seeds, num_envs, num_steps, num_updates = setting
    steps = num_updates * num_envs * num_steps
    sizes = dict(num_envs=num_envs, num_steps=num_steps, total_timesteps=steps)
    return script.Config(**sizes, **values), num_seeds


def in_turn(rounds, first, second):
    """Seconds of both functions, each [rounds]; who begins alternates. The first runs warm up."""
    first(), second()
    times = [], []
    for i in range(rounds):
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            times[which].append((first, second)[which]())
    return times


def quartiles(ratios):
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def seconds_of(program, *arguments):
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - start


def baseline_run(script, config):
    """The same run by Stable-Baselines3 or sb3-contrib, or None without such a thing.

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
        batch_size=config.batch_size // config.num_minibatches,
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
        for name, setting in SETTINGS.items():
            config, num_seeds = configured(script, setting, activation=activation)
            keys = seed_keys(num_seeds)
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
            steps = num_seeds * config.total_timesteps
            theirs = SB3_ITERATIONS * config.batch_size / np.median(times["other"] or [np.inf])
            print(
                f"| `{script.__name__}` | {name} | {steps / np.median(times['ours']):,.0f} "
                f"| {steps / np.median(times['bare']):,.0f} "
                f"| {quartiles(np.divide(times['bare'], times['ours']))} "
                f"| {compile_seconds:.1f} s | {f'{theirs:,.0f}' if other else '-'} |",
                flush=True,
            )


def against_others(folder, scripts, rounds):
    """The scripts of this repository (new) and those of the same names in `folder` (old)."""
    print("| script | setting | steps/s, new | old | new / old | compile, new | old | weights |")
    print("|---|---|---|---|---|---|---|---|")
    for name in scripts:
        new = importlib.import_module(name)
        old = load(Path(folder) / f"{name}.py", f"old_{name}")
        for setting_name, setting in SETTINGS.items():
            programs, compile_seconds = {}, {new: [], old: []}
            for script in (new, old, old, new):  # nobody's compiler is warmer
                config, num_seeds = configured(script, setting)
                keys = seed_keys(num_seeds)
                programs[script], seconds = compiled(script.train, config, keys)
                compile_seconds[script].append(seconds)
            run = {s: functools.partial(seconds_of, programs[s], keys) for s in (new, old)}
            times = in_turn(rounds, run[new], run[old])
            weights = [ravel_pytree(programs[s](keys)[0].params)[0] for s in (new, old)]
            same = "the same" if np.array_equal(*weights) else "others"
            steps = num_seeds * config.total_timesteps
            print(
                f"| `{name}` | {setting_name} | {steps / np.median(times[0]):,.0f} "
                f"| {steps / np.median(times[1]):,.0f} "
                f"| {quartiles(np.divide(times[1], times[0]))} "
                f"| {np.mean(compile_seconds[new]):.1f} s | {np.mean(compile_seconds[old]):.1f} s "
                f"| {same} |",
                flush=True,
            )


def load(path, name):
    """A module by its path, under another name than its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
            config, _ = configured(script, (num_seeds, num_envs, 128, num_updates))
            keys = seed_keys(num_seeds)
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


def usable_cores():
    """The cores that this process may use, as the scripts count them; before JAX starts."""
    before = jax.config.jax_num_cpu_devices
    ppo_discrete.use_cores(0)  # no seeds divide over any number of devices
    cores = jax.config.jax_num_cpu_devices
    jax.config.update("jax_num_cpu_devices", before)
    return max(cores, 1)


def serve_runs(name, devices):
    """Be one of the processes of `by_devices`: asked for a number of seeds, run, tell the seconds.

    The first run of each number compiles and does not count."""
    jax.config.update("jax_num_cpu_devices", devices)
    script = importlib.import_module(name)
    script.straight_threefry()
    programs = {}
    for line in sys.stdin:
        number = int(line)
        keys = jax.device_put(seed_keys(number), script.seed_axis())
        if number not in programs:
            config, _ = configured(script, (number, 4, 128, SEEDS_ON_DEVICES[number]))
            programs[number], _ = compiled(script.train, config, keys, script.over_seeds)
            seconds_of(programs[number], keys)
        print(seconds_of(programs[number], keys), flush=True)


def by_devices(scripts, counts, cores, rounds):
    """Steps per second of seeds of 4 x 128 that are spread over several CPU devices."""
    print(f"Steps per second of seeds of 4 x 128 on {cores} usable cores; in parentheses the speed")
    print("against one device, and this divided by the number of devices.\n")
    print("| script | devices |", " | ".join(f"{n} seeds" for n in SEEDS_ON_DEVICES), "|")
    print("|---" * (len(SEEDS_ON_DEVICES) + 2) + "|")
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = " ".join(flag for flag in flags if "device_count" not in flag)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    counts = list(dict.fromkeys([1, *counts]))  # one is what the others are compared with
    for name in scripts:
        with contextlib.ExitStack() as stack:
            start = functools.partial(
                subprocess.Popen,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            command = [sys.executable, __file__, "--scripts", name, "--serve"]
            processes = {n: stack.enter_context(start([*command, str(n)])) for n in counts}

            def ask(devices, number, processes=processes):
                print(number, file=processes[devices].stdin, flush=True)
                return float(processes[devices].stdout.readline())

            cells = {n: [] for n in counts}
            for number, num_updates in SEEDS_ON_DEVICES.items():
                able = [n for n in counts if number % n == 0]
                for n in able:
                    ask(n, number)
                times = np.array([[ask(n, number) for n in able] for _ in range(rounds)])
                speed = number * num_updates * 4 * 128 / np.median(times, axis=0)
                gain = np.median(times[:, :1] / times, axis=0)
                for i, n in enumerate(able):
                    against = f" ({gain[i]:.2f} x; {gain[i] / n:.0%})" if n > 1 else ""
                    cells[n].append(f"{speed[i]:,.0f}{against}")
                for n in set(counts) - set(able):
                    cells[n].append("-")
            for process in processes.values():
                process.stdin.close()  # ends it
        for n, texts in cells.items():
            forced = " (forced: more than cores)" if n > cores else ""
            print(f"| `{name}` | {n}{forced} | {' | '.join(texts)} |", flush=True)


def against_purejaxrl(folder, scripts, rounds):
    """PPO-clip here and in PureJaxRL: the same networks, hyperparameters and environments."""
    import purejaxrl

    print("| script | setting | devices | steps/s | PureJaxRL | ratio | compile | PureJaxRL |")
    print("|---|---|---|---|---|---|---|---|")
    devices, rows = jax.device_count(), []
    for name in scripts:  # theirs first, while Threefry is compiled as JAX has it
        script = importlib.import_module(name)
        for setting_name, setting in SETTINGS.items():
            config, num_seeds = configured(script, setting, **purejaxrl.OURS[name])
            theirs = compiled(purejaxrl.load_train(folder, name), config, seed_keys(num_seeds))
            rows.append((script, setting_name, config, num_seeds, theirs))
    ppo_discrete.straight_threefry()
    for script, setting_name, config, num_seeds, (theirs, their_seconds) in rows:
        keys = seed_keys(num_seeds)
        spread = num_seeds > 1 and devices > 1 and num_seeds % devices == 0
        for over in (1, devices) if spread else (1,):
            options = [script.over_seeds] if over > 1 else []
            ours, our_seconds = compiled(script.train, config, keys, *options)
            our_keys = jax.device_put(keys, script.seed_axis()) if over > 1 else keys
            times = in_turn(
                rounds,
                functools.partial(seconds_of, ours, our_keys),
                functools.partial(seconds_of, theirs, keys),
            )
            steps = num_seeds * config.total_timesteps
            print(
                f"| `{script.__name__}` | {setting_name} | {over} "
                f"| {steps / np.median(times[0]):,.0f} | {steps / np.median(times[1]):,.0f} "
                f"| {quartiles(np.divide(times[1], times[0]))} "
                f"| {our_seconds:.1f} s | {their_seconds:.1f} s |",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS, choices=SCRIPTS)
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--against", metavar="PATH", help="this instead: a folder of other scripts")
    parser.add_argument("--purejaxrl", metavar="PATH", help="this instead: a checkout of it")
    parser.add_argument("--gpu", action="store_true", help="this instead: whole runs on a GPU")
    parser.add_argument("--minutes", type=float, default=9.0, help="of `--gpu`, at most")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try `--gpu`")
    parser.add_argument(
        "--activation", default="tanh", choices=["tanh", "relu"], help="of the table `bare`"
    )
    numbers = dict(nargs="+", type=int, help="of the table `sizes`")
    parser.add_argument("--seeds", default=[1, 8, 64, 512, 2048], **numbers)
    parser.add_argument("--environments", default=[4, 64, 512, 2048], **numbers)
    parser.add_argument(
        "--devices", nargs="+", type=int, help="of the table `devices` [default: up to the cores]"
    )
    rounds_help = f"runs of each program per setting [default: {TABLES}, otherwise {ROUNDS}]"
    parser.add_argument("--rounds", type=int, help=rounds_help)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve_runs(*arguments.scripts, arguments.serve)
        return
    cores = usable_cores()
    if jax.config.jax_num_cpu_devices < 0 and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        spread = arguments.purejaxrl and not arguments.gpu
        jax.config.update("jax_num_cpu_devices", cores if spread else 1)
    rounds = lambda table: arguments.rounds or TABLES.get(table, ROUNDS)
    device = jax.devices()[0].device_kind
    circumstances = f"{time.strftime('%Y-%m-%d')}, {device}, {cores} cores, {platform.machine()}, "
    circumstances += f"Python {platform.python_version()}, jax {jax.__version__}"
    print(f"{circumstances}\n")
    if arguments.gpu:
        import gpu

        document = gpu.DOCUMENT if jax.default_backend() != "cpu" else None
        gpu.table(circumstances, arguments.purejaxrl, arguments.minutes, arguments.quick, document)
        return
    if arguments.purejaxrl:
        able = [name for name in arguments.scripts if name in ("ppo_discrete", "ppo_continuous")]
        against_purejaxrl(arguments.purejaxrl, able, rounds("purejaxrl"))
        return
    ppo_discrete.straight_threefry()
    if arguments.against:
        against_others(arguments.against, arguments.scripts, rounds("against"))
        return
    for table in arguments.tables:
        if table == "bare":
            against_bare_arithmetic(arguments.scripts, rounds(table), arguments.activation)
        elif table == "sizes":
            by_number(arguments.scripts, arguments.seeds, arguments.environments, rounds(table))
        else:
            doublings = [2**i for i in range(cores.bit_length()) if 2**i < cores] + [cores]
            by_devices(arguments.scripts, arguments.devices or doublings, cores, rounds(table))
        print()


if __name__ == "__main__":
    main()
