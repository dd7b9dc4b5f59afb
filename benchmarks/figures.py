"""Draw the pictures of docs/derivations.md and of docs/recipes.md.

    python benchmarks/figures.py                      # all; 15 minutes on two cores
    python benchmarks/figures.py surrogates symptoms  # some: the names of the files, see FIGURES

All runs are on CartPole-v1 with the defaults of the scripts, except where the functions below say
otherwise. The arrays inside an update are captured by replacing a function that the update calls.
For the symptoms, the medians over the seeds are printed too, for the table in docs/recipes.md.
"""

import argparse
import io
import re
import textwrap
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from common import DOCS, ROOT, circumstances, read_columns, replaced, run_script
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

import ppo_discrete
import ppo_penalty
import trpo

EPISODE = 500  # the time limit of CartPole-v1
STEPS = "thousand environment steps per seed"
BLUE, ORANGE, GREEN, GREY = "tab:blue", "tab:orange", "tab:green", "0.45"


def over_keys(function, seeds=8):
    """Results of `function(key)` for some keys, as NumPy arrays with a leading axis."""
    keys = jax.random.split(jax.random.key(0), seeds)
    return jax.device_get(jax.jit(partial(jax.lax.map, function))(keys))


def state_after(script, config, key, updates):
    """The state after some updates, and the function `update`."""
    init, update = script.make_train(config)
    return jax.lax.scan(update, init(key), None, updates)[0], update


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


def in_blocks(config, x, size):
    """Mean of every `size` updates without NaN: x [seeds, updates] -> thousand steps, blocks."""
    length = x.shape[1] // size * size
    blocks = x[:, :length].reshape(len(x), -1, size)
    steps = np.arange(size, length + 1, size) * config.batch_size / 1000
    return steps, np.nanmean(blocks, axis=2)


# ---- The clipped objective -----------------------------------------------------------------------


def clipped_objective(ratio, advantage, clip_eps):
    """L_CLIP of single samples [R] with one advantage, and its slope in the ratio, both [R]."""
    one = lambda x: ppo_discrete.clipped_surrogate(x[None], jnp.full(1, advantage), clip_eps)
    return jax.vmap(jax.value_and_grad(one))(ratio)


def draw_objective():
    figure, (panels,) = panels_of(1, 2, 3.2)
    ratio, eps = jnp.linspace(0.0, 2.0, 2000), ppo_discrete.Config().clip_eps
    for axes, sign in zip(panels, (1.0, -1.0), strict=True):
        objective, slope = clipped_objective(ratio, sign, eps)
        axes.plot(ratio, sign * ratio, color=GREY, ls=":", label="ρ Â, not clipped")
        axes.plot(ratio, objective, color=GREY, lw=2.5, label="L_CLIP, gradient zero")
        moving = np.where(slope != 0, objective, np.nan)
        axes.plot(ratio, moving, color=BLUE, lw=3, label="L_CLIP, gradient Â")
        axes.plot(1.0, sign, "o", color="black", label="ρ = 1: the old policy")
        axes.set(title=f"Â {'>' if sign > 0 else '<'} 0", xlabel="probability ratio ρ", xlim=(0, 2))
        axes.set_xticks([0, 1 - eps, 1, 1 + eps, 2], ["0", "1-ε", "1", "1+ε", "2"])
        axes.set_yticks([0, sign, 2 * sign], ["0", "Â", "2 Â"])
    panels[0].set_ylabel("contribution to the objective")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


# ---- The surrogates of PPO-clip ------------------------------------------------------------------


def surrogates_on_a_line(config, updates, alphas, key):
    """What the next update of PPO-clip sees at θ_old + α (θ_new - θ_old): {name: [alphas]}.

    Means are over the whole rollout, and the advantages are normalised over the whole rollout, not
    over minibatches as in the update itself.
    """
    state, update = state_after(ppo_discrete, config, key, updates)
    rollouts, advantages = [], []
    scan, gae = jax.lax.scan, ppo_discrete.gae

    def scan_and_keep(*arguments, **options):
        result = scan(*arguments, **options)
        if isinstance(result[1], ppo_discrete.Transition):
            rollouts.append(result[1])
        return result

    def gae_and_keep(*arguments):
        result = gae(*arguments)
        advantages.append(result[0])
        return result

    with replaced(jax.lax, scan=scan_and_keep), replaced(ppo_discrete, gae=gae_and_keep):
        new_state, _ = update(state)
    (rollout,), (advantage,) = rollouts, advantages
    advantage = ppo_discrete.normalize_advantage(advantage).ravel()
    obs = ppo_discrete.normalize(rollout.obs, state.obs_stats)
    space = ppo_discrete.load_env(config.env_id).action_space
    actor = ppo_discrete.Actor(space.n, config.hidden_sizes, config.activation)
    old, new = state.params["actor"], new_state.params["actor"]
    old_log_p = jax.nn.log_softmax(actor.apply(old, obs).logits)

    def measure(alpha):
        params = jax.tree.map(lambda old, new: old + alpha * (new - old), old, new)
        policy = actor.apply(params, obs)
        ratio = jnp.exp(policy.log_prob(rollout.action) - rollout.log_prob).ravel()
        clipped = jnp.clip(ratio, 1.0 - config.clip_eps, 1.0 + config.clip_eps)
        kl = jnp.exp(old_log_p) * (old_log_p - jax.nn.log_softmax(policy.logits))
        return dict(
            ratio=ratio.mean(),
            unclipped=(ratio * advantage).mean(),
            clipped=(clipped * advantage).mean(),
            minimum=ppo_discrete.clipped_surrogate(ratio, advantage, config.clip_eps),
            kl=kl.sum(axis=-1).mean(),
        )

    return jax.lax.map(measure, alphas)


