"""Runs of the scripts under random signals, damages and limits: nothing hangs, nothing is lost.

    python benchmarks/hostile.py --runs 300 --first 0

Each case draws from its own number what happens to a short run: `kill -9` or a signal at a random
moment, a full disk, closed streams, a reader that goes away, files of the run cut, changed,
renamed or removed, two processes at once, flags at random. Afterwards one of two things must hold:

- the command ended with 0, and metrics.csv and evaluation.csv are, byte for byte, those of a run
  that nothing disturbed;
- it ended with an exit code of the README, said why without a traceback, and, once what was damaged
  is put back, `--resume` leads to those bytes.

Two minutes are the limit of each command. Linux only; full disks need the right to mount.
"""

import argparse
import collections
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["ppo_discrete", "ppo_continuous", "ppo_penalty", "trpo"]
SMALL = ["--num-seeds", "2", "--num-envs", "4", "--num-steps", "16", "--hidden-sizes", "8"]
SMALL += ["--num-minibatches", "2", "--update-epochs", "2", "--total-timesteps", "30000"]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
CODES = {0, 1, 2} | {128 + number for number in SIGNALS} | {-number for number in SIGNALS}
FLAGS = ["--num-seeds", "--num-envs", "--num-steps", "--hidden-sizes", "--num-minibatches"]
FLAGS += [
    "--update-epochs",
    "--total-timesteps",
    "--learning-rate",
    "--gamma",
    "--seed",
    "--env-id",
]
VALUES = ["0", "-1", "1", "2", "3", "7", "1e39", "nan", "inf", "1e-30", "99999999999999", "x", ""]
VALUES += ["CartPole-v1", "Pendulum-v1", "cartpole", "nowhere:Maze", "os:Maze", "a/b", "2.5"]


