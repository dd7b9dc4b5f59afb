"""Pictures that explain the algorithms, from the scripts' own functions and from short runs.

    python benchmarks/figures.py                    # all, into docs/figures
    python benchmarks/figures.py a c --out FOLDER   # some, elsewhere

a  the clipped objective of PPO, and where its gradient is zero
b  the surrogates of PPO-clip on the line from θ_old through θ_new (figure 2 of the PPO paper)
c  the surrogate against the true return on the line of a TRPO step
d  β and KL while PPO-penalty adapts β
e  KL, accepted steps and tries of TRPO, with and hardly with damping

All runs are of CartPole-v1 with the scripts' defaults, but for what stands in the functions below.
What an update sees is had by replacing, in the loaded module, a public function that it calls.
"""

import argparse
import contextlib
import functools
import io
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ppo_discrete
import ppo_penalty
import trpo

SEEDS = 8
EPISODE = 500  # the limit of CartPole-v1
THOUSANDS = "thousand environment steps per seed"
BLUE, ORANGE, GREEN, GREY = "tab:blue", "tab:orange", "tab:green", "0.45"


@contextlib.contextmanager
def replaced(script, name, function):
    """In here `script.name` is `function`."""
    original = getattr(script, name)
    setattr(script, name, function)
    try:
        yield
    finally:
        setattr(script, name, original)


def keys_of(seeds):
    return jax.vmap(jax.random.key)(jnp.arange(seeds))


def after(script, config, key, updates):
    """The state after some updates, and the function that makes the next one."""
    init, update = script.make_train(config)
    return jax.lax.scan(update, init(key), None, updates)[0], update


# ---- What is drawn -------------------------------------------------------------------------------


def clipped_objective(ratio, advantage, clip_eps):
    """L_CLIP of single samples [R] of one advantage, and its slope in the ratio, both [R]."""
    one = lambda x: ppo_discrete.clipped_surrogate(x[None], jnp.full(1, advantage), clip_eps)
    return jax.vmap(jax.value_and_grad(one))(ratio)


def surrogates_on_a_line(config, updates, alphas, key):
    """What PPO-clip's next update sees at θ_old + α (θ_new - θ_old): {name: [alphas]}.

    All means are over the whole rollout, and so are the advantages' mean and deviation. (The update
    itself takes those of its minibatches.)
    """
    batches, make_take = [], ppo_discrete.make_take

    def keep(batch):
        batches.append(batch)
        return make_take(batch)

    with replaced(ppo_discrete, "make_take", keep):
        state, update = after(ppo_discrete, config, key, updates)
        new_state, _ = update(state, None)
    batch = batches[-1]  # of this update; those before were of the ones in `after`
    env = ppo_discrete.make_env(config.env_id)
    actor = ppo_discrete.Actor(env.action_space.n, config.hidden_sizes, config.activation)
    with_kl = lambda policy: ppo_penalty.Categorical(policy.logits)  # PPO-clip needs no exact KL
    old, new = state.params["actor"], new_state.params["actor"]
    old_policy = with_kl(actor.apply(old, batch["obs"]))
    advantage = ppo_discrete.normalize_advantage(batch["advantage"])

    def measure(alpha):
        params = jax.tree.map(lambda old, new: old + alpha * (new - old), old, new)
        policy = actor.apply(params, batch["obs"])
        ratio = jnp.exp(policy.log_prob(batch["action"]) - batch["old_log_prob"])
        clipped = jnp.clip(ratio, 1.0 - config.clip_eps, 1.0 + config.clip_eps)
        return dict(
            ratio=ratio.mean(),
            unclipped=ppo_penalty.surrogate(ratio, advantage),
            clipped=ppo_penalty.surrogate(clipped, advantage),
            minimum=ppo_discrete.clipped_surrogate(ratio, advantage, config.clip_eps),
            kl=old_policy.kl(with_kl(policy)).mean(),
        )

    return jax.lax.map(measure, alphas)


def play(config, obs_stats, params, key, episodes):
    """Whole episodes of TRPO's policy as it acts, drawing its actions, up to the limit.

    Returns obs [T, M, D] as the policy sees it, action, reward and whether it still plays [T, M].
    """
    env = trpo.make_env(config.env_id)
    actor = trpo.Actor(env.action_space, config.hidden_sizes, config.activation)
    keys = jax.random.split(key, EPISODE + 1)
    obs, env_state = env.reset(jax.random.split(keys[0], episodes))

    def step(carry, key):
        env_state, obs, playing = carry
        action_key, env_key = jax.random.split(key)
        obs = trpo.normalize(obs, obs_stats)
        action = actor.apply(params, obs).sample(action_key)
        env_state, _, next_obs, reward, terminated, truncated = env.step(
            jax.random.split(env_key, episodes), env_state, action
        )
        going_on = playing & ~(terminated | truncated)
        return (env_state, next_obs, going_on), (obs, action, reward * playing, playing)

    return jax.lax.scan(step, (env_state, obs, jnp.ones(episodes, bool)), keys[1:])[1]


