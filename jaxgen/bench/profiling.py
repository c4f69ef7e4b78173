"""What the device does during steady decode: launches per step, busy share, largest kernels. Needs a GPU."""

from __future__ import annotations

import bisect
import collections
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgen.bench import report
from jaxgen.bench.engines import random_prompts, vocab_size_of
from jaxgen.bench.workloads import Workload
from jaxgen.engine import Engine
from kernels_pallas import device_trace
from kernels_pallas.device_trace import Event

TRACE_SECONDS = 0.06
LEAST_STEPS = 10
KERNELS_SHOWN = 10
STREAM_INTERVAL = 8
EXTRA_TOKENS = 128  # decoded while the profiler starts and stops


@dataclass(frozen=True)
class Kernel:
    """One kernel of a trace: times it ran, median microseconds, share of all kernel time."""

    name: str
    count: int
    median_us: float
    share: float


@dataclass(frozen=True)
class Profile:
    """Steady decode steps.

    Attributes:
        steps: whole steps in the trace.
        busy_share: of the wall time of these steps, the device ran something.
        launches: kernels per step, copies not counted.
        launches_per_layer: those of kernels that run at least once every second layer, per layer.
        copies: copies and memsets per step.
        kernels: the largest by total time.
    """

    steps: int
    step_ms: float
    busy_share: float
    launches: float
    launches_per_layer: float
    copies: float
    kernels: tuple[Kernel, ...]


def require_gpu() -> None:
    platform = jax.default_backend()
    if platform != "gpu":
        raise RuntimeError(f"--profile needs a GPU, whose kernels it reads off a trace; this is a {platform}")


def warm_up(engine: Engine) -> None:
    """Starts the profiler once: the first start takes long, and steady decode would be over."""
    with tempfile.TemporaryDirectory(prefix="jaxgen-profile-") as directory:
        _trace(engine, directory, 0.0)


def decode(engine: Engine, workload: Workload, step_seconds: float, num_layers: int) -> Profile:
    """Profiles steady decode of a workload whose steps take about `step_seconds`."""
    inputs, outputs = workload.lengths()
    params = workload.sampling_params(outputs[0] + EXTRA_TOKENS) | {"stream_interval": STREAM_INTERVAL}
    options: dict[str, Any] = {}
    if workload.top_logprobs:
        options = {"return_logprob": True, "top_logprobs_num": workload.top_logprobs}
    chunks = engine.generate(
        input_ids=random_prompts(inputs, vocab_size_of(engine), np.random.default_rng(1)),
        sampling_params=params,
        stream=True,
        **options,
    )
    try:
        seen: collections.Counter[int] = collections.Counter()
        while len(seen) < workload.requests or min(seen.values()) < 2:
            seen[next(chunks)["index"]] += 1
        with tempfile.TemporaryDirectory(prefix="jaxgen-profile-") as directory:
            _trace(engine, directory, max(TRACE_SECONDS, LEAST_STEPS * step_seconds))
            events = device_trace.read(Path(directory))
    finally:
        chunks.close()
    return analyse(events, step_seconds, num_layers)


def _trace(engine: Engine, directory: str, seconds: float) -> None:
    engine.start_profile(directory, profiler_options=device_trace.options())
    try:
        time.sleep(seconds)
    finally:
        engine.stop_profile()


def analyse(events: Sequence[Event], step_seconds: float, num_layers: int) -> Profile:
    """The profile of events by start; RuntimeError if there are not at least two steps among them.

    Steps are told apart by a kernel that runs once in each: the one that ran as often as steps fit in.
    """
    by_name: dict[str, list[Event]] = collections.defaultdict(list)
    for event in events:
        if not event.is_copy:
            by_name[event.name].append(event)
    expected = (events[-1].start - events[0].start) / (step_seconds * 1e9) if events else 0.0
    anchors = min(
        by_name.values(), key=lambda found: (abs(len(found) - expected), -_total(found)), default=[]
    )
    if len(anchors) < 3 or not 0.5 < len(anchors) / expected < 2:
        raise RuntimeError(f"The trace shows no steady decode: {len(events)} events, no kernel once per step")
    starts = [anchor.start for anchor in anchors]
    inside = [event for event in events if starts[0] <= event.start < starts[-1]]
    steps = len(starts) - 1
    kernels = [event for event in inside if not event.is_copy]
    counts = collections.Counter(event.name for event in kernels)
    in_layers = sum(n for n in counts.values() if n / steps >= num_layers / 2)
    return Profile(
        steps=steps,
        step_ms=statistics.median(b - a for a, b in itertools.pairwise(starts)) / 1e6,
        busy_share=_busy(inside, starts[-1]) / (starts[-1] - starts[0]),
        launches=_median_per_step(kernels, starts),
        launches_per_layer=in_layers / steps / num_layers,
        copies=_median_per_step([event for event in inside if event.is_copy], starts),
        kernels=tuple(_largest(kernels)),
    )


def _total(events: Iterable[Event]) -> float:
    return sum(event.duration for event in events)


def _busy(events: Sequence[Event], stop: float) -> float:
    """Time in which at least one of the events (by start) ran, up to `stop`."""
    busy, reached = 0.0, 0.0
    for event in events:
        end = min(event.start + event.duration, stop)
        if end > reached:
            busy += end - max(event.start, reached)
            reached = end
    return busy


def _median_per_step(events: Sequence[Event], starts: Sequence[float]) -> float:
    steps = collections.Counter(bisect.bisect_right(starts, event.start) for event in events)
    return statistics.median(steps[i] for i in range(1, len(starts)))


def _largest(kernels: Sequence[Event]) -> list[Kernel]:
    durations: dict[str, list[float]] = collections.defaultdict(list)
    for event in kernels:
        durations[event.name].append(event.duration)
    total = _total(kernels)
    largest = sorted(durations.items(), key=lambda item: -sum(item[1]))[:KERNELS_SHOWN]
    return [
        Kernel(name, len(times), statistics.median(times) / 1e3, sum(times) / total)
        for name, times in largest
    ]


def show(name: str, profile: dict[str, Any]) -> None:
    """Prints a profile, as a dict, of the workload `name`."""
    print(
        f"\n{name}: {profile['steps']} steps of {profile['step_ms']:.3g} ms, device busy "
        f"{profile['busy_share']:.1%}, {profile['launches']:.0f} launches per step, "
        f"{profile['launches_per_layer']:.3g} per layer, {profile['copies']:.0f} copies\n"
    )
    report.table(
        ["share", "count", "median us", "kernel"],
        [[f"{k['share']:.1%}", k["count"], k["median_us"], k["name"][:90]] for k in profile["kernels"]],
    )
