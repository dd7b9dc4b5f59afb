"""RLHF in miniature: what the policy gains and loses as the price β of leaving the reference falls.

    python benchmarks/rlhf.py                 # trains all, a few minutes on two cores
    python benchmarks/rlhf.py --only GRPO     # only this one, and draws all that is stored
    python benchmarks/rlhf.py --only speed    # only the comparison of speeds

The language, its reward model with a loophole and the reward that is really wanted are described
in tests/edits/tokens.py, the algorithms are patches beside it. Each is trained from the same
references (one per seed) for each β. Afterwards 4000 texts are sampled: their mean proxy reward,
true reward, and KL(π ‖ π_ref), which is summed over a text's tokens and exact in each state.
Results are in benchmarks/results/rlhf.json, and in rlhf.png as means over the seeds with 95 %
intervals (Student's). The speeds are those of one seed and one β, of programs that take turns: the
fastest of ten runs each, reference included.

Since both rewards are sums over pairs of tokens, the best policy for each β is known: it is
π(text) ∝ π_human(text) exp(R(text) / β), by dynamic programming over the last token. (It starts
from the human text itself, where the algorithms start from its imitation.)
"""

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "edits")]
import tokens

import ppo_discrete

ALGORITHMS = {"PPO": ("rlhf",), "GRPO": ("rlhf", "grpo"), "DPO": ("rlhf", "dpo")}  # patches
BETAS = (0.0, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
SEEDS, TEXTS = 4, 4000
CONFIG = dict(
    env_id="tokens:any",
    total_timesteps=120 * 1024,
    num_envs=128,
    num_steps=tokens.LENGTH,
    learning_rate=1e-3,
    gamma=1.0,
    update_epochs=4,
    num_minibatches=4,
    kl_threshold=0.02,
)


def load(*names):
    """ppo_discrete.py with these patches applied, as a module."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "ppo_discrete.py")
        path.write_text((ROOT / "ppo_discrete.py").read_text())
        for name in names:
            command = ["git", "apply", str(ROOT / "tests" / "edits" / f"{name}.patch")]
            subprocess.run(command, cwd=folder, check=True)
        spec = importlib.util.spec_from_file_location("_".join(names), path)
        sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def measure(script, config, params, reference, key):
    """Proxy reward, true reward and KL to the reference, means over texts: [3]."""
    actor = script.Actor(tokens.VOCABULARY, config.hidden_sizes, config.activation)
    prompt_key, text_key = jax.random.split(key)
    policy = lambda obs: actor.apply(params, obs).logits
    text, obs, _ = tokens.complete(policy, text_key, tokens.draw_prompts(prompt_key, TEXTS))
    log_p = jax.nn.log_softmax(policy(obs))
    log_ref = jax.nn.log_softmax(actor.apply(reference, obs).logits)
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_ref), axis=(0, -1))  # [L, N, A] -> [N]
    values = tokens.proxy_reward(text), tokens.true_reward(text), kl
    return jnp.stack([value.mean() for value in values])


def optimum(beta, length=tokens.LENGTH):
    """The same three of the best policy for the reward model and β > 0, starting from human text.

    V_t(s) = β log Σ_a π_human(a|s) exp((r(s,a) + V_{t+1}(a)) / β) for a last token s, and
    π(a|s) = π_human(a|s) exp((r(s,a) + V_{t+1}(a) - V_t(s)) / β).
    """
    log_human, size = np.log(np.float64(tokens.HUMAN)), tokens.VOCABULARY
    proxy = np.float64(np.arange(size) == tokens.THANKS) * np.ones((size, 1))  # [last, next]
    true = np.where(tokens.PROPER, proxy, -1.0)
    value, policies = np.zeros(size), []
    for _ in range(length):
        q = log_human + (proxy + value) / beta
        value = beta * scipy.special.logsumexp(q, axis=1)
        policies.insert(0, np.exp(q - value[:, None] / beta))
    share, result = np.full(size, 1 / size), np.zeros(3)  # of the texts with this last token
    for policy in policies:
        joint = share[:, None] * policy
        log_ratio = np.where(policy > 0, np.log(np.maximum(policy, 1e-300)) - log_human, 0)
        result += [np.sum(joint * x) for x in (proxy, true, log_ratio)]
        share = joint.sum(axis=0)
    return result


def trained(script, betas, **fields):
    """A function of the seed, which trains for each β: [betas, 3], and [3] of the reference."""
    config = script.Config(**CONFIG | fields)

    def run(seed):
        key = jax.random.key(seed)
        test_key = jax.random.fold_in(key, 2**31)

        def of_beta(beta):
            state, _ = script.train(replace(config, beta=beta), key, tokens.make("any"))
            start = measure(script, config, state.reference, state.reference, test_key)
            end = measure(script, config, state.params["actor"], state.reference, test_key)
            return end, start

        results, start = jax.vmap(of_beta)(jnp.asarray(betas))
        return results, start[0]

    return run


def train_all(script, betas, seeds, **fields):
    """Train for all seeds: [seeds, betas, 3], and [seeds, 3] of the references."""
    return jax.device_get(script.over_seeds(trained(script, betas, **fields))(np.arange(seeds)))


def compare_speed(rounds=10, **fields):
    """Seconds of a run of each algorithm, the fastest of some in turn."""
    runs = {}
    for name, patches in ALGORITHMS.items():
        script = load(*patches)
        config = script.Config(**CONFIG | fields)
        train = lambda key, script=script, config=config: script.train(
            config, key, tokens.make("any")
        )
        runs[name] = jax.jit(train).lower(jax.random.key(0)).compile()
    seconds = {name: [] for name in runs}
    for i in range(rounds):
        for name, run in runs.items():
            clock = time.perf_counter()
            jax.block_until_ready(run(jax.random.key(i)))
            seconds[name].append(time.perf_counter() - clock)
    return {name: min(x) for name, x in seconds.items()}


def interval(x):
    """Half the width of Student's 95 % interval of the mean over the first axis."""
    return scipy.stats.t.ppf(0.975, len(x) - 1) * x.std(axis=0, ddof=1) / np.sqrt(len(x))


def table(stored):
    """Markdown: a row per algorithm and β."""
    lines = ["| | β | proxy reward | true reward | KL |", "|---|---|---|---|---|"]
    add = lambda name, beta, cells: lines.append(f"| {name} | {beta} | {' | '.join(cells)} |")
    text = lambda x: [f"{m:.2f} ± {e:.2f}" for m, e in zip(x.mean(0), interval(x), strict=True)]
    for name in [name for name in ALGORITHMS if name in stored]:
        results = np.array(stored[name]["results"])  # [seeds, betas, 3]
        for i, beta in enumerate(stored[name]["betas"]):
            add(name, f"{beta:g}", text(results[:, i]))
    add("reference", "", text(np.array(stored[name]["reference"])))
    for beta in stored[name]["betas"]:
        if beta > 0:
            add("optimum", f"{beta:g}", [f"{x:.2f}" for x in optimum(beta)])
    return "\n".join(lines)


def draw(stored, path):
    """PPO's rewards over β, and the true reward of all over the KL."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    betas = np.array(stored["PPO"]["betas"])
    shown = np.where(betas > 0, betas, betas[betas > 0].min() / 2)  # 0 has no place on the axis
    ppo = np.array(stored["PPO"]["results"])  # [seeds, betas, 3]
    fine = np.geomspace(betas[betas > 0].min(), betas.max(), 100)
    best = np.array([optimum(beta) for beta in fine])
    for i, (label, color) in enumerate([("proxy", "tab:orange"), ("true", "tab:blue")]):
        mean, half = ppo[..., i].mean(axis=0), interval(ppo[..., i])
        left.errorbar(shown, mean, half, color=color, marker="o", label=f"{label} reward, PPO")
        left.plot(fine, best[:, i], color=color, linestyle="--", label=f"{label} reward, best")
    reference = np.array(stored["PPO"]["reference"]).mean(axis=0)
    left.axhline(reference[1], color="gray", linewidth=0.8, label="true reward, reference")
    left.set(xscale="log", xlabel="β, price of a nat of KL", ylabel="mean of a text")
    left.set_xticks(shown, [f"{beta:g}" for beta in betas], minor=False)
    left.set_xticks([], minor=True)
    right.plot(best[:, 2], best[:, 1], color="black", linestyle="--", label="best policy")
    for name in [name for name in ALGORITHMS if name in stored]:
        results = np.array(stored[name]["results"])
        mean, half = results.mean(axis=0), interval(results)  # [betas, 3]
        order = np.argsort(mean[:, 2])  # DPO learns nothing for β = 0
        mean, half = mean[order], half[order]
        right.errorbar(mean[:, 2], mean[:, 1], half[:, 1], half[:, 2], marker="o", label=name)
    right.set(xlabel="KL(π ‖ π_ref) of a text, nats", ylabel="true reward")
    right.set_xscale("symlog", linthresh=1.0)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="upper right" if axes is left else "lower left")
    figure.savefig(path, dpi=110)


def benchmark(folder, only="", betas=BETAS, seeds=SEEDS, **fields):
    """Train and compare what is asked for, store it with what is there, draw; return all of it."""
    path = folder / "rlhf.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax"))
    made = f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {versions}"
    for name, patches in ALGORITHMS.items():
        if only in ("", name):
            results, reference = train_all(load(*patches), betas, seeds, **fields)
            stored[name] = dict(made=made, config=CONFIG | fields, betas=betas)
            stored[name] |= dict(results=results.tolist(), reference=reference.tolist())
    if only in ("", "speed"):
        stored["speed"] = dict(made=made, config=CONFIG | fields, seconds=compare_speed(**fields))
    path.write_text(json.dumps(stored) + "\n")
    draw(stored, folder / "rlhf.png")
    return stored


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", choices=["", *ALGORITHMS, "speed"])
    only = parser.parse_args().only
    ppo_discrete.use_cores(1 if only == "speed" else SEEDS)  # before JAX starts
    ppo_discrete.straight_threefry()
    stored = benchmark(RESULTS, only)
    print(table(stored))
    print(stored.get("speed"))


if __name__ == "__main__":
    main()