def return_on_a_line(config, updates, alphas, episodes, key):
    """The return and TRPO's surrogate at θ_old + α (step of the next update): {name: [alphas]}.

    The surrogate is that of the undiscounted return with advantages measured in `episodes` whole
    episodes of π_old: η(π_old) + E[Σ_t (ρ_t - 1) (G_t - b_t)], G_t the rewards from step t on, b_t
    their mean. It has the value and the slope of the return at α = 0, but for noise.
    """
    searches = []

    def keep(measure, theta, step, *rest):
        searches.append((measure, theta, step))
        return search(measure, theta, step, *rest)

    search = trpo.line_search
    state, update = after(trpo, config, key, updates)
    with replaced(trpo, "line_search", keep):
        update(state, None)
    measure, theta, step = searches[-1]
    seen, kl = jax.lax.map(lambda alpha: measure(theta + alpha * step), alphas)

    env = trpo.make_env(config.env_id)
    actor = trpo.Actor(env.action_space, config.hidden_sizes, config.activation)
    unravel = ravel_pytree(state.params["actor"])[1]
    old_key, new_key = jax.random.split(jax.random.fold_in(key, 2**31))
    obs, action, reward, playing = play(config, state.obs_stats, unravel(theta), old_key, episodes)
    to_go = jnp.cumsum(reward[::-1], axis=0)[::-1]
    alive = jnp.maximum(playing.sum(axis=1, keepdims=True), 1)
    baseline = jnp.sum(to_go, axis=1, keepdims=True, where=playing) / alive
    advantage = jnp.where(playing, to_go - baseline, 0.0)  # [T, M]
    old_log_prob = actor.apply(unravel(theta), obs).log_prob(action)

    def at(alpha):
        params = unravel(theta + alpha * step)
        ratio = jnp.exp(actor.apply(params, obs).log_prob(action) - old_log_prob)
        *_, new_reward, _ = play(config, state.obs_stats, params, new_key, episodes)
        gain = trpo.surrogate(ratio - 1.0, advantage) * EPISODE  # from the mean over T to the sum
        return gain, new_reward.sum(axis=0).mean()

    gain, returns = jax.lax.map(at, alphas)
    return dict(seen=seen, kl=kl, gain=gain, returns=returns, old=reward.sum(axis=0).mean())


def adapted_betas(config, betas, keys):
    """The metrics of PPO-penalty that starts with each β: {name: [betas, seeds, updates]}."""
    run = lambda beta, key: ppo_penalty.train(replace(config, beta=beta), key)[1]
    return jax.vmap(jax.vmap(run, (None, 0)), (0, None))(betas, keys)


def damped_runs(config, dampings, keys):
    """The metrics of TRPO with each damping λ: {name: [dampings, seeds, updates]}."""
    run = lambda damping, key: trpo.train(replace(config, cg_damping=damping), key)[1]
    return jax.vmap(jax.vmap(run, (None, 0)), (0, None))(dampings, keys)


# ---- Drawing -------------------------------------------------------------------------------------


def panels_of(rows, columns, height, **options):
    figure = Figure(figsize=(8, height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in panels.ravel():
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def draw_mean(axes, x, y, color, label=None, logarithmic=False, **style):
    """The mean of y [seeds, X] as a line, with its 95 % bootstrap interval as a band."""
    y = np.log(y) if logarithmic else np.asarray(y)
    back = np.exp if logarithmic else lambda x: x
    drawn = np.random.default_rng(0).integers(len(y), size=(2000, len(y)))
    low, high = np.percentile(y[drawn].mean(axis=1), [2.5, 97.5], axis=0)
    axes.plot(x, back(y.mean(axis=0)), color=color, label=label, **style)
    axes.fill_between(x, back(low), back(high), color=color, alpha=0.2, lw=0)


def save(figure, path):
    """As PNG with a palette, which is half as large."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    PIL.Image.open(buffer).convert("RGB").quantize(256).save(path, optimize=True)


def draw_objective(data):
    """a: two panels, Â > 0 and Â < 0."""
    figure, (panels,) = panels_of(1, 2, 3.2)
    ratio, eps = data["ratio"], data["eps"]
    for axes, sign in zip(panels, (1.0, -1.0), strict=True):
        objective, slope = data["curves"][sign]
        axes.plot(ratio, sign * ratio, color=GREY, ls=":", label="ρ Â, not clipped")
        axes.plot(ratio, objective, color=GREY, lw=2.5, label="L_CLIP, gradient zero")
        pulls = np.where(slope != 0, objective, np.nan)
        axes.plot(ratio, pulls, color=BLUE, lw=3, label="L_CLIP, gradient Â")
        for start, end in runs_of(slope != 0):
            axes.axvspan(ratio[start], ratio[end], color=BLUE, alpha=0.1, lw=0)
        axes.plot(1.0, sign, "o", color="black", label="ρ = 1: the old policy")
        axes.set(title=f"Â {'>' if sign > 0 else '<'} 0", xlabel="probability ratio ρ", xlim=(0, 2))
        axes.set_xticks([0, 1 - eps, 1, 1 + eps, 2], ["0", "1-ε", "1", "1+ε", "2"])
        axes.set_yticks([0, sign, 2 * sign], ["0", "Â", "2 Â"])
    panels[0].set_ylabel("contribution to the objective")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def runs_of(mask):
    """First and last index of each run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(int)))
    return [(start, end - 1) for start, end in edges.reshape(-1, 2)]