def draw_surrogates():
    config, alphas = ppo_discrete.default_config("CartPole-v1"), jnp.linspace(0, 4, 41)
    data = over_keys(partial(surrogates_on_a_line, config, 0, alphas))
    figure, panels = panels_of(2, 1, 5.2, sharex=True, height_ratios=[2, 1])
    top, bottom = panels[:, 0]
    draw_mean(top, alphas, data["unclipped"], ORANGE, "L = E[ρ Â]", ls="-.")
    draw_mean(top, alphas, data["clipped"], GREEN, "E[clip(ρ, 1-ε, 1+ε) Â]", ls="--")
    draw_mean(top, alphas, data["minimum"], BLUE, "L_CLIP, with the smaller of both")
    draw_mean(bottom, alphas, data["kl"], GREY)
    for axes in (top, bottom):
        axes.axvline(0, color="black", lw=0.8)
        axes.axvline(1, color="black", lw=0.8)
    top.set_ylabel("objective (in standard deviations of Â)")
    top.legend(loc="lower left")
    bottom.set(ylabel="KL(π_old ‖ π_θ) (nats)", xlabel="α, in θ_old + α (θ_new - θ_old)")
    bottom.set_xticks(range(5), ["0: θ_old", "1: θ_new", "2", "3", "4"])
    return figure


# ---- The surrogate and the return on the line of a TRPO step -------------------------------------


def play(config, obs_stats, params, key, episodes):
    """Whole episodes of TRPO's policy with sampled actions, up to the time limit.

    Returns obs [T, M, D] as the policy sees it, and action, reward and whether it plays, [T, M].
    """
    env = trpo.load_env(config.env_id)
    actor = trpo.Actor(env.action_space, config.hidden_sizes, config.activation, config.initial_std)
    keys = jax.random.split(key, EPISODE + 1)
    obs, env_state = env.reset(jax.random.split(keys[0], episodes))

    def step(carry, key):
        env_state, obs, playing = carry
        action_key, env_key = jax.random.split(key)
        obs = trpo.normalize(obs, obs_stats)
        action = actor.apply(params, obs).sample(action_key)
        next_obs, env_state, reward, terminated, truncated, _ = env.step(
            jax.random.split(env_key, episodes), env_state, action
        )
        still_playing = playing & ~(terminated | truncated)
        return (env_state, next_obs, still_playing), (obs, action, reward * playing, playing)

    return jax.lax.scan(step, (env_state, obs, jnp.ones(episodes, bool)), keys[1:])[1]


def return_on_a_line(config, updates, alphas, episodes, key):
    """The return and TRPO's surrogate at θ_old + α (step of the next update): {name: [alphas]}.

    The surrogate is that of the undiscounted return, with advantages measured in whole episodes of
    π_old: η(π_old) + E[Σ_t (ρ_t - 1) (G_t - b_t)], where G_t is the sum of rewards from step t on
    and b_t its mean. At α = 0 it has the value and the slope of the return, except for noise.
    """
    searches, search = [], trpo.line_search

    def search_and_keep(measure, theta, step, *rest):
        searches.append((measure, theta, step))
        return search(measure, theta, step, *rest)

    state, update = state_after(trpo, config, key, updates)
    with replaced(trpo, line_search=search_and_keep):
        update(state)
    measure, theta, step = searches[-1]
    seen, kl = jax.lax.map(lambda alpha: measure(theta + alpha * step), alphas)

    space = trpo.load_env(config.env_id).action_space
    actor = trpo.Actor(space, config.hidden_sizes, config.activation, config.initial_std)
    unravel = ravel_pytree(state.params["actor"])[1]
    old_key, new_key = jax.random.split(jax.random.fold_in(key, 2**31))
    obs, action, reward, playing = play(config, state.obs_stats, unravel(theta), old_key, episodes)
    to_go = jnp.cumsum(reward[::-1], axis=0)[::-1]
    number = jnp.maximum(playing.sum(axis=1, keepdims=True), 1)
    baseline = jnp.sum(to_go, axis=1, keepdims=True, where=playing) / number
    advantage = jnp.where(playing, to_go - baseline, 0.0)  # [T, M]
    old_log_prob = actor.apply(unravel(theta), obs).log_prob(action)

    def at(alpha):
        params = unravel(theta + alpha * step)
        ratio = jnp.exp(actor.apply(params, obs).log_prob(action) - old_log_prob)
        *_, new_reward, _ = play(config, state.obs_stats, params, new_key, episodes)
        return ((ratio - 1.0) * advantage).sum(axis=0).mean(), new_reward.sum(axis=0).mean()

    gain, returns = jax.lax.map(at, alphas)
    return dict(seen=seen, kl=kl, gain=gain, returns=returns, old=reward.sum(axis=0).mean())


