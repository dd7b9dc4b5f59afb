# SPDX-License-Identifier: MIT
"""Trust Region Policy Optimisation, discrete and continuous actions: JAX, one file, one program.

In state s_t an agent draws an action a_t from its policy π(· | s_t), receives the reward r_t and
finds itself in s_{t+1}. It is to learn a π with a large expected return E[Σ γ^t r_t]. The policy
gradient g = E[∇ log π(a_t|s_t) Â_t] makes an action more probable if it was better than expected:
the advantage Â_t compares what followed a_t with the value V(s_t), which a second network predicts.
TRPO (Schulman et al. 2015, arXiv:1502.05477) makes the largest improvement within the region where
data of the old policy can be trusted: measured in the policies' outputs, not in their parameters.

    maximise over θ    L(θ) = E[ π_θ(a_t|s_t) / π_old(a_t|s_t) · Â_t ]  (eq. 14: q = π_old, Â for Q)
    subject to         E[ KL(π_old(·|s_t) ‖ π_θ(·|s_t)) ] ≤ δ
    near θ_old         maximise gᵀx subject to ½ xᵀF x ≤ δ, with F = ∇² E[KL] at θ_old    (eq. 17)
    solved by          x = √( 2δ / gᵀF⁻¹g ) F⁻¹g, along the natural gradient          (appendix C)

F, the Fisher matrix, is never formed: conjugate gradient finds F⁻¹g from products F v. λ is added
to its diagonal (damping), since some directions in θ hardly change the policy; then ½ xᵀ(F+λI)x = δ
and ½ xᵀF x is less. A line search shortens the step until L, on the data, has grown and KL ≤ δ.
V is fitted by Adam to Â + V; Â: PPO eqs. 11-12, arXiv:1707.06347. The reasons: docs/derivations.md.

    s_t obs                s_{t+1} next_obs         a_t action       r_t reward
    Â_t advantage          V value                  δ max_kl         λ cg_damping (of F)
    θ theta                g gradient               x step           F v product(v)
    N num_envs             T num_steps              K update_epochs  B = T·N batch_size
    M = B/num_minibatches  D length of obs          P length of θ    A actions, or dimensions of one

    python trpo.py                                           # CartPole-v1, 8 seeds, 500k steps each
    python trpo.py --env-id Pendulum-v1 --num-seeds 3
    python trpo.py --help

Departures from the paper: advantages by GAE with a learned critic (Schulman et al. 2016), and
normalised; F is damped, and from all states by default; a time limit, like the end of a rollout, is
no end for V; observations and rewards are scaled by running statistics and clipped (δ does not
bound what new statistics do to π); actions are clipped and stretched to bounds; weights start
orthogonal; L may have an entropy bonus. "Detail n": n-th core one, Huang et al. 2022, 37 Details.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":  # Ctrl-C while the packages are imported ends without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

# ---- Hyperparameters: every field is a command-line flag, its comment the text of --help ---------


@dataclass(frozen=True)
class Config:
    """Hyperparameters of TRPO; some environments have others, by PRESETS."""

    env_id: str = "CartPole-v1"  # a gymnax environment, or module:name of your own
    seed: int = 0  # the first seed; the others count up from it
    num_seeds: int = 8  # independent runs, side by side
    total_timesteps: int = 500_000  # environment steps per seed, never exceeded
    num_envs: int = 16  # environments per seed (N)
    num_steps: int = 256  # steps of each environment per update (T)
    gamma: float = 0.99  # discount γ
    gae_lambda: float = 0.95  # λ of generalised advantage estimation
    max_kl: float = 0.01  # δ, bound on the mean KL(old ‖ new) over the states of a rollout
    ent_coef: float = 0.0  # weight of the entropy bonus (c_2 of PPO eq. 9)
    cg_iterations: int = 10  # iterations of conjugate gradient
    cg_damping: float = 0.1  # λ of F + λI
    fisher_stride: int = 1  # F is computed from every n-th step of a rollout (appendix C)
    line_search_tries: int = 10  # steps to try, the full one included
    line_search_ratio: float = 0.8  # length of each, as a fraction of the one before
    learning_rate: float = 1e-3  # the critic's: Adam's step size at the start
    anneal_lr: bool = True  # let the learning rate fall linearly towards zero
    update_epochs: int = 10  # the critic's passes over each rollout (K)
    num_minibatches: int = 8  # minibatches per pass
    normalize_obs: bool = True  # scale observations to running mean 0, variance 1
    normalize_reward: bool = True  # divide rewards by the discounted return's std
    hidden_sizes: tuple[int, ...] = (64, 64)  # widths of the hidden layers of actor and critic
    activation: Literal["tanh", "relu"] = "tanh"  # nonlinearity of the hidden layers
    initial_std: float = 1.0  # std of the first continuous actions, where ±1 are the bounds

    @property
    def batch_size(self) -> int:
        """Transitions per update, B = T·N."""
        return self.num_steps * self.num_envs

    @property
    def num_updates(self) -> int:
        """Iterations that fit into the budget."""
        return self.total_timesteps // self.batch_size


# ---- Policy distributions, and networks: separate actor and critic -------------------------------


class Categorical(NamedTuple):
    """Distribution over actions 0 ... A-1. All methods work on any leading axes [...]."""

    logits: jax.Array  # [..., A], unnormalised log-probabilities; finite, as 0 · -inf is NaN

    def sample(self, key):
        """A random action, [...]."""
        return jax.random.categorical(key, self.logits)

    def log_prob(self, action):
        """log π(action), [...]."""
        # A product with a one-hot vector: the gradient of indexing would be a slow scatter.
        chosen = jax.nn.one_hot(action, self.logits.shape[-1], dtype=self.logits.dtype)
        return jnp.sum(chosen * jax.nn.log_softmax(self.logits), axis=-1)

    def entropy(self):
        """S[π] = -Σ π log π in nats, [...]."""
        log_p = jax.nn.log_softmax(self.logits)
        return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)

    def kl(self, other):
        """KL(self ‖ other) = Σ π_self (log π_self - log π_other) in nats, [...]."""
        log_p, log_q = jax.nn.log_softmax(self.logits), jax.nn.log_softmax(other.logits)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

    def mode(self):
        """The most probable action, [...]."""
        return jnp.argmax(self.logits, axis=-1)


class DiagGaussian(NamedTuple):
    """Independent normal distributions of A action dimensions, on any leading axes [...]."""

    mean: jax.Array  # [..., A]
    log_std: jax.Array  # [..., A]

    def sample(self, key):
        """A random action, [..., A]."""
        return self.mean + jnp.exp(self.log_std) * jax.random.normal(key, self.mean.shape)

    def log_prob(self, action):
        """log π(action), summed over the dimensions, [...]."""
        z = (action - self.mean) * jnp.exp(-self.log_std)
        return -jnp.sum(0.5 * z**2 + self.log_std + 0.5 * math.log(2 * math.pi), axis=-1)

    def entropy(self):
        """S[π] = Σ (log σ + ½ log 2πe) in nats, [...]."""
        return jnp.sum(self.log_std + 0.5 * math.log(2 * math.pi * math.e), axis=-1)

    def kl(self, other):
        """KL(self ‖ other) = Σ ½ (σ²/σ'² + (μ - μ')²/σ'² - 1) + log σ'/σ in nats, [...]."""
        variance_ratio = jnp.exp(2 * (self.log_std - other.log_std))
        z = (self.mean - other.mean) * jnp.exp(-other.log_std)
        return jnp.sum(0.5 * (variance_ratio + z**2 - 1.0) + other.log_std - self.log_std, axis=-1)

    def mode(self):
        """The action of highest density, [..., A]."""
        return self.mean


def bound_action(action, space):
    """What the environment gets for the policy's action [N, A]: [N, ...], within its bounds.

    For the policy ±1 are the bounds, so that a std of 1 explores the whole range: clipped to
    ±1, stretched to [low, high]. Where a bound is missing nothing is clipped on that side, and the
    units are the environment's. The loss sees the raw action, whose density it is.
    """
    if hasattr(space, "n"):
        return action  # discrete ones, [N], have none
    low, high = jnp.broadcast_to(space.low, space.shape), jnp.broadcast_to(space.high, space.shape)
    has_low, has_high = low > -1e30, high < 1e30  # some spaces write the largest float for no bound
    start = jnp.where(has_low, low, jnp.where(has_high, high - 2.0, -1.0))
    end = jnp.where(has_high, high, start + 2.0)
    action = action.reshape(-1, *space.shape)
    action = jnp.clip(action, jnp.where(has_low, -1.0, -jnp.inf), jnp.where(has_high, 1.0, jnp.inf))
    return start + (end - start) * (action + 1.0) / 2


def orthogonal(scale):
    """Initialiser: `scale` times a random matrix with orthonormal rows or columns.

    Batched QR decompositions, as `nn.initializers.orthogonal` needs for many seeds, can deadlock on
    few cores. Newton-Schulz: x ← 3/2 x - 1/2 x xᵀx drives all singular values below √3 to 1.
    """

    def init(key, shape, dtype=jnp.float32):
        x = jax.random.normal(key, shape, dtype)  # [fan_in, fan_out]
        step = lambda _, y: 1.5 * y - 0.5 * y @ (y.T @ y)
        with jax.default_matmul_precision("highest"):
            return scale * jax.lax.fori_loop(0, 40, step, x / jnp.linalg.norm(x))

    return init


def mlp(x, hidden_sizes, activation, size, scale):
    """[..., D] -> [..., size], inside `@nn.compact`; `scale` is of the last layer's weights."""
    for width in hidden_sizes:  # √2: for what ReLU takes away, customary with tanh, too (detail 2)
        x = getattr(nn, activation)(nn.Dense(width, kernel_init=orthogonal(math.sqrt(2)))(x))
    return nn.Dense(size, kernel_init=orthogonal(scale))(x)


