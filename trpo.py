"""Trust Region Policy Optimisation, discrete and continuous actions: JAX, one file, one program.

The setting: in step t an agent sees s_t, draws an action a_t from its policy π(· | s_t), receives a
reward r_t and sees s_{t+1}, until the episode ends. It is to learn a π with a large expected return
E[Σ γ^t r_t], where γ ≤ 1 discounts what comes later. The environment need not be differentiated for
that: it does not depend on the parameters of π, and as ∇π = π ∇ log π, the gradient of the expected
return is E[Σ γ^t ∇ log π(a_t|s_t) G_t], where G_t = Σ_k γ^k r_{t+k} is the return from step t on
(a_t has no part in what came before). Since E[∇ log π] = Σ_a ∇π = 0 in every state, one may
subtract from G_t the return to be expected from s_t on, V(s_t), which usually removes noise. What
is left is the advantage Â_t, an estimate of how much better a_t was than V(s_t) promised. The
policy gradient E[∇ log π(a_t|s_t) Â_t] pushes each action's probability with its advantage as the
weight: up, or down where that is negative. (Its factor γ^t is left out, as usual: late steps count
in full.) π is the "actor"; V, fitted by regression, the "critic".

TRPO (Schulman et al. 2015, arXiv:1502.05477) makes the largest improvement of π within the region
where data of the old policy π_old are trusted. What the data promise is the surrogate L; how far
they are trusted is measured in the policies' outputs, not in their parameters. (A theorem in the
paper guarantees improvement, for the largest KL over all states and a δ too small to be of use; the
mean and a larger δ are its practical form. Single states may change by more.)

    maximise over θ    L(θ) = E[ π_θ(a|s) / π_old(a|s) · Â ]                (eq. 14, with Â for Q)
    subject to         E[ KL(π_old(·|s) ‖ π_θ(·|s)) ] ≤ δ

Near θ_old, L is linear with the policy gradient g as its slope, since ∇(π_θ/π_old) = ∇ log π_θ
there. The KL divergence has no linear part: it is zero at θ_old and nowhere smaller. Its quadratic
part is given by the Fisher information matrix F = E[∇ log π ∇ log πᵀ] of the policy:

    maximise over x    gᵀx    subject to    ½ xᵀF x ≤ δ                                   (eq. 17)

whose solution, where F has an inverse, is a step along the natural gradient F⁻¹g, to the edge of
the region:

    x = √( 2δ / gᵀF⁻¹g ) F⁻¹g                                                        (appendix C)

The policy that it leads to does not depend, to first order, on how the policy is parameterised;
where the gradient leads to does. Four decisions make this a program:

- F is never formed. Conjugate gradient solves F x = g from products F v alone, and such a product
  costs about as much as a gradient.
- Some directions in θ do not change the policy, such as a constant added to all logits, or hardly
  do in the states seen: F⁻¹ does not exist, or magnifies the noise of g there. So λ is added to the
  diagonal (damping): x ≈ (F+λI)⁻¹g, scaled to ½ xᵀ(F+λI) x = δ. To second order the KL of such a
  step is δ - ½ λ‖x‖². The price: where λ exceeds the eigenvalues of F, and these are most, x
  follows the plain gradient, which does depend on the parameterisation.
- Linear and quadratic model hold near θ_old only. So the step is a proposal: a line search tries
  shorter and shorter ones, until L itself, on the data, has grown and the KL itself is at most δ.
  If none passes, θ stays.
- KL(π_old ‖ π_θ), in this direction: π_θ must not become unlikely where π_old acts, whose data are
  to vouch for it. To second order both directions agree; the line search tells them apart.

The critic V is fitted by Adam to the targets Â + V, after the advantages (PPO eqs. 11-12,
arXiv:1707.06347) were computed from the old one, and shares no parameter with the policy.

`train(config, key)` runs a whole training, environments included, as one pure function:
`jit` compiles it, `vmap` trains many seeds at once. The command line runs the same `update` in
segments, to move a progress bar and write files between them.

    python trpo.py                                           # CartPole-v1, 8 seeds, 500k steps each
    python trpo.py --env-id Pendulum-v1 --num-seeds 3
    python trpo.py --help

Shapes: T = num_steps, N = num_envs, B = T·N transitions of a rollout, M = minibatch_size of them,
D = length of the observation vector, A = number of actions or of action dimensions, P = number of
the policy's parameters. Arrays of a rollout are [T, N, ...]; under vmap a seed axis stands in
front. In the code s_t is `obs`, and `State` the state of a training. λ is the damping, δ the size
of the region; in `gae` they are those of Schulman et al. 2016.

Departures from the paper, explained where they occur: advantages are estimated by GAE with a
learned critic (as in Schulman et al. 2016) and normalised; F is damped, and computed from all
states instead of a tenth of them, which costs time and saves noise; a time limit is not the end of
an episode for the value function, and neither is the end of a rollout, whose length is fixed;
observations and rewards are scaled by running statistics (δ bounds the change of the policy under
the statistics with which it acted); weights start orthogonal; the critic's Adam has an ε of 1e-5;
continuous actions are clipped and stretched to the bounds. "Huang et al." is "The 37 Implementation
Details of Proximal Policy Optimization" (2022).
"""

import argparse
import contextlib
import csv
import dataclasses
import difflib
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import scipy.stats
import tyro
from jax.experimental import multihost_utils
from jax.extend.random import threefry2x32_p
from jax.flatten_util import ravel_pytree
from jax.interpreters import mlir
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from tqdm import tqdm

# ---- Configuration: every field is a command-line flag, its comment the text of --help -----------


@dataclasses.dataclass(frozen=True)
class Config:
    """Train TRPO on an environment with discrete or continuous actions."""

    env_id: str = "CartPole-v1"  # a gymnax environment
    seed: int = 0  # the first seed; the others count up from it
    num_seeds: int = 8  # independent trainings, run side by side
    total_timesteps: int = 500_000  # environment steps per seed, never exceeded
    num_envs: int = 16  # environments per seed (N)
    num_steps: int = 256  # steps of each environment per update (T)
    gamma: float = 0.99  # discount γ
    gae_lambda: float = 0.95  # λ of generalised advantage estimation
    max_kl: float = 0.01  # δ, bound on the mean KL(old ‖ new) over the states of a rollout
    cg_iterations: int = 10  # iterations of conjugate gradient
    cg_damping: float = 0.1  # λ of F + λI
    line_search_tries: int = 10  # steps to try, the full one included
    line_search_ratio: float = 0.8  # length of each, as a fraction of the one before
    learning_rate: float = 1e-3  # the critic's: Adam's step size at the start
    anneal_lr: bool = True  # let the learning rate fall linearly to zero
    update_epochs: int = 10  # the critic's passes over each rollout (K)
    num_minibatches: int = 8  # minibatches per pass
    normalize_obs: bool = True  # scale observations by their running mean and deviation
    normalize_reward: bool = True  # scale rewards by the deviation of the discounted return
    hidden_sizes: tuple[int, ...] = (64, 64)  # widths of the hidden layers of actor and critic
    activation: Literal["tanh", "relu"] = "tanh"  # nonlinearity of the hidden layers
    resume: str | None = None  # directory of an earlier run to continue, with its configuration
    distributed: bool = False  # run as one of several processes, which jax.distributed joins

    @property
    def batch_size(self) -> int:
        """Transitions per update, T·N."""
        return self.num_steps * self.num_envs

    @property
    def minibatch_size(self) -> int:
        """Transitions per gradient step of the critic, M."""
        return self.batch_size // self.num_minibatches

    @property
    def num_updates(self) -> int:
        """Iterations that fit into the budget."""
        return self.total_timesteps // self.batch_size

    def __post_init__(self):
        """Raise ValueError on values that cannot work; traced floats (under vmap) pass unseen."""
        zero_allowed = {"seed", "gamma", "gae_lambda", "cg_damping"}
        for name, value in vars(self).items():
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, bool) or not isinstance(number, int | float):
                    continue
                if not (0 <= number < math.inf) or (number == 0 and name not in zero_allowed):
                    kind = "not negative" if name in zero_allowed else "positive"
                    raise ValueError(f"{name} must be finite and {kind}, got {number}")
                if name in ("gamma", "gae_lambda", "line_search_ratio") and number > 1:
                    raise ValueError(f"{name} must lie between 0 and 1, got {number}")
        if self.seed + self.num_seeds > 2**31:
            total = f"{self.seed} + {self.num_seeds}"
            raise ValueError(f"seed + num_seeds must not exceed 2^31, got {total}")
        if self.batch_size < 2:
            raise ValueError("num_steps x num_envs = 1 leaves nothing to normalise")
        if self.batch_size % self.num_minibatches:
            raise ValueError(
                f"num_steps x num_envs = {self.batch_size} transitions do not divide into "
                f"num_minibatches = {self.num_minibatches} equal parts"
            )
        if self.num_updates < 1:
            raise ValueError(
                f"total_timesteps = {self.total_timesteps} is less than one rollout of "
                f"num_steps x num_envs = {self.batch_size} steps"
            )