def draw_return():
    config = trpo.default_config("CartPole-v1")
    alphas = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 10, 12])
    figure, panels = panels_of(2, 2, 5.6, sharex=True, sharey="row", height_ratios=[3, 2])
    for (top, bottom), updates in zip(panels.T, (1, 4), strict=True):
        data = over_keys(partial(return_on_a_line, config, updates, jnp.asarray(alphas), 256))
        surrogate, kl = data["old"][:, None] + data["gain"], data["kl"].mean(axis=0)
        draw_mean(top, alphas, surrogate, ORANGE, "surrogate", ls="--")
        draw_mean(top, alphas, data["returns"], BLUE, "return")
        top.axhline(EPISODE, color=GREY, ls=":", label="largest possible return")
        draw_mean(bottom, alphas, surrogate - data["returns"], "black")
        bottom.axhline(0, color=GREY, lw=0.8)
        for axes in (top, bottom):
            within = alphas[kl <= config.max_kl].max()
            axes.axvspan(0, within, color=GREEN, alpha=0.2, lw=0, label="trust region, KL ≤ δ")
        top.set_title(f"after {updates} update{'s' if updates > 1 else ''}", pad=24)
        ticks = [1, 4, 8, 12]
        labels = [f"KL {np.interp(tick, alphas, kl):.2g}" for tick in ticks]
        top.secondary_xaxis("top").set_xticks(ticks, labels, fontsize=8)
        bottom.set(xlabel="α, in θ_old + α · step", xlim=(0, alphas[-1]))
    panels[0, 0].set_ylabel("return of an episode")
    panels[1, 0].set_ylabel("surrogate - return")
    panels[0, 0].legend(loc="center", bbox_to_anchor=(0.55, 0.55))
    return figure


# ---- Metrics of PPO-penalty and TRPO -------------------------------------------------------------


def metrics_of(script, config, field, value):
    """Metrics of a training with another value of a float hyperparameter: {name: [8, updates]}."""
    return over_keys(lambda key: script.train(replace(config, **{field: value}), key)[1])


def draw_beta():
    config = ppo_penalty.Config(total_timesteps=200_000, early_stop_kl=None)
    figure, panels = panels_of(3, 1, 6, sharex=True)
    top, middle, bottom = panels[:, 0]
    for color, beta in zip((ORANGE, BLUE, GREEN), (0.01, 1.0, 100.0), strict=True):
        metrics = metrics_of(ppo_penalty, config, "beta", beta)
        label = f"β = {beta:g} at the start"
        draw_mean(top, *in_blocks(config, metrics["beta"], 1), color, label, logarithmic=True)
        draw_mean(middle, *in_blocks(config, metrics["kl"], 1), color, logarithmic=True)
        draw_mean(bottom, *in_blocks(config, metrics["episodic_return"], 5), color)
    low, high = config.target_kl / 1.5, config.target_kl * 1.5
    middle.axhspan(low, high, color=GREY, alpha=0.3, lw=0, label="β stays if KL is in here")
    top.set(yscale="log", ylabel="β")
    middle.set(yscale="log", ylabel="KL(π_old ‖ π_new) (nats)")
    bottom.set(ylabel="return in training", xlabel=STEPS)
    top.legend()
    middle.legend()
    return figure


def draw_line_search():
    config = replace(trpo.default_config("CartPole-v1"), total_timesteps=200_000)
    figure, ((top,), (bottom,)) = panels_of(2, 1, 4.8, sharex=True)
    for color, damping in zip((BLUE, ORANGE), (config.cg_damping, 1e-5), strict=True):
        metrics = metrics_of(trpo, config, "cg_damping", damping)
        accepted = metrics["step_accepted"]
        label = f"damping λ = {damping:g}: {accepted.sum():.0f} of {accepted.size} steps accepted"
        draw_mean(top, *in_blocks(config, metrics["kl"], 3), color)
        draw_mean(bottom, *in_blocks(config, metrics["line_search_tries"], 3), color, label)
    top.axhline(config.max_kl, color="black", lw=0.8, ls="--", label="δ")
    top.set(ylabel="KL(π_old ‖ π_new) (nats)", ylim=(0, 1.1 * config.max_kl))
    bottom.set(ylabel="tries of the line search", xlabel=STEPS, ylim=(0, None))
    top.legend(loc="lower left")
    bottom.legend(loc="upper left")
    return figure