class Actor(nn.Module):
    """Observation [..., D] -> policy over A actions, or over actions of A dimensions."""

    action_space: Any
    hidden_sizes: tuple[int, ...]
    activation: str
    initial_std: float = 1.0

    @nn.compact
    def __call__(self, obs):
        # Tiny weights: nearly even odds, or means near 0 (Andrychowicz et al. 2020, 3.2). With a
        # std of 1, the same in all states, a third of the first samples hits a bound.
        is_discrete = hasattr(self.action_space, "n")
        size = self.action_space.n if is_discrete else math.prod(self.action_space.shape)
        x = mlp(obs, self.hidden_sizes, self.activation, size, 0.01)
        if is_discrete:
            return Categorical(x)
        log_std = self.param("log_std", lambda _: jnp.full(size, jnp.log(self.initial_std), float))
        return DiagGaussian(x, jnp.broadcast_to(log_std, x.shape))


class Critic(nn.Module):
    """Observation [..., D] -> value [...]."""

    hidden_sizes: tuple[int, ...]
    activation: str

    @nn.compact
    def __call__(self, obs):
        return mlp(obs, self.hidden_sizes, self.activation, 1, 1.0).squeeze(-1)


# ---- The mathematics: pure functions of arrays ---------------------------------------------------


def gae(reward, value, next_value, terminated, done, gamma, gae_lambda):
    """Generalised advantage estimation (PPO eqs. 11-12; Schulman et al. 2016, arXiv:1506.02438).

    λ = 1 has low bias and high variance, λ = 0 (Â = δ_t of eq. 12) the reverse. A `terminated` step
    has no V(s_{t+1}): nothing follows. `done`, terminated or cut by a time limit, ends the sum: the
    next row is another episode. A step that was only cut keeps V(s_{t+1}): the limit is no part of
    the task (Pardo et al. 2018, arXiv:1712.00378). All arrays [T, N]; returns Â and Â + V.
    """
    chex.assert_rank(reward, 2)
    chex.assert_equal_shape([reward, value, next_value, terminated, done])
    delta = reward + gamma * next_value * (1.0 - terminated) - value

    def step(advantage, row):
        delta, done = row
        advantage = delta + gamma * gae_lambda * (1.0 - done) * advantage
        return advantage, advantage

    end = jnp.zeros_like(delta[0])  # no sum beyond the rollout; unrolled, since steps are tiny
    _, advantage = jax.lax.scan(step, end, (delta, done), reverse=True, unroll=16)
    return advantage, advantage + value


def normalize_advantage(advantage):
    """Mean 0, since a mean would only add noise; variance 1 for comparable metrics and ent_coef."""
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8)


def surrogate(ratio, advantage):
    """L = E[ρ Â], ρ = π/π_old (PPO eq. 6; TRPO eq. 14), to be maximised: [...] -> scalar."""
    chex.assert_equal_shape([ratio, advantage])
    return jnp.mean(ratio * advantage)


def critic_loss(value, target):
    """½ E[(V - V_target)²]: two arrays [M] -> scalar."""
    chex.assert_equal_shape([value, target])  # [M] minus [M, 1] would be [M, M]
    return 0.5 * jnp.mean((value - target) ** 2)


# ---- The step of TRPO ----------------------------------------------------------------------------


def fisher_vector_product(policy_at, theta):
    """The linear map v [P] -> F v [P], with the Fisher matrix F [P, P] at θ_old.

    `policy_at` maps θ [P] to distributions of any states [...]; fewer make F noisier. F is the
    Hessian of the mean KL(π_old ‖ π_θ) at θ_old, so Jᵀ M J (appendix C.1): J is the Jacobian of the
    distributions' parameters (logits; mean and log σ) in θ, M the Hessian of the mean KL in these.
    (To linearise the KL's gradient would compute another term, which is zero at θ_old.)
    """
    old_policy, jacobian = jax.linearize(policy_at, theta)
    transpose = jax.linear_transpose(jacobian, theta)
    kl_gradient = jax.grad(lambda policy: old_policy.kl(policy).mean())  # in the new distribution

    def product(v):
        change = jacobian(v)  # J v, of every state's distribution
        _, curved = jax.jvp(kl_gradient, (old_policy,), (change,))  # M J v
        return transpose(curved)[0]  # Jᵀ M J v

    return product


def conjugate_gradient(product, b, num_iterations):
    """Solve A x = b, for A symmetric and positive definite, known through `product(v) = A v`.

    Hestenes & Stiefel 1952: each direction p is conjugate to all before, so that P of them would be
    exact, but for rounding. Far fewer come near if many eigenvalues are nearly equal; damping makes
    the small ones so. b [P] -> x [P], residual b - A x [P].
    """

    def iteration(carry, _):
        x, residual, p = carry
        Ap = product(p)
        square, curvature = residual @ residual, p @ Ap
        # x stays once it has converged to rounding (without this a 0/0 follows, at once if b = 0),
        # and where the curvature is not positive; then the residual is tried as the next direction.
        go = (square > jnp.finfo(b.dtype).eps ** 2 * (b @ b)) & (curvature > 0)
        alpha = jnp.where(go, square / curvature, 0.0)
        x, residual = x + alpha * p, residual - alpha * Ap
        p = residual + jnp.where(go, residual @ residual / square, 0.0) * p
        return (x, residual, p), None

    (x, residual, _), _ = jax.lax.scan(iteration, (jnp.zeros_like(b), b, b), None, num_iterations)
    return x, residual


def trust_region_step(product, gradient, max_kl, damping, num_iterations):
    """The step √(2δ / sᵀ(F+λI)s) s with s ≈ (F+λI)⁻¹ g (appendix C), and the error left over.

    gradient g [P] -> step [P], and ‖g - (F+λI)s‖ / ‖g‖ [], as counted by CG. The step is zero if g
    is, and where it would not be finite, or the curvature sᵀ(F+λI)s is not positive.
    """
    s, residual = conjugate_gradient(lambda v: product(v) + damping * v, gradient, num_iterations)
    curvature = s @ (gradient - residual)  # sᵀ(F+λI)s, without another product
    step = jnp.sqrt(2.0 * max_kl / curvature) * s
    usable = (curvature > 0) & jnp.isfinite(step).all()
    norm = jnp.linalg.norm(gradient)
    return jnp.where(usable, step, 0.0), jnp.linalg.norm(residual) / jnp.where(norm > 0, norm, 1.0)


class LineSearch(NamedTuple):
    """What became of a proposed step."""

    theta: jax.Array  # [P] the new parameters, or the old ones
    accepted: jax.Array  # [] bool
    tries: jax.Array  # [] how many steps were tried
    improvement: jax.Array  # [] of L; 0 if nothing was accepted
    kl: jax.Array  # [] mean KL(old ‖ new); 0 if nothing was accepted


