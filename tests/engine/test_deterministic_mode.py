"""enable_deterministic_inference: bit-identical results whatever a request is batched with and finds cached."""

import numpy as np
import pytest
from tiny_engine import prompt_of
from workload import assert_idle, strict_engine

STEM = prompt_of(90, 1)
PROMPTS = [(STEM[: 10 * i] + prompt_of(5 + 3 * i, 10 + i)) for i in range(8)] * 4  # 32, sharing prefixes
PARAMS = {"temperature": 0.9, "top_p": 0.9, "max_new_tokens": 12, "ignore_eos": True}


def exact(result):
    """Tokens and the bits of their log-probabilities."""
    logprobs = [entry[0] for entry in result["meta_info"]["output_token_logprobs"]]
    return result["output_ids"], np.array(logprobs).tobytes()


def generate(engine, prompts):
    return [exact(r) for r in engine.generate(input_ids=prompts, sampling_params=PARAMS, return_logprob=True)]


def deterministic_engine(**options):
    return strict_engine(enable_deterministic_inference=True, max_running_requests=32, **options)


@pytest.fixture(scope="module")
def engine():
    with deterministic_engine() as engine:
        yield engine
        assert_idle(engine)


@pytest.fixture(scope="module")
def alone(engine):
    results = []
    for prompt in PROMPTS[:8]:
        engine.flush_cache()
        results += generate(engine, [prompt])
    return results * 4


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 21, 32])
@pytest.mark.parametrize("order", [1, -1])
def test_batch_size_order_and_cached_prefixes_do_not_matter(engine, alone, size, order):
    if order == 1:
        engine.flush_cache()
    assert generate(engine, PROMPTS[:size][::order]) == alone[:size][::order]


@pytest.mark.parametrize(
    "options", [{"chunked_prefill_size": 32}, {"disable_radix_cache": True}, {"random_seed": 9}], ids=str
)
def test_chunking_cache_and_engine_seed_do_not_matter(alone, options):
    with deterministic_engine(**options) as other:
        assert generate(other, PROMPTS[:8]) == alone[:8]


def test_requests_without_a_seed_use_42_and_samples_still_differ(engine):
    call = {"input_ids": PROMPTS[3], "sampling_params": {**PARAMS, "n": 3}}
    implied = [result["output_ids"] for result in engine.generate(**call)]
    call["sampling_params"]["sampling_seed"] = 42
    assert [result["output_ids"] for result in engine.generate(**call)] == implied
    assert len({tuple(output) for output in implied}) == 3


def test_one_step_is_compiled_for_each_phase():
    """Also when buckets were asked for: a bucket chosen by the size of the batch would change the arithmetic."""
    with deterministic_engine(cuda_graph_bs_decode=[1, 4, 32], cuda_graph_bs_prefill=[16, 64]) as engine:
        assert engine._runner.config.decode_buckets == (32,)
        assert [tokens for tokens, _ in engine._runner.config.prefill_buckets] == [64]
        assert len(generate(engine, PROMPTS)) == 32
