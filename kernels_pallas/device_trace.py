"""What a GPU ran, by its own clock, read off a trace of JAX's profiler."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import jax

MOST_BYTES = 256 << 20
MOST_EVENTS = 2_000_000


@dataclass(frozen=True)
class Event:
    """Something a GPU ran, in nanoseconds."""

    start: float
    duration: float
    name: str

    @property
    def is_copy(self) -> bool:
        return self.name.startswith(("Memcpy", "Memset"))


def options() -> jax.profiler.ProfileOptions:
    """Of a trace that does not slow down the host: its own tracers are off."""
    chosen = jax.profiler.ProfileOptions()
    chosen.python_tracer_level = chosen.host_tracer_level = 0
    chosen.enable_hlo_proto = False
    return chosen


def read(directory: Path) -> list[Event]:
    """What the first GPU ran, by start, of the trace in a directory.

    Raises RuntimeError if there is no trace, or too large a one.
    """
    files = list(directory.rglob("*.xplane.pb"))
    if len(files) != 1:
        raise RuntimeError(f"The profiler wrote {len(files)} traces instead of one")
    if files[0].stat().st_size > MOST_BYTES:
        raise RuntimeError(f"The trace is larger than {MOST_BYTES >> 20} MiB: profile a smaller workload")
    return events_of(jax.profiler.ProfileData.from_file(str(files[0])))


def events_of(trace: jax.profiler.ProfileData) -> list[Event]:
    """What the first GPU of a trace ran, by start."""
    devices = sorted((p for p in trace.planes if "GPU:" in p.name), key=lambda plane: plane.name)
    streams = (line for plane in devices[:1] for line in plane.lines if line.name.startswith("Stream"))
    found = (Event(e.start_ns, e.duration_ns, e.name) for line in streams for e in line.events)
    events = list(itertools.islice(found, MOST_EVENTS + 1))
    if len(events) > MOST_EVENTS:
        raise RuntimeError(f"The trace has more than {MOST_EVENTS:,} events: profile a smaller workload")
    return sorted(events, key=lambda event: event.start)
