"""One-line bugs for the scripts, and for each a test that sees it: exercises for docs/recipes.md.

    python tests/break_it.py                           # the list, as it stands in the document
    python tests/break_it.py no-minimum > broken.py    # a script with this bug, to be run

`test_break_it.py` applies each to a copy of the repository's scripts and sees its test fail.
"""

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutation(NamedTuple):
    """A change for the worse of a text that stands once in the script."""

    script: str
    old: str
    new: str
    test: str  # that fails


GAE_EXAMPLE = "test_mathematics.py::test_gae_on_a_worked_example"
RATIO_ONE = "test_training.py::test_the_first_minibatch_has_ratio_one_and_later_ones_have_not"
ADVANTAGES = "test_update.py::test_what_the_advantages_are_made_of"

MUTATIONS = {
    "no-minimum": Mutation(
        "ppo_discrete",
        "jnp.minimum(ratio * advantage, clipped_ratio * advantage)",
        "clipped_ratio * advantage",
        "test_mathematics.py::test_clipped_surrogate_table",
    ),
    "new-log-prob": Mutation(
        "ppo_discrete",
        "policy.log_prob(action) - old_log_prob",
        "policy.log_prob(action) - jax.lax.stop_gradient(policy.log_prob(action))",
        RATIO_ONE,
    ),
    "raw-advantage": Mutation(
        "ppo_discrete",
        "clipped_surrogate(ratio, normalize_advantage(advantage), config.clip_eps)",
        "clipped_surrogate(ratio, advantage, config.clip_eps)",
        "test_update.py::test_advantages_are_normalised_where_they_are_used[ppo_discrete]",
    ),
    "entropy-punished": Mutation(
        "ppo_discrete",
        "- config.ent_coef * entropy",
        "+ config.ent_coef * entropy",
        "test_training.py::test_the_entropy_bonus_keeps_the_policy_random[ppo_discrete]",
    ),
    "limit-is-an-end": Mutation(
        "ppo_discrete",
        "gamma * next_value * (1.0 - terminated)",
        "gamma * next_value * (1.0 - done)",
        GAE_EXAMPLE,
    ),
    "no-end": Mutation(
        "ppo_discrete", "gamma * next_value * (1.0 - terminated)", "gamma * next_value", GAE_EXAMPLE
    ),
    "sum-across-episodes": Mutation(
        "ppo_discrete",
        "gae_lambda * (1.0 - done) * advantage",
        "gae_lambda * advantage",
        GAE_EXAMPLE,
    ),
    "value-of-the-reset": Mutation(
        "ppo_discrete",
        "state.obs, next_obs, action, log_prob",
        "state.obs, reset_obs, action, log_prob",
        f"{ADVANTAGES}[Cut-test]",
    ),
    "statistics-too-early": Mutation(
        "ppo_discrete",
        "obs = normalize(rollout.obs, state.obs_stats)",
        "obs = normalize(rollout.obs, update_stats(state.obs_stats, rollout.obs))",
        RATIO_ONE,
    ),
    "reward-centred": Mutation(
        "ppo_discrete",
        "normalize(rollout.reward, state.return_stats, center=False)",
        "normalize(rollout.reward, state.return_stats)",
        f"{ADVANTAGES}[EndAndCut-test]",
    ),
    "one-shuffle": Mutation(
        "ppo_discrete",
        "jax.random.bits(key, (config.update_epochs, config.batch_size), jnp.uint32)",
        "jnp.tile(jax.random.bits(key, (1, config.batch_size)), (config.update_epochs, 1))",
        "test_mathematics.py::test_shuffled_indices_are_permutations[1000]",
    ),
    "same-noise": Mutation(
        "ppo_discrete",
        "state._replace(params=params, opt_state=opt_state, key=key)",
        "state._replace(params=params, opt_state=opt_state)",
        "test_update.py::test_no_noise_is_used_twice[ppo_discrete]",
    ),
    "all-episodes-count": Mutation(
        "ppo_discrete",
        "total += jnp.where(playing, reward, 0.0)",
        "total += reward",
        "test_training.py::test_what_follows_an_evaluation_episode_does_not_count",
    ),
    "bounded-action-stored": Mutation(
        "ppo_continuous",
        "state.obs, next_obs, action, log_prob",
        "state.obs, next_obs, jnp.clip(action, -1, 1), log_prob",
        "test_continuous.py::test_the_first_ratio_is_one",
    ),
    "beta-halved": Mutation(
        "ppo_penalty",
        "jnp.where(kl > 1.5 * target_kl, 2 * beta, beta)",
        "jnp.where(kl > 1.5 * target_kl, beta / 2, beta)",
        "test_penalty.py::test_adapt_beta",
    ),
    "kl-reversed": Mutation(
        "ppo_penalty",
        "kl = old_policy.kl(policy).mean()",
        "kl = policy.kl(old_policy).mean()",
        "test_penalty.py::test_the_optimum_of_the_penalty_shows_its_direction",
    ),
    "no-kl-test": Mutation(
        "trpo",
        "moved & (improvement > 0) & (kl <= max_kl) & finite",
        "moved & (improvement > 0) & finite",
        "test_trpo.py::test_the_first_candidate_that_passes_is_taken",
    ),
    "rejected-step-kept": Mutation(
        "trpo",
        "return jax.tree.map(partial(jnp.where, accepted), passed, rejected)",
        "return passed",
        "test_trpo.py::test_a_rejected_step_leaves_the_bits",
    ),
    "no-damping": Mutation(
        "trpo",
        "product(v) + damping * v",
        "product(v)",
        "test_trpo.py::test_the_step_fills_the_quadratic_trust_region",
    ),
}


def broken(mutation: Mutation) -> str:
    """The script's text with the bug in it."""
    text = (ROOT / f"{mutation.script}.py").read_text()
    assert text.count(mutation.old) == 1, f"{mutation.script}.py has not once: {mutation.old}"
    return text.replace(mutation.old, mutation.new)


def run_tests(folder: str, tests: list[str]) -> tuple[int, list[str], str]:
    """Run tests of the copy in `folder`: pytest's exit code, what they raised, what it printed."""
    import pytest

    raised = []

    class Plugin:
        def pytest_exception_interact(self, call):
            raised.append(call.excinfo.typename)

    os.chdir(folder)
    output = io.StringIO()
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", folder]
    with contextlib.redirect_stdout(output):
        code = pytest.main([*options, *(f"tests/{test}" for test in tests)], plugins=[Plugin()])
    return int(code), raised, output.getvalue()


def table() -> str:
    """The list in docs/recipes.md."""
    rows = ["| bug | in | instead of | stands | the test that sees it |"]
    rows += ["|---|---|---|---|---|"]
    for name, (script, old, new, test) in MUTATIONS.items():
        file, function = test.split("[")[0].split("::")
        test = f"`{function}` in [{file}](../tests/{file})"
        rows += [f"| {name} | `{script}.py` | `{old}` | `{new}` | {test} |"]
    return "\n".join(rows)


if __name__ == "__main__":
    print(broken(MUTATIONS[sys.argv[1]]) if sys.argv[1:] else table(), end="")
