"""Floors: what a model must read and multiply."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxgen.bench.costs import ModelCosts, Rates, Work
from jaxgen.bench.floors import floor_seconds
from jaxgen.bench.workloads import WORKLOADS, Workload
from jaxgen.models.config import ModelConfig

CONFIGS = Path(__file__).parents[2] / "configs"
H100 = Rates(read_bytes_per_s=3.16e12, matrix_flops=780e12)


def costs_of(name: str, dtype: str = "float16", **overrides) -> ModelCosts:
    raw = json.loads((CONFIGS / f"{name}.json").read_text()) | overrides
    return ModelCosts.of(ModelConfig.from_hf(raw), np.dtype(dtype), np.dtype("float16"))


def test_costs_of_a_known_model():
    costs = costs_of("smollm2-135m", "float32")
    # The published number of parameters, less the last norm; the head is tied, so the table is read as one.
    assert costs.weight_bytes == 4 * (134_515_008 - 576)
    assert costs.kv_bytes == 2 * 30 * 3 * 64 * 2
    # A step without history reads the weights; its time is theirs.
    assert costs.decode_seconds(Work(1, 0), 1, Rates(1e9, 1e15)) == pytest.approx(costs.weight_bytes / 1e9)
    # A slow multiplier is the floor instead: two operations for each weight and token.
    assert costs.decode_seconds(Work(8, 0), 1, Rates(1e15, 1e9)) == pytest.approx(
        16 * (costs.weight_bytes / 4) / 1e9, rel=1e-3
    )


def test_quantised_layers_are_read_in_one_byte_a_weight():
    config = ModelConfig.from_hf(json.loads((CONFIGS / "llama-3.1-8b.json").read_text()))
    plain = ModelCosts.of(config, np.dtype("float16"), np.dtype("float16"))
    quantised = ModelCosts.of(config, np.dtype("float16"), np.dtype("float16"), np.dtype("int8"))
    layers = 32 * (4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336) + 2 * 4096)
    assert plain.weight_bytes - quantised.weight_bytes == layers


@pytest.mark.parametrize(
    ("model", "floors"),
    [
        ("qwen2.5-0.5b", {"bs1": 0.31, "fixed64": 0.58, "fixed256": 1.40, "prefill": 912_000}),
        ("llama-3.1-8b", {"bs1": 4.8, "fixed64": 7.6, "fixed256": 16.3, "prefill": 53_500}),
    ],
)
def test_floors_of_the_named_workloads(model, floors):
    costs = costs_of(model)
    for name, wanted in floors.items():
        (seconds,) = floor_seconds(WORKLOADS[name], costs, H100, 1).values()
        found = 32 * 4096 / seconds if name == "prefill" else seconds * 1e3
        assert found == pytest.approx(wanted, rel=0.02), name


@pytest.mark.parametrize("window", [None, 7])
def test_keys_are_counted_query_by_query(window):
    costs = ModelCosts(1, 1, 1, 1, 1, 1, windows=(None, window))
    queries = range(3, 19)
    wanted = sum((q + 1) + (q + 1 if window is None else min(window, q + 1)) for q in queries) / 2
    assert costs.keys(3, 19) == wanted


def test_a_common_prefix_is_computed_once_and_read_once_per_step():
    sizes = {"weight_bytes": 0, "layer_weights": 0, "head_weights": 0}
    costs = ModelCosts(**sizes, kv_bytes=1, attention_flops=1, num_layers=3, windows=())
    shared = Workload("x", "prefix", 10, (4, 4), (3, 3), prefix=100)
    reads_only = floor_seconds(shared, costs, Rates(1.0, 1e30), 1)
    # Two steps read the prefix and ten times the 5, then 6, tokens of each request.
    assert reads_only["cold"] == pytest.approx(2 * 100 + 10 * (5 + 6))
    multiplies_only = floor_seconds(shared, costs, Rates(1e30, 1.0), 1)
    assert multiplies_only["cold"] - multiplies_only["warm"] == pytest.approx(2 * 100 * 101 / 2)


def test_more_requests_than_steps_share_the_reads_of_the_weights():
    sizes = {"weight_bytes": 8, "layer_weights": 0, "head_weights": 0}
    costs = ModelCosts(**sizes, kv_bytes=0, attention_flops=0, num_layers=1, windows=())
    output = Workload("x", "output", 64, (4, 4), (5, 5))
    assert floor_seconds(output, costs, Rates(1.0, 1e30), 1)["output"] == pytest.approx(8 + 4 * 8)


def test_a_prefill_needs_of_the_last_layer_what_its_logits_and_the_cache_do():
    costs = costs_of("llama-3.1-8b")
    prompts, tokens, keys = 4, 4 * 1000, 4 * 1000 * 1001 // 2
    seconds = costs.prefill_seconds(Work(tokens, keys), Work(prompts, prompts * 1000), Rates(1e30, 1.0))
    layer = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336)
    last = 4096 * 2 * 1024
    products = 2 * tokens * (31 * layer + last) + 2 * prompts * (layer - last + 4096 * 128256)
    attention = 4 * 32 * 128 * (31 * keys + prompts * 1000)
    assert seconds == pytest.approx(products + attention, rel=1e-3)  # norms and biases are no products
