"""Bad input raises the promised type, starts nothing, and leaves the engine as it was."""

import asyncio
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_engine import CONTEXT, check_idle, golden_cases, greedy, prompt_of, start

VOCABULARY = 384
TWO = ["The fox", "A dog"]
IDS = [5, 6, 7]

# (arguments, part of the message)
BAD_CALLS = {
    "nothing to generate from": ({}, "must be given"),
    "three kinds of prompt": ({"prompt": "x", "input_ids": IDS, "input_embeds": [[0.0]]}, "must not all"),
    "no ids": ({"input_ids": []}, "cannot be empty"),
    "one prompt without ids": ({"input_ids": [[5], []]}, "cannot be empty"),
    "ids and lists mixed": ({"input_ids": [5, [6]]}, "input_ids"),
    "id past the vocabulary": ({"input_ids": [5, VOCABULARY]}, "vocabulary"),
    "negative id": ({"input_ids": [-1]}, "vocabulary"),
    "id that is no int": ({"input_ids": [1.5]}, "int"),
    "scalar ids": ({"input_ids": 3}, "input_ids"),
    "prompt of another type": ({"prompt": 3}, "prompt"),
    "prompt list with None": ({"prompt": ["x", None]}, "prompt"),
    "lone surrogate": ({"prompt": "\ud800"}, "Unicode"),
    "texts and ids of different counts": ({"prompt": TWO, "input_ids": [IDS]}, "input_ids"),
    "embeddings beside the prefix cache": ({"input_embeds": [[0.0] * 36]}, "disable_radix_cache"),
    "too few parameter records": ({"prompt": TWO, "sampling_params": [{}]}, "sampling_params"),
    "no parameter records": ({"prompt": TWO, "sampling_params": []}, "sampling_params"),
    "parameters of another type": ({"prompt": "x", "sampling_params": 3}, "sampling_params"),
    "different n": ({"prompt": TWO, "sampling_params": [{"n": 1}, {"n": 2}]}, "n must be equal"),
    "too few flags": ({"prompt": TWO, "return_logprob": [True]}, "return_logprob"),
    "flag of another type": ({"prompt": "x", "return_logprob": "yes"}, "return_logprob"),
    "too many starts": ({"prompt": TWO, "logprob_start_len": [0, 0, 0]}, "logprob_start_len"),
    "start below -1": ({"prompt": "x", "return_logprob": True, "logprob_start_len": -2}, "logprob_start_len"),
    "start past the prompt": (
        {"input_ids": IDS, "return_logprob": True, "logprob_start_len": 4},
        "logprob_start_len",
    ),
    "too few top counts": ({"prompt": TWO, "top_logprobs_num": [1]}, "top_logprobs_num"),
    "negative top count": ({"prompt": "x", "top_logprobs_num": -1}, "top_logprobs_num"),
    "logprob id past the vocabulary": (
        {"prompt": "x", "token_ids_logprob": [VOCABULARY]},
        "token_ids_logprob",
    ),
    "logprob id that is no int": ({"prompt": "x", "token_ids_logprob": ["5"]}, "token_ids_logprob"),
    "too few logprob id lists": ({"prompt": TWO, "token_ids_logprob": [[5]]}, "token_ids_logprob"),
    "hidden states of another kind": (
        {"prompt": "x", "return_hidden_states": "first"},
        "return_hidden_states",
    ),
    "too few hidden flags": ({"prompt": TWO, "return_hidden_states": [True]}, "return_hidden_states"),
    "adapter without LoRA": ({"prompt": "x", "lora_path": "a"}, "lora_path"),
    "adapter of another type": ({"prompt": "x", "lora_path": 3}, "lora_path"),
    "processor without permission": (
        {"prompt": "x", "custom_logit_processor": "a"},
        "enable_custom_logit_processor",
    ),
    "image for a text model": ({"prompt": "x", "image_data": "a.png"}, "image_data"),
    "too few request ids": ({"prompt": TWO, "rid": ["a"]}, "rid"),
    "equal request ids": ({"prompt": TWO, "rid": ["a", "a"]}, "Duplicate request ID"),
    "request id of another type": ({"prompt": "x", "rid": 3}, "rid"),
    "priority of another type": ({"prompt": "x", "priority": "high"}, "priority"),
    "priority past 64 bits": ({"prompt": "x", "priority": 1 << 63}, "priority"),
    "two kinds of session": ({"prompt": "x", "session_params": {"id": "a"}, "session_id": "a"}, "session"),
    "replica that does not exist": ({"prompt": "x", "routed_dp_rank": 1}, "routed_dp_rank"),
    "salt of another type": ({"prompt": "x", "cache_salt": 3}, "cache_salt"),
    "one bad member": ({"prompt": TWO, "sampling_params": [{}, {"top_p": 2.0}]}, "top_p"),
    "prompt as long as the context": ({"input_ids": prompt_of(CONTEXT)}, str(CONTEXT)),
    "one member too long": ({"input_ids": [IDS, prompt_of(CONTEXT)]}, str(CONTEXT)),
}

