# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "jax>=0.10.2,<0.12", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3", "chex>=0.1.92,<0.2",
#     "gymnax>=1.0.1,<1.1", "six>=1.17,<2",  # gymnax imports six without requiring it
#     "orbax-checkpoint>=0.12.8,<0.13", "tyro>=1.0.17,<1.1", "tqdm>=4.70,<5",
#     "matplotlib>=3.11,<3.12", "numpy>=2.4,<3",
# ]
# ///
"""Proximal Policy Optimization (PPO) with the adaptive KL penalty, in JAX.

An agent in state s_t samples an action a_t from its policy π(·|s_t), receives a reward r_t and
moves to state s_{t+1}. We look for a policy with a high expected return E[Σ γ^t r_t].

The policy gradient E[∇ log π(a_t|s_t) Â_t] makes an action more likely if it turned out better than
expected. The advantage Â_t measures that: the rewards that followed, minus what a second network,
the critic V, had predicted.

A policy gradient is only valid for the policy that collected the data, π_old, so each rollout is
good for a single step. PPO (Schulman et al. 2017, arXiv:1707.06347) takes many steps on each. It
weights every sample by the ratio ρ_t of its action's new and old probability. That corrects for the
new policy choosing other actions, but nothing corrects for it visiting other states, so it must
stay close to π_old. TRPO demands this with a constraint, E[KL] ≤ δ. Section 4 of the PPO paper
subtracts a penalty instead, β times the KL divergence, so that Adam can optimise it. No single β
suits all tasks, so β is adapted after each update: it is doubled if the policy has moved too far,
and halved if it has hardly moved.

    repeat   collect a rollout: T steps in each of N environments, with π_old = π_θ     (env_step)
             estimate the advantages Â_t and the targets of the critic                       (gae)
             K times: shuffle the rollout; take a gradient step on each minibatch of M      (loss)
             measure how far the policy has moved, and adapt β                        (adapt_beta)

    ρ_t(θ)      = π_θ(a_t|s_t) / π_old(a_t|s_t)                     (the paper's r_t(θ))
    L_KLPEN(θ)  = E[ ρ_t Â_t - β KL(π_old(·|s_t) ‖ π_θ(·|s_t)) ]                        (eq. 8)
    maximise      L_KLPEN - c_1 ½ E[(V_θ(s_t) - V_target)²] + c_2 E[S[π_θ](s_t)]          (as eq. 9)
    d           = E[KL(π_old ‖ π_θ)] over the rollout, after the update                 (section 4)
    next β      = β/2 if d < d_targ/1.5,   2β if d > 1.5 d_targ,   else β               (section 4)
    Â_t         = δ_t + γλ δ_{t+1} + (γλ)² δ_{t+2} + ..., to the end of the episode     (eq. 11)
    δ_t         = r_t + γ V(s_{t+1}) - V(s_t)                                           (eq. 12)
    V_target    = Â_t + V(s_t)

Near π_old, with the policy gradient g and the Fisher matrix F, a step x changes E[ρ_t Â_t] by gᵀx
and costs β ½ xᵀF x. The best step is F⁻¹g / β, the direction of TRPO, with d = gᵀF⁻¹g / (2β²). So β
plays the part of a Lagrange multiplier of TRPO's constraint (docs/derivations.md).

    s_t obs          s_{t+1} next_obs     a_t action       r_t reward       π_θ policy
    ρ_t ratio        Â_t advantage        V value          V_target target  S entropy
    β beta           d kl                 d_targ target_kl γ gamma          λ gae_lambda
    c_1 vf_coef      c_2 ent_coef         π_old old_policy
    N num_envs       T num_steps          K update_epochs  B = T·N          M = B/num_minibatches

    python ppo_penalty.py                                    # CartPole-v1, 8 seeds, 100k steps each
    python ppo_penalty.py --env-id Pendulum-v1 --num-seeds 3
    python ppo_penalty.py --help

Differences from the paper:
- β is kept within bounds;
- an episode cut by a time limit bootstraps from V(s_{t+1}); only a terminated one does not;
- advantages are normalised in each minibatch; the value loss has a factor ½;
- the actor stops early at `early_stop_kl`; the critic does not;
- rewards and, if asked for, observations are scaled by running statistics and clipped to ±10;
- continuous actions in [-1, 1] are stretched to the bounds of the environment;
- weights are initialised orthogonally, gradients are clipped by their norm, Adam's ε is 1e-5;
- the learning rate is annealed (the paper does so on Atari).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

# ---- Hyperparameters: every field is a command-line flag, and its comment the help text ----------


@dataclass(frozen=True)
class Config:
    """Hyperparameters. The defaults are tuned for small tasks."""

    env_id: str = "CartPole-v1"  # name of a gymnax environment, or module:name for your own
    seed: int = 0  # first seed; the others count up from it
    num_seeds: int = 8  # number of independent runs, trained side by side
    total_timesteps: int = 100_000  # environment steps per seed, rounded down to whole updates
    num_envs: int = 16  # parallel environments per seed (N)
    num_steps: int = 128  # steps per environment and update (T)
    learning_rate: float = 1e-3  # Adam step size at the start
    anneal_lr: bool = True  # decrease the learning rate linearly to zero
    gamma: float = 0.99  # discount γ
    gae_lambda: float = 0.95  # λ of generalised advantage estimation
    update_epochs: int = 8  # passes over each rollout (K)
    num_minibatches: int = 8  # minibatches per pass
    target_kl: float = 0.005  # d_targ, the KL divergence by which an update should move the policy
    beta: float = 1.0  # weight of the KL penalty at the start (β)
    adaptive_beta: bool = True  # adapt β after each update
    early_stop_kl: float | None = 0.02  # in each update, stop the actor once the KL exceeds this
    ent_coef: float = 0.0  # weight of the entropy bonus (c_2)
    vf_coef: float = 0.5  # weight of the value loss (c_1)
    max_grad_norm: float = 2.0  # clip the gradient of both networks together to this norm
    normalize_obs: bool = False  # scale observations to running mean 0 and variance 1
    normalize_reward: bool = True  # divide rewards by the std of discounted sums of past rewards
    hidden_sizes: tuple[int, ...] = (64, 64)  # hidden layers of the actor and of the critic
    activation: Literal["tanh", "relu"] = "tanh"  # activation of the hidden layers
    initial_std: float = 1.0  # std of the first continuous actions, in units of the bounds

    def __post_init__(self):
        """Raise ValueError for values that cannot work. Arrays pass, because they may be traced."""
        counts = ("num_seeds", "num_envs", "num_steps", "update_epochs", "num_minibatches")
        for name, value in vars(self).items():
            least = 1 if name in counts else 0
            most = 1 if name in ("gamma", "gae_lambda") else math.inf
            if isinstance(value, int | float) and not least <= value <= most:
                raise ValueError(f"{name} must be between {least} and {most}, not {value}")
        if min(self.hidden_sizes, default=1) < 1:
            raise ValueError(f"hidden_sizes must be positive, not {self.hidden_sizes}")
        size = f"num_envs x num_steps = {self.batch_size}"
        if self.batch_size % self.num_minibatches or self.batch_size < 2 * self.num_minibatches:
            raise ValueError(f"num_minibatches must divide {size} into parts of at least 2")
        if self.num_updates < 1:
            raise ValueError(f"total_timesteps must be at least {size}")

    @property
    def batch_size(self) -> int:
        """Transitions per update, B = T·N."""
        return self.num_steps * self.num_envs

    @property
    def num_updates(self) -> int:
        """Updates that fit into the budget of steps."""
        return self.total_timesteps // self.batch_size


# ---- Policy and value networks -------------------------------------------------------------------


class Categorical(NamedTuple):
    """Distribution over actions 0 ... A-1, for any leading axes [...]."""

    logits: jax.Array  # [..., A], finite: mask an action with -1e9, not with -inf

    def sample(self, key):
        return jax.random.categorical(key, self.logits)

    def log_prob(self, action):
        # The product with a one-hot vector has a faster gradient than indexing.
        chosen = jax.nn.one_hot(action, self.logits.shape[-1], dtype=self.logits.dtype)
        return jnp.sum(chosen * jax.nn.log_softmax(self.logits), axis=-1)

    def entropy(self):
        log_p = jax.nn.log_softmax(self.logits)
        return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)

    def kl(self, other):
        """KL(self ‖ other) = Σ π_self (log π_self - log π_other)."""
        log_p, log_q = jax.nn.log_softmax(self.logits), jax.nn.log_softmax(other.logits)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

    def mode(self):
        return jnp.argmax(self.logits, axis=-1)


class DiagGaussian(NamedTuple):
    """Independent normal distributions of the A components of an action, for any leading axes."""

    mean: jax.Array  # [..., A]
    log_std: jax.Array  # [..., A]

    def sample(self, key):
        return self.mean + jnp.exp(self.log_std) * jax.random.normal(key, self.mean.shape)

    def log_prob(self, action):
        z = (action - self.mean) * jnp.exp(-self.log_std)
        return -jnp.sum(0.5 * z**2 + self.log_std + 0.5 * math.log(2 * math.pi), axis=-1)

    def entropy(self):
        return jnp.sum(self.log_std + 0.5 * math.log(2 * math.pi * math.e), axis=-1)

    def kl(self, other):
        """KL(self ‖ other) = Σ log(σ'/σ) + ½ (σ²/σ'² + (μ - μ')²/σ'² - 1)."""
        variance_ratio = jnp.exp(2 * (self.log_std - other.log_std))
        z = (self.mean - other.mean) * jnp.exp(-other.log_std)
        return jnp.sum(other.log_std - self.log_std + 0.5 * (variance_ratio + z**2 - 1.0), axis=-1)

    def mode(self):
        return self.mean


def bound_action(action, space):
    """Map the policy's actions [N, A] to the bounds of the environment's action space: [N, ...].

    Actions are clipped to ±1 and stretched to [low, high], so that a standard deviation of 1 covers
    every range. If a side has no bound, nothing is clipped there and 1 is one unit of the space.
    The log-probability remains that of the sampled action.
    """
    if hasattr(space, "n"):
        return action  # discrete actions [N] have no bounds
    low, high = jnp.broadcast_to(space.low, space.shape), jnp.broadcast_to(space.high, space.shape)
    has_low, has_high = low > -1e30, high < 1e30  # some spaces write the largest float for no bound
    start = jnp.where(has_low, low, jnp.where(has_high, high - 2.0, -1.0))
    end = jnp.where(has_high, high, start + 2.0)
    action = action.reshape(-1, *space.shape)
    action = jnp.clip(action, jnp.where(has_low, -1.0, -jnp.inf), jnp.where(has_high, 1.0, jnp.inf))
    return start + (end - start) * (action + 1.0) / 2


def mlp(x, hidden_sizes, activation, out_size, out_scale):
    """A multilayer perceptron [..., D] -> [..., out_size]."""
    for size in hidden_sizes:
        x = nn.Dense(size, kernel_init=orthogonal(math.sqrt(2)))(x)
        x = getattr(nn, activation)(x)
    return nn.Dense(out_size, kernel_init=orthogonal(out_scale))(x)


class Actor(nn.Module):
    """Policy: observations [..., D] -> Categorical or DiagGaussian, as the action space demands."""

    action_space: Any
    hidden_sizes: tuple[int, ...]
    activation: str
    initial_std: float = 1.0

    @nn.compact
    def __call__(self, obs):
        # With tiny weights in the last layer all actions are about equally likely at first, and the
        # first means are near 0. The standard deviation is the same in all states.
        is_discrete = hasattr(self.action_space, "n")
        size = self.action_space.n if is_discrete else math.prod(self.action_space.shape)
        x = mlp(obs, self.hidden_sizes, self.activation, size, 0.01)
        if is_discrete:
            return Categorical(x)
        initial = jnp.full(size, jnp.log(self.initial_std), float)
        log_std = self.param("log_std", lambda _: initial)
        return DiagGaussian(x, jnp.broadcast_to(log_std, x.shape))


class Critic(nn.Module):
    """State value: observations [..., D] -> [...]."""

    hidden_sizes: tuple[int, ...]
    activation: str

    @nn.compact
    def __call__(self, obs):
        return mlp(obs, self.hidden_sizes, self.activation, 1, 1.0).squeeze(-1)


def make_networks(config, action_space):
    """The actor and the critic. To use other networks, change this function."""
    actor = Actor(action_space, config.hidden_sizes, config.activation, config.initial_std)
    return actor, Critic(config.hidden_sizes, config.activation)


# ---- The mathematics, as pure functions of arrays ------------------------------------------------


def gae(reward, value, next_value, terminated, done, gamma, gae_lambda):
    """Generalised advantage estimation (PPO eqs. 11-12; Schulman et al. 2016, arXiv:1506.02438).

    `gae_lambda` = 1 has low bias and high variance, 0 the opposite. After a `terminated` step there
    is no next state, so V(s_{t+1}) counts as 0. `done` means terminated, or truncated by a time
    limit: the next row belongs to another episode, so the sum stops. A step that was only truncated
    keeps V(s_{t+1}), because without the limit the episode would have continued (Pardo et al. 2018,
    arXiv:1712.00378). All arrays are [T, N]; returns the advantages and the targets of V.
    """
    chex.assert_rank(reward, 2)
    chex.assert_equal_shape([reward, value, next_value, terminated, done])
    delta = reward + gamma * jnp.where(terminated, 0.0, next_value) - value

    def step(advantage, row):
        delta, done = row
        advantage = delta + gamma * gae_lambda * jnp.where(done, 0.0, advantage)
        return advantage, advantage

    # From the last step to the first. The loop is unrolled, because one step is very little work.
    zeros = jnp.zeros_like(delta[0])
    _, advantage = jax.lax.scan(step, zeros, (delta, done), reverse=True, unroll=16)
    return advantage, advantage + value


def normalize_advantage(advantage):
    """Mean 0 and standard deviation 1, so that the same settings suit every reward scale."""
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8)


def surrogate(ratio, advantage):
    """E[ρ Â] (eq. 6), to be maximised: ratio and advantage [...] -> scalar."""
    chex.assert_equal_shape([ratio, advantage])
    return jnp.mean(ratio * advantage)


def value_loss(value, target):
    """½ E[(V - V_target)²] of arrays [M]."""
    chex.assert_equal_shape([value, target])
    return 0.5 * jnp.mean((value - target) ** 2)


def adapt_beta(beta, kl, target_kl):
    """The weight of the KL penalty for the next update (section 4), scalars.

    The bounds keep β from vanishing or overflowing. If the KL is not finite, β does not change.
    """
    new_beta = jnp.where(kl > 1.5 * target_kl, 2 * beta, beta)
    new_beta = jnp.where(kl < target_kl / 1.5, beta / 2, new_beta)
    return jnp.where(jnp.isfinite(kl), jnp.clip(new_beta, 1e-4, 1e4), beta)


# ---- Running statistics, to scale observations and rewards ---------------------------------------


class RunningStats(NamedTuple):
    """Mean and variance of everything seen so far, per component."""

    mean: jax.Array
    var: jax.Array
    count: jax.Array


def init_stats(shape):
    """Mean 0 and variance 1, with a count of 0: the first rollout replaces them."""
    return RunningStats(jnp.zeros(shape), jnp.ones(shape), jnp.float32(0.0))


def update_stats(stats, x):
    """Merge a rollout x [T, N, ...] into the statistics (Chan, Golub & LeVeque 1979)."""
    if stats is None:
        return None
    shift = x[0, 0]  # so that float32 rounds little even if the mean is large
    mean, var = shift + (x - shift).mean((0, 1)), (x - shift).var((0, 1))
    count = x.shape[0] * x.shape[1]
    weight = count / (stats.count + count)
    delta = mean - stats.mean
    new_var = (1 - weight) * stats.var + weight * var + weight * (1 - weight) * delta**2
    return RunningStats(stats.mean + weight * delta, new_var, stats.count + count)


def normalize(x, stats, center=True):
    """Scale x [..., D] to mean 0 and variance 1, clipped to ±10. Without statistics, return x.

    Rewards are only scaled (`center=False`), because subtracting a mean would change the task.
    """
    if stats is None:
        return x
    x = x - stats.mean if center else x
    return jnp.clip(x * jax.lax.rsqrt(stats.var + 1e-8), -10.0, 10.0)


# ---- Data ----------------------------------------------------------------------------------------


class Environment(NamedTuple):
    """N environments side by side. A new episode starts by itself when the old one has ended.

    reset: keys [N] -> obs [N, D], env_state
    step: keys [N], env_state, action [N] or [N, ...]
          -> obs [N, D], env_state, reward [N], terminated [N], truncated [N], next_obs [N, D]

    `next_obs` is s_{t+1}. `obs` is what the agent sees next: the same, or after the end of an
    episode the first observation of a new one. `action_space` is a Discrete or Box of gymnax's.
    """

    reset: Callable
    step: Callable
    action_space: Any


class Episode(NamedTuple):
    """The current episode of each environment, including the current step."""

    total: jax.Array  # [N] sum of rewards
    length: jax.Array  # [N] number of steps
    discounted: jax.Array  # [N] r_t + γ r_{t-1} + γ² r_{t-2} + ...; its std scales the rewards


class Transition(NamedTuple):
    """One step of N environments. A rollout stacks T of them: [T, N, ...]."""

    obs: jax.Array  # [N, D]
    next_obs: jax.Array  # [N, D]
    action: jax.Array  # [N], or [N, A] as sampled, without bounds
    policy: Categorical | DiagGaussian  # [N, A] π_old(·|s_t)
    reward: jax.Array  # [N]
    terminated: jax.Array  # [N] bool
    done: jax.Array  # [N] bool, terminated or truncated
    episode: Episode


class State(NamedTuple):
    """Everything that training changes."""

    params: dict[str, Any]  # {"actor": ..., "critic": ...}
    opt_state: optax.OptState
    beta: jax.Array  # [] weight of the KL penalty in the next update
    obs_stats: RunningStats | None  # of observations
    reward_stats: RunningStats | None  # of Episode.discounted
    env_state: Any  # of N environments
    obs: jax.Array  # [N, D] current observations
    episode: Episode
    key: jax.Array  # PRNG key


# ---- The algorithm -------------------------------------------------------------------------------


def make_train(config, env=None):
    """Make two functions, init(key) -> State and update(State) -> State, metrics. They use the
    Environment `env`, or else the gymnax environment named config.env_id."""
    env = env or make_gymnax(config.env_id)
    actor, critic = make_networks(config, env.action_space)
    grad_steps = config.update_epochs * config.num_minibatches  # gradient steps per update
    learning_rate = config.learning_rate
    if config.anneal_lr:
        learning_rate = optax.linear_schedule(learning_rate, 0.0, config.num_updates * grad_steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm), optax.adam(learning_rate, eps=1e-5)
    )

    def init(key):
        key, actor_key, critic_key, reset_key = jax.random.split(key, 4)
        obs, env_state = env.reset(jax.random.split(reset_key, config.num_envs))
        chex.assert_rank(obs, 2, custom_message="obs must be flat, [N, D]: see edits/cnn.patch")
        params = {"actor": actor.init(actor_key, obs), "critic": critic.init(critic_key, obs)}
        zeros = jnp.zeros(config.num_envs)
        return State(
            params=params,
            opt_state=optimizer.init(params),
            beta=jnp.asarray(config.beta, jnp.float32),
            obs_stats=init_stats(obs.shape[1:]) if config.normalize_obs else None,
            reward_stats=init_stats(()) if config.normalize_reward else None,
            env_state=env_state,
            obs=obs,
            episode=Episode(total=zeros, length=zeros.astype(jnp.int32), discounted=zeros),
            key=key,
        )

    def env_step(state, keys):
        """One step of the N environments with the current policy."""
        action_key, env_keys = keys
        policy = actor.apply(state.params["actor"], normalize(state.obs, state.obs_stats))
        action = policy.sample(action_key)
        obs, env_state, reward, terminated, truncated, next_obs = env.step(
            env_keys, state.env_state, bound_action(action, env.action_space)
        )
        chex.assert_equal_shape([state.obs, obs, next_obs])
        chex.assert_shape([reward, terminated, truncated], (config.num_envs,))
        done = terminated | truncated
        episode = Episode(
            total=state.episode.total + reward,
            length=state.episode.length + 1,
            discounted=config.gamma * state.episode.discounted + reward,
        )
        transition = Transition(
            obs=state.obs,
            next_obs=next_obs,
            action=action,
            policy=policy,
            reward=reward,
            terminated=terminated,
            done=done,
            episode=episode,
        )
        new_episode = jax.tree.map(lambda x: jnp.where(done, 0, x), episode)
        return state._replace(env_state=env_state, obs=obs, episode=new_episode), transition

    def loss(params, beta, obs, action, old_policy, old_log_prob, advantage, target):
        """The negative of the objective (as eq. 9) for a minibatch [M, ...], and metrics."""
        chex.assert_equal_shape([old_log_prob, advantage, target])
        policy = actor.apply(params["actor"], obs)
        ratio = jnp.exp(policy.log_prob(action) - old_log_prob)
        # The KL and its gradient are zero at π_old, where each update starts.
        kl = old_policy.kl(policy).mean()
        policy_loss = beta * kl - surrogate(ratio, normalize_advantage(advantage))
        value_error = value_loss(critic.apply(params["critic"], obs), target)
        entropy = policy.entropy().mean()
        total = policy_loss + config.vf_coef * value_error - config.ent_coef * entropy
        return total, {
            "policy_loss": policy_loss,
            "value_loss": value_error,
            "entropy": entropy,
            "minibatch_kl": kl,
        }

    def update(state, _=None):  # the second argument makes it the body of a jax.lax.scan
        """One iteration: collect a rollout, estimate advantages, train for K epochs, adapt β."""
        key, action_key, env_key, shuffle_key = jax.random.split(state.key, 4)
        state = state._replace(key=key)

        # Collect a rollout. Splitting all keys at once is cheaper than splitting in every step.
        action_keys = jax.random.split(action_key, config.num_steps)
        env_keys = jax.random.split(env_key, (config.num_steps, config.num_envs))
        state, rollout = jax.lax.scan(env_step, state, (action_keys, env_keys))

        # Estimate advantages. The value of s_{t+1} is computed, not taken from the next row, which
        # after the end of an episode belongs to another one. Until the next rollout, observations
        # keep the statistics with which the policy acted. Rewards use the newest ones.
        obs = normalize(rollout.obs, state.obs_stats)
        next_obs = normalize(rollout.next_obs, state.obs_stats)
        value = critic.apply(state.params["critic"], obs)
        next_value = critic.apply(state.params["critic"], next_obs)
        obs_stats = update_stats(state.obs_stats, rollout.obs)
        reward_stats = update_stats(state.reward_stats, rollout.episode.discounted)
        reward = normalize(rollout.reward, reward_stats, center=False)
        terminated, done = rollout.terminated, rollout.done
        advantage, target = gae(
            reward, value, next_value, terminated, done, config.gamma, config.gae_lambda
        )

        # Train for K epochs. Each passes over the whole batch in a new random order.
        batch = {
            "obs": obs,
            "action": rollout.action,
            "old_policy": rollout.policy,
            "old_log_prob": rollout.policy.log_prob(rollout.action),
            "advantage": advantage,
            "target": target,
        }
        batch = jax.tree.map(lambda x: jax.lax.collapse(x, 0, 2), batch)  # [T, N, ...] -> [B, ...]
        orders = random_orders(shuffle_key, config.update_epochs, config.batch_size)
        minibatch_indices = orders.reshape(grad_steps, -1)

        def train_step(carry, indices):
            params, opt_state, stopped = carry
            minibatch = jax.tree.map(lambda x: x[indices], batch)  # the arguments of `loss`
            gradient, metrics = jax.grad(loss, has_aux=True)(params, state.beta, **minibatch)
            if config.early_stop_kl is not None:
                stopped |= metrics["minibatch_kl"] > config.early_stop_kl
            unless_stopped = partial(jax.tree.map, lambda x: jnp.where(stopped, 0.0, x))
            gradient["actor"] = unless_stopped(gradient["actor"])
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            updates["actor"] = unless_stopped(updates["actor"])  # despite Adam's momentum
            metrics["stopped"] = stopped
            return (optax.apply_updates(params, updates), opt_state, stopped), metrics

        carry = (state.params, state.opt_state, jnp.bool(False))
        (params, opt_state, _), step_metrics = jax.lax.scan(train_step, carry, minibatch_indices)

        # Adapt β to how far the policy has moved, for the next update.
        kl = batch["old_policy"].kl(actor.apply(params["actor"], batch["obs"])).mean()
        beta = adapt_beta(state.beta, kl, config.target_kl) if config.adaptive_beta else state.beta

        # 1 if V predicts its targets up to a constant, 0 if it does no better than a constant.
        explained = 1.0 - jnp.var(target - value) / jnp.var(target)
        metrics = {
            "episodic_return": jnp.mean(rollout.episode.total, where=done),  # NaN if none ended
            "episodic_length": jnp.mean(rollout.episode.length, where=done),
            **jax.tree.map(jnp.mean, step_metrics),  # over all minibatches
            "kl": kl,
            "beta": state.beta,
            "explained_variance": jnp.where(jnp.isinf(explained), jnp.nan, explained),
        }
        state = state._replace(
            params=params,
            opt_state=opt_state,
            beta=beta,
            obs_stats=obs_stats,
            reward_stats=reward_stats,
        )
        return state, metrics

    return init, update


def train(config, key, env=None):
    """A complete run: returns the final State, and each metric as an array [num_updates].

    `jax.jit(jax.vmap(partial(train, config)))(keys)` trains one agent per key. Hyperparameters that
    are floats can be vmapped, too: `jax.vmap(lambda x: train(Config(gamma=x), key))(values)`.
    """
    init, update = make_train(config, env)
    return jax.lax.scan(update, init(key), None, config.num_updates)


def evaluate(config, state, key, num_episodes, env=None, max_steps=10_000):
    """Play episodes with the most likely actions: returns and lengths, both [num_episodes].

    Each of `num_episodes` environments plays one episode, which is cut after `max_steps`.
    """
    env = env or make_gymnax(config.env_id)
    actor, _ = make_networks(config, env.action_space)
    reset_key, key = jax.random.split(key)
    obs, env_state = env.reset(jax.random.split(reset_key, num_episodes))

    def unfinished(carry):
        *_, playing, _, length = carry
        return playing.any() & (length.max() < max_steps)

    def step(carry):
        key, obs, env_state, playing, total, length = carry
        key, step_key = jax.random.split(key)
        policy = actor.apply(state.params["actor"], normalize(obs, state.obs_stats))
        action = bound_action(policy.mode(), env.action_space)
        obs, env_state, reward, terminated, truncated, _ = env.step(
            jax.random.split(step_key, num_episodes), env_state, action
        )
        total += jnp.where(playing, reward, 0.0)
        length += playing
        return key, obs, env_state, playing & ~(terminated | truncated), total, length

    playing, total = jnp.ones(num_episodes, bool), jnp.zeros(num_episodes)
    carry = (key, obs, env_state, playing, total, jnp.zeros(num_episodes, jnp.int32))
    *_, total, length = jax.lax.while_loop(unfinished, step, carry)
    return total, length


# ---- Details, to skip at first reading -----------------------------------------------------------


def random_orders(key, number, size):
    """`number` random orders of 0 ... size-1, as [number, size].

    On two CPU cores `jax.random.permutation` would take a fifth of the training time: it sorts
    pairs of a random word and an index. Here the index is stored in the lowest bits of the word.
    """
    words = jax.random.bits(key, (number, size), jnp.uint32)
    if size > 2**15:  # the index would leave too few random bits
        return jnp.argsort(words)
    bits = (size - 1).bit_length()
    words = jnp.sort((words >> bits << bits) | jnp.arange(size, dtype=jnp.uint32))
    return words & jnp.uint32(2**bits - 1)


def orthogonal(scale):
    """Initialiser for orthogonal weights. Under vmap the seeds take turns, because with jax >= 0.10
    several QR decompositions at once can deadlock on a CPU with few cores."""

    def init(key, shape, dtype):
        one = partial(nn.initializers.orthogonal(scale), shape=shape, dtype=dtype)
        return jax.custom_batching.sequential_vmap(one)(key)

    return init


def make_gymnax(name):
    """N copies of a gymnax environment, with flat observations."""
    import gymnax  # not at the top: it starts JAX, which main() must configure first

    if name not in gymnax.registered_envs:
        known = ", ".join(sorted(gymnax.registered_envs))
        raise LookupError(f"unknown environment {name!r}; gymnax has {known}")
    with jax.ensure_compile_time_eval():  # some constructors compute arrays
        env, params = gymnax.make(name)
    num_categories = getattr(env.observation_space(params), "n", None)  # of a discrete observation

    def flatten(obs):
        if num_categories is not None:
            return jax.nn.one_hot(obs, num_categories)
        return jnp.float32(obs).ravel()

    @jax.vmap
    def reset(key):
        obs, env_state = env.reset(key, params)
        return flatten(obs), env_state

    @jax.vmap
    def step(key, env_state, action):
        obs, env_state, reward, terminated, truncated, info = env.step(
            key, env_state, action, params
        )
        next_obs = flatten(info["final_observation"])
        return flatten(obs), env_state, jnp.float32(reward), terminated, truncated, next_obs

    return Environment(reset, step, env.action_space(params))


# ==== The command line. To use the algorithm in a program of your own, delete what follows ========

import argparse
import contextlib
import csv
import importlib
import json
import os
import re
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import tyro
from jax.experimental import multihost_utils as multihost
from jax.sharding import Mesh, PartitionSpec
from tqdm import tqdm

SCRIPT = Path(__file__).stem
EVALUATION_EPISODES = 100  # per seed
SAVE_SECONDS = 30  # between checkpoints

# Tuned hyperparameters of environments, or of families of them (the last part of the name).
PRESETS: dict[str, dict[str, Any]] = {
    "MountainCar-v0": dict(normalize_obs=True),
    "MountainCarContinuous-v0": dict(gamma=0.999, normalize_obs=True),
    "Pendulum-v1": dict(activation="relu", normalize_obs=True),
    "PointRobot-misc": dict(normalize_obs=True),
    "Reacher-misc": dict(normalize_obs=True),
    "brax": dict(initial_std=0.5, early_stop_kl=None, normalize_obs=True),
    "DeepSea-bsuite": dict(num_envs=128),
    "MinAtar": dict(num_envs=64, update_epochs=4, target_kl=0.01, early_stop_kl=None,
        activation="relu", normalize_obs=True),
    "Breakout-MinAtar": dict(
        num_envs=128, learning_rate=2e-3, update_epochs=8, target_kl=0.02, ent_coef=0.02),
    "Asterix-MinAtar": dict(gae_lambda=0.65),
    "Freeway-MinAtar": dict(gae_lambda=0.8, normalize_obs=False),
    "Seaquest-MinAtar": dict(target_kl=0.02, ent_coef=0.02),
}  # fmt: skip


class UserError(Exception):
    """A mistake in the input: reported without a traceback, with exit code 2."""


@dataclass(frozen=True)
class Flags:
    """Train PPO with the adaptive KL penalty on an environment."""

    config: tyro.conf.OmitArgPrefixes[Config]
    resume: str | None = None  # folder of an earlier run, to continue it
    distributed: bool = False  # this is one of several processes (Slurm, Open MPI, TPU pods, ...)


def default_config(env_id: str) -> Config:
    """The hyperparameters that the command line uses for an environment, with its preset."""
    family = env_id.rpartition("-")[2]
    return Config(env_id=env_id, **{**PRESETS.get(family, {}), **PRESETS.get(env_id, {})})


def load_config(run_dir: str | Path) -> Config:
    """The hyperparameters of an earlier run."""
    try:
        stored = json.loads((Path(run_dir) / "config.json").read_text())
        return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()})
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{run_dir} is not the folder of a {SCRIPT} run: {error}") from error


def parse_flags() -> Flags:
    """Parse the command line. --env-id and --resume are read first: they set the defaults."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--env-id", "--env_id", default=Config.env_id)
    first.add_argument("--resume")
    known, _ = first.parse_known_args()
    default = load_config(known.resume) if known.resume else default_config(known.env_id)
    flags = tyro.cli(Flags, default=Flags(default))
    if known.resume and flags.config != default:
        raise UserError("a resumed run keeps its hyperparameters: leave out the other flags")
    return flags