# What some environments need instead of the defaults, by family (the end of the name) or by name.
# A swimmer may drift hundreds of units away from where it should be: after one such episode the
# statistics of the observations leave no resolution there.
# On MountainCarContinuous haste costs energy: the best policy for γ = 0.99 has a mean return (not
# discounted) of 94.3, that for 0.999 of 95.8 (benchmarks/optimum.py). ppo_continuous.py returns
# 93.9 and 95.7 after 1M steps.
# ReLU learns Pendulum a little faster than tanh: after 100k steps it returns -153 instead of -158.
# It is no better default: with it four of ten seeds of Acrobot learn nothing in 100k.
# MinAtar: Breakout returned 18 after 2M steps with these values, 14 with the defaults, and 11 with
# these values but δ = 0.01. That is two seeds each, so little more than a guess. A smaller
# gae_lambda takes noise from the advantages: after 1.6M of 10M steps three seeds of Asterix return
# 4.7 in training with 0.65, and 2.8 with 0.95; after all steps 26 with 0.65. Freeway returns 39
# with 0.8 after all steps, and 34 with 0.95.
# DeepSea pays at the end of one of 2^8 paths only: a random policy misses it in 2048 episodes, a
# first rollout with 64 environments, with probability e^-8, and no seed of twenty failed. With 16
# environments it is e^-2, and one of ten failed.
PRESETS: dict[str, dict[str, Any]] = {
    "Pendulum-v1": dict(activation="relu"),
    "Swimmer-misc": dict(normalize_obs=False),
    "MountainCarContinuous-v0": dict(gamma=0.999),
    "DeepSea-bsuite": dict(num_envs=64),
    "MinAtar": dict(num_envs=64, num_steps=128, max_kl=0.03, update_epochs=4, activation="relu"),
    "Asterix-MinAtar": dict(gae_lambda=0.65),
    "Freeway-MinAtar": dict(gae_lambda=0.8),
}


def default_config(env_id: str | None = None) -> Config:
    """The defaults and the preset, as the command line has them; Config(...) ignores the preset."""
    env_id = env_id or Config.env_id
    family = env_id.rpartition("-")[2]
    return Config(env_id=env_id, **PRESETS.get(family, {}) | PRESETS.get(env_id, {}))


# ---- Policy distributions ------------------------------------------------------------------------


class Categorical(NamedTuple):
    """Distribution over actions 0 ... A-1. All methods work on any leading axes [...]."""

    logits: jax.Array  # [..., A], unnormalised log-probabilities

    def sample(self, key: jax.Array) -> jax.Array:
        """A random action, [...]."""
        return jax.random.categorical(key, self.logits)

    def log_prob(self, action: jax.Array) -> jax.Array:
        """log π(action), [...]."""
        # A product with a one-hot vector: the gradient of indexing would be a slow scatter.
        chosen = jax.nn.one_hot(action, self.logits.shape[-1], dtype=self.logits.dtype)
        return jnp.sum(chosen * jax.nn.log_softmax(self.logits), axis=-1)

    def entropy(self) -> jax.Array:
        """S[π] = -Σ π log π in nats, [...]."""
        log_p = jax.nn.log_softmax(self.logits)
        return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)

    def kl(self, other: "Categorical") -> jax.Array:
        """KL(self ‖ other) = Σ π_self (log π_self - log π_other) in nats, [...]."""
        log_p, log_q = jax.nn.log_softmax(self.logits), jax.nn.log_softmax(other.logits)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

    def mode(self) -> jax.Array:
        """The most probable action, [...]."""
        return jnp.argmax(self.logits, axis=-1)


class DiagGaussian(NamedTuple):
    """Independent normal distributions of A action dimensions, on any leading axes [...].

    A density, not a probability: `log_prob` may be positive and `entropy` negative.
    """

    mean: jax.Array  # [..., A]
    log_std: jax.Array  # [..., A]

    def sample(self, key: jax.Array) -> jax.Array:
        """A random action, [..., A]."""
        return self.mean + jnp.exp(self.log_std) * jax.random.normal(key, self.mean.shape)

    def log_prob(self, action: jax.Array) -> jax.Array:
        """log π(action), summed over the dimensions, [...]."""
        z = (action - self.mean) * jnp.exp(-self.log_std)
        return -jnp.sum(0.5 * z**2 + self.log_std + 0.5 * math.log(2 * math.pi), axis=-1)

    def entropy(self) -> jax.Array:
        """S[π] = Σ (log σ + ½ log 2πe) in nats, [...]."""
        return jnp.sum(self.log_std + 0.5 * math.log(2 * math.pi * math.e), axis=-1)

    def kl(self, other: "DiagGaussian") -> jax.Array:
        """KL(self ‖ other) = Σ ½ (σ²/σ'² + (μ - μ')²/σ'² - 1) + log σ'/σ in nats, [...]."""
        variance_ratio = jnp.exp(2 * (self.log_std - other.log_std))
        z = (self.mean - other.mean) * jnp.exp(-other.log_std)
        return jnp.sum(0.5 * (variance_ratio + z**2 - 1.0) + other.log_std - self.log_std, axis=-1)

    def mode(self) -> jax.Array:
        """The action of highest density, [..., A]."""
        return self.mean


# ---- Networks: separate actor and critic, two multilayer perceptrons -----------------------------


def orthogonal(scale: float) -> Callable:
    """Initialiser: `scale` times a uniformly distributed matrix with orthonormal rows or columns.

    A square one keeps the length of what passes through it, forwards and backwards; √2 makes up
    for the half that ReLU takes away, and is customary with tanh, too (detail 2 of Huang et al.).

    The usual QR decomposition is a batched LAPACK call under vmap, and several of those in one
    program can deadlock on a machine with few cores (jax 0.10). The polar factor of a Gaussian
    matrix has the same distribution, and the Newton-Schulz iteration x ← 3/2 x - 1/2 x xᵀx, which
    drives every singular value in (0, √3) to 1, finds it with matrix products alone. Dividing by
    the Frobenius norm brings the singular values into range; the small ones grow by 3/2 per step.
    """

    def init(key, shape, dtype=jnp.float32):
        x = jax.random.normal(key, shape, dtype)  # [fan_in, fan_out]
        with jax.default_matmul_precision("highest"):
            step = lambda _, y: 1.5 * y - 0.5 * y @ (y.T @ y)
            return scale * jax.lax.fori_loop(0, 40, step, x / jnp.linalg.norm(x))

    return init


def mlp(x: jax.Array, hidden_sizes: tuple[int, ...], activation: str) -> jax.Array:
    """Hidden layers, [..., D] -> [..., hidden_sizes[-1]]; to be called inside a Linen module."""
    for size in hidden_sizes:
        x = getattr(nn, activation)(nn.Dense(size, kernel_init=orthogonal(math.sqrt(2)))(x))
    return x


