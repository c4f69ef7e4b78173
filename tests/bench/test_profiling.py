"""Profiles of decode steps, from traces made up for the purpose."""

import jax
import pytest

from jaxgen.bench.profiling import analyse
from kernels_pallas.device_trace import Event, events_of

LAYERS = 4
STEP = 1_000_000.0  # ns


def step(start: float, *, extra_copy: bool = False) -> list[Event]:
    """One decode step of 4 layers with two kernels each, an odd one in the first, and a busy share of 0.82."""
    events = [Event(start, 10_000, "MemcpyH2D")] if extra_copy else []
    events.append(Event(start + 10_000, 20_000, "embed"))
    for layer in range(LAYERS):
        begin = start + 100_000 + layer * 200_000
        events.append(Event(begin, 150_000, "first_gemm" if layer == 0 else "gemm"))
        events.append(Event(begin + 100_000, 80_000, "attention"))  # overlaps the other by 50 us
    events.append(Event(start + 900_000, 80_000, "argmax"))
    return events


def trace(steps: int) -> list[Event]:
    """Steps that begin and end amid one; every eighth also copies."""
    events = [e for i in range(steps) for e in step(i * STEP, extra_copy=i % 8 == 3)]
    return events[5:-4]


def test_launches_and_busy_share_of_a_step():
    profile = analyse(trace(30), step_seconds=1.1e-3, num_layers=LAYERS)
    assert profile.steps == 28
    assert profile.step_ms == pytest.approx(1.0)
    assert profile.launches == 2 + 2 * LAYERS
    assert profile.launches_per_layer == pytest.approx((2 * LAYERS - 1) / LAYERS)
    assert profile.copies == 0  # of most steps
    # 20 us embedding, 180 us in each layer, 80 us argmax; and 10 us of copies in every eighth step.
    assert profile.busy_share == pytest.approx((20 + LAYERS * 180 + 80 + 10 / 8) / 1000, abs=1e-3)
    largest = profile.kernels[0]
    assert (largest.name, largest.count, largest.median_us) == ("gemm", 3 * 28, 150.0)
    assert sum(kernel.share for kernel in profile.kernels) == pytest.approx(1.0)


def test_a_trace_without_steady_decode_is_refused():
    for events in ([], trace(30)[:3], [Event(0, 5, "MemcpyH2D"), Event(9, 5, "MemcpyD2H")]):
        with pytest.raises(RuntimeError, match="no steady decode"):
            analyse(events, step_seconds=1e-3, num_layers=LAYERS)


def test_only_streams_of_the_first_gpu_are_read():
    text = """
    planes { name: "/host:CPU" lines { name: "Stream #1" events { metadata_id: 1 offset_ps: 1 duration_ps: 1 } } }
    planes {
      name: "/device:GPU:0"
      event_metadata { key: 7 value { id: 7 name: "attention" } }
      event_metadata { key: 8 value { id: 8 name: "MemcpyD2D" } }
      lines { name: "Stream #13(Compute)" timestamp_ns: 1000
        events { metadata_id: 8 offset_ps: 9000000 duration_ps: 2000000 }
        events { metadata_id: 7 offset_ps: 5000000 duration_ps: 3000000 } }
      lines { name: "XLA Ops" events { metadata_id: 7 offset_ps: 1 duration_ps: 1 } }
    }
    planes { name: "/device:GPU:1" lines { name: "Stream #1" events { metadata_id: 1 offset_ps: 1 duration_ps: 1 } } }
    """
    events = events_of(jax.profiler.ProfileData.from_text_proto(text))
    assert events == [Event(6000, 3000, "attention"), Event(10000, 2000, "MemcpyD2D")]
    assert [event.is_copy for event in events] == [False, True]