def draw_surrogates(data):
    """b: the surrogates, and below them the KL divergence."""
    figure, panels = panels_of(2, 1, 5.2, sharex=True, height_ratios=[2, 1])
    top, bottom = panels[:, 0]
    alphas = data["alphas"]
    draw_mean(top, alphas, data["unclipped"], ORANGE, "L = E[ρ Â]", ls="-.")
    draw_mean(top, alphas, data["clipped"], GREEN, "E[clip(ρ, 1-ε, 1+ε) Â]", ls="--")
    draw_mean(top, alphas, data["minimum"], BLUE, "L_CLIP, with the smaller of both")
    draw_mean(bottom, alphas, data["kl"], GREY)
    for axes in (top, bottom):
        axes.axvline(0, color="black", lw=0.8)
        axes.axvline(1, color="black", lw=0.8)
    top.set_ylabel("objective (in deviations of Â)")
    top.legend(loc="lower left")
    bottom.set(ylabel="KL(π_old ‖ π_θ) (nats)", xlabel="α, in θ_old + α (θ_new - θ_old)")
    bottom.set_xlim(alphas[0], alphas[-1])
    ticks = np.arange(int(alphas[-1]) + 1)
    bottom.set_xticks(ticks, ["0: θ_old", "1: θ_new", *map(str, ticks[2:])])
    return figure


def draw_return(data):
    """c: per moment of the training the return and the surrogate, and below their difference."""
    figure, panels = panels_of(2, len(data), 5.6, sharex=True, sharey="row", height_ratios=[3, 2])
    for (top, bottom), (updates, line) in zip(panels.T, data.items(), strict=True):
        alphas, surrogate = line["alphas"], line["old"][:, None] + line["gain"]
        within = alphas[line["kl"].mean(axis=0) <= line["max_kl"]].max()
        draw_mean(top, alphas, surrogate, ORANGE, "surrogate", ls="--")
        draw_mean(top, alphas, line["returns"], BLUE, "return")
        top.axhline(EPISODE, color=GREY, ls=":", label="largest return possible")
        draw_mean(bottom, alphas, surrogate - line["returns"], "black")
        bottom.axhline(0, color=GREY, lw=0.8)
        for axes in (top, bottom):
            axes.axvspan(0, within, color=GREEN, alpha=0.2, lw=0, label="trust region, KL ≤ δ")
        top.set_title(f"after {updates} update{'s' * (updates > 1)}", pad=24)
        scale = top.secondary_xaxis("top")
        ticks = [1, 4, 8, 12]
        kl = [np.interp(tick, alphas, line["kl"].mean(axis=0)) for tick in ticks]
        scale.set_xticks(ticks, [f"KL {x:.2g}" for x in kl], fontsize=8)
        bottom.set(xlabel="α, in θ_old + α · step", xlim=(0, alphas[-1]))
    panels[0, 0].set_ylabel("return of an episode")
    panels[1, 0].set_ylabel("surrogate - return")
    panels[0, 0].legend(loc="center", bbox_to_anchor=(0.55, 0.55))
    return figure


def draw_beta(data):
    """d: β, the KL that it leads to, and the return."""
    figure, panels = panels_of(3, 1, 6, sharex=True)
    top, middle, bottom = panels[:, 0]
    steps = data["steps"]
    colors = (ORANGE, BLUE, GREEN)
    for color, beta, betas, kl, returns in zip(
        colors, data["betas"], data["beta"], data["kl"], data["episodic_return"], strict=True
    ):
        draw_mean(top, steps, betas, color, f"β = {beta:g} at the start", logarithmic=True)
        draw_mean(middle, steps, kl, color, logarithmic=True)
        draw_mean(bottom, *in_blocks(steps, returns, 5), color)
    low, high = data["target_kl"] / 1.5, data["target_kl"] * 1.5
    middle.axhspan(low, high, color=GREY, alpha=0.3, lw=0, label="β stays if KL is in here")
    top.set(yscale="log", ylabel="β")
    middle.set(yscale="log", ylabel="KL(π_old ‖ π_new) (nats)")
    bottom.set(ylabel="return in training", xlabel=THOUSANDS, xlim=(0, steps[-1]))
    top.legend(), middle.legend()
    return figure


