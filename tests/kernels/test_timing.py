"""Seconds of kernels, from what a GPU's clock says of equal runs."""

import pytest

from kernels_pallas import decode_config
from kernels_pallas.device_trace import Event
from kernels_pallas.timing import run_seconds


def kernels(*durations):
    return [Event(start=100.0 * i, duration=d, name="kernel") for i, d in enumerate(durations)]


def test_the_median_run_counts_without_its_copies():
    copy = Event(start=250.0, duration=1e6, name="MemcpyH2D")
    events = [*kernels(10, 20, 10, 40), copy, *kernels(500, 600)]
    assert run_seconds(events, runs=3) == pytest.approx(50e-9)


@pytest.mark.parametrize("durations", [(), (1, 2, 3)])
def test_runs_that_are_not_equal_are_an_error(durations):
    with pytest.raises(RuntimeError, match=f"2 runs has {len(durations)} kernels"):
        run_seconds(kernels(*durations), runs=2)


@pytest.mark.parametrize("lanes", [1, 8, 64, 256])
def test_a_tuner_measures_no_decode_configuration_twice(lanes):
    found = list(decode_config.candidates(lanes, 8, 4, 128, 64, 16))
    assert len(found) == len(set(found)) > 4
