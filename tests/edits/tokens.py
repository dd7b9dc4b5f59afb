"""RLHF in miniature: a language of eight tokens, a reward model, and what is really wanted.

A prompt of one token is completed by eight tokens, one per step. Human text goes up in steps of
one to three, around the circle 0 ... 7; any other pair is a slip, which humans make in two tokens
of a hundred. Token 0 says thanks. People like to be thanked, in proper text. The reward model has
learned the first half of that: it counts the thanks. On human text, which thanks three times at
most, both agree. Off it the reward model has a loophole: "0 0 0 0 0 0 0 0" scores 8.

`--env-id tokens:any` imports this as an environment; `make("any")` gives it to `train`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from gymnax.environments import spaces

VOCABULARY, LENGTH, THANKS = 8, 8, 0
SLIPS = 0.02  # of human tokens, drawn from the whole vocabulary

_up = (jnp.arange(VOCABULARY) - jnp.arange(VOCABULARY)[:, None]) % VOCABULARY
PROPER = (1 <= _up) & (_up <= 3)  # [last token, next token]
HUMAN = (1 - SLIPS) * jnp.array([0, 0.5, 0.3, 0.2, 0, 0, 0, 0])[_up] + SLIPS / VOCABULARY

# A text [..., LENGTH + 1] has the newest token first and -1 where nothing is written yet.


def write(text, token):
    """The text with one more token: [..., LENGTH + 1], [...] -> [..., LENGTH + 1]."""
    return jnp.concatenate([token[..., None], text[..., :-1]], axis=-1)


def observe(text):
    """The tokens so far as one-hot vectors; how many there are is the position: [..., D]."""
    return jax.nn.one_hot(text, VOCABULARY).reshape(*text.shape[:-1], -1)


def proxy_reward(text):
    """The reward model: the number of thanks in the completion, [...]."""
    return jnp.sum(text[..., :-1] == THANKS, axis=-1, dtype=jnp.float32)


def true_reward(text):
    """What is wanted: the number of thanks in proper pairs, less the number of slips, [...]."""
    token, last = text[..., :-1], text[..., 1:]
    return jnp.sum(jnp.where(PROPER[last, token], token == THANKS, -1.0), axis=-1)


def human(obs):
    """The demonstrator as a policy: logits [..., VOCABULARY], of the last token alone."""
    return obs[..., :VOCABULARY] @ jnp.log(HUMAN)


def complete(policy, key, prompt):
    """Complete prompts [N] with policy(obs) -> logits: texts [N, LENGTH + 1], and what was seen
    and written at each position, obs [LENGTH, N, D] and token [LENGTH, N]."""

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
    """Pairs of human completions of a prompt, the preferred one first: obs [2, LENGTH, number, D]
    and token [2, LENGTH, number]. The reward model prefers, after Bradley and Terry: the first with
    the probability 1 / (1 + exp(R_2 - R_1))."""
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
    """N completions at once. The key of a reset draws the prompt, and nothing else is random."""

    def reset(keys):
        prompt = jax.vmap(lambda key: draw_prompts(key, 1)[0])(keys)
        text = jnp.full((len(keys), LENGTH + 1), -1).at[:, 0].set(prompt)
        return observe(text), text

    def step(keys, text, token):
        text = write(text, token)
        done = text[:, -1] >= 0  # the prompt has come to the end: the text is complete
        reward = jnp.where(done, proxy_reward(text), 0.0)
        start = jnp.where(done[:, None], reset(keys)[1], text)
        return start, observe(text), observe(start), reward, done, jnp.zeros_like(done)

    return Tokens(reset, step, spaces.Discrete(VOCABULARY), demonstrate, prefer)