class Actor(nn.Module):
    """Observation [..., D] -> policy over A actions, or over actions of A dimensions."""

    action_size: int
    distribution: type[Categorical] | type[DiagGaussian]
    hidden_sizes: tuple[int, ...]
    activation: str

    @nn.compact
    def __call__(self, obs):
        x = mlp(obs, self.hidden_sizes, self.activation)
        # Tiny weights: the first policy is nearly the same for every observation, with even odds or
        # means near 0, the middle of a bounded range (Andrychowicz et al. 2020, 3.2).
        x = nn.Dense(self.action_size, kernel_init=orthogonal(0.01))(x)
        if self.distribution is Categorical:
            return Categorical(x)
        # One deviation per dimension, the same for every observation. It starts at 1: a third of
        # the first samples hits a bound.
        log_std = self.param("log_std", nn.initializers.zeros, (self.action_size,))
        return DiagGaussian(x, jnp.broadcast_to(log_std, x.shape))


class Critic(nn.Module):
    """Observation [..., D] -> value [...]."""

    hidden_sizes: tuple[int, ...]
    activation: str

    @nn.compact
    def __call__(self, obs):
        x = mlp(obs, self.hidden_sizes, self.activation)
        return nn.Dense(1, kernel_init=orthogonal(1.0))(x).squeeze(-1)


# ---- The mathematics: pure functions of arrays ---------------------------------------------------


def gae(reward, value, next_value, terminated, done, gamma, gae_lambda):
    """Generalised advantage estimation (PPO eqs. 11-12; Schulman et al. 2016, arXiv:1506.02438).

    δ_t estimates the advantage from one reward. To "bootstrap" is to put V in the place of rewards
    that were not seen or are not used, here of all later ones. With λ = 1 the V's between cancel in
    the sum: the rewards seen remain, V where they stop, and -V(s_t) (little bias, much noise). With
    λ = 0 it is δ_t alone (the reverse). (The PPO paper has T-t+1 as the last exponent of eq. 11, a
    misprint.)

    `next_value` is V of the observation that the step led to, even where the episode ended there.
    `terminated` stops the bootstrap: after a true end nothing follows, so its value is zero. `done`
    (terminated, or cut by a time limit) stops the recursion: the next row is another episode. The
    last step of an episode that was only cut still bootstraps: the limit is no part of the task,
    and V stands for the rewards that would have followed (Pardo et al. 2018, arXiv:1712.00378).

    All arrays [T, N]; returns the advantage Â and the critic's target Â + V, both [T, N].
    """
    delta = reward + gamma * next_value * (1.0 - terminated) - value

    def step(advantage, row):
        delta, done = row
        advantage = delta + gamma * gae_lambda * (1.0 - done) * advantage
        return advantage, advantage

    # The body is a handful of operations on N numbers: unrolling saves most of the loop's overhead.
    zero = jnp.zeros_like(delta[0])
    _, advantage = jax.lax.scan(step, zero, (delta, done), reverse=True, unroll=16)
    return advantage, advantage + value


def normalize_advantage(advantage):
    """Mean 0 and deviation 1 over the data of one gradient step, so that the policy's part in it
    does not depend on the scale of the rewards (OpenAI baselines; detail 7 of Huang et al.). The
    mean may be subtracted for the reason that V may: E[∇ log π] = 0. Any shape; in PPO [M]."""
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8)


def surrogate(ratio, advantage):
    """L = E[ρ Â] (PPO eq. 6; TRPO eq. 14 with Â for Q), to be maximised: [...] -> scalar."""
    return jnp.mean(ratio * advantage)


def value_loss(value, target):
    """½ E[(V - V_target)²]; the ½ cancels the 2 of its gradient. value, target [M] -> scalar."""
    return 0.5 * jnp.mean((value - target) ** 2)


def fisher_vector_product(policy_at, theta):
    """The linear map v -> F v, for v [P], with the Fisher information matrix F [P, P] at θ_old.

    `policy_at` maps θ [P] to the distributions of B states. F is the Hessian of the mean
    KL(π_old ‖ π_θ) at θ = θ_old and, by the chain rule, equal to Jᵀ M J (appendix C.1): J is the
    Jacobian of the distributions' parameters (logits; mean and log σ) in θ, M the Hessian of the
    mean KL in these. The chain rule's other term contains the first derivative of the KL, which is
    zero there. So a product needs one pass through the linearised network and one back; the
    activations they share are computed once, by `linearize`. To linearise the gradient of the KL
    instead is shorter but takes a fifth longer, since it computes the term that is zero, too.
    """
    old_policy, jacobian = jax.linearize(policy_at, theta)
    transpose = jax.linear_transpose(jacobian, theta)
    # Gradient of the mean KL in the second distribution's parameters, as such a distribution.
    kl_gradient = jax.grad(lambda policy: old_policy.kl(policy).mean())

    def product(v):
        change = jacobian(v)  # J v, of every state's distribution
        _, curved = jax.jvp(kl_gradient, (old_policy,), (change,))  # M J v
        (result,) = transpose(curved)  # Jᵀ M J v
        return result

    return product


def conjugate_gradient(product, b, num_iterations):
    """Solve F x = b, for F symmetric and positive definite, known through `product(v) = F v`.

    Hestenes & Stiefel 1952: each direction is conjugate to all before, so that no iteration undoes
    another and P of them would be exact, but for rounding. Far fewer come near if most eigenvalues
    are alike, as damping makes the small ones (TRPO passes F + λI as F). b [P] -> x [P] and the
    residual b - F x [P].
    """

    def iteration(carry, _):
        x, residual, direction = carry
        square = residual @ residual
        image = product(direction)
        curvature = direction @ image
        # x stays once it has converged to rounding (without this a 0/0 follows, at once if b = 0),
        # and where the curvature is not positive; then the residual is tried as the next direction.
        go = (square > jnp.finfo(b.dtype).eps ** 2 * (b @ b)) & (curvature > 0)
        length = jnp.where(go, square / curvature, 0.0)
        x = x + length * direction
        residual = residual - length * image
        direction = residual + jnp.where(go, residual @ residual / square, 0.0) * direction
        return (x, residual, direction), None

    (x, residual, _), _ = jax.lax.scan(iteration, (jnp.zeros_like(b), b, b), None, num_iterations)
    return x, residual


def trust_region_step(product, gradient, max_kl, damping, num_iterations):
    """The step √(2δ / xᵀ(F+λI)x) x with x ≈ (F+λI)⁻¹ g (appendix C), and the error left over.

    gradient g [P] -> step [P], and ‖g - (F+λI)x‖ / ‖g‖ [], as counted by CG. The step is zero if g
    is, or if the model is useless: not finite, or of no positive curvature along x.
    """
    x, residual = conjugate_gradient(lambda v: product(v) + damping * v, gradient, num_iterations)
    curvature = x @ (gradient - residual)  # xᵀ(F+λI)x, without another product
    step = jnp.sqrt(2.0 * max_kl / curvature) * x
    usable = (curvature > 0) & jnp.isfinite(step).all()
    norm = jnp.linalg.norm(gradient)
    return jnp.where(usable, step, 0.0), jnp.linalg.norm(residual) / jnp.where(norm > 0, norm, 1.0)


class LineSearch(NamedTuple):
    """What became of a proposed step."""

    theta: jax.Array  # [P] the new parameters, or the old ones
    accepted: jax.Array  # [] bool
    tries: jax.Array  # []
    improvement: jax.Array  # [] of the surrogate; 0 if nothing was accepted
    kl: jax.Array  # [] mean KL(old ‖ new); 0 if nothing was accepted


