"""RLHF in miniature: a language of eight tokens, a reward model, and what is really wanted.

The policy completes a prompt of one token by eight tokens, one per step. In proper text, each token
is one to three larger than the last one, modulo 8. Any other pair of tokens is a slip. Humans draw
2 % of their tokens at random, and five in eight of these are slips. Token 0 means thanks. People
like thanks, but only in proper text. The reward model just counts the thanks. On proper text, which
has at most three thanks, the reward model is right. Elsewhere it has a loophole: it gives
"0 0 0 0 0 0 0 0" a reward of 8.

On the command line, the environment is `--env-id tokens:any`. In a program, `make("any")` makes it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from gymnax.environments import spaces

VOCABULARY, LENGTH, THANKS = 8, 8, 0
SLIPS = 0.02  # fraction of the human tokens that are drawn from the whole vocabulary

_up = (jnp.arange(VOCABULARY) - jnp.arange(VOCABULARY)[:, None]) % VOCABULARY
PROPER = (1 <= _up) & (_up <= 3)  # [last token, next token]
HUMAN = (1 - SLIPS) * jnp.array([0, 0.5, 0.3, 0.2, 0, 0, 0, 0])[_up] + SLIPS / VOCABULARY

# A text [..., LENGTH + 1] has the newest token first. Places that are not written yet hold -1.


def write(text, token):
    """The text with one more token: [..., LENGTH + 1], [...] -> [..., LENGTH + 1]."""
    return jnp.concatenate([token[..., None], text[..., :-1]], axis=-1)


def observe(text):
    """The tokens so far as one-hot vectors, and zeros for the rest: [..., D]."""
    return jax.nn.one_hot(text, VOCABULARY).reshape(*text.shape[:-1], -1)


def proxy_reward(text):
    """The reward model: the number of thanks in the completion, [...]."""
    return jnp.sum(text[..., :-1] == THANKS, axis=-1, dtype=jnp.float32)


def true_reward(text):
    """What people like: the number of thanks in proper pairs minus the number of slips, [...]."""
    token, last = text[..., :-1], text[..., 1:]
    return jnp.sum(jnp.where(PROPER[last, token], token == THANKS, -1.0), axis=-1)


def human(obs):
    """The human policy: logits [..., VOCABULARY], which only depend on the last token."""
    return obs[..., :VOCABULARY] @ jnp.log(HUMAN)


def complete(policy, key, prompt):
    """Complete prompts [N] with policy(obs) -> logits.

    Returns the texts [N, LENGTH + 1], and for each position the observation [LENGTH, N, D] and the
    token that the policy wrote [LENGTH, N].
    """

    def step(text, key):
        token = jax.random.categorical(key, policy(observe(text)))
        return write(text, token), (observe(text), token)

    text = jnp.full((len(prompt), LENGTH + 1), -1).at[:, 0].set(prompt)
    text, (obs, token) = jax.lax.scan(step, text, jax.random.split(key, LENGTH))
    return text, obs, token


def draw_prompts(key, number):
    return jax.random.randint(key, (number,), 0, VOCABULARY)


def demonstrate(key, number=32):
    """Human completions, as pairs for supervised learning: obs [B, D], token [B]."""
    prompt_key, text_key = jax.random.split(key)
    _, obs, token = complete(human, text_key, draw_prompts(prompt_key, number))
    return obs.reshape(-1, obs.shape[-1]), token.ravel()


def prefer(key, number=64):
    """Pairs of human completions of the same prompt, with the preferred one first.

    Returns obs [2, LENGTH, number, D] and token [2, LENGTH, number]. Preferences follow Bradley and
    Terry: text 1 is preferred with probability 1 / (1 + exp(R_2 - R_1)), where the reward model
    gives R_1 and R_2.
    """
    prompt_key, text_key, choice_key = jax.random.split(key, 3)
    prompt = jnp.tile(draw_prompts(prompt_key, number), 2)
    text, obs, token = complete(human, text_key, prompt)
    reward = proxy_reward(text).reshape(2, number)
    swap = jax.random.bernoulli(choice_key, jax.nn.sigmoid(reward[1] - reward[0]))  # [number]

    def order(x):  # [LENGTH, 2 number, ...]
        x = x.reshape(LENGTH, 2, number, -1).swapaxes(0, 1)
        return jnp.where(swap[:, None], x[::-1], x)

    return order(obs), order(token)[..., 0]


class Tokens(NamedTuple):
    """An `Environment` of the scripts, with demonstrations and preferences."""

    reset: Any
    step: Any
    action_space: Any
    demonstrate: Any
    prefer: Any


def make(name):
    """N completions side by side. Only the prompt is random."""

    def reset(keys):
        prompt = jax.vmap(lambda key: draw_prompts(key, 1)[0])(keys)
        text = jnp.full((len(keys), LENGTH + 1), -1).at[:, 0].set(prompt)
        return observe(text), text

    def step(keys, text, token):
        text = write(text, token)
        done = text[:, -1] >= 0  # the text is complete when the prompt has moved to its end
        reward = jnp.where(done, proxy_reward(text), 0.0)
        start = jnp.where(done[:, None], reset(keys)[1], text)
        return observe(start), start, reward, done, jnp.zeros_like(done), observe(text)

    return Tokens(reset, step, spaces.Discrete(VOCABULARY), demonstrate, prefer)
