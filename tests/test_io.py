"""From the arguments of a call to requests, and from a request to its result."""

import re
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgen.errors import RequestError
from jaxgen.io import (
    GenerateReqInput,
    InputContext,
    LengthLimits,
    LogprobData,
    RequestSnapshot,
    apply_length_limits,
    make_output,
    merge_chunks,
    raise_if_failed,
)
from jaxgen.outputs import Emitted
from jaxgen.sampling_params import SamplingParams
from jaxgen.server_args import ServerArgs
from tests.tiny_tokenizers import byte_level, metaspace

VOCAB = 405
LIMITS = LengthLimits(context_length=64, max_req_len=63, max_req_input_len=58, pool_tokens=1024, page_size=16)
TEXT = ["Hello world", "the quick fox"]


def context(*, tokenizer="default", limits=LIMITS, in_flight=(), vocab_size=VOCAB, **options):
    return InputContext(
        server_args=ServerArgs(model_path="m", **options),
        vocab_size=vocab_size,
        tokenizer=byte_level() if tokenizer == "default" else tokenizer,
        limits=limits,
        in_flight=in_flight,
    )


def normalize(engine=None, **arguments):
    return GenerateReqInput(**arguments).normalize(engine or context())


# Single or batch


def test_a_text_is_a_single_request_and_a_list_a_batch():
    call = normalize(prompt=TEXT[0])
    assert call.single and list(call.requests[0].prompt_ids) == byte_level().encode(TEXT[0])
    call = normalize(prompt=TEXT[:1])
    assert not call.single and len(call.requests) == 1
    assert [request.text for request in normalize(prompt=TEXT).requests] == TEXT


def test_no_prompts_are_no_requests():
    call = normalize(prompt=[])
    assert call.requests == [] and not call.single