def line_search(measure, theta, step, max_kl, num_tries, ratio):
    """Take the first of θ + step, θ + ratio·step, θ + ratio²·step, ... that passes (appendix C).

    `measure(θ')` -> improvement L(θ') - L(θ), mean KL(π_θ ‖ π_θ'). To pass, θ must move, the
    improvement be positive, the KL at most δ, and everything finite. If none of `num_tries` passes,
    the old parameters come back, bit for bit.
    """

    def attempt(search):
        candidate = theta + ratio**search.tries * step
        # In the type of θ, so that the loop keeps its types where numbers are double by default.
        improvement, kl = (jnp.asarray(x, theta.dtype) for x in measure(candidate))
        finite = jnp.isfinite(improvement) & jnp.isfinite(candidate).all()
        moved = (candidate != theta).any()  # else rounding alone may look like an improvement
        accepted = moved & (improvement > 0) & (kl <= max_kl) & finite  # false if a NaN is compared
        return LineSearch(
            theta=jnp.where(accepted, candidate, theta),
            accepted=accepted,
            tries=search.tries + 1,
            improvement=jnp.where(accepted, improvement, 0.0),
            kl=jnp.where(accepted, kl, 0.0),
        )

    zero = jnp.zeros((), theta.dtype)
    return jax.lax.while_loop(
        lambda search: ~search.accepted & (search.tries < num_tries),
        attempt,
        LineSearch(theta, jnp.asarray(False), jnp.asarray(0), zero, zero),
    )


class RunningStats(NamedTuple):
    """Mean and variance of the rollouts merged so far, per component."""

    mean: jax.Array  # [...]
    var: jax.Array  # [...]
    count: jax.Array  # []


def init_stats(shape: tuple[int, ...]) -> RunningStats:
    """Mean 0 and variance 1 to begin with, of so little weight that the first data replace them."""
    return RunningStats(jnp.zeros(shape), jnp.ones(shape), jnp.asarray(1e-4))


def update_stats(stats: RunningStats, x: jax.Array) -> RunningStats:
    """Merge a rollout x, [T, N, ...], into the statistics (Chan, Golub & LeVeque 1979)."""
    n, mean, var = x.shape[0] * x.shape[1], x.mean((0, 1)), x.var((0, 1))
    count = stats.count + n
    weight = n / count  # of the rollout in the new statistics
    delta = mean - stats.mean
    spread = weight * (1.0 - weight) * delta**2  # what the distance of the two means adds
    return RunningStats(
        mean=stats.mean + weight * delta,
        var=(1.0 - weight) * stats.var + weight * var + spread,
        count=count,
    )


def normalize(obs: jax.Array, stats: RunningStats | None) -> jax.Array:
    """Observations [..., D] to mean 0 and deviation 1, clipped to ±10; unchanged without stats."""
    if stats is None:
        return obs
    # Times 1/√, not divided by √: XLA would replace some of the divisions by that and leave others,
    # so that rounding would depend on the number of devices, and differ from rollout to update.
    # The 1e-8 is for components that never vary.
    return jnp.clip((obs - stats.mean) * jax.lax.rsqrt(stats.var + 1e-8), -10.0, 10.0)


def scale_reward(reward: jax.Array, stats: RunningStats | None) -> jax.Array:
    """Rewards divided by the discounted return's deviation, clipped to ±10 (Engstrom et al. 2020).

    So the critic's targets vary on a similar scale in most environments. The mean stays: a constant
    taken from every reward would favour short or long episodes, and change the task. The clip
    changes it where it cuts some rewards only, such as one for a goal after hundreds of steps.
    """
    if stats is None:
        return reward
    return jnp.clip(reward * jax.lax.rsqrt(stats.var + 1e-8), -10.0, 10.0)


def shuffled_indices(key, num_epochs, batch_size, num_minibatches):
    """A new random order for each epoch, cut into minibatches: [num_epochs · num_minibatches, M].

    `jax.random.permutation` sorts pairs, mostly twice, in up to a third of all training time. Here
    the index sits in the low bits of a random word, and one sort of plain integers carries it
    along: three to seven times faster. Words whose random high bits agree keep the order of their
    indices: of 8192 transitions some 60 of 33 million pairs. A million has runs of about 256 such
    words; even that matters little where M is far larger, since of each run only what goes to
    either side of a minibatch boundary is not left to chance.
    """
    index_bits = (batch_size - 1).bit_length()
    low = jnp.uint32(2**index_bits - 1)
    words = jax.random.bits(key, (num_epochs, batch_size), jnp.uint32)
    words = (words & ~low) | jnp.arange(batch_size, dtype=jnp.uint32)
    order = (jnp.sort(words, axis=-1) & low).astype(jnp.int32)
    return order.reshape(num_epochs * num_minibatches, batch_size // num_minibatches)


def threefry2x32(key0, key1, count0, count1):
    """The hash behind `jax.random`: a key and a count, two uint32 each -> two random uint32.

    Arrays broadcast: usually one key meets many counts. It is Threefry-2x32 with 20 rounds (Salmon
    et al. 2011), bit for bit what JAX has. But on the CPU JAX runs the rounds in a loop, and in
    every step of a cheap environment such loops cost more than the environment. Written out they
    are plain arithmetic, which XLA fuses into one operation: small trainings run a tenth faster,
    and all compile in little more than half the time. The barrier changes no value. It stops XLA
    from merging a split of keys with the split that they came from: as each word of a hash needs
    both words of its key, the merged expression would double with each split, until compiling never
    ends.
    """
    key0, key1 = jax.lax.optimization_barrier((key0, key1))
    keys = (key0, key1, key0 ^ key1 ^ jnp.uint32(0x1BD11BDA))  # a constant of Threefry's
    x, y = count0 + key0, count1 + key1
    for i in range(5):
        for shift in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x = x + y
            y = x ^ ((y << shift) | (y >> (32 - shift)))  # y is rotated to the left
        x, y = x + keys[(i + 1) % 3], y + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x, y


# Replace JAX's own rule, for the CPU only, in whatever the process compiles from now on, other code
# included: hence at import. The random numbers stay the same. Neither import is stable API: if a
# new JAX breaks this, delete it with its imports; training only gets slower.
mlir.register_lowering(
    threefry2x32_p, mlir.lower_fun(threefry2x32, multiple_results=True), platform="cpu"
)


# ---- The environment: gymnax, as N environments with flat float32 observations -------------------


class Environment(NamedTuple):
    """What the algorithm needs of an environment; both functions act on N copies at once."""

    reset: Callable  # keys [N] -> obs [N, D], env_state
    step: Callable  # keys [N], env_state, action [N, ...] -> six results, see `step` in make_env
    make_actor: Callable  # hidden_sizes, activation -> the Actor for its actions


def bound_action(action: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """What the environment gets for the policy's action; elementwise, the bounds broadcast.

    The policy thinks in units in which ±1 are the bounds, so that a deviation of 1 explores the
    whole range, whatever its size: the action is clipped to ±1 and stretched to [low, high]. Where
    a bound is missing nothing is clipped on that side and the units are the environment's. The loss
    never sees this: the density is that of the raw action, and clipping it first would give a wrong
    ratio at the bounds.
    """
    has_low, has_high = low > -1e30, high < 1e30  # some spaces write the largest float for no bound
    start = jnp.where(has_low, low, jnp.where(has_high, high - 2.0, -1.0))
    end = jnp.where(has_high, high, start + 2.0)
    action = jnp.clip(action, jnp.where(has_low, -1.0, -jnp.inf), jnp.where(has_high, 1.0, jnp.inf))
    return start + (end - start) * (action + 1.0) / 2


def action_interface(env_id: str, space: Any) -> tuple[Callable, Callable]:
    """What makes the Actor, and the policy's action -> the environment's; both by the action space.

    Nothing else knows whether actions are discrete or continuous, but the Actor's last lines.
    """
    from gymnax.environments import spaces  # here, for the reason given in make_env

    if isinstance(space, spaces.Discrete):
        return partial(Actor, space.n, Categorical), lambda action: action
    if not isinstance(space, spaces.Box):
        raise ValueError(f"{env_id} has an action space that is not supported: {space}")
    low, high = (jnp.broadcast_to(bound, space.shape) for bound in (space.low, space.high))

    def to_env_action(action):
        return bound_action(action.reshape(space.shape), low, high)

    return partial(Actor, math.prod(space.shape), DiagGaussian), to_env_action


def make_env(env_id: str) -> Environment:
    """The gymnax environment of that name, vectorised. ValueError says why one cannot be used.

    It is used only through `reset`, `step` with its info["final_observation"], and the two spaces,
    so environments added by `gymnax.register`, wrapped ones too, work like the built-in ones.
    """
    # Imported here, because gymnax computes on import, and --distributed has to come before that.
    import gymnax
    from gymnax.environments import spaces

    if env_id not in gymnax.registered_envs:
        near = difflib.get_close_matches(env_id, gymnax.registered_envs, cutoff=0.4)
        raise ValueError(
            f"there is no environment {env_id!r}; "
            + (f"did you mean {' or '.join(near)}? " if near else "")
            + f"gymnax has: {', '.join(sorted(gymnax.registered_envs))}"
        )
    try:
        with jax.ensure_compile_time_eval():  # some constructors compute, and `train` may be traced
            env, env_params = gymnax.make(env_id)
    except OSError as error:
        raise ValueError(f"{env_id} needs data that could not be downloaded: {error}") from error
    action_space = env.action_space(env_params)
    obs_space = env.observation_space(env_params)
    if isinstance(obs_space, spaces.Dict | spaces.Tuple):
        raise ValueError(f"{env_id} has observations of several parts: not supported")
    make_actor, to_env_action = action_interface(env_id, action_space)

    def observe(obs):
        """One observation as a flat float vector [D]; a category becomes a one-hot vector."""
        if isinstance(obs_space, spaces.Discrete):
            return jax.nn.one_hot(obs, obs_space.n)
        return jnp.ravel(obs).astype(jnp.float32)

    def strong(env_state):
        """The same without weak types (those of Python's numbers), which some environments return
        in one of `reset` and `step` only: a loop over `jit(update)` would compile it twice."""
        return jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), env_state)

    @jax.vmap
    def reset(key):
        obs, env_state = env.reset(key, env_params)
        return observe(obs), strong(env_state)

    @jax.vmap
    def step(key, env_state, action):
        """One step and, where an episode ends, a reset: `obs` opens the new episode, `next_obs` is
        the last observation of the old one (elsewhere they are equal)."""
        obs, env_state, reward, terminated, truncated, info = env.step(
            key, env_state, to_env_action(action), env_params
        )
        next_obs = observe(info["final_observation"])
        reward = jnp.asarray(reward, jnp.float32)
        return observe(obs), strong(env_state), next_obs, reward, terminated, truncated

    return Environment(reset, step, make_actor)


