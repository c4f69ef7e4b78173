"""`jaxgen bench`: every benchmark runs, ends with one JSON line, and its figures hang together."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxgen.bench.accuracy import read_sequences
from jaxgen.bench.hf_export import export
from jaxgen.cli.main import main
from jaxgen.layers.quantization import SCHEMES

ROOT = Path(__file__).parents[2]
LLAMA3 = ROOT / "tests/golden/llama3"
# Few and small steps: the tests are about the report, not about speed.
SMALL = json.dumps({"cuda_graph_bs_prefill": [32], "chunked_prefill_size": 32})

# Stands in for hf_generate.py where torch is not installed: answers in its form, with tokens of its own.
FAKE_HF = """#!/usr/bin/env python3
import json, sys
print(json.dumps({"torch": "none", "transformers": "none", "threads": 1}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    ids = [[7] * request["new_tokens"] for _ in request["prompts"]]
    print(json.dumps({"seconds": 0.5, "output_ids": ids}), flush=True)
"""


def bench(*args: str) -> tuple[dict, str]:
    """The JSON record and the whole output of `jaxgen bench ARGS`."""
    done = subprocess.run(
        [sys.executable, "-m", "jaxgen", "bench", *args], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["bench"] == args[0]
    assert record["command"].startswith(f"jaxgen bench {args[0]} ")
    assert set(record["versions"]) == {"jaxgen", "jax", "jaxlib", "python"}
    assert record["host"]["cores"] >= 1
    return record, done.stdout


def test_cpu_with_an_opponent(tmp_path):
    fake = tmp_path / "python"
    fake.write_text(FAKE_HF)
    fake.chmod(0o755)
    record, text = bench(
        "cpu", "--model-path", str(LLAMA3), "--batch-sizes", "2", "--input-len", "8", "--output-len", "4",
        "--repeats", "1", "--compare-hf", str(fake), "--engine-options", SMALL,
    )  # fmt: skip
    (row,) = record["results"]
    assert row["batch"] == 2
    assert row["tokens_per_s"] == pytest.approx(8 / row["seconds"])
    assert row["hf_tokens_per_s"] == pytest.approx(16)
    assert row["ratio"] == pytest.approx(0.5 / row["seconds"])
    assert "ratio" in text


def test_scheduler():
    record, _ = bench("scheduler", "--requests", "4", "--iterations", "20", "--input-len", "8")
    (row,) = record["results"]
    assert row["iterations"] == 20
    assert 0 < row["packing_ms"] < row["median_ms"] <= row["p90_ms"] <= row["max_ms"]


def test_startup():
    options = {"max_running_requests": 1, **json.loads(SMALL)}
    record, _ = bench(
        "startup", "--model", str(LLAMA3 / "config.json"), "--engine-options", json.dumps(options)
    )
    (row,) = record["results"]
    # Compiling goes on from the memory plan to the last of these.
    phases = ("plan memory", "load weights", "allocate KV cache", "compile steps")
    seconds = {name: sum(row[name][phase] for phase in phases) for name in ("cold", "warm")}
    assert seconds["warm"] < seconds["cold"]
    assert row["ratio"] == pytest.approx(row["warm"]["total"] / row["cold"]["total"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["cpu", "--engine-options", "[1]"], "JSON object"),
        (["cpu", "--model-path", str(LLAMA3), "--compare-hf", "/no/such/python"], "cannot run"),
        (["latency", "--requests", "4", "--output-len", "1-8"], "one output length"),
        (["latency", "--requests", "4", "--workloads", "bs1"], "which is not run"),
        (["latency", "--plot", "figures.jpg"], ".svg, .png"),
        (["latency", "--plot", "/no/such/place/figures.svg"], "/no/such/place"),
        (["offline", "--workloads", "offline265"], "offline256"),
        (["offline", "--scale", "0"], "(0, 1]"),
        (["offline", "--input-len", "9-1"], "9..1"),
        (["kernels"], "run on a GPU"),
        (["kernels", "prefil"], "decode, prefill, sample"),
    ],
)
def test_bad_options_are_explained(args, words, capsys):
    with contextlib.suppress(SystemExit):  # of the parser
        assert main(["bench", *args]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3"])
def test_exported_weights_are_the_originals(name, tmp_path):
    source = ROOT / "tests/golden" / name
    export(str(source), tmp_path / "model")
    originals = {}
    for file in source.glob("*.safetensors"):
        originals |= load_file(file)
    copies = load_file(tmp_path / "model/model.safetensors")
    assert copies.keys() == originals.keys()
    for tensor, value in originals.items():
        np.testing.assert_array_equal(copies[tensor], value, err_msg=tensor)


def test_accuracy_of_each_quantisation(tmp_path):
    sequences = tmp_path / "sequences.json"
    sequences.write_text(json.dumps([list(range(10, 40)), {"input_ids": [5, 6], "output_ids": [7]}]))
    record, text = bench(
        "accuracy", "--model", str(LLAMA3), "--sequences", str(sequences), "--dtype", "float32",
        "--engine-options", SMALL,
    )  # fmt: skip
    assert record["tokens"] == 29 + 2
    rows = {row["quantization"]: row for row in record["results"]}
    assert set(rows) == {"unquant", *SCHEMES}
    assert (rows["unquant"]["mean_difference"], rows["unquant"]["same_best"]) == (0, 1)
    for name in SCHEMES:
        assert name in text
        assert 0 < rows[name]["mean_difference"] < 1.5
        assert rows[name]["weight_bytes"] < 0.5 * rows["unquant"]["weight_bytes"]
    assert rows["int8"]["mean_difference"] < rows["w8a8_int8"]["mean_difference"]


@pytest.mark.parametrize("content", ["{", "[]", "[[1]]", '[{"text": "a"}]', "[1, 2]"])
def test_sequences_that_are_none_are_refused(tmp_path, content):
    path = tmp_path / "sequences.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="--sequences"):
        read_sequences(path)


def test_linears_times_every_quantisation(tmp_path):
    config = json.loads((LLAMA3 / "config.json").read_text())
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(config))
    record, _ = bench("linears", "--config", str(path), "--tokens", "1", "3", "--repeats", "1")
    rows = record["results"]
    assert [row["quantization"] for row in rows] == ["unquant", *SCHEMES] * 2
    assert all(row["us"] > 0 for row in rows)
    assert [row["tokens"] for row in rows if row["speedup"] == 1] == [1, 3]