def line_search(measure, theta, step, max_kl, num_tries, ratio):
    """Take the first of θ + step, θ + ratio·step, θ + ratio²·step, ... that passes (appendix C).

    `measure(θ')` -> L(θ') - L(θ), mean KL(π_θ ‖ π_θ'). To pass, θ must move, L grow, the KL be at
    most δ, and all be finite. If none of `num_tries` passes, θ comes back, bit for bit.
    """

    def attempt(search):
        candidate = theta + ratio**search.tries * step
        # Cast, since under x64, too, what a loop carries has to keep its dtype.
        improvement, kl = (jnp.asarray(x, theta.dtype) for x in measure(candidate))
        finite = jnp.isfinite(improvement) & jnp.isfinite(candidate).all()
        moved = (candidate != theta).any()  # else rounding alone may look like an improvement
        accepted = moved & (improvement > 0) & (kl <= max_kl) & finite  # false if a NaN is compared
        rejected = search._replace(tries=search.tries + 1)
        passed = LineSearch(candidate, accepted, rejected.tries, improvement, kl)
        return jax.tree.map(partial(jnp.where, accepted), passed, rejected)

    go_on = lambda search: ~search.accepted & (search.tries < num_tries)
    start = LineSearch(theta, jnp.asarray(False), jnp.asarray(0), *jnp.zeros(2, theta.dtype))
    return jax.lax.while_loop(go_on, attempt, start)


# ---- Running statistics, which scale observations and rewards ------------------------------------


class RunningStats(NamedTuple):
    """Mean and variance of the rollouts merged so far, per component."""

    mean: jax.Array  # [...]
    var: jax.Array  # [...]
    count: jax.Array  # []


def init_stats(shape):
    """Mean 0 and variance 1 to begin with, of so little weight that the first data replace them."""
    return RunningStats(jnp.zeros(shape), jnp.ones(shape), jnp.float32(1e-4))


def update_stats(stats, x):
    """Merge a rollout x [T, N, ...] into the statistics (Chan, Golub & LeVeque 1979)."""
    if stats is None:
        return None
    n, mean, var = x.shape[0] * x.shape[1], x.mean((0, 1)), x.var((0, 1))
    weight = n / (stats.count + n)  # of the rollout in the new statistics
    delta = mean - stats.mean
    spread = weight * (1.0 - weight) * delta**2  # what the distance of the two means adds
    var = (1.0 - weight) * stats.var + weight * var + spread
    return RunningStats(stats.mean + weight * delta, var, stats.count + n)


def normalize(x, stats, center=True):
    """x [..., D] or [...] to mean 0 and variance 1, clipped to ±10; unchanged without statistics.

    Rewards are only divided by the discounted return's standard deviation, `center=False` (Engstrom
    et al. 2020; a sum of past rewards, which is known at once): a shift would change the task.
    """
    if stats is None:
        return x
    shifted = x - stats.mean if center else x
    # Not a division: XLA would round it differently in the rollout and in the update.
    return jnp.clip(shifted * jax.lax.rsqrt(stats.var + 1e-8), -10.0, 10.0)


# ---- Data ----------------------------------------------------------------------------------------


class Episode(NamedTuple):
    """The current episode of each environment, up to now."""

    total: jax.Array  # [N] sum of its rewards, for the reports
    length: jax.Array  # [N] its number of steps
    discounted: jax.Array  # [N] Σ γ^k r_{t-k}; its std over all steps scales the rewards


class Transition(NamedTuple):
    """One step of N environments; a rollout stacks T of them in front."""

    obs: jax.Array  # [N, D] s_t, not normalised
    next_obs: jax.Array  # [N, D] s_{t+1}, also where the episode ended there
    action: jax.Array  # [N], or [N, A] as sampled, not bounded
    reward: jax.Array  # [N] not scaled
    terminated: jax.Array  # [N] bool, the episode truly ended
    done: jax.Array  # [N] bool, terminated or cut by a time limit
    episode: Episode  # including this step


class State(NamedTuple):
    """Everything that changes during training."""

    params: dict[str, Any]  # {"actor": ..., "critic": ...}
    opt_state: optax.OptState  # of the critic
    obs_stats: RunningStats | None  # of the observations, shared by the N environments
    return_stats: RunningStats | None  # of the discounted return
    env_state: Any  # of N environments
    obs: jax.Array  # [N, D] what the policy sees next, not normalised
    episode: Episode
    updates_done: jax.Array  # []
    key: jax.Array  # [] PRNG key


# ---- The algorithm -------------------------------------------------------------------------------