nan, inf = math.nan, math.inf
# field -> values outside its range
BAD_PARAMETERS = {
    "max_new_tokens": [-1, 1.5, "3"],
    "min_new_tokens": [-1, 200, "1"],
    "n": [0, -1, 1.5],
    "temperature": [-0.1, nan, inf, "hot"],
    "top_p": [0.0, -0.1, 1.01, nan],
    "top_k": [0, -2, 1.5],
    "min_p": [-0.01, 1.01, nan],
    "frequency_penalty": [-2.01, 2.01, nan],
    "presence_penalty": [-2.01, 2.01, inf],
    "repetition_penalty": [0.0, -1.0, 2.01, nan],
    "stop": ["", ["a", ""], [3], ["a"] * 33, 3],
    "stop_token_ids": [["a"], [1.5], 3],
    "stop_regex": ["(", "a" * 257, ["a"] * 33, [3], ""],
    "no_stop_trim": ["yes", 1],
    "ignore_eos": ["no"],
    "skip_special_tokens": [2],
    "stream_interval": [0, 1.5],
    "logit_bias": [{VOCABULARY: 1.0}, {-1: 1.0}, {"x": 1.0}, {5: nan}, {5: "a"}, [5]],
    "sampling_seed": [1 << 63, -(1 << 63) - 1, "7", 1.5],
    "json_schema": [{"type": "object"}],
    "custom_params": [[1]],
}


@pytest.fixture
def served(engine):
    """After the test, the next ordinary request must still be served right."""
    yield engine
    case = golden_cases()[1]
    output = engine.generate(input_ids=case["prompt_ids"], sampling_params=greedy(8))
    assert output["output_ids"] == case["greedy_ids"][:8]


def raises_in_every_mode(engine, arguments, kind, message):
    with pytest.raises(kind, match=message):
        engine.generate(**arguments)
    chunks = engine.generate(**arguments, stream=True)  # errors show at the first `next`
    with pytest.raises(kind, match=message):
        next(chunks)

    async def whole():
        await engine.async_generate(**arguments)

    async def streaming():
        chunks = await engine.async_generate(**arguments, stream=True)
        await anext(chunks)

    for run in (whole, streaming):
        with pytest.raises(kind, match=message):
            asyncio.run(run())


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_raise_value_error(served, case):
    arguments, message = BAD_CALLS[case]
    raises_in_every_mode(served, arguments, ValueError, message)
    check_idle(served)


@pytest.mark.parametrize("field", BAD_PARAMETERS)
def test_parameters_outside_their_range_raise_value_error(served, field):
    for value in BAD_PARAMETERS[field]:
        with pytest.raises(ValueError, match=field):
            served.generate("The fox", {field: value})
    raises_in_every_mode(
        served, {"prompt": "x", "sampling_params": {field: BAD_PARAMETERS[field][0]}}, ValueError, field
    )


@pytest.mark.parametrize(
    "grammars", [{"regex": "a", "ebnf": "root ::= 'a'"}, {"json_schema": "{}", "regex": "a"}]
)
def test_two_grammars_raise_value_error(served, grammars):
    with pytest.raises(ValueError, match="at most one"):
        served.generate("x", grammars)


def test_unknown_names_raise_type_error(served):
    raises_in_every_mode(
        served, {"prompt": "x", "sampling_params": {"temprature": 1.0}}, TypeError, "temperature"
    )
    with pytest.raises(TypeError, match="max_tokens"):
        served.generate("x", max_tokens=3)


def test_values_at_the_ends_of_their_ranges_are_accepted(served):
    for params in (
        {"temperature": 0.0, "top_p": 1.0, "top_k": 1, "min_p": 0.0},
        {"temperature": 1e-6, "top_p": 1e-6, "top_k": -1, "min_p": 1.0},
        {"frequency_penalty": -2.0, "presence_penalty": 2.0, "repetition_penalty": 2.0},
        {"sampling_seed": -(1 << 63), "logit_bias": {"0": 1.0, VOCABULARY - 1: -1.0}},
        {
            "sampling_seed": (1 << 63) - 1,
            "min_new_tokens": 4,
            "stop": ["a"] * 32,
            "stop_token_ids": [None, 5],
        },
        {"stop": [], "stop_regex": [], "json_schema": "", "regex": None, "stop_token_ids": []},
        {"temperature": None, "top_p": None, "n": None, "stop": None},
    ):
        assert served.generate("The fox", {"max_new_tokens": 4, **params})["output_ids"]