# ---- Data ----------------------------------------------------------------------------------------


class Transition(NamedTuple):
    """One step of N environments; a rollout stacks T of them in front."""

    obs: jax.Array  # [N, D]
    next_obs: jax.Array  # [N, D] what the step led to, before any reset
    action: jax.Array  # [N] or [N, A] as sampled, not bounded
    reward: jax.Array  # [N] unscaled
    terminated: jax.Array  # [N] bool, the episode truly ended
    done: jax.Array  # [N] bool, terminated or cut by a time limit
    discounted_return: jax.Array  # [N] Σ γ^k r_{t-k} of the episode so far: like the return, but
    # backwards, so known at once. Its deviation over all steps is the scale of the rewards.
    episode_return: jax.Array  # [N] sum of the rewards of the episode so far, for the reports
    episode_length: jax.Array  # [N] its number of steps


class Batch(NamedTuple):
    """What the critic's loss needs of B transitions."""

    obs: jax.Array  # [B, D] normalised
    target: jax.Array  # [B] in units of the scaled reward


class State(NamedTuple):
    """Everything that changes during training."""

    params: dict[str, Any]  # {"actor": ..., "critic": ...}
    opt_state: optax.OptState
    obs_stats: RunningStats | None  # of the observations, shared by the N environments
    return_stats: RunningStats | None  # of the discounted return
    env_state: Any  # of N environments
    obs: jax.Array  # [N, D] the policy's next input, not normalised
    discounted_return: jax.Array  # [N]
    episode_return: jax.Array  # [N]
    episode_length: jax.Array  # [N]
    updates_done: jax.Array  # []
    key: jax.Array  # [] PRNG key


# ---- The algorithm -------------------------------------------------------------------------------


