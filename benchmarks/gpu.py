"""`--gpu` of benchmarks/speed.py: whole runs on an accelerator, beside PureJaxRL's.

    python benchmarks/speed.py --gpu                     # ten minutes at most
    python benchmarks/speed.py --gpu --purejaxrl PATH    # a checkout of PureJaxRL
    python benchmarks/speed.py --gpu --minutes 30        # with the rows that ten leave out
    python benchmarks/speed.py --gpu --quick             # tiny sizes, to try the program

The sizes are those that PureJaxRL shows, with its own number of environments, steps, epochs and
minibatches: CartPole with up to 2048 seeds of 500k steps, Breakout-MinAtar with up to 256 seeds of
10M, and Brax's ant (with 4096 environments), if Brax and benchmarks/environments.py are there. One
row more has the defaults of ppo_discrete.py.

Ours is what the command line runs: segments of a hundredth of the run, spread over all devices. It
runs to its end if that takes less than LONGEST seconds. Otherwise it runs for ENOUGH seconds, and
the time is extrapolated from this part, which the table names. PureJaxRL is one program on one
device, compiled for as much of the run as ours has made, and extrapolated likewise. All times are
those of a first call. `compile` includes tracing, `memory` is what the program asks for.

The most important rows come first. A row is begun only if as much time is left as the longest one
has taken. On an accelerator the table is written into docs/speed.md, after every row.
"""

import dataclasses
import importlib
import importlib.util
import re
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import purejaxrl

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "speed.md"
LONGEST, ENOUGH = 60.0, 10.0  # seconds
MARKS = "<!-- gpu -->", "<!-- end of gpu -->"

CARTPOLE = dict(num_envs=4, num_steps=128, update_epochs=4, num_minibatches=4)
CARTPOLE |= dict(total_timesteps=500_000)
BREAKOUT = dict(num_envs=64, num_steps=128, update_epochs=4, num_minibatches=8)
BREAKOUT |= dict(total_timesteps=10_000_000, activation="relu")
ANT = dict(num_envs=4096, num_steps=10, update_epochs=4, num_minibatches=32)
ANT |= dict(total_timesteps=50_000_000, hidden_sizes=(256, 256))
TINY = dict(num_envs=2, num_steps=8, update_epochs=1, num_minibatches=2, total_timesteps=64)


class Row(NamedTuple):
    """One line of the table."""

    script: str
    env_id: str
    num_seeds: int
    values: dict  # of the configuration
    compared: bool  # with PureJaxRL, too


class Measured(NamedTuple):
    """A whole run of all seeds."""

    seconds: float
    part: float  # of the run that was really made; the rest is extrapolated
    compile_seconds: float
    mebibytes: float


def has_ant():
    return all(map(importlib.util.find_spec, ("brax", "environments")))


def rows(quick):
    """All rows in the order of the table, and in that of their importance."""
    cartpole = lambda n: Row("ppo_discrete", "CartPole-v1", n, CARTPOLE, True)
    default = Row("ppo_discrete", "CartPole-v1", 2048, {}, False)
    breakout = lambda n: Row("ppo_discrete", "Breakout-MinAtar", n, BREAKOUT, True)
    ant = [Row("ppo_continuous", "environments:ant-brax", 1, ANT, False)] if has_ant() else []
    seeds = [1, 4, 16, 64, 256, 1024, 2048]
    table = [*map(cartpole, seeds), default, *map(breakout, seeds[:5]), *ant]
    first = [cartpole(2048), breakout(256), *ant, default, cartpole(1), breakout(1)]
    first += [cartpole(256), cartpole(16), breakout(16)]
    if quick:
        # The first and the last size of each environment, with a few updates.
        table = [cartpole(1), cartpole(2), breakout(1), *ant]
        table, first = [row._replace(values=TINY) for row in table], []
    return table, first + [row for row in table if row not in first]


def measure(script, config, longest=LONGEST, enough=ENOUGH, clock=time.perf_counter):
    """Train as the command line does, to the end or, if that takes too long, for a part."""
    seeds = config.seed + np.arange(config.num_seeds)
    begin = clock()
    init, update = script.make_train(config)
    start = script.over_seeds(lambda seed: init(jax.random.key(seed)))
    shapes, start = jax.eval_shape(start, seeds), start.lower(seeds).compile()
    on_devices = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=script.seed_axis())
    shapes = jax.tree.map(on_devices, shapes)
    run_segment, length = script.compile_segment(config, update, shapes)
    compile_seconds = clock() - begin
    begin = clock()
    state = jax.block_until_ready(start(jax.device_put(seeds, script.seed_axis())))
    started = clock()
    segments, made = config.num_updates // length, 0
    while made < segments:
        state, _ = jax.block_until_ready(run_segment(state))
        made += 1
        spent = clock() - started
        if spent > enough and spent * segments / made > longest:
            break
    seconds = started - begin + spent * segments / made
    return Measured(seconds, made / segments, compile_seconds, mebibytes_of(run_segment))


