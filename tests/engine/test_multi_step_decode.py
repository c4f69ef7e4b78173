"""Several decode steps in one launch give the tokens of single steps, and stop where those stop."""

import numpy as np
import pytest
from tiny_engine import check_idle, greedy, prompt_of, start, values
from workload import strict_engine

STEPS = {"num_continuous_decode_steps": 5}
HIDDEN = {"enable_return_hidden_states": True}
LENGTHS = (3, 17, 40, 64, 90, 21)


def workload() -> dict:
    """Requests that end at different tokens: by length, by a stop id, by a stop string."""
    free = strict_engine()
    prompts = [prompt_of(length, seed) for seed, length in enumerate(LENGTHS)]
    with free:
        first = free.generate(input_ids=prompts[2], sampling_params=greedy(12))["output_ids"]
        text = free.generate(input_ids=prompts[3], sampling_params=greedy(12))["text"]
    params = [
        greedy(1),
        greedy(13),
        {"temperature": 0.0, "max_new_tokens": 20, "stop_token_ids": [first[6]]},
        {"temperature": 0.0, "max_new_tokens": 20, "ignore_eos": True, "stop": [text[5:9]]},
        {"temperature": 0.9, "top_p": 0.9, "max_new_tokens": 33, "sampling_seed": 7, "ignore_eos": True},
        {"temperature": 1.0, "max_new_tokens": 9, "sampling_seed": 3, "repetition_penalty": 1.2},
    ]
    return {
        "input_ids": prompts,
        "sampling_params": params,
        "return_logprob": [False, True, True, False, True, False],
        "top_logprobs_num": [0, 2, 0, 0, 3, 0],
        "return_hidden_states": [False, True, False, True, False, False],
    }


@pytest.fixture(scope="module")
def expected():
    call = workload()
    with strict_engine(**HIDDEN) as engine:
        return call, engine.generate(**call)


def check_against(expected, engine, keys=slice(None)) -> None:
    call, results = expected
    found = engine.generate(**{name: values[keys] for name, values in call.items()})
    for result, reference in zip(found, results[keys], strict=True):
        assert result["output_ids"] == reference["output_ids"]
        assert result["text"] == reference["text"]
        finish = result["meta_info"]["finish_reason"]
        assert finish == reference["meta_info"]["finish_reason"]
        for key in ("output_token_logprobs", "output_top_logprobs", "hidden_states"):
            assert (key in result["meta_info"]) == (key in reference["meta_info"])
        if "output_token_logprobs" in result["meta_info"]:
            found_values, wanted_values = (
                values(entry["meta_info"]["output_token_logprobs"]) for entry in (result, reference)
            )
            np.testing.assert_allclose(found_values, wanted_values, atol=1e-5)
            assert len(found_values) == len(result["output_ids"])
        if "hidden_states" in result["meta_info"]:
            states = result["meta_info"]["hidden_states"], reference["meta_info"]["hidden_states"]
            for a, b in zip(*([np.asarray(x) for x in entry] for entry in states), strict=True):
                last = b if b.ndim == 1 else b[-len(a) :]  # cached positions have no vector
                np.testing.assert_allclose(a, last, atol=1e-4)
        assert result["meta_info"]["cache_miss_count"] == 0
    check_idle(engine)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"disable_overlap_schedule": True},
        {"max_total_tokens": 320},
        {"enable_mixed_chunk": True},
        {"num_continuous_decode_steps": 16},
    ],
)
def test_results_are_those_of_single_steps(expected, options):
    with strict_engine(**(STEPS | HIDDEN | options)) as engine:
        check_against(expected, engine)
        check_against(expected, engine, slice(0, 1))
        check_against(expected, engine)


def test_one_launch_serves_several_tokens():
    with start(**STEPS) as engine:
        launches = []
        launch = engine._runner.launch
        engine._runner.launch = lambda plan: launches.append(plan) or launch(plan)
        engine.generate(input_ids=prompt_of(9), sampling_params=greedy(21))
        decodes = [plan for plan in launches if plan.kind == "decode"]
        assert [plan.steps for plan in decodes] == [5] * 4
        launches.clear()
        engine.generate(input_ids=prompt_of(9), sampling_params=greedy(4), return_logprob=True)
        assert [plan.steps for plan in launches if plan.kind == "decode"] == [5]


def test_streaming_brings_the_tokens_of_a_launch_together():
    with start(**STEPS) as engine:
        chunks = engine.generate(input_ids=prompt_of(9), sampling_params=greedy(12), stream=True)
        lengths = [len(chunk["output_ids"]) for chunk in chunks]
    assert lengths[-1] == 12
    assert lengths == sorted(set(lengths)) and set(lengths) <= {1, 6, 11, 12}


def test_more_steps_than_a_page_holds_are_refused():
    with pytest.raises(ValueError, match="num_continuous_decode_steps must be 1 to page_size"):
        start(num_continuous_decode_steps=17)
