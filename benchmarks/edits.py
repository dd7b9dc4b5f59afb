"""Compare scripts with and without the patches of tests/edits, and write their table.

    python benchmarks/edits.py                    # train what has no current result
    python benchmarks/edits.py --only recurrent   # only experiments whose name contains this
    python benchmarks/edits.py --tables           # train nothing

Both run the same command. A result does not notice that the patch or the script has changed, only
that the configuration has: delete its file in benchmarks/results/edits to train it again. The
experiment on hopper needs Brax (benchmarks/requirements.txt).
"""

import argparse
import re

from common import RESULTS, ROOT, budget, markdown, publish, script_cell

POSITIONS = "tests.edits.positions_environment:CartPolePositions-test"
UNSCALED = "--no-normalize-reward --vf-coef"
EXPERIMENTS = [  # patch, environment, steps, seeds, flags
    ("shared_trunk", "CartPole-v1", 50_000, 10, ""),
    ("shared_trunk", "CartPole-v1", 50_000, 10, f"{UNSCALED} 0.5"),
    ("shared_trunk", "CartPole-v1", 50_000, 10, f"{UNSCALED} 0.005"),
    ("shared_trunk", "CartPole-v1", 50_000, 10, f"{UNSCALED} 0.0001"),
    ("squashed_gaussian", "Pendulum-v1", 100_000, 10, ""),
    ("squashed_gaussian", "benchmarks.environments:hopper-brax", 1_000_000, 5, "--initial-std 1"),
    ("recurrent", POSITIONS, 500_000, 6, ""),
    ("cnn", "Breakout-MinAtar", 2_000_000, 6, ""),
]


def cell_of(experiment, edited):
    """The cell of the script as it is, or of the edited one."""
    edit, env_id, steps, num_seeds, flags = experiment
    patch = (ROOT / "tests" / "edits" / f"{edit}.patch").read_text()
    (script,) = re.findall(r"^--- a/(.*)\.py$", patch, re.MULTILINE)
    words = [edit, env_id.rpartition(":")[2], flags, "edited" if edited else "plain"]
    name = re.sub(r"[^-.\w]+", "_", "__".join(filter(None, words)))
    path, changes = RESULTS / "edits" / f"{name}.csv", {"flags": flags}
    changes["patches"] = [edit] if edited else []
    return script_cell(path, script, env_id, steps, range(num_seeds), **changes)


def table():
    rows = []
    for experiment in EXPERIMENTS:
        edit, env_id, steps, _, flags = experiment
        texts = [cell_of(experiment, edited).text(1) for edited in (False, True)]
        flags = f"`{flags}`" if flags else ""
        rows.append([f"`{edit}`", env_id.rpartition(":")[2], budget(steps), flags, *texts])
    return markdown(["edit", "environment", "steps", "flags", "as it is", "edited"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="train only cells whose name contains this")
    parser.add_argument("--tables", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    for experiment in EXPERIMENTS if not arguments.tables else []:
        for edited in (False, True):
            cell = cell_of(experiment, edited)
            if arguments.only in cell.path.stem:
                cell.complete()
    publish("edits", table())


if __name__ == "__main__":
    main()
