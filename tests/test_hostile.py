"""Nothing hangs, nothing is lost, and a user's mistake gets a sentence instead of a traceback."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from conftest import ROOT

import ppo_discrete

SMALL = ["--num-seeds", "2", "--num-envs", "4", "--num-steps", "16", "--hidden-sizes", "8"]
SMALL += ["--num-minibatches", "2", "--update-epochs", "2", "--total-timesteps"]
UPDATES = 320
STEPS = str(64 * UPDATES)


@pytest.fixture
def folder(tmp_path):
    shutil.copy(ROOT / "ppo_discrete.py", tmp_path)
    return tmp_path


@pytest.fixture
def launch(folder, environment):
    """Start the script in a folder of its own; nothing outlives the test."""
    started = []

    def launch(*arguments, shell=None, cwd=folder, **variables):
        command = [sys.executable, "ppo_discrete.py", *map(str, arguments)]
        if shell:  # a line of bash in which "$@" is the command
            command = ["bash", "-c", shell, "bash", *command]
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**environment, **variables},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield launch
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def run(launch):
    """To its end: exit code and everything that it said, in which there is never a traceback."""

    def run(*arguments, traceback=False, **options):
        process = launch(*arguments, **options)
        said = "".join(process.communicate(timeout=120))
        assert traceback or "Traceback" not in said, said
        return process.returncode, said

    return run


@pytest.fixture
def main(folder, monkeypatch, capsys):
    """Call `main` in this process, which costs less: exit code and what it said."""

    def main(*arguments):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["ppo_discrete.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            ppo_discrete.main()
        return end.value.code, "".join(capsys.readouterr())

    return main


@pytest.fixture(scope="module")
def finished(tmp_path_factory, environment):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(ROOT / "ppo_discrete.py", folder)
    command = [sys.executable, "ppo_discrete.py", *SMALL, STEPS]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return next((folder / "runs").iterdir())


@pytest.fixture
def copy(finished, folder):
    """A copy of it, to be damaged."""
    return shutil.copytree(finished, folder / "copy")


def only_run(folder):
    (run_dir,) = (folder / "runs").iterdir()
    return run_dir


def wait_for(found, process):
    deadline = time.monotonic() + 100
    while not found():
        assert process.poll() is None, "it has ended: " + "".join(process.communicate())
        assert time.monotonic() < deadline
        time.sleep(0.02)


def trained(folder, rows):
    """Whether metrics.csv of the only run has so many rows."""
    files = list((folder / "runs").glob("*/metrics.csv")) if (folder / "runs").exists() else []
    return bool(files) and files[0].read_bytes().count(b"\n") > rows


def assert_same_files(run_dir, expected):
    for name in ("metrics.csv", "evaluation.csv"):
        assert (run_dir / name).read_bytes() == (expected / name).read_bytes(), name


# ---- Hangs, and data lost or mixed ----


def test_runs_is_a_link_to_nowhere(run, folder):
    (folder / "runs").symlink_to("/nowhere/scratch")
    code, said = run(*SMALL, STEPS)
    assert code == 2 and "cannot write" in said and "runs" in said


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 59.9)
    for second in ("000059", "000100"):
        run_dir = ppo_discrete.create_run(ppo_discrete.Config(env_id="own module:Maze-v1"))
        assert run_dir == f"runs/own_module_Maze-v1__ppo_discrete__0__19700101-{second}"
        assert json.loads((tmp_path / run_dir / "config.json").read_text())["format"] == 2


@pytest.mark.parametrize("cut", [8, 60])
def test_metrics_that_were_cut_are_noticed_before_training(cut, copy, main):
    with (copy / "metrics.csv").open("r+b") as file:
        file.truncate(file.seek(0, 2) - cut)
    code, said = main("--resume", copy)
    assert code == 2 and "metrics.csv was cut or changed" in said and "checkpoints" in said


def test_rows_that_no_checkpoint_knows_are_made_again(copy, run, finished):
    with (copy / "metrics.csv").open("a") as file:
        file.write("1,321,20544,0.1\n0,3")
    assert run("--resume", copy)[0] == 0
    assert_same_files(copy, finished)


def test_a_run_without_checkpoints_begins_anew(copy, run, finished):
    shutil.rmtree(copy / "checkpoints")
    (copy / "metrics.csv").write_text("anything")
    assert run("--resume", copy)[0] == 0
    assert_same_files(copy, finished)


def test_two_processes_cannot_resume_one_run(launch, run, folder):
    process = launch(*SMALL, 64 * 100_000)
    wait_for(lambda: trained(folder, 0), process)
    code, said = run("--resume", only_run(folder))
    assert code == 2 and "another process is at work" in said
    process.kill()  # which gives the lock back
    process.wait()
    process = launch("--resume", only_run(folder))
    before = (only_run(folder) / "metrics.csv").stat().st_size
    wait_for(lambda: (only_run(folder) / "metrics.csv").stat().st_size != before, process)


@pytest.mark.parametrize(
    "shell", ['"$@" 2>&1 | head -1', '"$@" >&- 2>&-', '"$@" 2>&1 | tee log >/dev/full']
)
def test_a_terminal_that_fails_does_not_stop_a_run(shell, run, folder, finished):
    run(*SMALL, STEPS, shell=shell)
    assert_same_files(only_run(folder), finished)
    assert [path.name for path in (only_run(folder) / "checkpoints").iterdir()] == [str(UPDATES)]


def test_ctrl_c_of_a_pipeline_saves(launch, folder, finished, run):
    # The reader of the pipe gets the signal, too, and dies of it.
    process = launch(*SMALL, STEPS, shell='"$@" 2>&1 | cat; echo code ${PIPESTATUS[0]} > code')
    wait_for(lambda: trained(folder, 20), process)
    pids = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True).stdout
    for pid in map(int, pids.split()):
        if pid != process.pid:  # bash has to live on, to report
            os.kill(pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert (folder / "code").read_text() == "code 130\n"
    rows = (only_run(folder) / "metrics.csv").read_bytes().count(b"\n") - 1
    (checkpoint,) = (only_run(folder) / "checkpoints").iterdir()
    assert int(checkpoint.name) == rows / 2
    assert run("--resume", only_run(folder))[0] == 0
    assert_same_files(only_run(folder), finished)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('"learning_rate": 0.003', '"learning_rate": 3.0', "another learning_rate"),
        ('"tanh"', '"relu"', "another activation"),
        ('"gamma": 0.99,', "", "lacks gamma"),
        ('"num_envs": 4', '"num_envs": 16.5', "num_envs must be of type int"),
        ('"hidden_sizes": [', '"hidden_sizes": ["a", ', "hidden_sizes must be of type int"),
        ('"CartPole-v1"', "5", "env_id must be of type str"),
        ('"format": 2,', "", "in format 1"),
        ('"ppo_discrete"', '"trpo"', "a run of trpo.py"),
        ('"vf_coef"', '"max_kl"', "lacks vf_coef, has an unknown max_kl"),
        ("{", "", "no configuration of a run"),
    ],
)
def test_an_edited_configuration_is_refused(old, new, message, copy, main):
    before = (copy / "evaluation.csv").read_bytes()
    text = (copy / "config.json").read_text()
    assert old in text
    (copy / "config.json").write_text(text.replace(old, new, 1))
    code, said = main("--resume", copy)
    assert code == 2 and message in said and "Traceback" not in said
    assert (copy / "evaluation.csv").read_bytes() == before


def test_a_renamed_checkpoint_is_refused(copy, main):
    (copy / "checkpoints" / str(UPDATES)).rename(copy / "checkpoints" / "100")
    code, said = main("--resume", copy)
    assert code == 2 and "checkpoint 100" in said and "renamed" in said


def test_other_circumstances_are_reported(copy, run, finished):
    code, said = run("--resume", copy, JAX_NUM_CPU_DEVICES="1", JAX_ENABLE_X64="0")
    assert code == 0 and "'devices': 2" in said and "'devices': 1" in said
    assert_same_files(copy, finished)  # all is trained, and a greedy CartPole is the same on each


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_saves_first(number, launch, run, folder, finished):
    before = signal.signal(number, signal.SIG_DFL)  # under `nohup` it is ignored, and inherited
    process = launch(*SMALL, STEPS)
    signal.signal(number, before)
    wait_for(lambda: trained(folder, 20), process)
    process.send_signal(number)
    said = "".join(process.communicate(timeout=60))
    assert process.returncode == 128 + number, said
    assert "stopping after this segment" in said and f"--resume {only_run(folder)}" not in said
    assert f"--resume runs/{only_run(folder).name}" in said
    assert run("--resume", f"runs/{only_run(folder).name}")[0] == 0
    assert_same_files(only_run(folder), finished)


def test_a_signal_that_is_ignored_stays_ignored(launch, folder):
    process = launch(*SMALL, STEPS, shell='trap "" HUP; exec "$@"')  # as `nohup` does
    wait_for(lambda: trained(folder, 20), process)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize("seconds", [0.3, 1.0, 1.8])
def test_ctrl_c_while_importing(seconds, launch):
    process = launch(*SMALL, STEPS)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    said = "".join(process.communicate(timeout=60))
    assert process.returncode in (-signal.SIGINT, 130) and "Traceback" not in said, said


def test_main_leaves_the_signal_handlers_as_they_were(main):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    streams = sys.stdout, sys.stderr
    assert main(*SMALL, 640)[0] == 0
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert streams == (sys.stdout, sys.stderr)


def test_main_in_a_thread(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["ppo_discrete.py", *SMALL, "640"])
    codes = []

    def call():
        try:
            ppo_discrete.main()
        except SystemExit as end:
            codes.append(end.code)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(100)
    assert codes == [0]


# ---- Sentences instead of tracebacks ----

TOO_MUCH = {
    "--total-timesteps 7000000000000": "total_timesteps must be",
    "--update-epochs 1000000000": "gradient steps 1952000000000",
    "--num-steps 10000000000": "num_steps must be",
    "--learning-rate 1e39": "learning_rate must be",
    "--seed 2147483647": "seed + num_seeds 2147483655 have to be below 2^31",
    "--hidden-sizes 10000000000 64": "hidden_sizes must be",
    "--hidden-sizes 2000000 2000000": "GiB per device",
    "--num-envs 2000000 --total-timesteps 2000000000": "GiB per device",
    "--num-seeds 1000000000": "GiB per device",
}


@pytest.mark.parametrize("flags", TOO_MUCH)
def test_too_much_is_refused_before_any_memory_is_taken(flags, main, folder):
    code, said = main(*flags.split())
    assert code == 2 and TOO_MUCH[flags] in said and "Traceback" not in said, said
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    "error, message",
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore"),
            "not enough memory",
        ),
        (MemoryError("no more"), "not enough memory"),
        (OSError(5, "Input/output error"), "cannot write"),
    ],
)
def test_what_the_system_refuses(error, message, main, monkeypatch):
    def refuse(_):
        raise error

    monkeypatch.setattr(ppo_discrete, "run_command", refuse)
    code, said = main(*SMALL, STEPS)
    assert code == 2 and f"error: {message}: " in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("damage", ["text", "header"])
def test_metrics_that_cannot_be_read_are_said_before_training(damage, copy, main):
    lines = (copy / "metrics.csv").read_text().splitlines(keepends=True)
    if damage == "text":
        lines[7] = "not a row\n"
    (copy / "metrics.csv").write_text("".join(lines[damage == "header" :]))
    code, said = main("--resume", copy)
    assert code == 2 and "metrics.csv was cut or changed" in said


@pytest.mark.parametrize("address", ["localhost", "localhost:abc", "", ":1", "localhost:1 "])
def test_a_wrong_address(address, run):
    variables = dict(JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="0", JAX_COORDINATOR_ADDRESS=address)
    code, said = run(*SMALL, STEPS, "--distributed", **variables)
    assert code == 2 and "host:port" in said


@pytest.mark.parametrize("platform", ["cuda", "foo"])
def test_a_platform_that_is_not_there(platform, run):
    code, said = run(*SMALL, STEPS, JAX_PLATFORMS=platform)
    assert code == 2 and f"JAX_PLATFORMS={platform}" in said and len(said.splitlines()) <= 3


def test_a_terminal_without_greek(run):
    code, said = run(*SMALL, "640", PYTHONIOENCODING="ascii")
    assert code == 0 and re.search(r"\d\.\d\d \? \d+\.\d\d", said)
    code, said = run("--help", PYTHONIOENCODING="ascii")
    assert code == 0 and "discount ?" in said


def tiny_disk(folder, kilobytes):
    """A file system of its own, where the system lets us have one."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting takes root")


