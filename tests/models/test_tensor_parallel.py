"""Splitting a model over devices changes neither its tokens nor what has to be communicated."""

import re

import jax
import numpy as np
import pytest

from jaxgen.layers.attention import DecodeBatch
from tests.models.harness import golden_runner, load_config
from tests.models.test_golden import check_against_golden


# 9 query heads over 3 kv heads on 3 devices; biases, an untied head with a window, and qk-norm on 2.
@pytest.mark.parametrize(
    ("family", "tp_size"),
    [("llama3", 3), ("qwen2", 2), ("qwen3", 2), ("mistral", 2), ("llama_yarn", 2), ("llama2", 4)],
)
def test_tokens_do_not_depend_on_the_number_of_devices(family, tp_size):
    check_against_golden(family, tp_size)


def test_a_step_sums_partial_results_and_moves_nothing_else():
    runner = golden_runner("llama3", tp_size=3)
    lanes = runner.max_rows
    zeros = np.zeros(lanes, np.int32)
    batch = DecodeBatch(runner.page_table, zeros + 1)
    step = jax.jit(runner._forward).lower(runner.leaves, zeros, zeros, runner.kv, batch)
    collectives = re.findall(
        r" (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", step.compile().as_text()
    )
    # the embedding, and in every layer the attention's and the MLP's output
    assert collectives == ["all-reduce"] * (1 + 2 * load_config("llama3").num_layers)


def test_weights_and_pages_really_are_split():
    runner = golden_runner("llama3", tp_size=3)
    whole = sum(param.size for param in runner.params.values())
    on_first = sum(leaf.addressable_shards[0].data.size for leaf in runner.leaves)
    assert on_first < 0.36 * whole  # all but the norms
    k_pages, _ = runner.kv[0]
    assert k_pages.addressable_shards[0].data.shape[1] == 1  # one of the three kv heads
