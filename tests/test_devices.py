"""Several devices, and several processes: on the CPU, over loopback."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from conftest import ROOT
from test_command_line import (
    QUICK,
    end,
    every_time,
    only_run,
    rows_of,
    wait_for_run,
    wait_for_update,
)

import ppo_discrete

SEEDS = ["--num-seeds", "4", *QUICK[2:]]


def devices(number):
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={number}"}


TRAIN = """
import importlib, re, sys
from dataclasses import replace
import chex, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
script = importlib.import_module(sys.argv[1])
script.straight_threefry()  # as the command line does; it compiles in half the time
config = script.default_config(sys.argv[2])
config = replace(config, num_seeds=8, total_timesteps=4 * config.batch_size, normalize_obs=True)
seeds = np.arange(8)

def train():
    run = script.over_seeds(lambda seed: script.train(config, jax.random.key(seed)))
    compiled = run.lower(seeds).compile()
    exchanges = r"all-reduce|all-gather|all-to-all|collective|reduce-scatter|send|recv"
    assert not re.findall(exchanges, compiled.as_text())
    state, metrics = run(seeds)
    state = state._replace(key=jax.random.key_data(state.key))
    return len(state.obs.sharding.device_set), jax.device_get((state, metrics))

number, four = train()
assert number == jax.device_count() == 4
first = jax.make_mesh((1,), ("seed",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
script.seed_axis = lambda: NamedSharding(first, PartitionSpec("seed"))
number, one = train()
assert number == 1
chex.assert_trees_all_equal(four, one)
"""


@pytest.mark.parametrize(
    ("script", "env_id"),
    [
        ("ppo_discrete", "CartPole-v1"),
        ("ppo_continuous", "Pendulum-v1"),
        ("ppo_penalty", "Pendulum-v1"),
        ("trpo", "CartPole-v1"),  # has a loop whose length differs between seeds
    ],
)
def test_four_devices_compute_the_bits_of_one_without_talking(script, env_id, environment):
    # Eight seeds on one device, two on each of four. Without the flag XLA takes other loops for the
    # sums of two seeds than for those of eight. (`normalize_obs` covers the statistics, too.)
    flags = f"{devices(4)['XLA_FLAGS']} --xla_cpu_experimental_ynn_fusion_type=-reduce"
    subprocess.run(
        [sys.executable, "-c", TRAIN, script, env_id],
        cwd=ROOT,
        env={**environment, "XLA_FLAGS": flags},
        check=True,
        timeout=300,
    )


def test_seeds_must_divide_over_the_devices(environment, tmp_path):
    result = subprocess.run(
        [sys.executable, str(ROOT / "ppo_discrete.py"), "--num-seeds", "6"],
        cwd=tmp_path,
        env={**environment, **devices(4)},
        text=True,
        capture_output=True,
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "num_seeds = 6 does not divide over 4 devices" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_distributed_without_an_address_is_explained(environment, tmp_path):
    result = subprocess.run(
        [sys.executable, str(ROOT / "ppo_discrete.py"), "--distributed"],
        cwd=tmp_path,
        env=environment,
        text=True,
        capture_output=True,
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "JAX_COORDINATOR_ADDRESS" in result.stderr


@pytest.mark.parametrize(
    "settings, arguments, expected",
    [
        ({"XLA_FLAGS": devices(3)["XLA_FLAGS"]}, ["--num-seeds", "3"], 3),
        ({"JAX_NUM_CPU_DEVICES": "3"}, ["--num-seeds", "3"], 3),
        ({"JAX_NUM_CPU_DEVICES": "1"}, ["--num-seeds", "4"], 1),
        ({}, ["--num-seeds", "1"], 1),
        ({}, ["--num-seeds", "64"], None),  # one per core
    ],
)
def test_there_is_a_device_per_core_or_as_many_as_were_asked_for(
    settings, arguments, expected, environment, tmp_path
):
    arguments = [*arguments, *QUICK[2:], "--total-timesteps", "64"]
    result = subprocess.run(
        [sys.executable, str(ROOT / "ppo_discrete.py"), *arguments],
        cwd=tmp_path,
        env={**environment, **settings},
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr
    number = int(re.search(r"64 steps, on (\d+) x cpu", result.stdout)[1])
    if expected is None:
        assert number == max(n for n in (1, 2, 4, 8, 16, 32, 64) if n <= cores_of_this_process())
    else:
        assert number == expected


def cores_of_this_process():
    """The cores that this process may use."""
    cores = len(os.sched_getaffinity(0))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists() and quota.read_text().split()[0] != "max":
        share, period = map(int, quota.read_text().split())
        cores = max(1, min(cores, share // period))
    return cores


@pytest.mark.parametrize("text", ["it is gone\nsee above", ""])
def test_a_lost_process_ends_this_one_with_a_reason(text, monkeypatch, capsys):
    # Some of JAX's errors have no text.
    def run_command(flags):
        raise jax.errors.JaxRuntimeError(text)

    flags = ppo_discrete.Flags(ppo_discrete.Config(), distributed=True)
    monkeypatch.setattr(ppo_discrete, "parse_flags", lambda: flags)
    for name in ("straight_threefry", "join_processes"):
        monkeypatch.setattr(ppo_discrete, name, lambda: None)
    monkeypatch.setattr(ppo_discrete, "run_command", run_command)

    def said(processes):
        monkeypatch.setattr(jax, "process_count", lambda: processes)
        with pytest.raises(SystemExit) as end:
            ppo_discrete.main()
        assert end.value.code == 1
        return capsys.readouterr().err

    together = said(2)
    assert "the processes cannot go on together: " in together and "--resume" in together
    assert ("it is gone" if text else "JaxRuntimeError") in together
    assert "Traceback" not in together
    # Alone there is nobody to lose: this is a fault, and shows where it is.
    assert "together" not in said(1) and "Traceback" in said(1)


def test_two_processes_do_what_one_does_and_survive_a_death(environment, tmp_path, request):
    script = tmp_path / "ppo_discrete.py"
    shutil.copy(ROOT / "ppo_discrete.py", script)
    every_time(script, 1)
    long = [*SEEDS, "--total-timesteps", str(64 * 1000)]

    def start(*arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        address = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
        # What they say goes to files: a pipe that nobody empties in time would stop them.
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), "--distributed", *arguments],
                cwd=tmp_path,
                env={**environment, **devices(2), **address, "JAX_PROCESS_ID": str(index)},
                stdout=(tmp_path / f"said_{index}").open("w"),
                stderr=subprocess.STDOUT,
            )
            for index in range(2)
        ]
        request.addfinalizer(lambda: end(processes))
        return processes

    def ends(processes):
        codes = [process.wait(timeout=300) for process in processes]
        said = [(tmp_path / f"said_{index}").read_text() for index in range(2)]
        print(*said, sep="\n----\n")  # pytest shows it if the test fails
        return codes, *said

    # One of them is killed: the other says so and ends.
    processes = start(*long)
    run_dir = wait_for_run(tmp_path, *processes)
    wait_for_update(run_dir, 200, *processes)
    processes[1].kill()
    killed = time.monotonic()
    codes, said, _ = ends(processes)
    assert codes[1] == -signal.SIGKILL and time.monotonic() - killed < 150
    resume = str(run_dir.relative_to(tmp_path))
    if codes[0] == 1:
        assert "the processes cannot go on together" in said
        assert f"writing {resume}" in said and "Traceback" not in said
    else:  # JAX's own thread was the first to notice, and ended it
        assert codes[0] == -signal.SIGABRT and "another task died" in said

    # Both go on from the checkpoint, until one of them is asked to stop: then both do.
    before = len(rows_of(run_dir / "metrics.csv"))
    processes = start("--resume", resume)
    wait_for_update(run_dir, before // 4 + 200, *processes)
    processes[1].send_signal(signal.SIGTERM)
    codes, said, said_by_other = ends(processes)
    assert codes == [128 + signal.SIGTERM] * 2
    assert f"--resume {resume}" in said and "stopped after update" not in said_by_other
    assert len(rows_of(run_dir / "metrics.csv")) < 4 * 1000

    codes, *_ = ends(start("--resume", resume))
    assert codes == [0, 0]

    # One process with four devices writes the same bits.
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(ROOT / "ppo_discrete.py", alone)
    subprocess.run(
        [sys.executable, "ppo_discrete.py", *long],
        cwd=alone,
        env={**environment, **devices(4)},
        check=True,
        capture_output=True,
    )
    for name in ("metrics.csv", "evaluation.csv"):
        assert (run_dir / name).read_bytes() == (only_run(alone) / name).read_bytes()