class Case:
    """One folder with one script, and what is done to it."""

    def __init__(self, number: int, base: Path, environment: dict):
        self.random, self.environment = random.Random(number), environment
        self.script = self.random.choice(SCRIPTS)
        self.folder = base / f"case{number}"
        self.folder.mkdir()
        shutil.copy(ROOT / f"{self.script}.py", self.folder)
        self.reference = base / self.script
        self.said, self.codes = "", []

    def start(self, *arguments, shell='exec "$@"', often=False):
        """The command, as a process group; `often` writes a checkpoint after each segment."""
        script = self.folder / f"{self.script}.py"
        text = (ROOT / script.name).read_text()
        if often:
            text = text.replace("CHECKPOINT_SECONDS = 30", "CHECKPOINT_SECONDS = 0")
        script.write_text(text)
        command = ["bash", "-c", shell, "bash", sys.executable, script.name, *arguments]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def end(self, process) -> int:
        try:
            said, _ = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError("it hangs") from None
        self.said += said
        self.codes.append(process.returncode)
        assert "Traceback" not in said, "a traceback"
        return process.returncode

    def run_dir(self):
        found = list((self.folder / "runs").glob("*")) if (self.folder / "runs").exists() else []
        return found[0] if found else None

    def same(self) -> None:
        for name in ("metrics.csv", "evaluation.csv"):
            expected = (self.reference / name).read_bytes()
            assert (self.run_dir() / name).read_bytes() == expected, f"other bytes in {name}"

    def resume(self, **options) -> int:
        return self.end(self.start("--resume", str(self.run_dir()), **options))

    def must_resume(self) -> None:
        """To the right bytes, or from the beginning where the run had no directory yet."""
        if self.run_dir() and (self.run_dir() / "config.json").exists():
            assert self.resume() == 0, "it does not resume"
            self.same()

    # ---- what can happen ----

    def interrupt(self) -> None:
        """Signals at random moments, again and again, until a run gets to its end."""
        for _attempt in range(4):
            resumes = self.run_dir() and (self.run_dir() / "config.json").exists()
            arguments = ["--resume", str(self.run_dir())] if resumes else SMALL
            if not resumes:
                shutil.rmtree(self.folder / "runs", ignore_errors=True)
            process = self.start(*arguments, often=self.random.random() < 0.5)
            # Not at once: a signal in Python's own start gets Python's own traceback.
            moment = time.monotonic() + self.random.uniform(0.3, 8)
            rows = self.random.choice([None, 0, 5, 200, 600])
            while time.monotonic() < moment and process.poll() is None:
                time.sleep(0.005)
                with contextlib.suppress(OSError, AttributeError, TypeError):
                    if rows is not None and (self.run_dir() / "metrics.csv").stat().st_size > rows:
                        break
            number = self.random.choice([signal.SIGKILL, *SIGNALS])
            for _ in range(self.random.choice([1, 1, 2])):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                time.sleep(self.random.choice([0, 0.01, 0.5]))
            code = self.end(process)
            assert code in {*CODES, -signal.SIGKILL}, f"exit code {code}"
            if code == 0:
                break
        else:
            self.must_resume()
        if code == 0:
            self.same()

    def streams(self) -> None:
        """Terminals that close, break or are full; one of them with Ctrl-C for all."""
        shell = self.random.choice(
            [
                '"$@" | head -1',
                '"$@" 2>&1 | head -c 150',
                '"$@" >&-',
                '"$@" 2>&-',
                '"$@" >&- 2>&- <&-',
                '"$@" >/dev/full 2>&1',
                '"$@" 2>&1 | (sleep 3; exec <&-; sleep 8)',
            ]
        )
        process = self.start(*SMALL, shell=shell + "; exit ${PIPESTATUS[0]}")
        if interrupts := self.random.random() < 0.3:
            time.sleep(self.random.uniform(1, 8))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
        code = self.end(process)
        assert interrupts or code == 0, f"exit code {code}"
        if code == 0:
            self.same()
        self.must_resume()

    def disk(self) -> None:
        """A disk that is full after some kilobytes, and has room again later."""
        limit = self.random.choice([1, 3, 20, 60, 90, 110, 130, 160, 200, 260])
        (self.folder / "runs").mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={limit}k,nr_inodes=0", "tmpfs"]
        subprocess.run([*command, str(self.folder / "runs")], check=True)
        try:
            code = self.end(self.start(*SMALL, often=self.random.random() < 0.5))
            assert code in (0, 2), f"exit code {code}"
            assert code == 0 or "No space left" in self.said, "no reason"
            if code == 2 and self.run_dir() and (self.run_dir() / "config.json").exists():
                if (self.run_dir() / "config.json").stat().st_size:
                    code = self.resume()
                    assert code in (0, 2), f"exit code {code}"
            shutil.copytree(self.folder / "runs", self.folder / "kept")
        finally:
            subprocess.run(["umount", str(self.folder / "runs")], check=True)
        shutil.rmtree(self.folder / "runs")
        (self.folder / "kept").rename(self.folder / "runs")
        if self.run_dir() and (self.run_dir() / "config.json").stat().st_size:
            self.must_resume()

    def damage(self) -> None:
        """A file of a finished or half-finished run is cut, changed, renamed or removed."""
        half = self.random.random() < 0.5
        process = self.start(*SMALL, often=True)
        while half and process.poll() is None:
            time.sleep(0.02)
            checkpoints = self.run_dir() / "checkpoints" if self.run_dir() else None
            if checkpoints and any(x.name.isdecimal() for x in checkpoints.glob("*")):
                os.killpg(process.pid, self.random.choice(SIGNALS))
                break
        self.end(process)
        run_dir = self.run_dir()
        shutil.copytree(run_dir, self.folder / "good")
        for _ in range(self.random.choice([1, 1, 2, 4])):
            files = sorted(path for path in run_dir.rglob("*") if path.is_file())
            names = [run_dir / "metrics.csv", run_dir / "config.json"]
            path = self.random.choice([self.random.choice(files), *names])
            with contextlib.suppress(OSError):
                data = path.read_bytes()
                at = self.random.randrange(len(data) + 1)
                what = self.random.choice(["cut", "empty", "change", "insert", "remove", "rename"])
                if what == "cut":
                    path.write_bytes(data[:at])
                elif what == "empty":
                    path.write_bytes(b"")
                elif what == "change" and data:
                    path.write_bytes(data[: at - 1] + bytes([data[at - 1] ^ 5]) + data[at:])
                elif what == "insert":
                    path.write_bytes(data[:at] + b"1,2,nonsense\n" + data[at:])
                elif what == "remove":
                    path.unlink()
                else:
                    path.parent.rename(path.parent.with_name("other")) if path.parent not in (
                        run_dir,
                        run_dir / "checkpoints",
                    ) else path.rename(path.with_name("other"))
        code = self.resume()
        assert code in (0, 2), f"exit code {code}"
        if code == 0:
            self.same()
        shutil.rmtree(run_dir)
        (self.folder / "good").rename(run_dir)
        self.must_resume()

    def together(self) -> None:
        """Two processes at once, in one folder or at one run."""
        process = self.start(*SMALL)
        if self.random.random() < 0.3:
            other = self.start(*SMALL)
            assert self.end(process) == 0 and self.end(other) == 0, "not both"
            assert len(list((self.folder / "runs").glob("*"))) == 2, "not two runs"
            return self.same()
        while not self.run_dir() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(self.random.uniform(0, 1))
        code = self.resume()
        assert code in (0, 2), f"exit code {code}"
        assert code == 0 or "at work" in self.said or "configuration" in self.said, "no reason"
        assert self.end(process) == 0, "the first one ended"
        self.same()
        self.must_resume()

    def flags(self) -> None:
        """Nonsense on the command line: at most a sentence."""
        arguments = list(SMALL)
        for _ in range(self.random.choice([1, 1, 2, 3])):
            arguments += [self.random.choice(FLAGS), self.random.choice(VALUES)]
        if self.random.random() < 0.1:
            arguments += ["--resume", self.random.choice(["", "nowhere", "/", "/dev/null"])]
        code = self.end(self.start(*arguments))
        assert code in (0, 1, 2), f"exit code {code}"
        assert code != 2 or not self.run_dir(), "a run was left"
        # A tenth of what a user may type is right: those train to their end, or to a NaN.


