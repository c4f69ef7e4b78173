"""Every supported architecture through the whole engine, against Hugging Face: chunked, batched, then cached."""

import numpy as np
import pytest
from tiny_engine import GOLDEN, PAGE, golden_cases, greedy, start, values


@pytest.mark.parametrize("family", ["llama2", "llama3", "llama_yarn", "mistral", "qwen2", "qwen3"])
def test_golden_prompts_in_one_batch(family):
    cases = golden_cases(family)
    ids = [case["prompt_ids"] for case in cases]
    options = {
        "model_path": str(GOLDEN / family),
        "chunked_prefill_size": 2 * PAGE,
        "cuda_graph_bs_prefill": [2 * PAGE],
    }
    with start(**options) as engine:
        for start_len in (0, -1):  # cold with prompt log-probabilities, then warm
            outputs = engine.generate(
                input_ids=ids,
                sampling_params=greedy(32),
                return_logprob=True,
                logprob_start_len=start_len,
            )
            for output, case in zip(outputs, cases):
                meta = output["meta_info"]
                assert output["output_ids"] == case["greedy_ids"]
                np.testing.assert_allclose(
                    values(meta["output_token_logprobs"]), case["greedy_logprobs"], atol=1e-4
                )
                assert meta["cache_miss_count"] == 0
                if start_len == 0:
                    np.testing.assert_allclose(
                        values(meta["input_token_logprobs"]), case["prompt_logprobs"], atol=1e-4
                    )
                else:
                    assert meta["cached_tokens"] == len(case["prompt_ids"]) - 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_stay_near_float32(dtype):
    """Rounding may change a greedy token, so the prompt's log-probabilities are compared."""
    case = golden_cases()[3]
    with start(dtype=dtype) as engine:
        meta = engine.generate(
            input_ids=case["prompt_ids"], sampling_params=greedy(1), return_logprob=True, logprob_start_len=0
        )["meta_info"]
    error = np.abs(values(meta["input_token_logprobs"]) - case["prompt_logprobs"])
    tolerance = {"bfloat16": 0.15, "float16": 0.02}[dtype]
    assert error.mean() < tolerance
