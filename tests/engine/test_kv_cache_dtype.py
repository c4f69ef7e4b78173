"""An 8-bit KV cache: half the memory, at results close to those of a whole one."""

import json

import numpy as np
import pytest
from tiny_engine import GOLDEN, golden_cases, greedy, start, values

from jaxgen.checkpoint.errors import CheckpointError

CASES = golden_cases()
LAYERS = json.loads((GOLDEN / "llama3" / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]


def scales_file(path, scale=0.05, layers=LAYERS, dtype="float8_e4m3fn"):
    factors = {"0": {str(i): scale for i in range(layers)}}
    path.write_text(json.dumps({"kv_cache": {"dtype": dtype, "scaling_factor": factors}}), encoding="utf-8")
    return str(path)


def score(engine, ids):
    """Log-probabilities of every token of the texts but their first."""
    outputs = engine.generate(
        input_ids=ids, sampling_params=greedy(1), return_logprob=True, logprob_start_len=0
    )
    return [values(output["meta_info"]["input_token_logprobs"]) for output in outputs]


def error(engine):
    """Mean error of the golden prompts' log-probabilities."""
    found = score(engine, [case["prompt_ids"] for case in CASES])
    return np.abs(np.concatenate(found) - np.concatenate([case["prompt_logprobs"] for case in CASES])).mean()


def chunked(**options):
    """An engine whose prompts come in several chunks: later ones read what the first have stored."""
    return start(chunked_prefill_size=32, cuda_graph_bs_prefill=[32], **options)


@pytest.fixture(scope="module")
def rounding_error():
    with chunked(kv_cache_dtype="bfloat16") as engine:
        return error(engine)


@pytest.mark.parametrize("scaled", [False, True])
def test_results_stay_near_those_of_a_whole_cache(scaled, rounding_error, tmp_path):
    options = {"kv_cache_dtype": "fp8_e4m3"}
    if scaled:
        options["quantization_param_path"] = scales_file(tmp_path / "scales.json")
    with chunked(**options) as engine:
        # Four bits of mantissa less than bfloat16: 16 times the rounding.
        assert 4 * rounding_error < error(engine) < 24 * rounding_error
        prompts = [case["prompt_ids"] for case in CASES]
        outputs = engine.generate(input_ids=prompts, sampling_params=greedy(20), return_logprob=True)
        engine.flush_cache()
        texts = [prompt + output["output_ids"] for prompt, output in zip(prompts, outputs, strict=True)]
        for found, output in zip(score(engine, texts), outputs, strict=True):
            decoded = values(output["meta_info"]["output_token_logprobs"])
            np.testing.assert_allclose(decoded, found[-20:], atol=0.02)  # decoding stores what prefill does


def test_a_token_takes_half_the_memory():
    sizes = []
    for dtype in ("bfloat16", "fp8_e4m3"):
        with start(kv_cache_dtype=dtype) as engine:
            sizes.append(sum(pages.nbytes for pages in engine._runner.kv))
    assert sizes[0] == 2 * sizes[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 0.0}, "layer 0 must be a positive number"),
        ({"scale": "1"}, "layer 0 must be a positive number"),
        ({"layers": LAYERS + 1}, f"scales of {LAYERS + 1} layers"),
        ({"dtype": "float8_e5m2"}, "float8_e4m3fn"),
    ],
)
def test_unusable_scales_name_the_file(changes, message, tmp_path):
    path = scales_file(tmp_path / "scales.json", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        start(kv_cache_dtype="fp8_e4m3", quantization_param_path=path)
    assert path in str(caught.value)
