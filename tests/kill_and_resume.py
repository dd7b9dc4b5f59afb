"""Kill a run at random moments, resume it, and compare its files with an uninterrupted run's.

    python tests/kill_and_resume.py ppo_discrete --times 20

Each time a new run is killed with SIGKILL, which a program cannot handle, and finished by
`--resume`. Its metrics.csv and evaluation.csv must equal, byte for byte, the files of a run that
nothing interrupted. The test suite makes a few such runs, too (test_command_line.py).
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# 40 updates of 64 steps for each of eight seeds.
FLAGS = "--num-seeds 8 --num-envs 4 --num-steps 16 --hidden-sizes 8 --total-timesteps 2560".split()
ROWS = 8 * 40  # of metrics.csv
FILES = ["metrics.csv", "evaluation.csv"]


def command(script, *arguments, save_always=False):
    """The command that runs a copy of a script in the current folder. With `save_always` it writes
    a checkpoint after every update, instead of every half minute."""
    program = [f"{script}.py"]
    if save_always:
        program = ["-c", f"import {script}; {script}.SAVE_SECONDS = 0; {script}.main()"]
    return [sys.executable, *program, *map(str, arguments)]


def only_run(folder):
    """The folder of the only run that was started in `folder`."""
    (config,) = Path(folder).glob("runs/*/config.json")
    return config.parent


def count_rows(folder):
    """The rows in metrics.csv of the only run, or -1 while there is no such file."""
    for path in Path(folder).glob("runs/*/metrics.csv"):
        return max(0, path.read_bytes().count(b"\n") - 1)
    return -1


def wait_for_rows(folder, rows, process):
    """Wait until metrics.csv has this number of rows, or the process has ended."""
    while count_rows(folder) < rows and process.poll() is None:
        time.sleep(0.01)


def kill_and_resume(folder, script, environment, rows, delay, save_always=True):
    """Start a run, kill it `delay` seconds after it has written `rows` rows, and resume it. Returns
    the rows that existed when it was killed."""
    options = dict(cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    killed = command(script, *FLAGS, save_always=save_always)
    with subprocess.Popen(killed, stderr=subprocess.DEVNULL, **options) as process:
        wait_for_rows(folder, rows, process)
        time.sleep(delay)
        process.kill()
    rows = count_rows(folder)
    resumed = command(script, "--resume", only_run(folder).relative_to(folder))
    subprocess.run(resumed, check=True, capture_output=True, cwd=folder, env=environment)
    return rows


def read_files(folder):
    """The bytes of the files that are compared."""
    return [(only_run(folder) / name).read_bytes() for name in FILES]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("script", help="name of a script, without .py")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    flags = parser.parse_args()
    rng = random.Random(flags.seed)
    with tempfile.TemporaryDirectory() as root:
        shutil.copy(ROOT / f"{flags.script}.py", root)
        environment = {
            "JAX_COMPILATION_CACHE_DIR": f"{root}/cache",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            **os.environ,
        }

        def new_folder(name):
            folder = Path(root, name)
            folder.mkdir()
            shutil.copy(f"{root}/{flags.script}.py", folder)
            return folder

        folder = new_folder("uninterrupted")
        options = dict(check=True, cwd=folder, env=environment, capture_output=True)
        subprocess.run(command(flags.script, *FLAGS), **options)
        expected = read_files(folder)
        failures = 0
        for i in range(flags.times):
            rows, delay = rng.randint(0, ROWS), rng.uniform(0, 0.5)
            folder = new_folder(f"killed_{i}")
            rows = kill_and_resume(folder, flags.script, environment, rows, delay)
            same = read_files(folder) == expected
            failures += not same
            verdict = "the same files" if same else "DIFFERENT FILES"
            print(f"{i + 1:3d}: killed after {rows:3d} of {ROWS} rows, {verdict}", flush=True)
    sys.exit(f"{failures} of {flags.times} runs differ" if failures else 0)


if __name__ == "__main__":
    main()
