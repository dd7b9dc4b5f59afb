"""One-line bugs, and for each of them a test that detects it: exercises for docs/recipes.md.

    python tests/break_it.py                           # print the list for docs/recipes.md
    python tests/break_it.py no-minimum > broken.py    # write a script with this bug

`test_break_it.py` puts each bug into a copy of the scripts and checks that its test fails.
"""

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutation(NamedTuple):
    """A bug: `old`, which occurs once in the script, is replaced by `new`."""

    script: str
    old: str
    new: str
    test: str  # the test that fails


GAE_EXAMPLE = "test_mathematics.py::test_gae_on_a_worked_example"
RATIO_ONE = "test_training.py::test_the_first_minibatch_has_ratio_one_and_later_ones_have_not"
ARGUMENTS = "test_update.py::test_the_arguments_of_gae"

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
        "+ config.ent_coef * entropy",
        "- config.ent_coef * entropy",
        "test_training.py::test_the_entropy_bonus_keeps_the_policy_random[ppo_discrete]",
    ),
    "imprecise-kl": Mutation(
        "ppo_discrete",
        "jnp.expm1(log_ratio) - log_ratio",
        "ratio - 1.0 - log_ratio",
        "test_update.py::test_the_metrics_of_given_ratios[ppo_discrete]",
    ),
    "stopped-for-one-minibatch": Mutation(
        "ppo_discrete",
        'stopped |= metrics["approx_kl"] > config.target_kl',
        'stopped = metrics["approx_kl"] > config.target_kl',
        "test_update.py::test_the_metrics_of_given_ratios[ppo_discrete]",
    ),
    "momentum-moves-on": Mutation(
        "ppo_discrete",
        'updates["actor"] = unless_stopped(updates["actor"])',
        "pass",
        "test_update.py::test_the_actor_stops_for_the_rest_of_an_update[ppo_discrete]",
    ),
    "limit-terminates": Mutation(
        "ppo_discrete",
        "jnp.where(terminated, 0.0, next_value)",
        "jnp.where(done, 0.0, next_value)",
        GAE_EXAMPLE,
    ),
    "no-end": Mutation(
        "ppo_discrete", "jnp.where(terminated, 0.0, next_value)", "next_value", GAE_EXAMPLE
    ),
    "sum-across-episodes": Mutation(
        "ppo_discrete", "jnp.where(done, 0.0, advantage)", "advantage", GAE_EXAMPLE
    ),
    "value-of-the-reset": Mutation(
        "ppo_discrete", "next_obs=next_obs,", "next_obs=obs,", f"{ARGUMENTS}[Cut-test]"
    ),
    "statistics-too-early": Mutation(
        "ppo_discrete",
        "obs = normalize(rollout.obs, state.obs_stats)",
        "obs = normalize(rollout.obs, update_stats(state.obs_stats, rollout.obs))",
        RATIO_ONE,
    ),
    "reward-centred": Mutation(
        "ppo_discrete",
        "normalize(rollout.reward, reward_stats, center=False)",
        "normalize(rollout.reward, reward_stats)",
        f"{ARGUMENTS}[EndAndCut-test]",
    ),
    "one-shuffle": Mutation(
        "ppo_discrete",
        "jax.random.bits(key, (number, size), jnp.uint32)",
        "jnp.tile(jax.random.bits(key, (1, size), jnp.uint32), (number, 1))",
        "test_mathematics.py::test_random_orders_are_permutations[1000]",
    ),
    "same-noise": Mutation(
        "ppo_discrete",
        "state = state._replace(key=key)",
        "pass",
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
        "action=action,",
        "action=jnp.clip(action, -1, 1),",
        "test_continuous.py::test_the_rollout_stores_raw_actions_and_their_density",
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
        "test_penalty.py::test_the_optimum_of_the_objective",
    ),
    "no-kl-test": Mutation(
        "trpo",
        "moved & (improvement > 0) & (kl <= max_kl) & finite",
        "moved & (improvement > 0) & finite",
        "test_trpo.py::test_the_first_acceptable_step_is_taken",
    ),
    "rejected-step-kept": Mutation(
        "trpo",
        "return jax.tree.map(choose, success, failure)",
        "return success",
        "test_trpo.py::test_a_rejected_step_leaves_the_bits",
    ),
    "no-damping": Mutation(
        "trpo",
        "product(v) + damping * v",
        "product(v)",
        "test_trpo.py::test_the_step_fills_the_quadratic_trust_region[3-Categorical]",
    ),
}


def broken(mutation: Mutation) -> str:
    """The text of the script with the bug."""
    text = (ROOT / f"{mutation.script}.py").read_text()
    assert text.count(mutation.old) == 1, f"not once in {mutation.script}.py: {mutation.old}"
    return text.replace(mutation.old, mutation.new)


def run_tests(folder: str, tests: list[str]) -> tuple[int, list[str], str]:
    """Run tests in `folder`; returns pytest's exit code, the names of exceptions, the output."""
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
    rows = ["| name | script | correct code | code with the bug | test that detects it |"]
    rows += ["|---|---|---|---|---|"]
    for name, (script, old, new, test) in MUTATIONS.items():
        file, function = test.split("[")[0].split("::")
        test = f"`{function}` in [{file}](../tests/{file})"
        rows += [f"| {name} | `{script}.py` | `{old}` | `{new}` | {test} |"]
    return "\n".join(rows)


if __name__ == "__main__":
    print(broken(MUTATIONS[sys.argv[1]]) if sys.argv[1:] else table(), end="")