def test_an_id_in_flight_cannot_be_used_again(served):
    running = served.generate("The fox", greedy(100), stream=True, rid="taken")
    next(running)
    with pytest.raises(ValueError, match="Duplicate request ID"):
        served.generate("The fox", greedy(1), rid="taken")
    running.close()
    for chunk in served.generate("The fox", greedy(1), rid="free", stream=True):
        assert chunk["meta_info"]["id"] == "free"
    served.generate("The fox", greedy(1), rid="free")


def test_encode_needs_an_embedding_engine(served):
    with pytest.raises(ValueError, match="embedding"):
        served.encode("x")


def test_old_spelling_of_the_replica_warns(served):
    with pytest.warns(DeprecationWarning, match="routed_dp_rank"):
        served.generate("x", greedy(1), data_parallel_rank=0)


def test_without_a_tokenizer_text_is_refused_and_ids_are_served():
    case = golden_cases()[1]
    with start(skip_tokenizer_init=True) as engine:
        for arguments, message in [
            ({"prompt": "x"}, "skip_tokenizer_init"),
            ({"input_ids": IDS, "sampling_params": {"stop": "a"}}, "stop"),
            ({"input_ids": IDS, "sampling_params": {"stop_regex": "a"}}, "stop_regex"),
            ({"input_ids": IDS, "sampling_params": {"min_new_tokens": 1}}, "min_new_tokens"),
            ({"input_ids": IDS, "return_hidden_states": True}, "enable_return_hidden_states"),
        ]:
            raises_in_every_mode(engine, arguments, ValueError, message)
        output = engine.generate(input_ids=case["prompt_ids"], sampling_params=greedy(8))
        assert output["output_ids"] == case["greedy_ids"][:8]
        assert "text" not in output
        for chunk in engine.generate(input_ids=case["prompt_ids"], sampling_params=greedy(8), stream=True):
            assert "text" not in chunk and chunk["output_ids"]
        check_idle(engine)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 400) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
ARGUMENTS = ["prompt", "input_ids", "return_logprob", "logprob_start_len", "top_logprobs_num", "token_ids_logprob",
             "return_hidden_states", "rid", "priority", "cache_salt", "extra_key", "lora_path"]  # fmt: skip
PARAMETERS = ["min_new_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids",
              "stop_regex", "logit_bias", "sampling_seed", "repetition_penalty"]  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arguments=st.dictionaries(st.sampled_from(ARGUMENTS), json_like, max_size=4),
    params=st.dictionaries(st.sampled_from(PARAMETERS), json_like, max_size=3),
)
def test_whatever_is_passed_is_either_served_or_refused_by_name(shared_engine, arguments, params):
    try:
        result = shared_engine.generate(**arguments, sampling_params={"max_new_tokens": 2, **params})
    except (ValueError, TypeError) as error:
        assert str(error)
        return
    for output in result if isinstance(result, list) else [result]:
        assert output["meta_info"]["finish_reason"]["type"] in ("length", "stop")


def test_five_hundred_prompts_with_bad_ones_among_them(served):
    """Each bad prompt fails its own call; the good ones come back complete and in order."""
    rng = np.random.default_rng(0)
    bad = [
        ([], ValueError),
        ([VOCABULARY], ValueError),
        (prompt_of(CONTEXT + 5), ValueError),
        ([1.5], ValueError),
        ("text", ValueError),
    ]
    prompts = [rng.integers(10, 380, rng.integers(1, 40)).tolist() for _ in range(500)]
    chosen = set(rng.choice(500, 25, replace=False).tolist())
    for row in sorted(chosen):
        wrong, kind = bad[row % len(bad)]
        with pytest.raises(kind):
            served.generate(input_ids=[*prompts[:row][-3:], wrong], sampling_params=greedy(2))
    params = [greedy(0 if row % 50 == 0 else 2) for row in range(500)]
    outputs = served.generate(input_ids=prompts, sampling_params=params, return_prompt_token_ids=True)
    assert [output["prompt_token_ids"] for output in outputs] == prompts
    assert [len(output["output_ids"]) for output in outputs] == [p["max_new_tokens"] for p in params]
    for row in (1, 251, 499):
        alone = served.generate(input_ids=prompts[row], sampling_params=greedy(2))
        assert alone["output_ids"] == outputs[row]["output_ids"]
