"""Where the time goes between Enter and the evaluation table, and what costs most at import.

    python benchmarks/first_run.py                         # ppo_discrete.py with its defaults
    python benchmarks/first_run.py --script trpo --rounds 5 -- --num-seeds 2
    python benchmarks/first_run.py --imports               # python -X importtime, by package

Flags after `--` are the script's. Each round is a process of its own, in an empty folder, with the
packages installed and read once before. Shown are the medians of elapsed and of processor time. The
phases are told apart by the script's functions, each of which notes when it begins and ends.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent

# What runs in the process that is timed: the script's command line, with notes. [name, elapsed
# since the parent started the process, processor time of it] in the order in which things ended.
CHILD = """
import importlib, json, os, sys, time
began, script, notes = float(sys.argv[1]), sys.argv[2], []
note = lambda name: notes.append([name, time.time() - began, time.process_time()])
note("Python starts")
sys.path.insert(0, {root!r})
module = importlib.import_module(script)
note("import")

def noting(name, before, owner=module):
    function = getattr(owner, name)
    def noted(*arguments, **options):
        if before:
            note(before)
        result = function(*arguments, **options)
        note(name)
        return result
    setattr(owner, name, noted)

noting("parse_flags", "streams")
noting("compile_segment", "start JAX, trace the initial state")
noting("train_in_segments", "open the run, compile and make the initial state")
noting("plot_learning_curve", "")
noting("report_evaluation", "compile and play the evaluation")
sys.argv = [script + ".py", *sys.argv[3:]]
try:
    module.main()
finally:
    note("end")
    print("NOTES", json.dumps(notes), file=sys.__stdout__, flush=True)
    os._exit(0)
"""
NAMES = {
    "parse_flags": "parse the flags",
    "compile_segment": "compile the training",
    "train_in_segments": "train",
    "plot_learning_curve": "plot",
    "report_evaluation": "report",
}


def phases(notes):
    """[(name, elapsed, processor)] of each phase, from the notes at their ends."""
    result, before = [], (0.0, 0.0)
    for name, elapsed, processor in notes:
        result.append((NAMES.get(name, name), elapsed - before[0], processor - before[1]))
        before = elapsed, processor
    return result


def one_run(script, flags):
    with tempfile.TemporaryDirectory() as folder:
        code = CHILD.format(root=str(ROOT))
        command = [sys.executable, "-c", code, str(time.time()), script, *flags]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return phases(json.loads(re.findall("^NOTES (.*)$", done.stdout, re.MULTILINE)[0]))


def imports(script):
    """{top-level package: (seconds of its own modules, seconds with all that it imports first)}."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {script}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    own, whole = {}, {}
    for line in done.stderr.splitlines():
        match = re.fullmatch(r"import time:\s*(\d+) \|\s*(\d+) \| (\s*)(\S+)", line)
        if match:
            package = match[4].partition(".")[0]
            own[package] = own.get(package, 0.0) + int(match[1]) / 1e6
            whole[package] = max(whole.get(package, 0.0), int(match[2]) / 1e6)
    return {package: (own[package], whole[package]) for package in own}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", default="ppo_discrete")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--imports", action="store_true")
    parser.add_argument("flags", nargs="*", help="of the script, after --")
    arguments = parser.parse_args()
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {platform.machine()}, ", end="")
    print(f"Python {platform.python_version()}, jax {version('jax')}\n")
    if arguments.imports:
        runs = [imports(arguments.script) for _ in range(arguments.rounds + 1)][1:]
        print("| package | its own modules | with what it imports first |\n|---|---|---|")
        medians = {p: np.median([run[p] for run in runs if p in run], axis=0) for p in runs[0]}
        for package, (own, whole) in sorted(medians.items(), key=lambda item: -item[1][0])[:20]:
            print(f"| {package} | {own:.3f} s | {whole:.3f} s |")
        total = np.median([sum(own for own, _ in run.values()) for run in runs])
        print(f"| all | {total:.2f} s | |")
        return
    runs = [one_run(arguments.script, arguments.flags) for _ in range(arguments.rounds)]
    print("| phase | elapsed | processor |\n|---|---|---|")
    times = np.median([[phase[1:] for phase in run] for run in runs], axis=0)
    for (name, *_), (elapsed, processor) in zip(runs[0], times, strict=True):
        print(f"| {name} | {elapsed:.2f} s | {processor:.2f} s |")
    totals = np.sum([[phase[1:] for phase in run] for run in runs], axis=1)
    print(f"| in all | {np.median(totals[:, 0]):.2f} s | {np.median(totals[:, 1]):.2f} s |")


if __name__ == "__main__":
    main()