def load_env(env_id: str) -> Environment:
    """A gymnax environment, or for `module:name` the result of `module.make(name)`. The module may
    be in the current folder. Instead of defining `make` it may register `name` with gymnax."""
    module_name, _, name = env_id.rpartition(":")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name.removeprefix("./")) if module_name else None
        env = module.make(name) if hasattr(module, "make") else make_gymnax(name)
    except (ImportError, LookupError) as error:
        raise UserError(f"cannot make {env_id}: {error}") from error
    if not hasattr(env.action_space, "n") and not hasattr(env.action_space, "high"):
        raise UserError(f"{env_id} has no Discrete or Box actions: see edits/multi_discrete.patch")
    return env


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return max(n for n in range(1, limit + 1) if number % n == 0)


def use_cores(num_seeds: int) -> None:
    """Split a CPU into up to one device per core. This works only before JAX has started."""
    if jax.config.jax_num_cpu_devices < 0 and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        jax.config.update("jax_num_cpu_devices", largest_divisor(num_seeds, cores))


def over_seeds(function: Callable, num_seeds: int, **options: Any) -> Callable:
    """Compile `function` of one seed to run for all, vmapped and spread over the devices.

    All arguments and results have a leading seed axis. The devices do not communicate.
    """
    if jax.process_count() > 1 and num_seeds % jax.device_count():
        raise UserError(f"num_seeds must be a multiple of {jax.device_count()}, the device count")
    devices = jax.devices()[: largest_divisor(num_seeds, jax.device_count())]
    axis = PartitionSpec("seed")
    # With check_vma=True JAX rejects loops that start from a constant.
    specs = dict(mesh=Mesh(devices, "seed"), in_specs=axis, out_specs=axis, check_vma=False)
    return jax.jit(jax.shard_map(jax.vmap(function), **specs), **options)