def make_train(config, env=None):
    """The two pure functions of training: init(key) -> State; update(state, _) -> State, metrics.

    `env` may be an `Environment` of your own, in the place of the one called `config.env_id`.
    """
    validate(config)
    env = env or make_env(config.env_id)
    actor = Actor(env.action_space, config.hidden_sizes, config.activation, config.initial_std)
    critic = Critic(config.hidden_sizes, config.activation)
    per_update = config.update_epochs * config.num_minibatches  # gradient steps

    def learning_rate(count):
        """Adam's step size after `count` gradient steps, the same within an update (detail 4)."""
        progress = count // per_update / config.num_updates if config.anneal_lr else 0.0
        return config.learning_rate * (1.0 - progress)

    # ε is OpenAI's (detail 3). `packed` only makes it faster.
    optimizer = packed(optax.adam(learning_rate, eps=1e-5), config)

    def init(key):
        key, actor_key, critic_key, reset_key = jax.random.split(key, 4)
        obs, env_state = env.reset(jax.random.split(reset_key, config.num_envs))
        params = {"actor": actor.init(actor_key, obs), "critic": critic.init(critic_key, obs)}
        zeros = jnp.zeros(config.num_envs)
        return State(
            params=params,
            opt_state=optimizer.init(params["critic"]),
            obs_stats=init_stats(obs.shape[1:]) if config.normalize_obs else None,
            return_stats=init_stats(()) if config.normalize_reward else None,
            env_state=env_state,
            obs=obs,
            episode=Episode(total=zeros, length=zeros.astype(jnp.int32), discounted=zeros),
            updates_done=jnp.int32(0),
            key=key,
        )

    def act(state, keys):
        """One step of the N environments with the current policy."""
        action_key, env_keys = keys
        policy = actor.apply(state.params["actor"], normalize(state.obs, state.obs_stats))
        action = policy.sample(action_key)
        env_state, next_obs, reset_obs, reward, terminated, truncated = env.step(
            env_keys, state.env_state, bound_action(action, env.action_space)
        )  # next_obs is s_{t+1}; where the episode ended, reset_obs opens the next one
        chex.assert_equal_shape([state.obs, next_obs, reset_obs])
        chex.assert_shape([reward, terminated, truncated], (config.num_envs,))
        total, length, discounted = state.episode
        episode = Episode(total + reward, length + 1, config.gamma * discounted + reward)
        done = terminated | truncated
        transition = Transition(state.obs, next_obs, action, reward, terminated, done, episode)
        # The last step of an episode counts; after it the sums start again.
        episode = jax.tree.map(lambda x: jnp.where(done, 0, x), episode)
        return state._replace(env_state=env_state, obs=reset_obs, episode=episode), transition

    def policy_step(params, obs, action, advantage):
        """One step of the actor for the whole rollout, all [T, N, ...]: propose and search."""
        theta, unravel = ravel_pytree(params)  # all parameters as one vector [P]
        policy_at = lambda theta, every=1: actor.apply(unravel(theta), obs[::every])
        old_policy = policy_at(theta)  # π_old: obs was scaled as in the rollout
        old_log_prob = old_policy.log_prob(action)
        ratio = lambda new: jnp.exp(new.log_prob(action) - old_log_prob)  # [T, N]
        L = lambda new: surrogate(ratio(new), advantage) + config.ent_coef * new.entropy().mean()
        old_L, gradient = jax.value_and_grad(lambda theta: L(policy_at(theta)))(theta)
        F = fisher_vector_product(partial(policy_at, every=config.fisher_stride), theta)
        step_settings = config.max_kl, config.cg_damping, config.cg_iterations
        step, cg_residual = trust_region_step(F, gradient, *step_settings)
        gain = lambda new: (L(new) - old_L, old_policy.kl(new).mean())
        search_settings = config.max_kl, config.line_search_tries, config.line_search_ratio
        search = line_search(lambda theta: gain(policy_at(theta)), theta, step, *search_settings)
        metrics = dict(surrogate_improvement=search.improvement, kl=search.kl)
        metrics |= dict(step_accepted=jnp.float32(search.accepted), line_search_steps=search.tries)
        metrics |= dict(cg_residual=cg_residual, entropy=old_policy.entropy().mean())
        return unravel(search.theta), metrics

    def update(state, _):
        """One iteration: roll out, estimate advantages, step the actor, fit the critic."""
        key, action_key, env_key, shuffle_key = jax.random.split(state.key, 4)

        # Roll out. All keys come from two calls, which costs less than splitting in every step.
        action_keys = jax.random.split(action_key, config.num_steps)  # [T]
        env_keys = jax.random.split(env_key, (config.num_steps, config.num_envs))  # [T, N]
        state, rollout = jax.lax.scan(act, state, (action_keys, env_keys))

        # Estimate advantages. Observations keep the statistics with which the policy acted, until
        # the next iteration; rewards are scaled by those that include this rollout. next_value is
        # not value moved by a row: where an episode ended, the next row comes after a reset.
        obs = normalize(rollout.obs, state.obs_stats)  # [T, N, D]
        next_obs = normalize(rollout.next_obs, state.obs_stats)
        value = critic.apply(state.params["critic"], obs)  # [T, N]
        next_value = critic.apply(state.params["critic"], next_obs)
        state = state._replace(
            obs_stats=update_stats(state.obs_stats, rollout.obs),
            return_stats=update_stats(state.return_stats, rollout.episode.discounted),
        )
        reward = normalize(rollout.reward, state.return_stats, center=False)
        terminated, done = rollout.terminated, rollout.done
        advantage, target = gae(
            reward, value, next_value, terminated, done, config.gamma, config.gae_lambda
        )

        # Step the actor, in full float32, with less than which GPUs and TPUs multiply by default.
        whole = obs, rollout.action, normalize_advantage(advantage)
        with jax.default_matmul_precision("highest"):
            actor_params, policy_metrics = policy_step(state.params["actor"], *whole)

        # Fit the critic, in one scan over the minibatches of all epochs.
        loss = lambda params, obs, target: critic_loss(critic.apply(params, obs), target)
        flatten = lambda x: x.reshape(config.batch_size, *x.shape[2:])  # [T, N, ...] -> [B, ...]
        batch = jax.tree.map(flatten, dict(obs=obs, target=target))
        indices = shuffled_indices(shuffle_key, config)  # [K · num_minibatches, M]

        def gradient_step(carry, indices):
            params, opt_state = carry
            minibatch = jax.tree.map(lambda x: x[indices], batch)  # [M, ...]
            value_loss, gradient = jax.value_and_grad(loss)(params, **minibatch)
            change, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(params, change), opt_state), value_loss

        start = state.params["critic"], state.opt_state
        (critic_params, opt_state), value_losses = jax.lax.scan(gradient_step, start, indices)
        params = {"actor": actor_params, "critic": critic_params}

        # Returns are means over the episodes that ended in this rollout: NaN where none did.
        metrics = {
            "episodic_return": jnp.mean(rollout.episode.total, where=done),
            "episodic_length": jnp.mean(rollout.episode.length, where=done),
            **policy_metrics,
            "value_loss": value_losses.mean(),
            # 1 if V predicts its targets (but for a constant), 0 if no better than a constant.
            "explained_variance": 1.0 - jnp.var(target - value) / jnp.var(target),
            "learning_rate": learning_rate(state.updates_done * per_update),
        }
        count = state.updates_done + 1
        state = state._replace(params=params, opt_state=opt_state, updates_done=count, key=key)
        return state, metrics

    return init, update


def train(config, key, env=None):
    """A whole run, as a pure function: the final state, and each metric as [num_updates].

    `jit(vmap(partial(train, config)))(keys)` trains one agent per key; a float of the
    configuration may be vmapped as well: `vmap(lambda x: train(replace(config, gamma=x), key))`.
    """
    init, update = make_train(config, env)
    return jax.lax.scan(update, init(key), None, config.num_updates)


def evaluate(config, state, key, num_episodes, env=None, max_steps=10**6):
    """Play greedily (the mode of the policy), with the statistics frozen.

    Each of num_episodes environments plays one episode, which is cut after `max_steps`, and of
    which this returns the sum of rewards and the length, both [num_episodes].
    """
    env = env or make_env(config.env_id)
    actor = Actor(env.action_space, config.hidden_sizes, config.activation)
    reset_key, step_key = jax.random.split(key)
    obs, env_state = env.reset(jax.random.split(reset_key, num_episodes))

    def step(carry):
        key, obs, env_state, playing, total, length = carry
        key, env_key = jax.random.split(key)
        policy = actor.apply(state.params["actor"], normalize(obs, state.obs_stats))
        action = bound_action(policy.mode(), env.action_space)
        env_state, _, obs, reward, terminated, truncated = env.step(
            jax.random.split(env_key, num_episodes), env_state, action
        )
        total += jnp.where(playing, reward, 0.0)
        length += playing
        return key, obs, env_state, playing & ~(terminated | truncated), total, length

    zeros = jnp.zeros(num_episodes, jnp.int32)
    carry = (step_key, obs, env_state, zeros == 0, zeros.astype(jnp.float32), zeros)
    go_on = lambda carry: carry[3].any() & (carry[5].max() < max_steps)  # playing, length
    *_, total, length = jax.lax.while_loop(go_on, step, carry)
    return total, length


# ==== The algorithm ends here: what follows makes it run, fast and from the command line ==========
# It has used `validate`, `make_env`, `shuffled_indices` and `packed`, and of an environment what
# `Environment` names. To copy it, leave out what follows "The command line".

import contextlib
import difflib
import importlib
import itertools
import json
import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import tyro
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm


class Failure(ValueError):
    """What ends a run with one sentence and this exit code."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


# What some environments need instead of the defaults, by family (the end of the name) or by name.
# The measurements are in docs/results.md.
PRESETS: dict[str, dict[str, Any]] = {
    "Pendulum-v1": dict(activation="relu"),  # after 100k steps -152 instead of -158 with tanh
    "Swimmer-misc": dict(normalize_obs=False),  # drifting far once would take their resolution
    "MountainCarContinuous-v0": dict(gamma=0.999),  # with 0.99 haste costs energy
    "brax": dict(initial_std=0.5),  # with 1 ant returns 127 after 1M steps, not 3900
    "DeepSea-bsuite": dict(num_envs=64),  # the first rollout has to find one path of 2^8
    "MinAtar": dict(num_envs=64, num_steps=128, fisher_stride=5, update_epochs=4, activation="relu")
    | dict(max_kl=0.1, ent_coef=0.1),  # without the bonus it soon tries nothing new
    "Breakout-MinAtar": dict(max_kl=0.03),  # after 5M steps 45 instead of 31 with 0.1
    "SpaceInvaders-MinAtar": dict(max_kl=0.03, ent_coef=0.01),  # 170 instead of 147 with 0.1, 0.03
    "Asterix-MinAtar": dict(gae_lambda=0.65),  # its advantages are noisy
    "Freeway-MinAtar": dict(gae_lambda=0.8),  # 39 instead of 34, before it had the bonus
}


def default_config(env_id: str = Config.env_id) -> Config:
    """The defaults and the preset, as the command line has them; Config(...) ignores the preset."""
    family = env_id.rpartition("-")[2]
    return Config(env_id=env_id, **PRESETS.get(family, {}) | PRESETS.get(env_id, {}))


def validate(config: Config) -> None:
    """Raise Failure on values that cannot work; arrays, which may be traced, pass unseen."""
    may_be_zero = {"gamma", "gae_lambda", "cg_damping"}
    at_most_one = {"gamma", "gae_lambda", "line_search_ratio"}
    for name, value in vars(config).items():
        default = getattr(Config, name)
        default = default[0] if isinstance(default, tuple) else default
        kind = float if default is None else type(default)
        is_number = kind in (int, float)
        zero = name in may_be_zero or default == 0
        most = 1 if name in at_most_one else 2**31 - 1 if kind is int else 3e38
        least = -most if is_number and (default or 0) < 0 else 0  # a field of your own, say
        for x in value if isinstance(value, tuple) else (value,):
            if isinstance(x, jax.Array) or x is default is None:
                continue
            x = float(x) if isinstance(x, np.floating) else x  # as of np.logspace
            if type(x) is not kind and (type(x), kind) != (int, float):
                raise Failure(f"{name} must be of type {kind.__name__}, got {x!r}")
            if is_number and not (least < x <= most or (x == 0 and zero)):
                more = "" if zero else "more than "
                raise Failure(f"{name} must be from {more}{least} to {most}, got {x}")
    if config.activation not in ("tanh", "relu"):
        raise Failure(f"activation must be tanh or relu, got {config.activation!r}")
    size, parts = config.batch_size, config.num_minibatches
    if size % parts or size < 2 * parts:
        equal = f"num_minibatches = {parts} equal parts of 2 or more"
        raise Failure(f"num_steps x num_envs = {size} transitions do not divide into {equal}")
    if config.num_updates < 1:
        raise Failure(f"total_timesteps must be at least num_steps x num_envs = {size}")
    steps = config.num_updates * config.update_epochs * parts
    if max(steps, size, config.seed + config.num_seeds) >= 2**31:
        seeds = config.seed + config.num_seeds
        what = f"batch {size}, gradient steps {steps} and seed + num_seeds {seeds}"
        raise Failure(f"{what} have to be below 2^31")


def straight_threefry() -> None:
    """Compile `jax.random` to straight code on the CPU, in the whole process; the same numbers.

    JAX runs Threefry-2x32 (Salmon et al. 2011) in loops, with which XLA fuses nothing: without them
    the default command ends a tenth sooner, mostly by compiling faster. The API is not stable:
    where JAX has changed, nothing happens.
    """

    def threefry2x32(key0, key1, count0, count1):
        # The barrier keeps XLA from merging a split of keys with the split that they came from: the
        # expression would double with each, until compiling never ends.
        key0, key1 = jax.lax.optimization_barrier((key0, key1))
        keys = (key0, key1, key0 ^ key1 ^ jnp.uint32(0x1BD11BDA))  # a constant of Threefry's
        x, y = count0 + key0, count1 + key1
        for i in range(5):
            for shift in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
                x = x + y
                y = x ^ ((y << shift) | (y >> (32 - shift)))  # y is rotated to the left
            x, y = x + keys[(i + 1) % 3], y + keys[(i + 2) % 3] + jnp.uint32(i + 1)
        return x, y

    with contextlib.suppress(ImportError, AttributeError, TypeError):
        from jax.extend.random import threefry2x32_p
        from jax.interpreters import mlir

        lowering = mlir.lower_fun(threefry2x32, multiple_results=True)
        mlir.register_lowering(threefry2x32_p, lowering, platform="cpu")


def shuffled_indices(key, config):
    """A new random order for each epoch, cut into minibatches: [K · num_minibatches, M].

    The index sits in the low bits of a random word, and one sort of plain integers carries it
    along: ten times faster than `jax.random.permutation`, which sorts pairs. (Ties keep their
    order, which matters at the edge of a minibatch only.)
    """
    low = jnp.uint32(2 ** (config.batch_size - 1).bit_length() - 1)
    words = jax.random.bits(key, (config.update_epochs, config.batch_size), jnp.uint32) & ~low
    order = jnp.sort(words | jnp.arange(config.batch_size, dtype=jnp.uint32), axis=-1) & low
    return order.astype(jnp.int32).reshape(config.update_epochs * config.num_minibatches, -1)


def packed(optimizer, config):
    """The optimizer, on one vector instead of a dozen arrays where the networks are small.

    With two layers of 64 units training is up to 8 % faster; with 256 it would be up to a third
    slower (docs/speed.md).
    """
    return optax.flatten(optimizer) if sum(config.hidden_sizes) <= 128 else optimizer


class Environment(NamedTuple):
    """What the algorithm needs of N environments side by side."""

    reset: Callable  # keys [N] -> obs [N, D], env_state
    # keys [N], env_state, action [N] -> env_state, next_obs [N, D], reset_obs [N, D], reward [N],
    # terminated [N], truncated [N]. Where an episode ended, `next_obs` is its last observation, and
    # `reset_obs`, to which env_state belongs, the next one's first; elsewhere both are the same.
    step: Callable
    action_space: Any  # of one environment, as gymnax.environments.spaces has them


def make_env(env_id: str) -> Environment:
    """A gymnax environment by its name, or `module:name`: a module, which may lie in the current
    folder, that defines `make(name) -> Environment` or has registered `name` with gymnax."""
    module, _, name = env_id.rpartition(":")
    if module and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        if module.startswith("."):  # as in ./folder/file
            raise ModuleNotFoundError(name=module)
        module = module and importlib.import_module(module)
        env = module.make(name) if hasattr(module, "make") else make_gymnax(name)
    except ModuleNotFoundError as error:
        if not f"{env_id}.".startswith((f"{error.name}.", f"{error.name}:")):
            raise  # something that the module imports
        hint = " (leave out .py)" * module.endswith(".py")
        raise Failure(f"there is no module {module!r}, neither here nor installed{hint}") from None
    except (OSError, SystemExit) as error:  # the user's: not of writing a run, nor of this script
        raise RuntimeError(f"{env_id} cannot be made") from error
    # By its attributes: an imported copy of this file has an Environment of its own.
    if not all(hasattr(env, x) for x in Environment._fields) or callable(env.action_space):
        kind = type(env).__name__
        what = f"a {kind}, not an Environment whose action_space is a space"
        raise Failure(f"make({name!r}) of {module.__name__} returned {what}")
    space = env.action_space
    if not hasattr(space, "n") and not hasattr(space, "low"):
        raise Failure(f"{env_id} has actions that are neither discrete nor a box: not supported")
    if module:
        check_environment(env, env_id)
    return env


def check_environment(env: Environment, env_id: str) -> None:
    """Failure if `reset` or `step` does not return what `Environment` says, for two of them."""
    keys, space = jax.random.split(jax.random.key(0)), env.action_space
    action = jnp.zeros(2, int) if hasattr(space, "n") else jnp.zeros((2, *space.shape))
    shape = lambda x: getattr(x, "shape", ())
    form = lambda x: f"{x.dtype} {list(x.shape)}" if hasattr(x, "shape") else type(x).__name__
    form_all = lambda x: ", ".join(map(form, x)) if isinstance(x, tuple | list) else form(x)
    start = jax.eval_shape(env.reset, keys)
    is_pair = isinstance(start, tuple | list) and len(start) == 2
    if not is_pair or len(shape(start[0])) < 2 or 0 in start[0].shape:
        should = f"reset of {env_id} should return obs [N, D], env_state"
        raise Failure(f"{should}; for N = 2 it returned {form_all(start)}")
    obs, env_state = start
    result = jax.eval_shape(env.step, keys, env_state, action)
    shapes = [obs.shape, obs.shape, (2,), (2,), (2,)]
    is_right = isinstance(result, tuple | list) and [*map(shape, result[1:])] == shapes
    if not is_right or any(flag.dtype != bool for flag in result[4:]):
        parts = "env_state, next_obs [N, D], reset_obs [N, D], reward [N], terminated [N] (bool)"
        should = f"step of {env_id} should return {parts}, truncated [N] (bool)"
        raise Failure(f"{should}; for N = 2 it returned {form_all(result)}")


def make_gymnax(name: str) -> Environment:
    """N copies of a gymnax environment, with observations as flat float vectors."""
    import gymnax  # here, since it computes on import, and --distributed has to come before that
    from gymnax.environments import spaces

    if name not in gymnax.registered_envs:
        near = " or ".join(difflib.get_close_matches(name, gymnax.registered_envs, cutoff=0.4))
        known = f"did you mean {near}? " * bool(near) + ", ".join(sorted(gymnax.registered_envs))
        own = "or module:name, of a module that defines make(name) or registers name with gymnax"
        raise Failure(f"there is no environment {name!r}; {known}; {own}")
    try:
        with jax.ensure_compile_time_eval():  # some constructors compute, and `train` may be traced
            env, params = gymnax.make(name)
    except OSError as error:
        raise Failure(f"{name} needs data that could not be downloaded: {error}") from None
    space = env.observation_space(params)
    if isinstance(space, spaces.Dict | spaces.Tuple):
        raise Failure(f"{name} has observations of several parts: not supported")
    is_category = isinstance(space, spaces.Discrete)  # which becomes a one-hot vector
    observe = lambda x: jax.nn.one_hot(x, space.n) if is_category else jnp.float32(x).ravel()

    @jax.vmap
    def reset(key):
        obs, env_state = env.reset(key, params)
        return observe(obs), env_state

    @jax.vmap
    def step(key, env_state, action):
        obs, env_state, reward, terminated, truncated, info = env.step(
            key, env_state, action, params
        )
        next_obs, reset_obs = observe(info["final_observation"]), observe(obs)
        return env_state, next_obs, reset_obs, jnp.float32(reward), terminated, truncated

    return Environment(reset, step, env.action_space(params))


# ---- The command line: nothing above prints, writes or reads the clock ---------------------------

SCRIPT = Path(__file__).stem
FORMAT = 2  # of a run's directory
CHECKPOINT_SECONDS = 30  # a kill loses at most this and a segment
EVALUATION_EPISODES = 100  # per seed
MAY_BE_NAN = ("episodic_return", "episodic_length", "explained_variance")  # all else is finite


@dataclass(frozen=True)
class Flags:
    """Train TRPO on an environment with discrete or continuous actions."""

    config: tyro.conf.OmitArgPrefixes[Config]
    resume: str | None = None  # directory of an earlier run to continue, with its configuration
    distributed: bool = False  # run as one of several processes, which jax.distributed joins


def load_config(run_dir: str | Path) -> Config:
    """The configuration of an earlier run of this script; Failure says why there is none."""
    try:
        stored = json.loads((Path(run_dir) / "config.json").read_text())
        made_by = stored.pop("script"), stored.pop("format", 1)
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise Failure(f"{run_dir} has no configuration of a run: {error!r}") from None
    if made_by != (SCRIPT, FORMAT):
        made_by = f"{made_by[0]}.py in format {made_by[1]}"
        raise Failure(f"{run_dir} is a run of {made_by}, not of {SCRIPT}.py in format {FORMAT}")
    known = vars(Config()).keys()
    wrong = [f"lacks {name}" for name in sorted(known - stored.keys())]
    wrong += [f"has an unknown {name}" for name in sorted(stored.keys() - known)]
    if wrong:
        raise Failure(f"{run_dir}/config.json {', '.join(wrong)}")
    config = Config(**{name: tuple(x) if isinstance(x, list) else x for name, x in stored.items()})
    validate(config)
    return config


def parse_flags() -> Flags:
    """A first pass finds the environment or the run, which have the defaults of the second."""
    first, _ = tyro.cli(Flags, default=Flags(Config()), add_help=False, return_unknown_args=True)
    resumes = first.resume is not None
    default = load_config(first.resume) if resumes else default_config(first.config.env_id)
    flags = tyro.cli(Flags, default=Flags(default))
    for name, value in vars(default).items():
        if resumes and getattr(flags.config, name) != value:
            raise Failure(f"{first.resume} was started with {name} = {value}; this cannot change")
    validate(flags.config)
    return flags


def use_cores(num_seeds: int) -> None:
    """One CPU device per core, as far as the seeds divide over them; what the user has set wins."""
    if "device_count" in os.environ.get("XLA_FLAGS", "") or jax.config.jax_num_cpu_devices > 0:
        return
    affinity = getattr(os, "sched_getaffinity", None)  # `taskset` counts
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # the quota of a container, if there is one
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = max(1, min(cores, int(quota) // int(period)))
    devices = next(n for n in range(cores, 0, -1) if num_seeds % n == 0)
    with contextlib.suppress(RuntimeError):  # JAX is running already
        jax.config.update("jax_num_cpu_devices", devices)


def join_processes() -> None:
    """Become one of several processes. On a cluster that JAX knows the same command in each is all;
    elsewhere three variables say where the first is, how many there are, and which this is."""
    names = ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]
    address, *numbers = [os.environ.get(name) for name in names]
    print(f"joining the other processes{f' at {address}' if address else ''}")
    try:
        if address is not None and not re.fullmatch(r".+:\d{1,5}", address):
            raise ValueError(f"{address} is not host:port")
        number, index = (None if x is None else int(x) for x in numbers)
        jax.distributed.initialize(num_processes=number, process_id=index)
    except (ValueError, TypeError, RuntimeError) as error:
        known = "Slurm, Open MPI, TPU and (with jax[k8s]) Kubernetes are found; elsewhere set"
        raise Failure(f"cannot join the others: {error}\n{known} {', '.join(names)}") from None


def brief(error: Exception) -> str:
    """The first line of what JAX or Orbax may say in fifty."""
    return (str(error).strip() or repr(error)).splitlines()[0][:300].rstrip(":")


def exchange(value: Any) -> list:
    """Every process's `value`, of JSON and up to 16 kB, in the order of the processes."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode().ljust(2**14), np.uint8)
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(text)]