def in_blocks(steps, x, size):
    """The mean of every `size` updates, NaN left out: x [seeds, updates] -> steps, x."""
    length = x.shape[1] // size * size
    blocks = x[:, :length].reshape(len(x), -1, size)
    return steps[size - 1 : length : size], np.nanmean(blocks, axis=2)


def draw_line_search(data):
    """e: KL and tries, for each damping; how many steps were accepted stands in the legend."""
    figure, ((top,), (bottom,)) = panels_of(2, 1, 4.8, sharex=True)
    for i, (color, damping) in enumerate(zip((BLUE, ORANGE), data["dampings"], strict=True)):
        accepted = data["step_accepted"][i]
        label = f"damping λ = {damping:g}: {accepted.sum():.0f} of {accepted.size} steps accepted"
        draw_mean(top, *in_blocks(data["steps"], data["kl"][i], 3), color)
        draw_mean(bottom, *in_blocks(data["steps"], data["line_search_steps"][i], 3), color, label)
    top.axhline(data["max_kl"], color="black", lw=0.8, ls="--", label="δ")
    top.set(ylabel="KL(π_old ‖ π_new) (nats)", ylim=(0, 1.1 * data["max_kl"]))
    bottom.set(ylabel="tries of the line search", xlabel=THOUSANDS)
    bottom.set(xlim=(0, data["steps"][-1]), ylim=(0, None))
    top.legend(loc="lower left"), bottom.legend(loc="upper left")
    return figure


# ---- The five pictures, as in docs/figures -------------------------------------------------------


def objective():
    ratio, eps = jnp.linspace(0.0, 2.0, 2000), ppo_discrete.Config().clip_eps  # not on a bend
    curves = {sign: clipped_objective(ratio, sign, eps) for sign in (1.0, -1.0)}
    return dict(ratio=ratio, eps=eps, curves=curves)


def surrogates():
    config, alphas = ppo_discrete.default_config(), jnp.linspace(0, 4, 41)
    line = functools.partial(surrogates_on_a_line, config, 0, alphas)
    return dict(alphas=alphas, **jax.jit(jax.vmap(line))(keys_of(SEEDS)))


def returns():
    config, alphas = trpo.default_config(), jnp.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 10, 12])
    lines = {}
    for updates in (1, 4):
        line = functools.partial(return_on_a_line, config, updates, alphas, 256)
        measured = jax.jit(lambda keys, line=line: jax.lax.map(line, keys))(keys_of(SEEDS))
        lines[updates] = dict(alphas=alphas, max_kl=config.max_kl, **measured)
    return lines


def betas():
    config = replace(ppo_penalty.Config(), total_timesteps=200_000)
    betas = jnp.array([0.01, 1.0, 100.0])
    metrics = jax.jit(functools.partial(adapted_betas, config))(betas, keys_of(SEEDS))
    return dict(betas=betas, target_kl=config.target_kl, steps=thousand_steps(config), **metrics)


def line_searches():
    config = replace(trpo.default_config(), total_timesteps=200_000)
    dampings = jnp.array([config.cg_damping, 1e-5])
    metrics = jax.jit(functools.partial(damped_runs, config))(dampings, keys_of(SEEDS))
    return dict(dampings=dampings, max_kl=config.max_kl, steps=thousand_steps(config), **metrics)


def thousand_steps(config):
    return (1 + np.arange(config.num_updates)) * config.batch_size / 1000


FIGURES = {  # name: (what is measured, how it is drawn, file)
    "a": (objective, draw_objective, "clipped_objective.png"),
    "b": (surrogates, draw_surrogates, "surrogates.png"),
    "c": (returns, draw_return, "surrogate_and_return.png"),
    "d": (betas, draw_beta, "adaptive_beta.png"),
    "e": (line_searches, draw_line_search, "line_search.png"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=list(FIGURES))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    ppo_discrete.straight_threefry()
    print(f"{time.strftime('%Y-%m-%d')}, {jax.devices()[0].device_kind}, {platform.machine()},")
    print(f"Python {platform.python_version()}, jax {jax.__version__}, {SEEDS} seeds")
    for name in arguments.names or FIGURES:
        measure, draw, file = FIGURES[name]
        start = time.perf_counter()
        data = jax.tree.map(np.asarray, measure())
        save(draw(data), arguments.out / file)
        print(f"{name}: {arguments.out / file}, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
