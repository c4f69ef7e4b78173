"""`jaxgen bench latency` and `offline`: the named workloads at a small scale, and figures that hang together."""

import json

import numpy as np
import pytest
from test_bench import LLAMA3, bench

from jaxgen.bench import command
from jaxgen.bench.workloads import SUITES, WORKLOADS, Workload, custom, groups

# Few and small steps: the tests are about the report, not about speed.
SMALL = json.dumps({
    "cuda_graph_bs_prefill": [32], "chunked_prefill_size": 32, "context_length": 256, "max_running_requests": 4,
})  # fmt: skip
TINY = ("--model", str(LLAMA3), "--dtype", "float32", "--scale", "0.016", "--engine-options", SMALL)


def test_latency(tmp_path):
    drawing = tmp_path / "latency.svg"
    record, text = bench("latency", *TINY, "--repeats", "2", "--plot", str(drawing))
    rows = {row["workload"]: row for row in record["results"]}
    assert tuple(rows) == SUITES["latency"]
    assert rows["fixed256"]["requests"] == 4
    assert rows["fixed256"]["input_tokens"] == 4 * 16
    for row in rows.values():
        assert row["compiles"] == 0
        assert len(row["seconds"]) == 2
        best, worst = (row["floor"], row["measured"])[:: -1 if "tok" in row["unit"] else 1]
        assert row["of_floor"] == pytest.approx(best / worst) and best > 0
        assert f"{row['workload']} " in text
    assert rows["bs1"]["measured"] == pytest.approx(1e3 * np.median(rows["bs1"]["seconds"]))
    assert rows["bs1"]["first_token_seconds"] > 0
    prefill = rows["prefill"]
    assert prefill["measured"] == pytest.approx(prefill["input_tokens"] / np.median(prefill["seconds"]))
    assert record["rates"]["read_bytes_per_s"] > 0
    drawn = drawing.read_text()
    assert drawn.startswith("<?xml")
    assert "fixed64" in drawn


def test_offline():
    record, _ = bench("offline", *TINY, "--repeats", "1")
    rows = {row["workload"]: row for row in record["results"]}
    assert list(rows) == [
        "offline256", "offline1024", "shared cold", "shared warm", "fixed256", "sampled", "logprobs",
    ]  # fmt: skip
    assert all(row["of_floor"] > 0 and row["compiles"] == 0 for row in rows.values())
    offline = rows["offline1024"]
    assert offline["requests"] == 16
    assert offline["measured"] == pytest.approx(offline["output_tokens"] / offline["seconds"][0])
    assert rows["shared cold"]["floor"] > rows["shared warm"]["floor"]
    for name in ("sampled", "logprobs"):
        ratio = rows["fixed256"]["measured"] / rows[name]["measured"]
        assert rows[name]["cost"] == pytest.approx(1 - ratio)


def test_a_workload_of_ones_own():
    record, _ = bench(
        "offline", *TINY, "--repeats", "1", "--scale", "1", "--requests", "5", "--input-len", "8-16",
        "--output-len", "4",
    )  # fmt: skip
    (row,) = record["results"]
    assert row["workload"] == "custom"
    assert 5 * 8 <= row["input_tokens"] <= 5 * 16
    assert row["output_tokens"] == 5 * 4


def test_profile_says_that_it_needs_a_gpu(capfd):
    with pytest.raises(AssertionError, match="needs a GPU"):  # of `bench`: the exit status
        bench("latency", *TINY, "--workloads", "bs1", "--profile")


def test_lengths_are_drawn_from_the_whole_range_and_stay():
    inputs, outputs = WORKLOADS["offline1024"].lengths()
    for lengths in (inputs, outputs):
        assert len(lengths) == 1024
        assert min(lengths) in range(100, 110)
        assert max(lengths) in range(1015, 1025)
    assert inputs != outputs
    assert (inputs, outputs) == WORKLOADS["offline1024"].lengths()


def test_what_is_held_against_another_is_measured_in_turns_with_it():
    names = [[w.name for w in g] for g in groups([WORKLOADS["bs1"], WORKLOADS["logprobs"]], 1)]
    assert names == [["bs1"], ["fixed256", "logprobs"]]
    assert command._workloads("all") == list(WORKLOADS)
    everything = [w.name for g in groups(WORKLOADS.values(), 0.1) for w in g]
    assert sorted(everything) == sorted(WORKLOADS)


def test_custom_shapes_choose_what_is_timed():
    assert custom("latency", 1, (8, 8), (1, 1)).measure == "prefill"
    assert custom("latency", 1, (8, 8), (2, 2)).measure == "decode"
    assert custom("offline", 1, (8, 8), (1, 9)).measure == "output"
    with pytest.raises(ValueError, match="one output length"):
        custom("latency", 1, (8, 8), (1, 9))
    with pytest.raises(ValueError, match="not a range"):
        Workload("x", "output", 1, (0, 4), (1, 1))


def test_settings_of_sampling_reach_the_requests():
    assert WORKLOADS["sampled"].sampling_params(7) == {
        "temperature": 0.8, "top_p": 0.95, "top_k": 50, "max_new_tokens": 7, "ignore_eos": True,
    }  # fmt: skip
    assert WORKLOADS["fixed256"].sampling_params(7)["temperature"] == 0
