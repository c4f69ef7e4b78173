"""Engines with quantised weights: close to the plain engine, and the same on several devices."""

import numpy as np
import pytest
from tiny_engine import GOLDEN, check_idle, golden_cases, greedy, start, values

from jaxgen.layers.quantization import SCHEMES

FAMILY = "llama2"
# Mean |difference| of log-probabilities; the fixture's random weights make them more sensitive than real ones.
TOLERANCE = {"int8": 0.1, "w8a8_int8": 0.2, "w8a16_fp8": 0.5, "fp8": 0.75}


def engine_of(quantization, **options):
    return start(model_path=str(GOLDEN / FAMILY), quantization=quantization, **options)


def input_logprobs(engine) -> np.ndarray:
    """Of the golden prompts and their golden continuations, given as prompts."""
    ids = [case["prompt_ids"] + case["greedy_ids"] for case in golden_cases(FAMILY)]
    results = engine.generate(
        input_ids=ids, sampling_params=greedy(1), return_logprob=True, logprob_start_len=0
    )
    return np.concatenate([values(result["meta_info"]["input_token_logprobs"]) for result in results])


def generate(engine) -> list[list[int]]:
    prompts = [case["prompt_ids"] for case in golden_cases(FAMILY)]
    return [r["output_ids"] for r in engine.generate(input_ids=prompts, sampling_params=greedy(32))]


@pytest.fixture(scope="module")
def plain():
    with engine_of("unquant") as engine:
        yield input_logprobs(engine), engine._runner.steps.weight_bytes


@pytest.fixture(scope="module", params=sorted(SCHEMES))
def quantized(request):
    with engine_of(request.param) as engine:
        yield request.param, engine
        check_idle(engine)


def test_log_probabilities_stay_near_those_of_the_plain_model(plain, quantized):
    name, engine = quantized
    difference = np.abs(input_logprobs(engine) - plain[0]).mean()
    assert 1e-4 < difference < TOLERANCE[name]  # not the plain model either


def test_greedy_tokens_do_not_depend_on_the_batch(quantized):
    _, engine = quantized
    together = generate(engine)
    assert all(len(ids) == 32 for ids in together)
    engine.flush_cache()
    prompt = golden_cases(FAMILY)[-1]["prompt_ids"]
    assert engine.generate(input_ids=prompt, sampling_params=greedy(32))["output_ids"] == together[-1]


def test_the_matrices_take_one_byte_a_weight(plain, quantized):
    name, engine = quantized
    runner = engine._runner
    small = [array for array in runner.weights if array.dtype.itemsize == 1]
    assert len(small) == 4 * runner.model_config.num_layers
    assert all(array.dtype == SCHEMES[name].dtype for array in small)
    held = sum(array.nbytes for array in runner.weights)
    assert runner.steps.weight_bytes == held
    channels = sum(array.size // array.shape[-1] for array in small)
    assert plain[1] - held == 3 * sum(array.size for array in small) - 4 * channels


def test_two_devices_give_the_tokens_of_one(quantized):
    name, engine = quantized
    with engine_of(name, tp_size=2) as split:
        assert generate(split) == generate(engine)
        np.testing.assert_allclose(input_logprobs(split), input_logprobs(engine), atol=1e-3)


def test_bfloat16_activations(plain):
    with engine_of("fp8", dtype="bfloat16") as engine:
        types = {str(array.dtype) for array in engine._runner.weights}
        assert types == {"float8_e4m3fn", "bfloat16", "float32"}
        assert np.abs(input_logprobs(engine) - plain[0]).mean() < TOLERANCE["fp8"]


def test_dummy_weights_are_quantised_too():
    with engine_of("fp8", load_format="dummy") as engine:
        assert all(len(ids) == 32 for ids in generate(engine))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError) as caught:
        engine_of("fp9")
    assert all(name in str(caught.value) for name in ("quantization", "fp9", *SCHEMES))


def test_compiled_steps_are_not_mixed_up(tmp_path):
    """int8 and w8a16_fp8 differ in nothing but the weights' type, and share a cache directory."""
    for name in ("int8", "w8a16_fp8"):
        with engine_of(name, compilation_cache_dir=str(tmp_path / "steps")) as engine:
            assert all(len(ids) == 32 for ids in generate(engine))
