"""Compare the scripts with Brax's own PPO and PureJaxRL on Brax's locomotion tasks.

    python benchmarks/locomotion.py --only trpo             # one algorithm
    python benchmarks/locomotion.py --purejaxrl PATH        # all, with a checkout of PureJaxRL
    python benchmarks/locomotion.py --tables                # train nothing
    python benchmarks/locomotion.py --purejaxrl PATH --steps 20480 --only reacher    # a quick try

This needs benchmarks/requirements.txt. All tasks have spring physics and episodes of 1000 steps.
Our scripts run the documented command, Brax's PPO and PureJaxRL the settings that their authors
published (Brax's PPO has none for hopper and walker2d, and gets those for halfcheetah). Brax trains
in whole iterations, and so up to 0.64M steps more. Every policy is scored by the mean return of 100
greedy episodes per seed in our adapter. If the program is killed, the same command continues it.
"""

import argparse
import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from common import (
    EPISODES,
    RESULTS,
    Cell,
    budget,
    draw_curve,
    interquartile_mean,
    markdown,
    publish,
    scored,
    script_cell,
)
from matplotlib.figure import Figure

import ppo_discrete

TASKS = ("inverted_double_pendulum", "reacher", "hopper", "walker2d", "halfcheetah", "ant")
BUDGETS = (1_000_000, 3_000_000)
OURS = {"ppo_continuous": "PPO-clip", "ppo_penalty": "PPO-penalty", "trpo": "TRPO"}
LABELS = OURS | {"brax": "Brax's PPO", "purejaxrl": "PureJaxRL"}
SEEDS = dict.fromkeys(OURS, 6) | {"brax": 2, "purejaxrl": 2}
LIMIT = 1000  # steps of an episode

# notebooks/training.ipynb of github.com/google/brax
PLANAR = dict(
    reward_scaling=1, unroll_length=20, num_minibatches=32, num_updates_per_batch=8,
    discounting=0.95, learning_rate=3e-4, entropy_cost=1e-3, num_envs=2048, batch_size=512,
    action_repeat=1,
)  # fmt: skip
PENDULUM = PLANAR | dict(
    reward_scaling=10, unroll_length=5, num_updates_per_batch=4, discounting=0.97,
    entropy_cost=1e-2, batch_size=1024,
)  # fmt: skip
REACHER = PLANAR | dict(reward_scaling=5, unroll_length=50, batch_size=256, action_repeat=4)
BRAX = dict.fromkeys(TASKS, PLANAR) | {
    "inverted_double_pendulum": PENDULUM,
    "reacher": REACHER,
    "ant": PENDULUM | dict(num_envs=4096, batch_size=2048),
}
# purejaxrl/ppo_continuous_action.py of github.com/luchris429/purejaxrl
PUREJAXRL = dict(
    NUM_ENVS=2048, NUM_STEPS=10, UPDATE_EPOCHS=4, NUM_MINIBATCHES=32, LR=3e-4, GAMMA=0.99,
    GAE_LAMBDA=0.95, CLIP_EPS=0.2, ENT_COEF=0.0, VF_COEF=0.5, MAX_GRAD_NORM=0.5,
    ACTIVATION="tanh", ANNEAL_LR=False, NORMALIZE_ENV=True,
)  # fmt: skip


def play(env, policy, key, repeat=1):
    """Mean return of greedy episodes. policy: obs [N, D] -> action [N, A], kept `repeat` steps."""
    reset_key, step_key = jax.random.split(key)
    obs, env_state = env.reset(jax.random.split(reset_key, EPISODES))

    def step(carry, inputs):
        obs, env_state, action, playing, total = carry
        time, key = inputs
        action = jnp.where(time % repeat == 0, policy(obs), action)
        obs, env_state, reward, terminated, truncated, _ = env.step(
            jax.random.split(key, EPISODES), env_state, action
        )
        total += jnp.where(playing, reward, 0.0)
        return (obs, env_state, action, playing & ~(terminated | truncated), total), None

    playing, total = jnp.ones(EPISODES, bool), jnp.zeros(EPISODES)
    carry = (obs, env_state, jnp.zeros_like(policy(obs)), playing, total)
    inputs = jnp.arange(LIMIT), jax.random.split(step_key, LIMIT)
    (*_, total), _ = jax.lax.scan(step, carry, inputs)
    return total.mean()


