"""Several devices and several processes, on the CPU."""

import os
import shutil
import socket
import subprocess
import sys

import jax
import pytest
from conftest import ROOT
from kill_and_resume import FLAGS, ROWS, command, only_run, read_files, wait_for_rows

import ppo_discrete


@pytest.fixture
def quick(environment):
    """Environment variables for subprocesses that compile as quickly as these tests do."""
    return {**environment, "XLA_FLAGS": os.environ["XLA_FLAGS"]}


SEEDS = """
import re, sys
from dataclasses import replace
from functools import partial
import jax, numpy as np
import ppo_discrete as ppo

devices = int(sys.argv[1])
assert jax.device_count() == devices
config = ppo.Config(num_envs=4, num_steps=16, hidden_sizes=(8,), total_timesteps=64 * 8)
config = replace(config, normalize_obs=True)

def train(seeds):
    # Returns every number that training has computed, and the number of devices that took part.
    run = ppo.over_seeds(lambda seed: ppo.train(config, jax.random.key(seed)), len(seeds))
    compiled = run.lower(seeds).compile()
    exchanges = "all-reduce|all-gather|all-to-all|collective|reduce-scatter|send|recv"
    assert not re.findall(exchanges, compiled.as_text())
    state, metrics = compiled(seeds)
    used = len(state.obs.sharding.device_set)
    state = state._replace(key=jax.random.key_data(state.key))
    return [np.asarray(x) for x in jax.tree.leaves((state, metrics))], used

eight, used = train(np.arange(8))
assert used == devices
seven, used = train(np.arange(3, 10))
assert used == (7 if devices == 8 else 1)
if devices == 8:  # each seed has a device of its own
    for a, b in zip(eight, seven):
        np.testing.assert_array_equal(a[3:], b[:5])
else:  # each device has two seeds
    others, used = train(np.arange(4, 12))
    assert used == devices
    for a, b in zip(eight, others):
        np.testing.assert_array_equal(a[4:], b[:4])
"""


@pytest.mark.parametrize(
    "number, settings",
    [
        (8, {"JAX_NUM_CPU_DEVICES": "8"}),
        (4, {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}),
    ],
)
def test_seeds_do_not_depend_on_each_other(number, settings, quick, tmp_path):
    (tmp_path / "seeds.py").write_text(SEEDS)
    env = {**quick, "PYTHONPATH": str(ROOT), **settings}
    subprocess.run([sys.executable, "seeds.py", str(number)], cwd=tmp_path, env=env, check=True)


@pytest.mark.parametrize(
    "num_seeds, cores, devices", [(8, 6, 4), (7, 4, 1), (9, 6, 3), (1, 6, 1), (64, 6, 4), (6, 6, 6)]
)
def test_as_many_cores_are_used_as_divide_the_seeds(num_seeds, cores, devices, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setenv("XLA_FLAGS", "")
    updates = {}
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    ppo_discrete.use_cores(num_seeds)
    assert updates == {"jax_num_cpu_devices": devices}
    # The user's own choice counts.
    updates.clear()
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    ppo_discrete.use_cores(num_seeds)
    assert updates == {}


def test_several_processes_need_seeds_for_all_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    with pytest.raises(ppo_discrete.UserError, match="num_seeds must be a multiple of 4"):
        ppo_discrete.over_seeds(lambda seed: seed, 6)


def test_two_processes_write_the_files_of_one(quick, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    shutil.copy(ROOT / "ppo_discrete.py", folders[0])
    shutil.copy(folders[0] / "ppo_discrete.py", folders[1])

    def start(*arguments):
        """Start two processes with one device each, which train a run together."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        arguments = command("ppo_discrete", "--distributed", *arguments, save_always=True)
        together = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
        return [
            subprocess.Popen(
                arguments,
                cwd=folders[1],
                env={**quick, **together, "JAX_PROCESS_ID": str(index)},
                stdout=(tmp_path / f"output_{index}").open("w"),
                stderr=subprocess.STDOUT,
            )
            for index in range(2)
        ]

    processes = start(*FLAGS)
    wait_for_rows(folders[1], ROWS // 4, processes[0])
    for process in processes:
        process.kill()
        process.wait()
    run_dir = only_run(folders[1])
    processes = start("--resume", run_dir.relative_to(folders[1]))
    outputs = [tmp_path / f"output_{index}" for index in range(2)]
    codes = [process.wait(timeout=300) for process in processes]
    first, second = [path.read_text() for path in outputs]
    assert codes == [0, 0], first + second
    assert "mean of 8 seeds" in first and "seed" not in second  # only the first process prints

    env = {**quick, "JAX_NUM_CPU_DEVICES": "2"}
    one = command("ppo_discrete", *FLAGS)
    subprocess.run(one, cwd=folders[0], env=env, check=True, capture_output=True)
    assert read_files(folders[1]) == read_files(folders[0])