def first_does(function: Callable, *arguments: Any) -> Any:
    """Call `function` in the first process. All get its result, of JSON, or its failure."""
    result, failure = None, None
    try:
        result = function(*arguments) if jax.process_index() == 0 else None
    except (Failure, OSError) as error:
        failure = explain(error)
    result, failure = exchange([result, failure])[0]
    if failure:
        raise Failure(*failure)
    return result


def seed_axis() -> NamedSharding:
    """Arrays with a leading seed axis, spread over all devices of all processes."""
    mesh = jax.make_mesh((jax.device_count(),), ("seed",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("seed"))


def over_seeds(function: Callable, **options: Any) -> Callable:
    """`function` of one seed, compiled for all: vmapped on each device, side by side on several.

    Every argument and result has a leading seed axis. The devices exchange nothing. (Left to `jit`,
    a `while_loop` under vmap would ask all of them in each iteration whether it has ended.)
    """
    axis = seed_axis()
    share = dict(mesh=axis.mesh, in_specs=axis.spec, out_specs=axis.spec, check_vma=False)
    return jax.jit(jax.shard_map(jax.vmap(function), **share), **options)


def compile_segment(config: Config, update: Callable, state: State) -> tuple:
    """Some updates of all seeds as one program, which serves all segments, and their number.

    It returns the State, the metrics, and for each update whether observations, rewards, losses
    and weights were finite: causes before effects. Failure if it takes more memory than there is.
    """
    most = max(1, config.num_updates // 100)
    length = next(n for n in range(most, 0, -1) if config.num_updates % n == 0)

    def step(state, _):
        state, metrics = update(state, None)
        losses = [x for name, x in metrics.items() if name not in MAY_BE_NAN]
        returns = state.return_stats, state.episode.discounted
        causes = [(state.obs, state.obs_stats), returns, losses, state.params]
        finite = jnp.stack([jnp.isfinite(ravel_pytree(x)[0]).all() for x in causes])
        return state, (metrics, finite)

    segment = lambda state: jax.lax.scan(step, state, None, length)
    compiled = over_seeds(segment, donate_argnums=0).lower(state).compile()
    memory, devices = compiled.memory_analysis(), jax.local_devices()
    needs = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")  # the CPU's share one memory
    if limit is None and hasattr(os, "sysconf"):
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices)
    if limit and needs > limit:
        sizes = f"{needs / 2**30:,.1f} GiB per device, which has {limit / 2**30:,.1f}"
        raise Failure(f"this takes {sizes}: use fewer seeds, environments or steps")
    return compiled, length


def csv_text(columns: dict[str, np.ndarray], header: bool) -> bytes:
    """Lines of a CSV file, from arrays of one shape; NaN becomes an empty cell."""
    text = lambda x: str(x) if isinstance(x, int | str) else "" if math.isnan(x) else f"{x:.7g}"
    rows = zip(*(column.ravel().tolist() for column in columns.values()), strict=True)
    return "".join(",".join(map(text, row)) + "\n" for row in [columns] * header + [*rows]).encode()


def plot_learning_curve(run_dir: Path, config: Config) -> None:
    """Draw the return of the training episodes over steps from metrics.csv."""
    import scipy.stats  # both late, since they take half a second
    from matplotlib.figure import Figure

    rows = [line.split(",") for line in (run_dir / "metrics.csv").read_text().splitlines()]
    table = np.array(rows[1:]).reshape(-1, config.num_seeds, len(rows[0]))
    steps = table[:, 0, rows[0].index("env_step")].astype(int)
    returns = table[:, :, rows[0].index("episodic_return")]
    returns = np.ma.masked_invalid(np.where(returns == "", "nan", returns).astype(float))
    known = returns.count(axis=1) > 0  # updates in which some episode ended
    steps, returns = steps[known], returns[known]
    mean, count = returns.mean(axis=1), returns.count(axis=1)
    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).subplots()
    axes.plot(steps, returns, color="tab:blue", alpha=0.2, linewidth=0.8)
    axes.plot(steps, mean, color="tab:blue", linewidth=2, label=f"mean of {config.num_seeds} seeds")
    if config.num_seeds > 1:  # Student's; none (nan, not drawn) where one seed alone had an end
        error = returns.std(axis=1, ddof=1) / np.sqrt(count)
        error = error * scipy.stats.t.ppf(0.975, count - 1)
        axes.fill_between(steps, mean - error, mean + error, alpha=0.3, label="95 % interval")
    axes.set(xlabel="environment steps per seed", ylabel="return of training episodes")
    axes.set_title(f"{SCRIPT} on {config.env_id}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(run_dir / "learning_curve.png", dpi=150)


def report_evaluation(run_dir: Path, config: Config, returns, lengths, max_steps: int) -> None:
    """Write evaluation.csv and print a table; both arrays [num_seeds, episodes]."""
    import scipy.stats

    row, episode = np.indices(returns.shape)
    columns = dict(seed=config.seed + row, episode=episode)
    columns |= dict(episodic_return=returns, episodic_length=lengths)
    (run_dir / "evaluation.csv").write_bytes(csv_text(columns, header=True))
    print(f"\nGreedy evaluation, {returns.shape[1]} episodes per seed\n")
    print("  seed       return ± std           length")
    for i in range(min(config.num_seeds, 20)):  # evaluation.csv has the others
        mean, deviation, length = returns[i].mean(), returns[i].std(), lengths[i].mean()
        print(f"{config.seed + i:6d} {mean:12.2f} ± {deviation:<9.2f} {length:9.1f}")
    if cut := (lengths >= max_steps).sum():
        print(f"{cut} episodes had no end after {max_steps} steps and were cut there")
    scores = returns.mean(axis=1)
    iqm = partial(scipy.stats.trim_mean, proportiontocut=0.25)  # Agarwal et al. 2021
    name = "interquartile mean" if config.num_seeds > 3 else "mean"
    text = f"\n{name} over seeds: {iqm(scores):.2f}"
    if config.num_seeds > 1:
        bootstrap = scipy.stats.bootstrap((scores,), iqm, method="percentile", batch=999, rng=0)
        low, high = bootstrap.confidence_interval
        text += f"   (95 % bootstrap interval {low:.2f} to {high:.2f})"
    print(text)


@contextlib.contextmanager
def asked_to_stop():
    """In here the first Ctrl-C, SIGTERM or SIGHUP only adds its number to the list that this gives;
    the second one ends the process."""

    def note(number, _):
        if numbers:
            os._exit(128 + number)
        numbers.append(number)
        with contextlib.suppress(OSError):  # not `print`, which may be what was interrupted
            os.write(2, b"\nstopping after this segment (once more: at once)\n")

    numbers, watched = [], [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)]
    watched = [number for number in watched if signal.getsignal(number) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        watched = []  # only the main thread gets signals
    before = {number: signal.signal(number, note) for number in dict.fromkeys(watched)}
    try:
        yield numbers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def create_run(config: Config) -> str:
    """The directory of a new run, named by what it is and when it began."""
    name = f"{re.sub(r'[^-.a-zA-Z0-9_]', '_', config.env_id)}__{SCRIPT}__{config.seed}"
    Path("runs").mkdir(exist_ok=True)
    for second in itertools.count(int(time.time())):
        run_dir = Path("runs") / time.strftime(f"{name}__%Y%m%d-%H%M%S", time.gmtime(second))
        with contextlib.suppress(FileExistsError):  # of a run that began in the same second
            run_dir.mkdir()
            break
    stored = {"format": FORMAT, "script": SCRIPT, **asdict(config)}
    (run_dir / "config.json").write_text(json.dumps(stored, indent=2) + "\n")
    return str(run_dir)


class Run:
    """The directory of a run, held against other processes: metrics.csv and the last checkpoint,
    which knows the size and checksum that metrics.csv had, and what it was made with."""

    def __init__(self, path: str, config: Config):
        self.path, self.config = Path(path), config
        circumstances = dict(jax=jax.__version__, x64=bool(jax.config.jax_enable_x64))
        circumstances |= dict(devices=jax.device_count())  # the bits depend on them
        self.made_with = json.loads(json.dumps([asdict(config), circumstances]))
        first_does(self.lock)
        policy, every = ocp.checkpoint_managers.ContinuousCheckpointingPolicy, CHECKPOINT_SECONDS
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=policy(minimum_interval_secs=every),
            max_to_keep=1,
            enable_async_checkpointing=False,
        )
        handler, folder = ocp.StandardCheckpointHandler(), self.path.resolve() / "checkpoints"
        self.checkpoints = ocp.CheckpointManager(folder, item_handlers=handler, options=options)
        self.done, self.size, self.checksum = first_does(self.find_checkpoint)

    def restore(self, state: State) -> None:
        """Begin with this state, or with what a checkpoint of its shapes has in its place."""
        self.state = state
        if self.done:
            try:
                args = ocp.args.StandardRestore(state)
                self.state = self.checkpoints.restore(self.done, args=args)
            except Exception as error:  # whatever Orbax raises on a damaged file
                what = f"is damaged, or of another {SCRIPT}.py"
                raise Failure(f"the checkpoint of {self.path} {what}: {brief(error)}") from None

    def lock(self) -> None:
        """Open metrics.csv, and hold it against other processes until this one ends."""
        self.metrics = (self.path / "metrics.csv").open("a+b")
        with contextlib.suppress(ImportError):  # Windows has no locks
            import fcntl

            try:
                fcntl.flock(self.metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Failure(f"another process is at work in {self.path}") from None

    def find_checkpoint(self) -> tuple[int, int, int]:
        """The last checkpoint's updates, size and checksum of metrics.csv, which is cut back to it:
        later rows belong to updates that will be done again."""
        done, size, checksum = self.checkpoints.latest_step() or 0, 0, 0
        if done:
            try:
                stored = self.checkpoints.metadata(done).custom_metadata
                (update, size, checksum), (config, then) = stored["metrics"], stored["made_with"]
            except Exception as error:  # whatever Orbax raises on a damaged file
                raise Failure(f"the checkpoint of {self.path} is damaged: {brief(error)}") from None
            other = [name for name in config if self.made_with[0].get(name) != config[name]]
            if other or update != done:
                what = f"it was made with another {', '.join(other)}" if other else "it was renamed"
                raise Failure(f"checkpoint {done} of {self.path} is not this run's: {what}")
            if then != self.made_with[1]:
                print(f"made with {then}, goes on with {self.made_with[1]}: other bits may follow")
        self.metrics.seek(0)
        if zlib.crc32(self.metrics.read(size)) != checksum or self.metrics.tell() != size:
            anew = f"remove {self.path}/checkpoints to begin anew"
            raise Failure(
                f"{self.path}/metrics.csv was cut or changed since the checkpoint: {anew}"
            )
        self.metrics.truncate()
        return done, size, checksum

    def append(self, metrics: dict[str, np.ndarray]) -> None:
        """Add one row per update and seed; `metrics` are [num_seeds, updates of this segment]."""
        update, row = np.indices(next(iter(metrics.values())).T.shape)
        update += self.done + 1
        columns = dict(seed=self.config.seed + row, update=update)
        columns |= dict(env_step=update * self.config.batch_size)
        text = csv_text(columns | {name: x.T for name, x in metrics.items()}, self.size == 0)
        self.metrics.write(text)
        self.metrics.flush()
        os.fsync(self.metrics.fileno())  # before a checkpoint counts on it
        self.size, self.checksum = self.size + len(text), zlib.crc32(text, self.checksum)

    def save(self, force: bool) -> None:
        """Write a checkpoint if it is time for one; Orbax renames it when it is complete."""
        stored = dict(metrics=[self.done, self.size, self.checksum], made_with=self.made_with)
        args = dict(args=ocp.args.StandardSave(self.state), custom_metadata=stored, force=force)
        try:
            self.checkpoints.save(self.done, **args)
        except ValueError as error:  # TensorStore's, of a full disk
            reason = str(error).rpartition(": ")[2]
            raise OSError(reason) if re.search("os.error", reason, re.I) else error from None


def train_in_segments(run: Run, run_segment: Callable, length: int) -> int:
    """Go on to the end, or to the segment in which a signal comes: its number, or 0."""
    config, hidden, asked = run.config, jax.process_index() > 0, 0
    steps = config.num_seeds * config.batch_size  # of an update
    total, start = config.num_updates * steps, run.done * steps
    bar = tqdm(total=total, initial=start, unit="step", unit_scale=True, disable=hidden)
    with bar, asked_to_stop() as signals:
        while run.done < config.num_updates and not asked:
            run.state, results = run_segment(run.state)
            # Whole NumPy arrays in each process; this waits for the segment.
            metrics, finite = multihost_utils.process_allgather(results, tiled=True)
            first_does(run.append, metrics)
            if not finite.all():  # [num_seeds, updates, causes]
                update, seed, cause = np.argwhere(~finite.swapaxes(0, 1))[0]
                what = ("an observation", "a reward", "a loss", "a weight")[cause]
                where = f"seed {config.seed + seed} in update {run.done + update + 1}"
                mend = "mend the environment" if cause < 2 else "try a lower --learning-rate"
                raise Failure(f"{what} of {where} is not finite, see metrics.csv: {mend}", code=1)
            run.done += length
            asked = max(exchange(signals[0] if signals else 0))
            run.save(force=asked > 0 or run.done == config.num_updates)
            bar.update(length * steps)
            if np.isfinite(metrics["episodic_return"]).any():
                bar.set_postfix_str(f"return {np.nanmean(metrics['episodic_return']):.2f}")
    return asked


def count_devices(flags: Flags) -> int:
    """Those of all processes. Failure if these were not started alike, or seeds do not divide."""
    try:
        devices = jax.device_count()
    except (RuntimeError, AssertionError) as error:
        asked = f"with JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
        raise Failure(f"JAX finds no device {asked}: {brief(error)}") from None
    mine = {**asdict(flags.config), "resume": flags.resume, "folder": os.getcwd()}
    mine = {name: str(value) for name, value in mine.items()}
    for i, other in enumerate(exchange(mine)):
        differ = [name for name in mine if other[name] != mine[name]]
        differ = [f"{name} {other[name]} (here {mine[name]})" for name in differ]
        if differ:
            raise Failure(f"process {i} was started with another {', '.join(differ)}")
    if flags.config.num_seeds % devices:
        seeds = f"num_seeds = {flags.config.num_seeds}"
        raise Failure(f"{seeds} does not divide over {devices} devices")
    return devices


def run_command(flags: Flags) -> int:
    """Train, evaluate, report. Returns the exit code."""
    devices, config, first_process = count_devices(flags), flags.config, jax.process_index() == 0
    say = print if first_process else lambda *_: None
    scale = f"{config.num_seeds} seeds x {config.num_updates} updates x {config.batch_size} steps"
    say(f"{SCRIPT} on {config.env_id}: {scale}, on {devices} x {jax.devices()[0].device_kind}")
    run = Run(flags.resume, config) if flags.resume else None
    clock = time.perf_counter()
    init, update = make_train(config)
    start, axis = over_seeds(lambda seed: init(jax.random.key(seed))), seed_axis()
    shapes = jax.eval_shape(start, jax.ShapeDtypeStruct((config.num_seeds,), jnp.int32))
    on_devices = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=axis)
    run_segment, length = compile_segment(config, update, jax.tree.map(on_devices, shapes))
    say(f"compiled in {time.perf_counter() - clock:.1f} s")
    run = run or Run(first_does(create_run, config), config)
    say(f"writing {run.path}")
    seeds = config.seed + np.arange(config.num_seeds)
    run.restore(start(seeds))
    clock, before = time.perf_counter(), run.done
    asked = train_in_segments(run, run_segment, length)
    seconds = time.perf_counter() - clock
    steps = (run.done - before) * config.num_seeds * config.batch_size
    say(f"trained {steps:,} steps in {seconds:.1f} s ({steps / seconds:,.0f} steps/s)")
    if first_process and run.done:
        plot_learning_curve(run.path, config)
    if asked:
        again = f"--resume {shlex.quote(str(run.path))}" + " --distributed" * flags.distributed
        say(f"stopped after update {run.done} of {config.num_updates}; go on with")
        say(f"  python {sys.argv[0]} {again}")
        return 128 + asked
    # All is saved: from here on a signal ends it. The keys are none that training had: it splits,
    # and split(key, n)[i] is fold_in(key, i) with i < n.
    most = max(10_000, config.num_updates * config.num_steps)  # at least as many as in training
    key = lambda seed: jax.random.fold_in(jax.random.key(seed), 2**31)
    play = lambda seed, state: evaluate(config, state, key(seed), EVALUATION_EPISODES, None, most)
    results = over_seeds(play)(seeds, run.state)
    returns, lengths = multihost_utils.process_allgather(results, tiled=True)
    if first_process:
        report_evaluation(run.path, config, returns, lengths, most)
        print(f"\nfiles in {run.path}: {', '.join(sorted(x.name for x in run.path.iterdir()))}")
    return 0