def train_brax(task, steps, options, seeds):
    """Train a seed with Brax's PPO and its own wrappers."""
    import environments  # not at the top, because it starts JAX, which use_cores has to precede
    from brax import envs
    from brax.training.agents.ppo import train as ppo

    # Brax 0.14.2 calls a function that JAX 0.11 has removed.
    jax.device_put_replicated = lambda x, devices: jax.tree.map(
        lambda leaf: jnp.stack([leaf] * len(devices)), x
    )
    make_policy, params, _ = ppo.train(
        environment=envs.get_environment(task, backend="spring"),
        num_timesteps=steps,
        episode_length=LIMIT,
        normalize_observations=True,
        seed=seeds[0],
        max_devices_per_host=1,
        run_evals=False,
        **options,
    )
    policy = make_policy(params, deterministic=True)
    act = lambda obs: policy(obs, jax.random.key(0))[0]
    env = environments.make(f"{task}-brax")
    score = jax.jit(partial(play, env, act, repeat=options["action_repeat"]))
    names = ("batch_size", "unroll_length", "num_minibatches", "action_repeat")
    iteration = math.prod(options[name] for name in names)
    (row,) = scored(seeds, [score(jax.random.key(1000 + seeds[0]))])
    return [row | {"trained_steps": -(-steps // iteration) * iteration}]


def train_purejaxrl(checkout, task, steps, options, seeds):
    """Train seeds with PureJaxRL's script for continuous actions, on spring physics."""
    import environments
    import purejaxrl

    module = purejaxrl.load_module(checkout, "ppo_continuous")
    module.BraxGymnaxWrapper = partial(module.BraxGymnaxWrapper, backend="spring")
    options = options | dict(TOTAL_TIMESTEPS=steps, ENV_NAME=task)
    env = environments.make(f"{task}-brax")
    network = module.ActorCritic(env.action_space.shape[0], activation=options["ACTIVATION"])

    def score(seed):
        key = jax.random.key(seed)
        trained, env_state, *_ = module.make_train(options)(key)["runner_state"]
        stats = env_state.env_state  # statistics of observations, the same in all rows
        mean, deviation = stats.mean[0], jnp.sqrt(stats.var[0] + 1e-8)

        def policy(obs):
            gaussian, _ = network.apply(trained.params, (obs - mean) / deviation)
            return jnp.clip(gaussian.mode(), -1.0, 1.0)

        return play(env, policy, jax.random.key(1000 + seed))

    scores = ppo_discrete.over_seeds(score, len(seeds))(np.array(seeds))
    batch = options["NUM_ENVS"] * options["NUM_STEPS"]
    trained_steps = steps // batch * batch
    return [row | {"trained_steps": trained_steps} for row in scored(seeds, scores)]


def cell_of(algorithm, task, steps, checkout=None):
    path = RESULTS / "locomotion" / f"{algorithm}__{task}__{steps}.csv"
    seeds = range(SEEDS[algorithm])
    if algorithm in OURS:
        env_id = f"benchmarks.environments:{task}-brax"
        return script_cell(path, algorithm, env_id, steps, seeds)
    if algorithm == "brax":
        options, chunk = BRAX[task], 1
        train = partial(train_brax, task, steps, options)
    else:
        options, chunk = PUREJAXRL, None
        train = partial(train_purejaxrl, checkout, task, steps, options)
    config = {"algorithm": algorithm, "task": task, "steps": steps, **options}
    return Cell(path, config, seeds, train, chunk)


def table():
    rows = []
    for steps, task in itertools.product(BUDGETS, TASKS):
        texts = [cell_of(algorithm, task, steps).text(1) for algorithm in LABELS]
        rows.append([task, budget(steps), *texts])
    return markdown(["task", "steps", *LABELS.values()], rows)


def draw_curves():
    """A panel per task: our training returns, and the final scores of the others as dots."""
    steps = BUDGETS[-1]
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    for axes, task in zip(panels, TASKS, strict=True):
        for i, (algorithm, label) in enumerate(LABELS.items()):
            cell = cell_of(algorithm, task, steps)
            curve = cell.path.with_suffix(".curve.csv")
            if curve.exists():
                draw_curve(axes, curve, label, f"C{i}")
            elif cell.rows():
                score = interquartile_mean(cell.scores())
                axes.plot(steps / 1000, score, "o", color=f"C{i}", label=f"{label}, at the end")
        axes.set(title=task, xlabel="thousand steps per seed", ylabel="return")
        axes.grid(alpha=0.3)
    panels[1].legend(*panels[2].get_legend_handles_labels(), loc="lower right")  # has room
    figure.savefig(RESULTS / "locomotion.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="train only cells whose file name contains this")
    parser.add_argument("--steps", type=int, nargs="+", default=BUDGETS, help="budgets to train")
    parser.add_argument("--purejaxrl", metavar="PATH", help="a checkout of PureJaxRL")
    parser.add_argument("--tables", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    ppo_discrete.use_cores(6)
    algorithms = [name for name in LABELS if name != "purejaxrl" or arguments.purejaxrl]
    for algorithm in algorithms if not arguments.tables else []:
        for steps, task in itertools.product(arguments.steps, TASKS):
            cell = cell_of(algorithm, task, steps, arguments.purejaxrl)
            if arguments.only in cell.path.stem:
                cell.complete()
    publish("locomotion", table())
    draw_curves()


if __name__ == "__main__":
    main()