@pytest.mark.parametrize(
    ("ids", "rows"),
    [
        ([1, 2, 3], [[1, 2, 3]]),
        ((1, 2), [[1, 2]]),
        (np.array([1, 2], np.int64), [[1, 2]]),
        ([np.int32(1), np.int32(2)], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ([np.array([1]), np.array([2, 3])], [[1], [2, 3]]),
    ],
)
def test_ids_come_as_lists_or_arrays(ids, rows):
    call = normalize(input_ids=ids)
    assert [list(request.prompt_ids) for request in call.requests] == rows
    assert call.single == (np.ndim(ids[0]) == 0)
    assert all(type(token) is int for request in call.requests for token in request.prompt_ids)


@pytest.mark.parametrize("ids", [[], [[]], [[1], []], np.zeros((0,), int), np.zeros((1, 0), int)])
def test_empty_ids_are_refused(ids):
    with pytest.raises(ValueError, match="cannot be empty"):
        normalize(input_ids=ids)


@pytest.mark.parametrize(
    "ids",
    [
        *(1, "12", {1: 2}, b"12", object(), np.array(3)),
        *([1.0], [True], ["1"], [None], [-1], [VOCAB], [2**63], np.array([0.5])),
        *([1, [2]], [[1], 2], [[[1]]]),
    ],
    ids=lambda ids: "an object" if type(ids) is object else str(ids),  # its address differs between workers
)
def test_bad_ids_are_value_errors(ids):
    with pytest.raises(ValueError, match="input_ids"):
        normalize(input_ids=ids)


@pytest.mark.parametrize("prompt", [1, b"a", ["a", 1], [None], {"a": 1}, ["a", ["b"]], [[1, 2]], True])
def test_bad_prompts_are_value_errors(prompt):
    with pytest.raises(ValueError, match="prompt"):
        normalize(prompt=prompt)


def test_something_must_be_given_but_not_everything():
    with pytest.raises(ValueError, match="must be given"):
        normalize()
    with pytest.raises(ValueError, match="must not all"):
        normalize(prompt="a", input_ids=[1], input_embeds=[[0.5]])


def test_embeddings_need_the_prefix_cache_off():
    with pytest.raises(ValueError, match="disable_radix_cache"):
        normalize(input_embeds=[[0.5]])
    with pytest.raises(NotImplementedError, match="input_embeds"):
        normalize(context(disable_radix_cache=True), input_embeds=[[0.5]])


def test_ids_take_the_place_of_a_prompt_given_with_them():
    call = normalize(prompt="anything", input_ids=[7, 8])
    assert call.single and list(call.requests[0].prompt_ids) == [7, 8] and call.requests[0].text == "anything"
    call = normalize(prompt=["a", "b"], input_ids=[[7], [8]])
    assert [list(request.prompt_ids) for request in call.requests] == [[7], [8]]
    for prompt, ids in [("a", [[1]]), (["a"], [1]), (["a", "b"], [[1]]), ("a", [[1], [2]])]:
        with pytest.raises(ValueError, match="same prompts"):
            normalize(prompt=prompt, input_ids=ids)


def test_a_text_without_ids_is_bos_or_an_error():
    assert list(normalize(prompt="").requests[0].prompt_ids) == [byte_level().bos_token_id]
    with pytest.raises(ValueError, match="cannot be empty"):
        normalize(context(tokenizer=metaspace(), vocab_size=86), prompt=["a", ""])


def test_without_tokenizer_only_ids_are_taken():
    bare = context(tokenizer=None, skip_tokenizer_init=True)
    assert list(normalize(bare, input_ids=[1]).requests[0].prompt_ids) == [1]
    for arguments in (
        {"prompt": "a"},
        {"prompt": ["a"]},
        *({"input_ids": [1], "sampling_params": {name: value}} for name, value in
          [("stop", "a"), ("stop_regex", "a"), ("min_new_tokens", 1)]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="skip_tokenizer_init"):
            normalize(bare, **arguments)


def test_generate_on_an_embedding_engine_is_refused():
    engine = InputContext(ServerArgs(model_path="m"), VOCAB, byte_level(), is_generation=False)
    with pytest.raises(ValueError, match="encode"):
        normalize(engine, prompt="a")


# Per-prompt values


def test_shared_values_reach_every_prompt_and_lists_theirs():
    call = normalize(
        prompt=TEXT,
        sampling_params=[{"temperature": 0}, {"temperature": 0.5}],
        return_logprob=[True, False],
        logprob_start_len=[None, 1],
        top_logprobs_num=2,
        token_ids_logprob=[[1, 2], None],
    )
    first, second = call.requests
    assert (first.params.greedy, second.params.temperature) == (True, 0.5)
    assert (first.return_logprob, second.return_logprob) == (True, False)
    assert (first.logprob_start_len, second.logprob_start_len) == (-1, 1)
    assert first.top_logprobs_num == second.top_logprobs_num == 2
    assert (first.token_ids_logprob, second.token_ids_logprob) == ([1, 2], None)
    shared = normalize(prompt=TEXT, token_ids_logprob=[3, 4])
    assert [request.token_ids_logprob for request in shared.requests] == [[3, 4], [3, 4]]


def test_defaults():
    request = normalize(prompt="the", return_logprob=None, token_ids_logprob=[]).requests[0]
    assert not request.return_logprob and request.return_hidden_states is False
    assert (request.logprob_start_len, request.top_logprobs_num, request.token_ids_logprob) == (-1, 0, None)
    assert re.fullmatch("[0-9a-f]{32}", request.rid) and request.base_rid is None
    assert (request.priority, request.namespace) == (None, "")


def test_more_top_logprobs_than_tokens_are_clipped():
    assert normalize(prompt="a", top_logprobs_num=10**6).requests[0].top_logprobs_num == VOCAB


@pytest.mark.parametrize(
    "arguments",
    [
        {"sampling_params": [{}]},
        {"sampling_params": [{}, {}, {}]},
        {"sampling_params": []},
        {"sampling_params": 5},
        {"sampling_params": [{"n": 2}, {"n": 3}]},
        {"sampling_params": {"n": 0}},
        {"sampling_params": {"temperature": float("nan")}},
        {"return_logprob": [True]},
        {"return_logprob": 1},
        {"return_logprob": "yes"},
        {"logprob_start_len": [0]},
        {"logprob_start_len": -2},
        {"logprob_start_len": 100},
        {"logprob_start_len": [0, 100]},
        {"logprob_start_len": 1.0},
        {"top_logprobs_num": [1, 2, 3]},
        {"top_logprobs_num": -1},
        {"top_logprobs_num": True},
        {"token_ids_logprob": [[1]]},
        {"token_ids_logprob": [1, [2]]},
        {"token_ids_logprob": [-1]},
        {"token_ids_logprob": [VOCAB]},
        {"token_ids_logprob": [1.5]},
        {"token_ids_logprob": 5},
        {"return_hidden_states": True},
        {"return_hidden_states": "last"},
        {"return_hidden_states": "first"},
        {"return_hidden_states": 1},
        {"return_hidden_states": [True]},
        {"lora_path": "adapter"},
        {"lora_path": ["adapter", None]},
        {"lora_path": 5},
        {"lora_path": [None]},
        {"lora_path": [1, 2]},
        {"custom_logit_processor": "x"},
        {"custom_logit_processor": ["x", None]},
        {"custom_logit_processor": 1},
        {"image_data": "x.png"},
        {"image_data": [b"x"]},
        {"image_data": [None, ["x"]]},
        {"image_data": [np.ones(3)]},
        {"audio_data": "x.wav"},
        {"video_data": ["x.mp4"]},
        {"rid": ["a"]},
        {"rid": ["a", "a"]},
        {"rid": ["a", 1]},
        {"rid": ""},
        {"rid": 5},
        {"priority": 2**63},
        {"priority": -(2**63) - 1},
        {"priority": 1.0},
        {"priority": True},
        {"priority": [1, 2]},
        {"session_params": {"id": "a"}, "session_id": "b"},
        {"session_params": "a"},
        {"routed_dp_rank": 1},
        {"routed_dp_rank": -1},
        {"routed_dp_rank": 1.0},
        {"cache_salt": 5},
        {"extra_key": ["a"]},
        {"extra_key": 5},
        {"return_text_in_logprobs": 1},
        {"return_prompt_token_ids": "yes"},
    ],
    ids=str,
)
def test_broken_rules_are_value_errors_that_name_the_argument(arguments):
    with pytest.raises(ValueError) as caught:
        normalize(prompt=TEXT, **arguments)
    message, (name, value) = str(caught.value), next(iter(arguments.items()))
    named = {name, *(value if isinstance(value, dict) else ())}
    if name == "sampling_params" and isinstance(value, list):
        named |= {"n must be equal"}
    assert any(part in message for part in named) or "Duplicate request ID" in message


@pytest.mark.parametrize(
    "arguments",
    [
        {"session_params": {"id": "a"}},
        {"session_id": "a"},
        {"return_routed_experts": True},
        {"mm_hashes": ["a"]},
        {"sampling_params": {"json_schema": "{}"}},
    ],
    ids=str,
)
def test_what_is_not_available_says_so(arguments):
    with pytest.raises(NotImplementedError):
        normalize(prompt=TEXT, **arguments)


def test_inert_arguments_are_accepted():
    normalize(
        prompt=TEXT,
        image_data=[None, []],
        audio_data=[],
        lora_path=[None, None],
        custom_logit_processor=None,
        bootstrap_host="h",
        kv_hints={},
        routed_dp_rank=0,
        external_trace_header={"a": "b"},
        require_reasoning=True,
    )


def test_unknown_sampling_parameters_are_type_errors():
    with pytest.raises(TypeError, match="temperature"):
        normalize(prompt="a", sampling_params={"temprature": 1})


def test_the_old_name_of_the_replica_warns():
    with pytest.warns(DeprecationWarning, match="routed_dp_rank"):
        normalize(prompt="a", data_parallel_rank=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="routed_dp_rank"):
            normalize(prompt="a", data_parallel_rank=3)


def test_engine_defaults_reach_requests():
    engine = context(preferred_sampling_params={"top_p": 0.5, "max_new_tokens": 7})
    request = normalize(engine, prompt="a", sampling_params={"max_new_tokens": 3}).requests[0]
    assert (request.params.top_p, request.max_new_tokens) == (0.5, 3)


@pytest.mark.parametrize(
    ("options", "value", "allowed"),
    [
        ({"enable_return_hidden_states": True}, True, True),
        ({"enable_return_hidden_states": True}, "last", True),
        ({"return_hidden_states_mode": "full"}, True, True),
        ({"return_hidden_states_mode": "last"}, "last", True),
        ({"return_hidden_states_mode": "last"}, True, False),
        ({}, "last", False),
        ({}, False, True),
        ({}, None, True),
    ],
)
def test_hidden_states_only_as_far_as_enabled(options, value, allowed):
    engine = context(**options)
    if allowed:
        assert normalize(engine, prompt="a", return_hidden_states=value).requests[0].return_hidden_states == (
            value or False
        )
    else:
        with pytest.raises(ValueError, match="return_hidden_states"):
            normalize(engine, prompt="a", return_hidden_states=value)


# Ids and parallel sampling


def test_request_ids():
    assert normalize(prompt="a", rid="x").requests[0].rid == "x"
    batch = normalize(prompt=TEXT, rid="x")
    assert [request.rid for request in batch.requests] == ["x_0", "x_1"]
    assert {request.base_rid for request in batch.requests} == {"x"}
    assert [request.rid for request in normalize(prompt=TEXT, rid=["p", "q"]).requests] == ["p", "q"]
    for arguments in ({"prompt": TEXT, "rid": ["p", "p"]}, {"prompt": "a", "rid": "busy"}):
        with pytest.raises(ValueError, match="Duplicate request ID"):
            normalize(context(in_flight={"busy"}), **arguments)


def test_samples_come_in_prompt_major_order_with_ids_and_seeds_of_their_own():
    call = normalize(
        prompt=TEXT,
        sampling_params={"n": 3, "sampling_seed": 2**63 - 2},
        rid=["p", "q"],
        top_logprobs_num=[1, 2],
    )
    assert not call.single
    assert [(request.index, request.prompt_index, request.sample) for request in call.requests] == [
        (0, 0, 0), (1, 0, 1), (2, 0, 2), (3, 1, 0), (4, 1, 1), (5, 1, 2),
    ]  # fmt: skip
    assert len({request.rid for request in call.requests} | {"p", "q"}) == 8
    assert [request.params.sampling_seed for request in call.requests[:3]] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert [request.top_logprobs_num for request in call.requests] == [1, 1, 1, 2, 2, 2]


def test_several_samples_of_one_prompt_are_a_batch():
    call = normalize(prompt="a", sampling_params={"n": 2}, rid="x")
    assert not call.single and [request.rid for request in call.requests] == ["x_0", "x_1"]


def test_namespaces_keep_salts_and_keys_apart():
    seen = {
        normalize(prompt="a", cache_salt=salt, extra_key=key).requests[0].namespace
        for salt in (None, "", "a", "ab", '"]')
        for key in (None, "", "b", '", "b')
    }
    assert len(seen) == 20
    pair = normalize(prompt=TEXT, cache_salt="s", extra_key=["a", "b"]).requests
    assert pair[0].namespace != pair[1].namespace


def test_one_bad_member_refuses_the_whole_call():
    prompts = [[1]] * 5 + [[VOCAB]] + [[1]] * 5
    with pytest.raises(ValueError, match="input_ids"):
        normalize(input_ids=prompts)
    with pytest.raises(ValueError, match="context length"):
        normalize(input_ids=[[1], [1] * 64])


def test_ten_thousand_prompts_keep_their_order():
    call = normalize(input_ids=[[row % VOCAB, row // VOCAB] for row in range(10_000)])
    assert [list(request.prompt_ids) for request in call.requests] == [
        [row % VOCAB, row // VOCAB] for row in range(10_000)
    ]
    assert [request.index for request in call.requests] == list(range(10_000))


anything = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.binary(max_size=2)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=5,
)
ARGUMENTS = sorted(set(GenerateReqInput.__dataclass_fields__) - {"data_parallel_rank"})


@settings(max_examples=1500, deadline=None)
@given(st.dictionaries(st.sampled_from(ARGUMENTS), anything, max_size=3))
def test_whatever_is_given_there_are_requests_or_an_error_of_the_right_type(arguments):
    try:
        call = normalize(**{"prompt": "a", **arguments})
    except (ValueError, NotImplementedError):
        return
    except TypeError as error:
        assert "unknown sampling parameter" in str(error)
        return
    for position, request in enumerate(call.requests):
        assert request.index == position and request.prompt_ids
        assert -1 <= request.logprob_start_len <= len(request.prompt_ids)


# Length rules


def fit(prompt_len, params=None, truncate=False, limits=LIMITS):
    return apply_length_limits(prompt_len, SamplingParams.from_request(params), limits, truncate)


@pytest.mark.parametrize(
    ("prompt_len", "params", "prompt_after", "tokens"),
    [
        (10, None, 10, 52),  # the default 128 is clipped silently to 63 - 10 - 1
        (10, {"max_new_tokens": None}, 10, 52),
        (10, {"max_new_tokens": 5}, 10, 5),
        (10, {"max_new_tokens": 0}, 10, 0),
        (10, {"max_new_tokens": 54}, 10, 52),
        (57, None, 57, 5),
        (1, {"max_new_tokens": 61}, 1, 61),
    ],
)
def test_lengths_that_fit(prompt_len, params, prompt_after, tokens):
    fitted = fit(prompt_len, params)
    assert (fitted.prompt_len, fitted.max_new_tokens, fitted.warnings) == (prompt_after, tokens, ())
    assert fit(prompt_len, params, truncate=True) == fitted


@pytest.mark.parametrize(
    ("prompt_len", "params", "numbers", "prompt_after", "tokens"),
    [
        (64, None, ("64", "64"), 58, 4),
        (1000, None, ("1000", "64"), 58, 4),
        (10, {"max_new_tokens": 55}, ("10", "55", "64"), 10, 52),
        (10, {"max_new_tokens": 2**63}, ("10", "64"), 10, 52),
        (58, None, ("58", "57"), 58, 4),
        (63, None, ("63", "57"), 58, 4),
    ],
)
def test_lengths_that_do_not_fit_are_errors_or_cut(prompt_len, params, numbers, prompt_after, tokens):
    with pytest.raises(ValueError) as caught:
        fit(prompt_len, params)
    assert all(number in str(caught.value) for number in numbers)
    fitted = fit(prompt_len, params, truncate=True)
    assert (fitted.prompt_len, fitted.max_new_tokens) == (prompt_after, tokens) and fitted.warnings


def test_the_pool_bounds_generation_by_whole_pages():
    small = LengthLimits(1000, 99, 94, pool_tokens=100, page_size=16)
    assert fit(20, None, limits=small).max_new_tokens == 100 - 32 - 16 - 1
    assert fit(90, None, limits=small).max_new_tokens == 0


def test_the_minimum_is_lowered_with_the_maximum():
    fitted = fit(10, {"min_new_tokens": 100, "max_new_tokens": None})
    assert fitted.min_new_tokens == fitted.max_new_tokens == 52


def test_truncation_keeps_the_first_ids_and_logs(caplog):
    caplog.set_level("WARNING", "jaxgen")  # an engine of another test may have set it higher
    engine = context(allow_auto_truncate=True)
    request = normalize(engine, input_ids=list(range(100)), logprob_start_len=58).requests[0]
    assert list(request.prompt_ids) == list(range(58)) and request.max_new_tokens == 4
    assert "keeping its first 58" in caplog.text
    with pytest.raises(ValueError, match="logprob_start_len"):
        normalize(engine, input_ids=list(range(100)), logprob_start_len=59)


# Results

ALWAYS = {
    "id", "finish_reason", "prompt_tokens", "completion_tokens", "cached_tokens", "cached_tokens_details",
    "reasoning_tokens", "num_retractions", "weight_version", "dp_rank", "cache_miss_count",
}  # fmt: skip
FINISHED = {"e2e_latency", "response_sent_to_client_ts", "weight_versions"}
LENGTH = {"type": "length", "length": 2}


def snapshot(**options):
    defaults = {"rid": "r", "output_ids": [5, 6], "text": "ab", "finish_reason": LENGTH, "prompt_tokens": 3}
    return RequestSnapshot(**{**defaults, **options})


def logprobs(prompt=(1, 2, 3)):
    selected = [[(-3.0, 20, None), (-4.0, 21, None)], [(-5.0, 20, None), (-6.0, 21, None)]]
    return LogprobData(
        input=list(zip([None, -1.0, -2.0], prompt, [None] * 3)),
        input_top=[None, [(-0.5, 7, None)], [(-0.25, 8, None)]][: len(prompt)],
        input_selected=[None, *selected][: len(prompt)],
        output=[(-0.1, 5, None), (-0.2, 6, None)],
        output_top=[[(-0.1, 5, None)], [(-0.2, 6, None)]],
        output_selected=selected,
    )


def test_keys_of_a_plain_result():
    output = make_output(snapshot(received_at=1.0, finished_at=3.5))
    assert set(output) == {"text", "output_ids", "meta_info"}
    assert set(output["meta_info"]) == ALWAYS | FINISHED
    assert output["meta_info"]["e2e_latency"] == 2.5
    assert output["meta_info"]["weight_versions"] == [{"version": "default", "start": 0, "end": 2}]


def test_keys_of_other_results():
    middle = make_output(snapshot(finish_reason=None, index=1))
    assert set(middle) == {"text", "output_ids", "meta_info", "index"} and middle["index"] == 1
    assert set(middle["meta_info"]) == ALWAYS and middle["meta_info"]["finish_reason"] is None
    bare = make_output(snapshot(text=None, prompt_token_ids=[1, 2, 3]))
    assert set(bare) == {"output_ids", "prompt_token_ids", "meta_info"}
    plain = make_output(snapshot(logprobs=logprobs()))["meta_info"]
    assert set(plain) - ALWAYS - FINISHED == {
        "input_token_logprobs", "output_token_logprobs", "output_token_logprobs_length",
    }  # fmt: skip
    hidden = make_output(snapshot(return_hidden_states=True, hidden_states=[np.ones((2, 4))]))
    assert set(hidden["meta_info"]) == ALWAYS | FINISHED | {"hidden_states"}
    timed = make_output(snapshot(metrics={"queue_time": 0.5}))
    assert timed["meta_info"]["queue_time"] == 0.5


def test_logprob_entries():
    meta = make_output(snapshot(top_logprobs_num=1, token_ids_logprob=[20, 21], logprobs=logprobs()))[
        "meta_info"
    ]
    assert meta["input_token_logprobs"] == [(None, 1, None), (-1.0, 2, None), (-2.0, 3, None)]
    assert meta["input_top_logprobs"] == [None, [(-0.5, 7, None)], [(-0.25, 8, None)]]
    assert meta["input_token_ids_logprobs"] == [None, [(-3.0, 20, None), (-4.0, 21, None)],
                                                [(-5.0, 20, None), (-6.0, 21, None)]]  # fmt: skip
    assert [entry[1:] for entry in meta["output_token_logprobs"]] == [(5, None), (6, None)]
    assert meta["output_top_logprobs"] == [[(-0.1, 5, None)], [(-0.2, 6, None)]]
    assert meta["output_token_logprobs_length"] == 2


def test_logprob_entries_show_text_only_on_request():
    wanted = snapshot(top_logprobs_num=1, logprobs=logprobs())
    meta = make_output(wanted, token_text=lambda token: f"<{token}>")["meta_info"]
    assert meta["input_token_logprobs"][0] == (None, 1, "<1>")
    assert meta["output_top_logprobs"][0] == [(-0.1, 5, "<5>")]


def test_without_prompt_logprobs_the_input_lists_are_empty():
    meta = make_output(snapshot(top_logprobs_num=1, token_ids_logprob=[1, 2], logprobs=logprobs(prompt=())))[
        "meta_info"
    ]
    assert (
        meta["input_token_logprobs"] == meta["input_top_logprobs"] == meta["input_token_ids_logprobs"] == []
    )


def test_scoring_without_generation_keeps_the_next_distribution():
    data = LogprobData(
        input=[(None, 1, None)],
        output_selected=[[(-1.0, 9, None)]],
        output_top=[[(-2.0, 4, None)]],
    )
    meta = make_output(
        snapshot(
            output_ids=[],
            text="",
            top_logprobs_num=1,
            token_ids_logprob=[9],
            logprobs=data,
        )
    )["meta_info"]
    assert meta["output_token_logprobs"] == [] and meta["completion_tokens"] == 0
    assert meta["output_token_ids_logprobs"] == [[(-1.0, 9, None)]]
    assert meta["output_top_logprobs"] == [[(-2.0, 4, None)]]


def test_hidden_states_join_to_all_rows():
    states = [np.arange(6, dtype=np.float16).reshape(3, 2), np.ones(2), np.full(2, 2.0)]
    full = make_output(snapshot(return_hidden_states=True, hidden_states=states))["meta_info"][
        "hidden_states"
    ]
    rows = [np.atleast_2d(np.array(entry)) for entry in full]
    assert np.concatenate(rows).shape == (5, 2) and type(full[1][0]) is float
    for count, newest in ((3, [2.0, 2.0]), (1, [4.0, 5.0])):
        last = make_output(snapshot(return_hidden_states="last", hidden_states=states[:count]))
        assert last["meta_info"]["hidden_states"] == newest


def test_incremental_chunks_hold_only_what_is_new_and_join_to_the_whole():
    wanted = {
        "top_logprobs_num": 1,
        "token_ids_logprob": [20, 21],
        "logprobs": logprobs(),
    }
    whole = make_output(snapshot(**wanted))
    half = logprobs()
    half.output, half.output_top = half.output[:1], half.output_top[:1]
    half.output_selected = half.output_selected[:1]
    first = make_output(
        snapshot(**{**wanted, "logprobs": half}, output_ids=[5], text="a", finish_reason=None),
        emitted=Emitted(),
    )
    second = make_output(snapshot(**wanted), emitted=Emitted(text=1, ids=1))
    assert (second["text"], second["output_ids"]) == ("b", [6])
    assert len(second["meta_info"]["output_token_logprobs"]) == 1
    assert second["meta_info"]["completion_tokens"] == 2
    assert second["meta_info"]["input_token_logprobs"] == whole["meta_info"]["input_token_logprobs"]
    joined = merge_chunks(first, second, incremental=True)
    for output in (whole, joined):
        del output["meta_info"]["e2e_latency"], output["meta_info"]["response_sent_to_client_ts"]
    assert joined == whole
    assert merge_chunks(first, whole, incremental=False) is whole


def test_aborts_become_errors_by_status():
    raise_if_failed(None)
    raise_if_failed(LENGTH)
    raise_if_failed({"type": "abort", "message": "Aborted", "status_code": None, "err_type": None})
    with pytest.raises(ValueError, match="too long"):
        raise_if_failed({"type": "abort", "message": "too long", "status_code": 400, "err_type": None})
    for status in (500, 503):
        with pytest.raises(RequestError, match="no room") as caught:
            raise_if_failed({"type": "abort", "message": "no room", "status_code": status, "err_type": None})
        assert (caught.value.status_code, caught.value.detail) == (status, "no room")