class Terminal:
    """A standard stream; a write that fails, as to a closed pipe, is no reason to stop. If `thread`
    is given it alone is heard: Orbax's say at length what the run says in a sentence."""

    def __init__(self, stream, thread=None):
        self.stream, self.thread = stream, thread
        self.write, self.flush = (partial(self.attempt, name) for name in ("write", "flush"))
        self.attempt("reconfigure", errors="replace")  # terminals without γ
        is_heard = lambda record: thread is None or record.thread == thread.ident
        logging.getLogger("absl").addFilter(is_heard)

    def attempt(self, name, *arguments, **options):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            if self.thread in (None, threading.current_thread()):
                getattr(self.stream, name)(*arguments, **options)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def explain(error: Exception) -> tuple[str, int]:
    """What to say of whatever ended the command, and its exit code."""
    if isinstance(error, Failure):
        return str(error), error.code
    if isinstance(error, OSError):
        return f"cannot write: {brief(error)}; a run that had begun goes on with --resume", 2
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return f"not enough memory: {brief(error)}", 2
    if isinstance(error, AssertionError) and "Chex" in str(error):
        ours = [x for x in traceback.extract_tb(error.__traceback__) if x.filename == __file__]
        place = f"line {ours[-1].lineno} of {SCRIPT}.py"
        return f"an array has another shape than it should ({place}): {brief(error)}", 2
    if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
        return f"the processes cannot go on together: {brief(error)}; start all with --resume", 1
    frames = "".join(traceback.format_exception(error))
    return f"the program, or the environment, failed\n{frames}", 1