# ---- Symptoms of runs that do not learn ----------------------------------------------------------

PPO, ACROBOT = "ppo_discrete.py", "ppo_discrete.py --env-id Acrobot-v1"
CAR, UNSCALED = "ppo_discrete.py --env-id MountainCar-v0", "ppo_continuous.py --no-normalize-reward"
REJECTED = "trpo.py --cg-damping 0 --cg-iterations 3 --line-search-tries 1"
SYMPTOMS = [  # title, column, command
    ("steps too small", "clip_fraction", f"{PPO} --learning-rate 1e-5"),
    ("steps too large", "clip_fraction", f"{PPO} --learning-rate 0.1"),
    ("the KL jumps", "approx_kl", f"{PPO} --learning-rate 0.1 --target-kl None"),
    ("entropy lost too early", "entropy", f"{PPO} --learning-rate 0.1"),
    ("entropy stays", "entropy", f"{PPO} --ent-coef 1"),
    ("the critic does not learn", "explained_variance", f"{ACROBOT} --vf-coef 0"),
    ("rewards badly scaled", "value_loss", f"{UNSCALED} --learning-rate 1e-4"),
    ("no reward found", "value_loss", f"{CAR} --no-normalize-obs"),
    ("every step rejected", "step_accepted", REJECTED),
    ("β at its lower bound", "beta", "ppo_penalty.py --learning-rate 1e-5"),
    ("β at its upper bound", "beta", "ppo_penalty.py --learning-rate 0.1"),
    ("harmless: nothing left to explain", "explained_variance", PPO),
]
BUDGET = ["--num-seeds", "3", "--total-timesteps", "100000"]


def healthy(command):
    """The same script on the same environment, without the other flags."""
    script, *flags = command.split()
    return " ".join([script, *flags[:2]]) if flags[:1] == ["--env-id"] else script


def run_symptom(command):
    """The columns of metrics.csv [updates, seeds], and the mean return of the greedy episodes."""
    script, *flags = command.split()
    name = "symptom_" + re.sub(r"[^\w.]+", "_", command)
    run_dir = run_script(ROOT / script, [*flags, *BUDGET], name)
    evaluation = np.genfromtxt(run_dir / "evaluation.csv", delimiter=",", names=True)
    return read_columns(run_dir), evaluation["episodic_return"].mean()


def draw_symptoms():
    figure = Figure(figsize=(15, 9), layout="constrained")
    panels = figure.subplots(3, 4)
    for axes, (title, name, command) in zip(panels.ravel(), SYMPTOMS, strict=True):
        lines = textwrap.wrap(command, 48, break_on_hyphens=False)
        axes.set_title("\n".join([title, *lines]), fontsize=8)
        for each, color in ((command, "tab:red"), (healthy(command), "tab:gray")):
            columns, greedy = run_symptom(each)
            steps, curves = columns["env_step"][:, 0] / 1000, columns[name]
            median = np.nanmedian(curves, axis=1)
            axes.plot(steps, curves, color=color, alpha=0.3, linewidth=0.8)
            axes.plot(steps, median, color=color, linewidth=2)
            fifths = [f"{np.median(part):.2g}" for part in np.array_split(median, 5)]
            print(f"{each}: {name} {', '.join(fifths)} by fifths; greedy return {greedy:.1f}")
        if name in ("approx_kl", "value_loss", "beta"):
            axes.set_yscale("log")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel(STEPS)
    figure.suptitle("red: the command; gray: without its flags; thick: median of three seeds")
    return figure


FIGURES = {  # file: function
    "figures/clipped_objective.png": draw_objective,
    "figures/surrogates.png": draw_surrogates,
    "figures/surrogate_and_return.png": draw_return,
    "figures/adaptive_beta.png": draw_beta,
    "figures/line_search.png": draw_line_search,
    "symptoms.png": draw_symptoms,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = {file.split("/")[-1].removesuffix(".png"): file for file in FIGURES}
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    arguments = parser.parse_args()
    print(circumstances())
    for name in arguments.names or names:
        buffer = io.BytesIO()
        FIGURES[names[name]]().savefig(buffer, dpi=80 if name == "symptoms" else 110)
        image = PIL.Image.open(buffer).convert("RGB")
        image.quantize(256).save(DOCS / names[name], optimize=True)  # half the size
        print(f"wrote docs/{names[name]}", flush=True)


if __name__ == "__main__":
    main()
