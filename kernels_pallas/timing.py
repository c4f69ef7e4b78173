"""Seconds of compiled programs, and the rates of the GPU at hand that floors are made of."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from kernels_pallas import device_trace
from kernels_pallas.device_trace import Event

L2_BYTES = 64 << 20


def seconds_per_call(
    program: Callable, args: Sequence, calls: int, repeats: int, *, donated: int = 0
) -> float:
    """Median seconds of one of the `calls` calls chained in a program.

    The first `donated` arguments are given away at each run, and are the first results of the program.
    """
    compiled = jax.jit(program, donate_argnums=tuple(range(donated))).lower(*args).compile()
    return compiled_seconds(compiled, args, calls, repeats, donated=donated)


def compiled_seconds(
    compiled: Callable, args: Sequence, calls: int, repeats: int, *, donated: int = 0
) -> float:
    """As `seconds_per_call`, of a program that is compiled already."""
    given, kept = list(args[:donated]), args[donated:]

    def run(times: int) -> float:
        nonlocal given
        start = time.perf_counter()
        results = []
        for _ in range(times):
            results.append(compiled(*given, *kept))
            given = list(results[-1][:donated]) if donated else given
        jax.block_until_ready(results[-1] if donated else results)
        return time.perf_counter() - start

    run(1)
    # Enough launches back to back that the host's share of a measurement is small.
    launches = max(1, min(50, int(0.03 / max(run(1), 1e-6))))
    return statistics.median(run(launches) / (launches * calls) for _ in range(repeats))


def device_seconds(compiled: Callable, args: Sequence, calls: int, repeats: int) -> float:
    """As `compiled_seconds`, by the GPU's own clock: of kernels so short that the host launches them too slowly.

    What passes between one kernel and the next is left out.
    """
    jax.block_until_ready(compiled(*args))
    with tempfile.TemporaryDirectory(prefix="kernels-pallas-") as directory:
        with jax.profiler.trace(directory, profiler_options=device_trace.options()):
            for _ in range(repeats):
                jax.block_until_ready(compiled(*args))
        return run_seconds(device_trace.read(Path(directory)), repeats) / calls


def run_seconds(events: Sequence[Event], runs: int) -> float:
    """Median over equal runs, one after the other, of the time in their kernels. RuntimeError if they are not equal."""
    durations = [event.duration for event in events if not event.is_copy]
    if not durations or len(durations) % runs:
        raise RuntimeError(f"The trace of {runs} runs has {len(durations)} kernels")
    return statistics.median(map(sum, itertools.batched(durations, len(durations) // runs))) / 1e9


def read_bandwidth(repeats: int) -> float:
    """Bytes per second of reading 4 GiB once, in a reduction to one value per row."""
    x = jnp.ones((1 << 15, 1 << 15), jnp.float32)
    best = 0.0
    for reduce in (lambda x: x.sum(axis=1), lambda x: x.max()):
        best = max(best, x.nbytes / seconds_per_call(reduce, (x,), 1, repeats))
    return best


def matrix_rate(repeats: int) -> float:
    """Floating-point operations per second of an 8192 x 8192 x 8192 bfloat16 product of random values."""
    a, b = jax.random.normal(jax.random.key(0), (2, 8192, 8192), jnp.bfloat16)
    return 2 * 8192**3 / seconds_per_call(lambda a, b: a @ b, (a, b), 1, repeats)


def figure(op: str, case: str, seconds: float, floor: float, **more: float | None) -> dict:
    times = {"us": seconds * 1e6, "floor_us": floor * 1e6, "of_floor": floor / seconds}
    return {"op": op, "case": case, **times, **more}
