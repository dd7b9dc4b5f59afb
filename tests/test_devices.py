"""Several devices, and several processes: on the CPU, over loopback."""

import logging
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from absl import logging as absl_logging
from conftest import ROOT
from test_command_line import QUICK, end, only_run, rows_of, wait_for_run, wait_for_update

import ppo_discrete

SEEDS = ["--num-seeds", "4", *QUICK[2:]]


def devices(number):
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={number}"}


COMPARE = """
import importlib, re, sys
from dataclasses import replace
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType
script = importlib.import_module(sys.argv[1])
config = script.default_config(sys.argv[2])
config = replace(config, num_seeds=8, total_timesteps=4 * config.batch_size, normalize_obs=True)
four = script.make_mesh(8)
assert four.size == 4
one = jax.make_mesh((1,), ("seed",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
keys = jax.vmap(jax.random.key)(jnp.arange(8))
run = script.over_seeds(partial(script.train, config), four)
exchanges = re.findall(r"all-reduce|all-gather|all-to-all|collective|reduce-scatter|send|recv",
                       run.lower(keys).compile().as_text())
assert not exchanges, exchanges
single = script.over_seeds(partial(script.train, config), one)
raw = lambda state: state._replace(key=jax.random.key_data(state.key))
results = [(raw(state), metrics) for state, metrics in (single(keys), run(keys))]
jax.tree.map(np.testing.assert_array_equal, *jax.device_get(results))
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
        [sys.executable, "-c", COMPARE, script, env_id],
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
    message = "num_seeds = 6 does not divide over 4 devices; 4 or 8 would, or 3 devices\n"
    assert message in result.stderr
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


def test_a_lost_process_is_not_reported_twice(monkeypatch, caplog):
    # Orbax saves in threads, which log what they raise with a traceback: it comes out only if the
    # process is lost at that moment.
    absl = logging.getLogger("absl")
    monkeypatch.setattr(absl, "level", absl.level)  # puts it back afterwards
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: None)
    ppo_discrete.join_processes()
    try:
        raise RuntimeError("it is gone")
    except RuntimeError:
        absl_logging.exception("a thread of Orbax raised")
    assert "raised" not in caplog.text


@pytest.mark.parametrize("error", [RuntimeError("it is gone\nsee above"), RuntimeError()])
def test_a_lost_process_ends_this_one_with_a_reason(error, monkeypatch, capsys):
    # A normal exit would wait for the lost one. Some of JAX's errors have no text.
    def exchange():
        raise error

    monkeypatch.setattr("os._exit", sys.exit)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(SystemExit) as end:
        ppo_discrete.together("runs/x", exchange)
    said = capsys.readouterr().err
    assert end.value.code == 1 and "--resume runs/x" in said
    assert ("(it is gone)" if str(error) else "(RuntimeError())") in said

    with pytest.raises(SystemExit):  # while the run is opened there is nothing yet to resume
        ppo_discrete.together(None, exchange)
    said = capsys.readouterr().err
    assert "start all of them again" in said and "--resume" not in said

    monkeypatch.setattr(jax, "process_count", lambda: 1)
    with pytest.raises(RuntimeError):  # alone there is nobody to wait for
        ppo_discrete.together("runs/x", exchange)


def test_two_processes_do_what_one_does_and_survive_a_death(environment, tmp_path, request):
    script = tmp_path / "ppo_discrete.py"
    text = (ROOT / "ppo_discrete.py").read_text()
    script.write_text(text.replace("CHECKPOINT_SECONDS = 30", "CHECKPOINT_SECONDS = 1"))
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
        assert f"--resume {resume}" in said and "Traceback" not in said
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
