"""RLHF in miniature: what a policy gains and loses as the KL penalty β becomes smaller.

    python benchmarks/rlhf.py                 # train what has no current result
    python benchmarks/rlhf.py --only GRPO     # only this algorithm
    python benchmarks/rlhf.py --tables        # train nothing

tests/edits/tokens.py describes the language, its reward model with a loophole and the true reward.
The algorithms are patches beside it. For each β, each of them starts from the same references, one
per seed. Stored are means over 4000 texts of the trained policy: the reward of the reward model
(proxy), the true reward, and KL(π ‖ π_ref) of a text. Intervals are Student's 95 % intervals.

Both rewards are sums over pairs of tokens. Dynamic programming over the last token therefore finds
the best policy for each β: π(text) ∝ π_human(text) exp(R(text) / β).
"""

import argparse
import sys
import tempfile
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats
from common import RESULTS, ROOT, Cell, copy_patched, load_module, markdown, publish
from matplotlib.figure import Figure

import ppo_discrete

sys.path.insert(0, str(ROOT / "tests" / "edits"))
import tokens

ALGORITHMS = {"PPO": ("rlhf",), "GRPO": ("rlhf", "grpo"), "DPO": ("rlhf", "dpo")}  # patches
BETAS = (0.0, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
SEEDS, TEXTS = 4, 4000
MEASURES = ("proxy_reward", "true_reward", "kl")
CONFIG = dict(
    env_id="tokens:any", total_timesteps=120 * 1024, num_envs=128, num_steps=tokens.LENGTH,
    learning_rate=1e-3, gamma=1.0, update_epochs=4, num_minibatches=4, target_kl=0.02,
)  # fmt: skip


def measure(script, config, params, reference, key):
    """Proxy reward, true reward and KL to the reference, averaged over texts: [3]."""
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
    """The same three numbers for the best policy with a KL penalty β > 0.

    For a last token s, V_t(s) = β log Σ_a π_human(a|s) exp((r(s,a) + V_{t+1}(a)) / β), and
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


def cell_of(algorithm, betas=BETAS, num_seeds=SEEDS, folder=RESULTS, **fields):
    """The cell of an algorithm, with columns such as kl_0.1 for β = 0.1, and kl_reference."""

    def train(seeds):
        with tempfile.TemporaryDirectory() as temporary:
            path = copy_patched("ppo_discrete", ALGORITHMS[algorithm], temporary)
            script = load_module(path, f"ppo_discrete_{algorithm}")
        run = script.over_seeds(trained(script, betas, **fields), len(seeds))
        results, references = jax.device_get(run(np.array(seeds)))
        numbers = np.column_stack([results.reshape(len(seeds), -1), references]).tolist()
        columns = [f"{name}_{beta}" for beta in [*betas, "reference"] for name in MEASURES]
        rows = [dict(zip(columns, row, strict=True)) for row in numbers]
        return [{"seed": seed} | row for seed, row in zip(seeds, rows, strict=True)]

    config = ppo_discrete.Config(**CONFIG | fields)
    path = folder / "rlhf" / f"{algorithm}.csv"
    others = {"patches": list(ALGORITHMS[algorithm]), "betas": list(betas)}
    return Cell.of_script(path, "ppo_discrete", config, range(num_seeds), train, **others)


def read(cell, beta):
    """The stored measures for a β, or for the "reference": [seeds, 3]."""
    return np.stack([cell.scores(f"{name}_{beta}") for name in MEASURES], axis=-1)


def half_width(x):
    """Half the width of Student's 95 % interval of the mean over the first axis."""
    return scipy.stats.t.ppf(0.975, len(x) - 1) * x.std(axis=0, ddof=1) / np.sqrt(len(x))


def table(cells):
    """A row per algorithm and β, the reference, and the best policy for each β > 0."""

    def texts(x):
        return [f"{m:.2f} ± {e:.2f}" for m, e in zip(x.mean(0), half_width(x), strict=True)]

    rows = []
    for name, cell in cells.items():
        label = f"{name}{cell.dagger()}"
        rows += [[label, f"{beta:g}", *texts(read(cell, beta))] for beta in cell.config["betas"]]
    rows.append(["reference", "", *texts(read(cells["PPO"], "reference"))])
    for beta in filter(None, cells["PPO"].config["betas"]):
        rows.append(["optimum", f"{beta:g}", *(f"{x:.2f}" for x in optimum(beta))])
    return markdown(["", "β", "proxy reward", "true reward", "KL"], rows)


def draw(cells, path):
    """Rewards of PPO over β, and the true reward of all algorithms over the KL."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    betas = np.array(cells["PPO"].config["betas"])
    shown = np.where(betas > 0, betas, betas[betas > 0].min() / 2)  # a logarithmic axis has no 0
    ppo = np.stack([read(cells["PPO"], beta) for beta in betas], axis=1)  # [seeds, betas, 3]
    fine = np.geomspace(betas[betas > 0].min(), betas.max(), 100)
    best = np.array([optimum(beta) for beta in fine])
    for i, (label, color) in enumerate([("proxy", "tab:orange"), ("true", "tab:blue")]):
        mean, half = ppo[..., i].mean(axis=0), half_width(ppo[..., i])
        left.errorbar(shown, mean, half, color=color, marker="o", label=f"{label} reward, PPO")
        left.plot(fine, best[:, i], color=color, linestyle="--", label=f"{label} reward, best")
    reference = read(cells["PPO"], "reference").mean(axis=0)
    left.axhline(reference[1], color="gray", linewidth=0.8, label="true reward, reference")
    left.set(xscale="log", xlabel="KL penalty β", ylabel="mean over texts")
    left.set_xticks(shown, [f"{beta:g}" for beta in betas], minor=False)
    left.set_xticks([], minor=True)
    right.plot(best[:, 2], best[:, 1], color="black", linestyle="--", label="best policy")
    for name, cell in cells.items():
        results = np.stack([read(cell, beta) for beta in cell.config["betas"]], axis=1)
        mean, half = results.mean(axis=0), half_width(results)  # [betas, 3]
        right.errorbar(mean[:, 2], mean[:, 1], half[:, 1], half[:, 2], marker="o", label=name)
    right.set(xlabel="KL(π ‖ π_ref) of a text, nats", ylabel="true reward")
    right.set_xscale("symlog", linthresh=1.0)
    left.legend(fontsize="small", loc="upper right")
    right.legend(fontsize="small", loc="lower left")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", choices=["", *ALGORITHMS], help="one algorithm")
    parser.add_argument("--tables", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    cells = {name: cell_of(name) for name in ALGORITHMS}
    for name, cell in cells.items():
        if arguments.only in name and not arguments.tables:
            cell.complete()
    cells = {name: cell for name, cell in cells.items() if cell.rows()}
    publish("rlhf", table(cells))
    draw(cells, RESULTS / "rlhf.png")


if __name__ == "__main__":
    main()