def main() -> None:
    """The command line: whatever ends it becomes a sentence and an exit code."""
    out, err = Terminal(sys.stdout), Terminal(sys.stderr, threading.current_thread())
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            flags = parse_flags()
            straight_threefry()
            join_processes() if flags.distributed else use_cores(flags.config.num_seeds)
            code = run_command(flags)
            if flags.distributed:
                jax.distributed.shutdown()  # waits for the others
        except Exception as error:
            sentence, code = explain(error)
            print(f"error: {sentence}", file=err)
        sys.exit(code)


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:  # what the streams still hold is written, or lost with a closed pipe
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):
                stream.flush()
        os._exit(end.code)  # threads of JAX and Orbax that wait for others or complain end here

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "jax>=0.10.2,<0.12",
#     "flax>=0.12.8,<0.13",
#     "optax>=0.2.8,<0.3",
#     "gymnax>=1.0.1,<1.1",
#     "chex>=0.1.92,<0.2",
#     "six>=1.17,<2",
#     "orbax-checkpoint>=0.12.8,<0.13",
#     "tyro>=1.0.17,<1.1",
#     "tqdm>=4.70,<5",
#     "matplotlib>=3.11,<3.12",
#     "numpy>=2.4,<3",
#     "scipy>=1.17,<2",
# ]
# ///