def make_train(config: Config) -> tuple[Callable, Callable]:
    """The two pure functions that training consists of.

    Returns:
        init(key) -> State
        update(state, _) -> State, metrics: one iteration, in the form that `lax.scan` wants.
    """
    env = make_env(config.env_id)
    actor = env.make_actor(config.hidden_sizes, config.activation)
    critic = Critic(config.hidden_sizes, config.activation)
    num_gradient_steps = config.update_epochs * config.num_minibatches  # per update

    def learning_rate(gradient_step):
        """Adam's step size; it stays the same within an update (detail 4 of Huang et al.)."""
        if not config.anneal_lr:
            return config.learning_rate
        progress = gradient_step // num_gradient_steps / config.num_updates
        return config.learning_rate * (1.0 - progress)

    # Adam's ε is OpenAI's (detail 3). `flatten` turns half a dozen small arrays into one vector, on
    # which the step costs a few operations instead of a few dozen.
    optimizer = optax.flatten(optax.adam(learning_rate, eps=1e-5))

    def init(key):
        key, actor_key, critic_key, reset_key = jax.random.split(key, 4)
        obs, env_state = env.reset(jax.random.split(reset_key, config.num_envs))
        params = {"actor": actor.init(actor_key, obs), "critic": critic.init(critic_key, obs)}
        return State(
            params=params,
            opt_state=optimizer.init(params["critic"]),
            obs_stats=init_stats(obs.shape[1:]) if config.normalize_obs else None,
            return_stats=init_stats(()) if config.normalize_reward else None,
            env_state=env_state,
            obs=obs,
            discounted_return=jnp.zeros(config.num_envs),
            episode_return=jnp.zeros(config.num_envs),
            episode_length=jnp.zeros(config.num_envs, jnp.int32),
            updates_done=jnp.asarray(0),
            key=key,
        )

    def env_step(state, keys):
        """One step of the N environments with the current policy."""
        action_key, env_keys = keys
        policy = actor.apply(state.params["actor"], normalize(state.obs, state.obs_stats))
        action = policy.sample(action_key)
        obs, env_state, next_obs, reward, terminated, truncated = env.step(
            env_keys, state.env_state, action
        )  # `obs` is what the policy sees next, `next_obs` the s_{t+1} of PPO's eq. 12
        transition = Transition(
            obs=state.obs,
            next_obs=next_obs,
            action=action,
            reward=reward,
            terminated=terminated,
            done=terminated | truncated,
            discounted_return=config.gamma * state.discounted_return + reward,
            episode_return=state.episode_return + reward,
            episode_length=state.episode_length + 1,
        )
        # The running sums are read first and reset after: the last step of an episode counts.
        restart = lambda x: jnp.where(transition.done, 0, x)
        state = state._replace(
            env_state=env_state,
            obs=obs,
            discounted_return=restart(transition.discounted_return),
            episode_return=restart(transition.episode_return),
            episode_length=restart(transition.episode_length),
        )
        return state, transition

    def policy_step(params, obs, action, advantage):
        """One step of the actor for the whole rollout, all [T, N, ...]: propose and search."""
        theta, unravel = ravel_pytree(params)  # all parameters as one vector [P]
        policy_at = lambda theta: actor.apply(unravel(theta), obs)
        old_policy = policy_at(theta)  # π_old: the statistics are still those of the rollout
        old_log_prob = old_policy.log_prob(action)
        surrogate_of = lambda policy: surrogate(
            jnp.exp(policy.log_prob(action) - old_log_prob), advantage
        )

        objective = lambda theta: surrogate_of(policy_at(theta))
        old_surrogate, gradient = jax.value_and_grad(objective)(theta)
        step, cg_residual = trust_region_step(
            fisher_vector_product(policy_at, theta),
            gradient,
            config.max_kl,
            config.cg_damping,
            config.cg_iterations,
        )

        def measure(theta):
            policy = policy_at(theta)
            return surrogate_of(policy) - old_surrogate, old_policy.kl(policy).mean()

        search = line_search(
            measure, theta, step, config.max_kl, config.line_search_tries, config.line_search_ratio
        )
        metrics = {
            "surrogate_improvement": search.improvement,
            "kl": search.kl,
            "step_accepted": search.accepted.astype(jnp.float32),
            "line_search_steps": search.tries,
            "cg_residual": cg_residual,
            "entropy": old_policy.entropy().mean(),  # of the policy that acted
        }
        return unravel(search.theta), metrics

    def loss(params, batch):
        """The critic's loss on a minibatch."""
        return value_loss(critic.apply(params, batch.obs), batch.target)

    def minibatch_step(batch, carry, indices):
        """One gradient step of the critic on the transitions `indices` [M] of the batch."""
        params, opt_state = carry
        minibatch = jax.tree.map(lambda x: x[indices], batch)
        critic_loss, gradient = jax.value_and_grad(loss)(params, minibatch)
        change, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, change), opt_state), critic_loss

    def update(state, _):
        """One iteration: roll out, estimate advantages, step the actor, fit the critic."""
        key, action_key, env_key, shuffle_key = jax.random.split(state.key, 4)

        # Roll out. All keys come from two calls, which costs less than splitting in every step.
        action_keys = jax.random.split(action_key, config.num_steps)  # [T]
        env_keys = jax.random.split(env_key, (config.num_steps, config.num_envs))  # [T, N]
        state, rollout = jax.lax.scan(env_step, state, (action_keys, env_keys))

        # Estimate advantages. Observations are normalised as they were during the rollout, so that
        # π_old is the policy that acted; their statistics change for the next iteration only.
        # The reward scale may know the new returns at once: it is one factor for the whole rollout,
        # and V, which was learned in the old scale, is off by little once the statistics settle.
        # V(s_{t+1}) is not V(s_t) shifted by a row: where an episode ended, a reset lies between.
        flatten = lambda x: x.reshape(config.batch_size, *x.shape[2:])  # [T, N, ...] -> [B, ...]
        obs = normalize(rollout.obs, state.obs_stats)  # [T, N, D]
        next_obs = normalize(rollout.next_obs, state.obs_stats)
        value = critic.apply(state.params["critic"], obs)  # [T, N]
        next_value = critic.apply(state.params["critic"], next_obs)
        obs_stats, return_stats = state.obs_stats, state.return_stats
        if config.normalize_obs:
            obs_stats = update_stats(obs_stats, rollout.obs)
        if config.normalize_reward:
            return_stats = update_stats(return_stats, rollout.discounted_return)
        advantage, target = gae(
            scale_reward(rollout.reward, return_stats),
            value,
            next_value,
            rollout.terminated,
            rollout.done,
            config.gamma,
            config.gae_lambda,
        )

        # Step the actor. Its step does not depend on the scale of the advantages; their mean is
        # taken away because it adds noise, and to the expected gradient nothing. Conjugate gradient
        # and the small differences that the line search tests want all of float32; by default
        # recent GPUs and TPUs multiply with less.
        with jax.default_matmul_precision("highest"):
            actor_params, policy_metrics = policy_step(
                state.params["actor"], obs, rollout.action, normalize_advantage(advantage)
            )

        # Fit the critic, in one scan over the minibatches of all epochs. Each gathers its
        # transitions by index, which is cheaper than a shuffled copy of the rollout per epoch.
        batch = jax.tree.map(flatten, Batch(obs, target))
        indices = shuffled_indices(
            shuffle_key, config.update_epochs, config.batch_size, config.num_minibatches
        )
        (critic_params, opt_state), value_losses = jax.lax.scan(
            partial(minibatch_step, batch), (state.params["critic"], state.opt_state), indices
        )

        # The value loss is a mean over all gradient steps, returns over the episodes that ended in
        # this rollout: NaN where none did.
        mean_of_ended = lambda x: jnp.mean(x, where=rollout.done)
        metrics = {
            "episodic_return": mean_of_ended(rollout.episode_return),
            "episodic_length": mean_of_ended(rollout.episode_length),
            **policy_metrics,
            "value_loss": value_losses.mean(),
            # 1 if V and its targets differ by a constant, 0 or less if a constant does as well.
            "explained_variance": 1.0 - jnp.var(target - value) / jnp.var(target),
            "learning_rate": learning_rate(state.updates_done * num_gradient_steps),
        }
        state = state._replace(
            params={"actor": actor_params, "critic": critic_params},
            opt_state=opt_state,
            obs_stats=obs_stats,
            return_stats=return_stats,
            updates_done=state.updates_done + 1,
            key=key,
        )
        return state, metrics

    return init, update