def make_run_dir(config: Config) -> Path:
    """Create runs/<env_id>__<script>__<seed>__<time>, with the hyperparameters in it."""
    # All processes use the name that the first one gives; its process id makes it unique.
    now, pid = multihost.broadcast_one_to_all(np.uint32([time.time(), os.getpid()]))
    date = time.strftime("%Y%m%d-%H%M%S", time.gmtime(int(now)))
    name = f"{config.env_id}__{SCRIPT}__{config.seed}__{date}-{pid}"
    run_dir = Path("runs") / re.sub(r"[^-.\w]", "_", name)
    if jax.process_index() == 0:
        run_dir.mkdir(parents=True)
        (run_dir / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    multihost.sync_global_devices("config.json is written")
    return run_dir


def open_checkpoints(run_dir: str | Path) -> ocp.CheckpointManager:
    """The checkpoints of a run, of which the last one is kept. Writing one is atomic."""
    every = ocp.checkpoint_managers.ContinuousCheckpointingPolicy(
        minimum_interval_secs=SAVE_SECONDS
    )
    options = dict(save_decision_policy=every, max_to_keep=1, enable_async_checkpointing=False)
    options = ocp.CheckpointManagerOptions(**options)
    return ocp.CheckpointManager(Path(run_dir, "checkpoints").resolve(), options=options)


def load_run(run_dir: str | Path) -> tuple[Config, Environment, State, int]:
    """The hyperparameters and the environment of a run, its last saved State (or else the initial
    one) with a leading seed axis, and the number of updates that led to it."""
    config = load_config(run_dir)
    env = load_env(config.env_id)
    init, _ = make_train(config, env)
    seeds = config.seed + np.arange(config.num_seeds)
    state = over_seeds(lambda seed: init(jax.random.key(seed)), config.num_seeds)(seeds)
    with open_checkpoints(run_dir) as checkpoints:
        updates_done = checkpoints.latest_step() or 0
        if updates_done:
            state = checkpoints.restore(updates_done, args=ocp.args.StandardRestore(state))
    return config, env, state, updates_done


def open_metrics(run_dir: Path, num_lines: int):
    """Cut metrics.csv to `num_lines` lines and open it to append. The lines that it cuts belong to
    updates after the last checkpoint, which are repeated. Only the first process writes it."""
    if jax.process_index() > 0:
        return tempfile.TemporaryFile("w")
    file = (run_dir / "metrics.csv").open("a+", newline="")
    with contextlib.suppress(ImportError):  # there is no fcntl on Windows
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is training {run_dir}") from error
    file.seek(0)
    for _ in range(num_lines):
        file.readline()
    file.truncate(file.tell())
    return file


def append_metrics(file, config: Config, updates_done: int, metrics: dict[str, np.ndarray]) -> None:
    """Write a row per update and seed; `metrics` are [num_seeds, updates]."""
    writer = csv.writer(file, lineterminator="\n")
    if updates_done == 0:
        writer.writerow(["seed", "update", "env_step", *metrics])
    num_seeds, num_updates = metrics["episodic_return"].shape
    for i in range(num_updates):
        for j in range(num_seeds):
            update = updates_done + i + 1
            values = [f"{x[j, i]:.7g}" for x in metrics.values()]
            writer.writerow([config.seed + j, update, update * config.batch_size, *values])
    file.flush()
    os.fsync(file.fileno())  # on the disk before a checkpoint counts on it


def train_and_save(run_dir: Path) -> State:
    """Train all seeds of a run, from its last checkpoint if there is one."""
    config, env, state, updates_done = load_run(run_dir)
    _, update = make_train(config, env)
    # One call of train_segment makes `length` updates. There are at least 50 calls, if possible.
    length = largest_divisor(config.num_updates, max(1, config.num_updates // 50))
    segment = partial(jax.lax.scan, update, xs=None, length=length)
    train_segment = over_seeds(segment, config.num_seeds, donate_argnums=0)
    steps = config.num_seeds * config.batch_size  # per update
    num_lines = 1 + updates_done * config.num_seeds if updates_done else 0
    diverged = np.zeros(config.num_seeds, bool)
    show = dict(unit="step", unit_scale=True, disable=jax.process_index() > 0)
    with (
        open_metrics(run_dir, num_lines) as file,
        open_checkpoints(run_dir) as checkpoints,
        tqdm(total=config.num_updates * steps, initial=updates_done * steps, **show) as bar,
    ):
        while updates_done < config.num_updates:
            state, metrics = train_segment(state)
            metrics = multihost.process_allgather(metrics, tiled=True)
            append_metrics(file, config, updates_done, metrics)
            updates_done += length
            is_last = updates_done == config.num_updates
            checkpoints.save(updates_done, args=ocp.args.StandardSave(state), force=is_last)
            bar.update(length * steps)
            bar.set_postfix(episodic_return=np.ma.masked_invalid(metrics["episodic_return"]).mean())
            for i in np.flatnonzero(np.isnan(metrics["entropy"][:, -1]) & ~diverged):
                bar.write(f"seed {config.seed + i} diverged: its weights are no longer finite")
                diverged[i] = True
    return state


def plot_learning_curve(run_dir: Path, config: Config) -> None:
    """Draw the returns in metrics.csv over environment steps: each seed, and their mean."""
    from matplotlib.figure import Figure

    table = np.genfromtxt(run_dir / "metrics.csv", delimiter=",", names=True)
    table = table.reshape(-1, config.num_seeds)
    steps, returns = table["env_step"], table["episodic_return"]
    axes = Figure(layout="constrained").subplots()
    axes.plot(steps, returns, color="tab:blue", alpha=0.2, linewidth=0.8)
    mean = np.ma.masked_invalid(returns).mean(axis=1)
    label = "no episode ended" if mean.mask.all() else f"mean of {config.num_seeds} seeds"
    axes.plot(steps[:, 0], mean, color="tab:blue", label=label)
    axes.set(xlabel="environment steps per seed", ylabel="return of training episodes")
    axes.legend(title=f"{SCRIPT} on {config.env_id}")
    axes.figure.savefig(run_dir / "learning_curve.png", dpi=150)


def report_evaluation(run_dir: Path, config: Config, returns, lengths, finite) -> None:
    """Write evaluation.csv and print a summary of returns and lengths, [num_seeds, episodes]."""
    row, episode = np.indices(returns.shape)
    table = np.stack([config.seed + row, episode, returns, lengths], axis=-1).reshape(-1, 4)
    header = "seed,episode,episodic_return,episodic_length"
    np.savetxt(run_dir / "evaluation.csv", table, "%.7g", ",", header=header, comments="")
    print(f"\nGreedy evaluation, {EVALUATION_EPISODES} episodes\n\n  seed     return ± std")
    for i, x in enumerate(returns):
        note = "" if finite[i] else "  (diverged)"
        print(f"{config.seed + i:6d} {x.mean():10.2f} ± {x.std():.2f}{note}")
    print(f"\nmean of {config.num_seeds} seeds: {returns.mean():.2f}")


def run(flags: Flags) -> None:
    """Train, evaluate and plot."""
    config = flags.config
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")  # only the first process prints
    env = load_env(config.env_id)  # before there is a folder, in case the name is wrong
    run_dir = Path(flags.resume) if flags.resume else make_run_dir(config)
    changed = {k: v for k, v in vars(config).items() if v != getattr(Config, k)}
    print(f"{SCRIPT} with {changed or 'its defaults'}")
    print(f"writing {run_dir}; to continue it after an interruption: --resume {run_dir}")
    state = train_and_save(run_dir)

    def play(state):
        finite = jnp.all(jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(state.params)]))
        _, key = jax.random.split(state.key)
        return *evaluate(config, state, key, EVALUATION_EPISODES, env), finite

    results = over_seeds(play, config.num_seeds)(state)
    results = multihost.process_allgather(results, tiled=True)
    if jax.process_index() == 0:
        report_evaluation(run_dir, config, *results)
        plot_learning_curve(run_dir, config)


def main() -> None:
    try:
        flags = parse_flags()
        if not jax.config.jax_compilation_cache_dir:  # compile the same programs only once
            jax.config.update("jax_compilation_cache_dir", os.path.abspath("runs/jax_cache"))
        if flags.distributed:
            # JAX finds the other processes on Slurm, Open MPI, TPU pods and the like. Elsewhere set
            # JAX_COORDINATOR_ADDRESS and these two variables.
            names = ["JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]
            count, index = (int(os.environ[x]) if x in os.environ else None for x in names)
            jax.distributed.initialize(num_processes=count, process_id=index)
        else:
            use_cores(flags.config.num_seeds)
        run(flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