def measure_other(train, config, part):
    """The same of a function `train(config, key)` that is one program, for a part of the run."""
    updates = max(1, round(part * config.num_updates))
    shorter = dataclasses.replace(config, total_timesteps=updates * config.batch_size)
    keys = jax.vmap(jax.random.key)(np.arange(config.num_seeds))
    begin = time.perf_counter()
    program = jax.jit(jax.vmap(lambda key: train(shorter, key))).lower(keys).compile()
    compile_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    jax.block_until_ready(program(keys))
    part = updates / config.num_updates
    seconds = (time.perf_counter() - begin) / part
    return Measured(seconds, part, compile_seconds, mebibytes_of(program))


def mebibytes_of(program):
    memory = program.memory_analysis()
    size = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (size + memory.temp_size_in_bytes) / 2**20


def if_it_fits(function, *arguments):
    """What the function measures, or None if there is too little memory."""
    try:
        return function(*arguments)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if not re.search("RESOURCE_EXHAUSTED|use fewer seeds", str(error)):
            raise
        return None


def cells(measured):
    """Time, compile time and memory."""
    if measured is None:
        return ["too little memory", "-", "-"]
    short = lambda x: f"{x:,.1f}" if x > 10 else f"{x:.2g}"
    part = "" if measured.part == 1 else f" (from {measured.part:.1%})"
    times = f"{short(measured.seconds)} s{part}", f"{measured.compile_seconds:.1f} s"
    return [*times, f"{short(measured.mebibytes)} MiB"]


def line_of(row, folder):
    """Measure a row and write it down."""
    script = importlib.import_module(row.script)
    compared = folder is not None and row.compared
    values = row.values | (purejaxrl.OURS[row.script] if compared else {})
    make = script.Config if row.values else script.default_config
    config = dataclasses.replace(make(env_id=row.env_id), num_seeds=row.num_seeds, **values)
    ours, other = if_it_fits(measure, script, config), None
    texts, ratio, speed = cells(ours), "-", "-"
    if ours:
        steps = config.num_seeds * config.num_updates * config.batch_size
        speed = f"{steps / ours.seconds:,.0f}"
    their_texts = ["-", "-", "-"]
    if compared:
        train = purejaxrl.load_train(folder, row.script)
        other = if_it_fits(measure_other, train, config, ours.part if ours else 0.0)
        their_texts = cells(other)
    if ours and other:
        ratio = f"{other.seconds / ours.seconds:.2f}"
    name = row.env_id.rpartition(":")[2] + ("" if row.values else ", defaults")
    sizes = f"{config.num_envs} x {config.num_steps}, "
    sizes += f"{config.update_epochs} x {config.num_minibatches}"
    texts = [name, sizes, row.num_seeds, f"{config.total_timesteps:,}", speed, *texts]
    return f"| {' | '.join(map(str, [*texts, *their_texts, ratio]))} |"


HEAD = """
| environment | N x T, K x parts | seeds | steps per seed | steps/s | time | compile | memory \
| PureJaxRL: time | compile | memory | ratio |
|---|---|---|---|---|---|---|---|---|---|---|---|
""".strip()


def write(document, text):
    """Put the text between the marks of the document."""
    begin, end = MARKS
    pattern = re.compile(f"{begin}\n.*?{end}", re.DOTALL)
    old = document.read_text()
    if len(pattern.findall(old)) != 1:
        raise ValueError(f"{document} must have one {begin} ... {end}")
    document.write_text(pattern.sub(lambda _: f"{begin}\n{text}\n{end}", old))


def table(circumstances, folder, minutes, quick, document):
    """Measure, print and write down as many rows as there is time for."""
    begin, longest, lines, failures = time.perf_counter(), 0.0, {}, []
    all_rows, by_importance = rows(quick)
    print(HEAD, flush=True)
    for row in by_importance:
        row_begins = time.perf_counter()
        if row_begins - begin + longest > 60 * minutes:
            continue
        try:
            lines[all_rows.index(row)] = line = line_of(row, folder)
            print(line, flush=True)
        except Exception:  # the machine may be there for these minutes only: the others go on
            traceback.print_exc()
            failures.append(f"{row.env_id} with {row.num_seeds} seeds")
        longest = max(longest, time.perf_counter() - row_begins)
        if document:
            command = "`python benchmarks/speed.py --gpu"
            command += " --purejaxrl PATH`" if folder else "`"
            in_order = "\n".join(lines[i] for i in sorted(lines))
            rest = f"\n\nFailed: {', '.join(failures)}." if failures else ""
            if missing := len(all_rows) - len(lines) - len(failures):
                rest += f"\n\n{missing} rows are missing for want of time."
            write(document, f"{command}, {circumstances}:\n\n{HEAD}\n{in_order}{rest}")