def train(config: Config, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
    """A whole training run, as a pure function: the final state, and each metric as [num_updates].

    `jit(vmap(partial(train, config)))(keys)` trains one agent per key; a float of the
    configuration may be vmapped as well: `vmap(lambda x: train(replace(config, gamma=x), key))`.
    """
    init, update = make_train(config)
    return jax.lax.scan(update, init(key), None, config.num_updates)


def evaluate(config: Config, state: State, key: jax.Array, num_episodes: int):
    """Play greedily (the mode of the policy), with the statistics frozen.

    Each of num_episodes environments plays one episode; what it does afterwards does not count.
    An environment in which episodes neither end nor are cut would be played for ever.
    Returns the sum of rewards, unscaled, and the length of each episode, both [num_episodes].
    """
    env = make_env(config.env_id)
    actor = env.make_actor(config.hidden_sizes, config.activation)
    reset_key, step_key = jax.random.split(key)
    obs, env_state = env.reset(jax.random.split(reset_key, num_episodes))

    def step(carry):
        key, obs, env_state, playing, episode_return, episode_length = carry
        key, env_key = jax.random.split(key)
        policy = actor.apply(state.params["actor"], normalize(obs, state.obs_stats))
        obs, env_state, _, reward, terminated, truncated = env.step(
            jax.random.split(env_key, num_episodes), env_state, policy.mode()
        )
        episode_return += jnp.where(playing, reward, 0.0)
        episode_length += playing
        playing &= ~(terminated | truncated)
        return key, obs, env_state, playing, episode_return, episode_length

    start = (jnp.ones(num_episodes, bool), jnp.zeros(num_episodes), jnp.zeros(num_episodes, int))
    start = (step_key, obs, env_state, *start)
    some_play = lambda carry: carry[3].any()
    *_, episode_return, episode_length = jax.lax.while_loop(some_play, step, start)
    return episode_return, episode_length


# ---- The host side: nothing above prints, writes or reads the clock -----------------------------

CHECKPOINT_SECONDS = 30  # a kill loses at most this and a segment
EVALUATION_EPISODES = 100  # per seed


def fail(message: object) -> None:
    """End with a message and exit code 2, as tyro does on wrong flags."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        os._exit(2)  # a normal exit would wait for the other processes, and they for this one
    sys.exit(2)


def load_config(run_dir: str | Path) -> Config:
    """The configuration of an earlier run; ValueError if that is not possible."""
    path = Path(run_dir) / "config.json"
    try:
        stored = json.loads(path.read_text())
        script = stored.pop("script")
        if script != Path(__file__).stem:
            raise ValueError(f"this is a run of {script}.py")
        return Config(**stored | {"hidden_sizes": tuple(stored["hidden_sizes"])})
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"cannot continue from {path}: {error!r}") from error


def parse_command_line() -> Config:
    """The configuration: the environment's default, or the resumed run's, and the flags over it."""
    # A first pass finds only the two flags on which the defaults of the others depend.
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--env-id", "--env_id", nargs="?")
    finder.add_argument("--resume", nargs="?")
    found = finder.parse_known_args()[0]
    if found.resume == "":
        fail("--resume needs the directory of a run")
    try:
        default = load_config(found.resume) if found.resume else default_config(found.env_id)
    except ValueError as error:
        fail(error)
    default = dataclasses.replace(default, resume=found.resume)
    config = tyro.cli(Config, default=default)
    for name, value in vars(config).items():
        if found.resume and name != "distributed" and value != getattr(default, name):
            fail(f"{found.resume} was started with {name} = {getattr(default, name)}, not {value}")
    return config


def join_processes() -> None:
    """With --distributed: become one of several processes, on one machine or on many.

    The same command is started once per process. On a cluster that JAX recognises that is all;
    elsewhere the three environment variables below say where the first process is, and how many
    there are, and which this one is.
    """
    number = lambda name: int(os.environ[name]) if name in os.environ else None
    try:
        jax.distributed.initialize(
            num_processes=number("JAX_NUM_PROCESSES"),
            process_id=number("JAX_PROCESS_ID"),
            initialization_timeout=60,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        fail(
            f"cannot join the other processes: {error}\n"
            "Slurm, Open MPI, TPU and (with jax[k8s]) Kubernetes are found; elsewhere set for each "
            "process JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES, JAX_PROCESS_ID"
        )
    # Orbax's threads log the loss of a process with a traceback; `together` says it in two lines.
    logging.getLogger("absl").setLevel(logging.CRITICAL)


def make_mesh(num_seeds: int) -> Mesh:
    """All devices of all processes, in one row along the seed axis.

    Raises ValueError if the seeds do not divide over them.
    """
    devices = jax.device_count()
    if num_seeds % devices:
        fewer = num_seeds // devices * devices
        would = f"{fewer} or {fewer + devices}" if fewer else devices
        fitting = next(n for n in range(devices, 0, -1) if num_seeds % n == 0)
        raise ValueError(
            f"num_seeds = {num_seeds} does not divide over {devices} devices; {would} would, or "
            f"{fitting} device{'s' * (fitting > 1)}"
        )
    return jax.make_mesh((devices,), ("seed",), axis_types=(AxisType.Auto,))


def over_seeds(function: Callable, mesh: Mesh, **options: Any) -> Callable:
    """`function` of one seed, compiled for all: vmapped on each device, side by side on several.

    Every argument and result has a leading seed axis. `shard_map` lets each device run the program
    over its share of the seeds without exchanging anything. Left to the compiler, a `while_loop`
    under vmap (evaluation has one) would ask all devices in each iteration whether it has ended.
    """
    axis = PartitionSpec("seed")
    function = jax.shard_map(
        jax.vmap(function), mesh=mesh, in_specs=axis, out_specs=axis, check_vma=False
    )
    return jax.jit(function, **options)


def together(
    run_dir: Path | str | None, function: Callable, *arguments: Any, **options: Any
) -> Any:
    """Call `function`, in which the processes wait for each other; if one is lost, exit.

    `run_dir` is what to resume then, None while a new run is being opened.
    """
    try:
        return function(*arguments, **options)
    except Exception as error:  # JAX's own, or what Orbax makes of it
        if jax.process_count() == 1:
            raise
        reason = (str(error) or repr(error)).splitlines()[0]
        resume = f" with --resume {run_dir}" if run_dir else ""
        print(
            f"\nerror: the processes cannot go on together, perhaps because one was lost ({reason})"
            f"\nstart all of them again{resume}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # a normal exit would wait for the lost process


def interquartile_mean(x, axis=-1):
    """The mean of the middle half (Agarwal et al. 2021); of fewer than four, the plain mean."""
    return scipy.stats.trim_mean(x, 0.25, axis=axis)


def append_metrics(path: Path, config: Config, first_update: int, metrics: dict) -> None:
    """Add one row per seed and update; `metrics` are [num_seeds, updates of this segment]."""
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if first_update == 0:
            writer.writerow(["seed", "update", "env_step", *metrics])
        for i in range(next(iter(metrics.values())).shape[1]):
            update = first_update + i + 1
            for row in range(config.num_seeds):
                values = (f"{m[row, i]:.7g}" for m in metrics.values())
                values = ("" if value == "nan" else value for value in values)
                writer.writerow([config.seed + row, update, update * config.batch_size, *values])


def plot_learning_curve(run_dir: Path, config: Config) -> None:
    """Draw the return of the training episodes over steps from metrics.csv."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = [(int(row["env_step"]), row["episodic_return"]) for row in csv.DictReader(file)]
    steps = np.array([step for step, _ in rows]).reshape(-1, config.num_seeds)[:, 0]
    returns = np.array([float(value or "nan") for _, value in rows]).reshape(-1, config.num_seeds)
    known = np.isfinite(returns).any(axis=1)  # updates in which some episode ended
    steps, returns = steps[known], returns[known]

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, returns, color="tab:blue", alpha=0.2, linewidth=0.8)
    mean = np.nanmean(returns, axis=1)
    axes.plot(steps, mean, color="tab:blue", linewidth=2, label=f"mean of {config.num_seeds} seeds")
    if config.num_seeds > 1:
        # Student's interval; none (nan, not drawn) where in one seed alone an episode ended.
        others = np.isfinite(returns).sum(axis=1) - 1
        error = np.nanstd(returns, axis=1) / np.sqrt(np.maximum(others, 1))
        error *= scipy.stats.t.ppf(0.975, others)
        axes.fill_between(
            steps, mean - error, mean + error, alpha=0.3, linewidth=0, label="95 % interval"
        )
    axes.set(
        title=f"{Path(__file__).stem} on {config.env_id}",
        xlabel="environment steps per seed",
        ylabel="return of training episodes",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(run_dir / "learning_curve.png", dpi=150)


def report_evaluation(run_dir: Path, config: Config, returns, lengths) -> None:
    """Write evaluation.csv and print a table; both arrays [num_seeds, episodes]."""
    with (run_dir / "evaluation.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["seed", "episode", "episodic_return", "episodic_length"])
        for (row, episode), value in np.ndenumerate(returns):
            writer.writerow([config.seed + row, episode, f"{value:.7g}", lengths[row, episode]])
    print(f"\nGreedy evaluation, {returns.shape[1]} episodes per seed\n")
    print("  seed       return ± deviation     length")
    shown = min(config.num_seeds, 20)
    for row in range(shown):
        mean, deviation = returns[row].mean(), returns[row].std()
        print(f"{config.seed + row:6d} {mean:12.2f} ± {deviation:<9.2f} {lengths[row].mean():9.1f}")
    if shown < config.num_seeds:
        print(f"   ... and {config.num_seeds - shown} more in evaluation.csv")
    scores = returns.mean(axis=1)
    print(f"\ninterquartile mean over seeds: {interquartile_mean(scores):.2f}", end="")
    if config.num_seeds > 1:
        interval = scipy.stats.bootstrap(  # a thousand samples at a time, for the memory's sake
            (scores,), interquartile_mean, batch=1000, method="percentile", rng=0
        ).confidence_interval
        print(f"   (95 % bootstrap interval {interval.low:.2f} to {interval.high:.2f})", end="")
    print()


def open_run(config: Config, state: State) -> tuple[Path, ocp.CheckpointManager, State, int]:
    """Create the run's directory, or open the one to resume.

    `state` has shapes only. On resuming it comes back filled, with the number of updates done.
    """
    script, first_process = Path(__file__).stem, jax.process_index() == 0

    def directory(second):
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(second))
        return Path("runs") / f"{config.env_id}__{script}__{config.seed}__{stamp}"

    create, second = first_process and not config.resume, int(time.time())
    while create:
        try:
            directory(second).mkdir(parents=True)
            break
        except FileExistsError:  # by a run that was started in the same second
            second += 1
        except OSError as error:
            fail(f"cannot write to {directory(second)}: {error}")
    second = int(multihost_utils.broadcast_one_to_all(np.uint32(second)))  # the first process's
    run_dir = Path(config.resume or directory(second))
    # Orbax writes a checkpoint beside the old one and renames it when it is complete.
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    try:
        if create:
            stored = {"script": script, **dataclasses.asdict(config)}
            del stored["resume"], stored["distributed"]
            (run_dir / "config.json").write_text(json.dumps(stored, indent=2) + "\n")
        checkpoints = ocp.CheckpointManager(
            run_dir.resolve() / "checkpoints",
            options=options,
            item_handlers=ocp.StandardCheckpointHandler(),
        )
    except OSError as error:
        fail(f"cannot write to {run_dir}: {error}")
    if not config.resume:
        return run_dir, checkpoints, state, 0
    try:
        updates_done = checkpoints.latest_step()
        if updates_done is None:
            raise ValueError("none was written; start anew")
        stored, shape = checkpoints.item_metadata(updates_done), lambda x: x.shape
        if jax.tree.map(shape, stored["params"]) != jax.tree.map(shape, state.params):
            raise ValueError("its networks have other sizes")
        state = checkpoints.restore(updates_done, args=ocp.args.StandardRestore(state))
        # Rows written after the checkpoint belong to updates that will be done again.
        metrics_file = run_dir / "metrics.csv"
        num_rows = 1 + updates_done * config.num_seeds if updates_done else 0
        rows = metrics_file.read_text().splitlines(keepends=True)[:num_rows] if num_rows else []
        if len(rows) < num_rows:
            raise ValueError("metrics.csv is shorter than the checkpoint says")
    except Exception as error:  # whatever Orbax raises on a damaged file
        fail(f"the checkpoint in {run_dir} is missing or damaged: {error}")
    multihost_utils.sync_global_devices("all have read metrics.csv")
    if first_process:
        try:
            shorter = metrics_file.with_suffix(".tmp")
            shorter.write_text("".join(rows))
            shorter.replace(metrics_file)  # at once, so that a kill leaves one or the other
        except OSError as error:
            fail(f"cannot write to {run_dir}: {error}")
    return run_dir, checkpoints, state, updates_done


def check_finite(config: Config, first_update: int, metrics: dict, finite: np.ndarray) -> None:
    """Raise FloatingPointError if a loss (TRPO: or the residual) or the weights are not finite.

    `metrics` are [num_seeds, updates]; `finite` [num_seeds] says whether a seed's weights are.
    """
    watched = [name for name in metrics if name.endswith(("_loss", "_residual"))]
    bad = ~np.isfinite([metrics[name] for name in watched])  # [names, num_seeds, updates]
    if bad.any():
        update, seed, name = np.argwhere(bad.T)[0]  # the first update, in it the first seed
        raise FloatingPointError(
            f"the {watched[name]} of seed {config.seed + seed} is not finite in update "
            f"{first_update + update + 1}"
        )
    if not finite.all():
        seed, last_update = config.seed + int(np.argmin(finite)), first_update + bad.shape[2]
        raise FloatingPointError(
            f"the weights of seed {seed} are not finite after update {last_update}"
        )


def main() -> None:
    """Train from the command line, in segments between which files are written."""
    config = parse_command_line()
    if config.distributed:
        join_processes()
    try:
        init, update = make_train(config)
        mesh = make_mesh(config.num_seeds)
    except ValueError as error:
        fail(error)
    # Each process makes the keys of its own devices, as its part of one array.
    sharding = NamedSharding(mesh, PartitionSpec("seed"))
    make_keys = lambda: jax.vmap(jax.random.key)(config.seed + jnp.arange(config.num_seeds))
    keys = jax.jit(make_keys, out_shardings=sharding)()
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(jax.vmap(init), keys),
    )
    run_dir, checkpoints, state, updates_done = together(config.resume, open_run, config, shapes)

    def save(step, state):
        try:
            together(run_dir, checkpoints.save, step, args=ocp.args.StandardSave(state))
        except ValueError as error:  # what TensorStore makes of a full disk
            raise OSError(error) from error

    # Arrays that are spread over the processes become whole NumPy arrays in each of them. NumPy
    # arrays, of which each process has one, are joined along their first axis.
    gather = partial(together, run_dir, multihost_utils.process_allgather, tiled=True)
    first_process = jax.process_index() == 0  # it alone reports, and writes tables and pictures
    say = print if first_process else lambda *_: None
    say(
        f"{Path(__file__).stem} on {config.env_id}: {config.num_seeds} seeds x "
        f"{config.num_updates} updates x {config.batch_size} steps, on "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}\nwriting {run_dir}"
    )

    # From here on the first Ctrl-C or SIGTERM asks for an end after the current segment.
    signals = []

    def stop(number, _):
        signals.append(number)
        handle(signal.SIG_DFL)  # the second one ends at once
        # Not `print`, which fails if the signal came while it was printing. Ctrl-C may also have
        # ended whatever reads standard error.
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this segment (once more: at once)\n")

    def handle(handler):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handler)

    handle(stop)

    # One program serves all segments, since they have the same length: the largest divisor of the
    # number of updates up to a hundredth of it. Donation lets the new state take the old memory.
    longest = max(1, config.num_updates // 100)
    length = next(n for n in range(longest, 0, -1) if config.num_updates % n == 0)

    def segment(state):
        state, metrics = jax.lax.scan(update, state, None, length)
        finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(state.params)]).all()
        return state, metrics, finite

    start = time.perf_counter()
    run_segment = over_seeds(segment, mesh, donate_argnums=0).lower(shapes).compile()
    initialize = None if config.resume else over_seeds(init, mesh).lower(keys).compile()
    say(f"compiled in {time.perf_counter() - start:.1f} s")
    if not config.resume:
        state = initialize(keys)
        save(0, state)

    start = saved = time.perf_counter()
    resumed_at = updates_done
    steps_per_update = config.num_seeds * config.batch_size
    progress = tqdm(
        total=config.num_updates * steps_per_update,
        initial=updates_done * steps_per_update,
        unit="step",
        unit_scale=True,
        disable=not first_process,
    )
    stopping = False
    while updates_done < config.num_updates and not stopping:
        state, metrics, finite = run_segment(state)
        metrics, finite = gather((metrics, finite))  # waits for the segment
        # All processes learn whether one was asked to stop, or thinks that it is time to save, so
        # that all do the same.
        asked = np.array([[len(signals) > 0, time.perf_counter() - saved > CHECKPOINT_SECONDS]])
        stopping, saving = gather(asked).any(axis=0)
        if first_process:
            append_metrics(run_dir / "metrics.csv", config, updates_done, metrics)
        try:
            check_finite(config, updates_done, metrics, finite)
        except FloatingPointError as error:
            progress.close()
            if first_process:
                print(
                    f"error: {error}; metrics.csv shows how it came to that\n"
                    f"the last good checkpoint, of update {checkpoints.latest_step()}, is in "
                    f"{run_dir}\nresumed, it would end the same way: start anew, perhaps with a "
                    "lower --learning-rate",
                    file=sys.stderr,
                )
            sys.exit(1)
        updates_done += length
        progress.update(length * steps_per_update)
        if np.isfinite(metrics["episodic_return"]).any():
            progress.set_postfix_str(f"return {np.nanmean(metrics['episodic_return']):.2f}")
        if saving:
            save(updates_done, state)
            saved = time.perf_counter()
    progress.close()
    seconds, steps = time.perf_counter() - start, (updates_done - resumed_at) * steps_per_update
    say(f"trained {steps:,} steps in {seconds:.1f} s ({steps / seconds:,.0f} steps/s)")
    if updates_done > checkpoints.latest_step():
        save(updates_done, state)
    if updates_done and first_process:
        plot_learning_curve(run_dir, config)
    if gather(np.array([len(signals) > 0])).any():
        say(f"stopped after update {updates_done} of {config.num_updates}; go on with")
        say(f"  python {sys.argv[0]} --resume {run_dir}" + " --distributed" * config.distributed)
        sys.exit(128 + (signals or [signal.SIGTERM])[0])

    handle(signal.SIG_DFL)  # all is saved: nothing left to protect
    play = partial(evaluate, config, num_episodes=EVALUATION_EPISODES)
    # Keys that training never had: it splits, and split(key, n)[i] is fold_in(key, i), with i < n.
    play_seed = lambda state, key: play(state, jax.random.fold_in(key, 2**31))
    returns, lengths = gather(over_seeds(play_seed, mesh)(state, keys))
    if first_process:
        report_evaluation(run_dir, config, returns, lengths)
        print(f"\nfiles in {run_dir}: {', '.join(sorted(path.name for path in run_dir.iterdir()))}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # the disk is full, say
        fail(f"cannot write: {error}\nwhat is saved, if anything, can be continued with --resume")