@pytest.mark.parametrize("kilobytes", [120, 260])
def test_a_full_disk(kilobytes, tmp_path, launch, environment):
    disk = tmp_path / "disk"
    disk.mkdir()
    tiny_disk(disk, kilobytes)
    try:
        shutil.copy(ROOT / "ppo_discrete.py", disk)
        for arguments in ([*SMALL, 64 * 10_000], ["--resume", "run"]):
            if "--resume" in arguments:
                (disk / "run").symlink_to(only_run(disk))
            process = launch(*arguments, cwd=disk)
            said = "".join(process.communicate(timeout=100))
            assert process.returncode == 2 and "Traceback" not in said, said
            assert "No space left on device" in said and len(re.split("[\r\n]+", said)) < 200
    finally:
        subprocess.run(["umount", str(disk)])


@pytest.mark.parametrize("seed", range(3))
def test_damaged_checkpoint_files(seed, copy, run, finished):
    files = sorted(path for path in (copy / "checkpoints").rglob("*") if path.is_file())
    rng = np.random.default_rng(seed)
    for i in rng.choice(len(files), 3, replace=False) if seed else range(len(files)):
        files[i].write_bytes(files[i].read_bytes()[: files[i].stat().st_size // 2])
    code, said = run("--resume", copy)
    if code == 0:  # nothing that is needed was hit
        assert_same_files(copy, finished)
    else:
        assert code == 2 and "damaged" in said and len(said.splitlines()) <= 6, said


# ---- Environments ----

OWN = """
from typing import NamedTuple
import jax, jax.numpy as jnp
from gymnax.environments import spaces
import ppo_discrete

def make(name):
    def reset(keys):
        if name == "Raises":
            raise KeyError("my own mistake")
        return jnp.zeros((len(keys), 3)), jnp.zeros(len(keys), int)
    def step(keys, time, action):
        time, n = time + 1, len(keys)
        obs = jnp.zeros((n, 4 if name == "Shape" else 3))
        reward = jnp.where(time > 40, jnp.nan, 1.0) if name == "Reward" else jnp.ones(n)
        obs = jnp.where(time[:, None] > 40, jnp.nan, obs) if name == "Observation" else obs
        never = jnp.zeros(n, bool)
        return time, obs, obs, reward, never, never
    return ppo_discrete.Environment(reset, step, spaces.Discrete(2))
"""


@pytest.mark.parametrize(
    "name, code, message",
    [
        ("Raises", 1, "the program, or the environment, failed"),
        ("Shape", 2, "step of own:Shape should return env_state, next_obs [N, D], reset_obs"),
        ("Reward", 1, "a reward of seed 0 in update 3 is not finite"),
        ("Observation", 1, "an observation of seed 0 in update 3 is not finite"),
    ],
)
def test_a_broken_environment(name, code, message, run, folder):
    (folder / "own.py").write_text(OWN)
    found, said = run("--env-id", f"own:{name}", *SMALL, STEPS, traceback=True)
    assert found == code and message in said, said
    assert ("my own mistake" in said and "own.py" in said) == (name == "Raises")
    assert ("Traceback" in said) == (name == "Raises")
    assert (folder / "runs").exists() == (name in ("Reward", "Observation"))


def test_an_endless_environment_is_cut_in_the_evaluation(run, folder):
    (folder / "own.py").write_text(OWN)
    code, said = run("--env-id", "own:Endless", *SMALL, "640")
    assert code == 0 and "200 episodes had no end after 10000 steps" in said, said


def test_a_loss_that_is_not_finite(run, folder):
    flags = ["--learning-rate", 1e38, "--max-grad-norm", 1e38]
    code, said = run(*SMALL, STEPS, *flags)
    assert code == 1 and re.search(r"a (loss|weight) of seed \d in update \d+ is not finite", said)
    assert "--learning-rate" in said and (only_run(folder) / "metrics.csv").exists()