HAPPENS = [Case.interrupt] * 4 + [Case.damage] * 3
HAPPENS += [Case.streams, Case.disk, Case.together, Case.flags, Case.flags]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    options = parser.parse_args()
    counts, failed = collections.Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(base / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        for script in SCRIPTS:  # what nothing disturbed
            (base / f"{script}_alone").mkdir()
            shutil.copy(ROOT / f"{script}.py", base / f"{script}_alone")
            command = [sys.executable, f"{script}.py", *SMALL]
            where = dict(cwd=base / f"{script}_alone", env=environment)
            subprocess.run(command, check=True, capture_output=True, **where)
            next((base / f"{script}_alone" / "runs").iterdir()).rename(base / script)
        for number in range(options.first, options.first + options.runs):
            case = Case(number, base, environment)
            what = case.random.choice(HAPPENS)
            start = time.monotonic()
            try:
                what(case)
                result = "well"
            except AssertionError as error:
                result = f"FAILED: {error}"
                failed.append(number)
            counts[what.__name__] += 1
            seconds = time.monotonic() - start
            print(f"{number} {case.script} {what.__name__} {case.codes} {seconds:.0f} s {result}")
            if result != "well":
                print("    " + case.said[-3000:].replace("\r", "\n").replace("\n", "\n    "))
            sys.stdout.flush()
            shutil.rmtree(case.folder, ignore_errors=True)
    print(dict(counts), f"{len(failed)} failed: {failed}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
