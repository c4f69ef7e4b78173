"""How long a prompt and its output may be, to the token."""

import logging

import pytest
from tiny_engine import CONTEXT, PAGE, greedy, prompt_of, start

MAX_REQ_LEN = CONTEXT - 1
MAX_REQ_INPUT_LEN = MAX_REQ_LEN - 5


def ends(engine, prompt_len, params, **more):
    """(prompt tokens served, length limit reported) of a request that runs to its limit."""
    output = engine.generate(input_ids=prompt_of(prompt_len), sampling_params=params, **more)
    reason, meta = output["meta_info"]["finish_reason"], output["meta_info"]
    assert reason["type"] == "length"
    assert len(output["output_ids"]) == reason["length"] == meta["completion_tokens"]
    return meta["prompt_tokens"], reason["length"]


def test_limits_that_programs_look_up(engine):
    assert engine.tokenizer_manager.max_req_input_len == MAX_REQ_INPUT_LEN
    assert engine.get_server_info()["max_req_input_len"] == MAX_REQ_INPUT_LEN
    assert engine.tokenizer_manager.model_config.context_len == CONTEXT


@pytest.mark.parametrize("prompt_len", [CONTEXT, CONTEXT + 1, 2 * CONTEXT])
def test_a_prompt_that_fills_the_context_is_refused_naming_both_numbers(engine, prompt_len):
    with pytest.raises(ValueError, match=rf"{prompt_len}.*{CONTEXT}"):
        engine.generate(input_ids=prompt_of(prompt_len), sampling_params={"max_new_tokens": 0})


@pytest.mark.parametrize("prompt_len", [MAX_REQ_INPUT_LEN, MAX_REQ_INPUT_LEN + 1, CONTEXT - 1])
def test_a_prompt_without_room_for_output_is_refused(engine, prompt_len):
    with pytest.raises(ValueError, match=str(prompt_len)):
        engine.generate(input_ids=prompt_of(prompt_len), sampling_params={"max_new_tokens": 0})


def test_the_longest_prompt_is_served(engine):
    prompt_len = MAX_REQ_INPUT_LEN - 1
    assert ends(engine, prompt_len, greedy(0)) == (prompt_len, 0)
    assert ends(engine, prompt_len, greedy(CONTEXT - prompt_len)) == (
        prompt_len,
        MAX_REQ_LEN - prompt_len - 1,
    )


@pytest.mark.parametrize("prompt_len", [1, PAGE, 100, 200])
def test_an_explicit_length_must_fit_the_context(engine, prompt_len):
    room = CONTEXT - prompt_len
    with pytest.raises(ValueError, match=str(CONTEXT)):
        engine.generate(input_ids=prompt_of(prompt_len), sampling_params=greedy(room + 1))
    # Exactly the context is accepted, and clipped by the two tokens every request keeps free.
    assert ends(engine, prompt_len, greedy(room)) == (prompt_len, room - 2)
    assert ends(engine, prompt_len, greedy(room - 2)) == (prompt_len, room - 2)


def test_the_default_length_is_clipped_silently(engine):
    free = {"temperature": 0.0, "ignore_eos": True}
    assert ends(engine, 100, free) == (100, 128)
    assert ends(engine, 200, free) == (200, MAX_REQ_LEN - 201)


def test_none_means_as_much_as_fits(engine):
    for prompt_len in (3, 200):
        expected = MAX_REQ_LEN - prompt_len - 1
        assert ends(engine, prompt_len, greedy(None)) == (prompt_len, expected)


def test_min_new_tokens_is_lowered_with_the_clip(engine):
    params = {"temperature": 0.0, "max_new_tokens": 56, "min_new_tokens": 56}
    assert ends(engine, 200, params) == (200, 54)


@pytest.mark.parametrize("stream", [False, True])
def test_zero_new_tokens_prefill_only(engine, stream):
    prompt = prompt_of(40, seed=1)
    result = engine.generate(
        input_ids=prompt,
        sampling_params={"temperature": 0, "max_new_tokens": 0},
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=3,
        token_ids_logprob=[7, 5],
        stream=stream,
    )
    if stream:
        (result,) = result
    meta = result["meta_info"]
    assert result["text"] == "" and result["output_ids"] == []
    assert meta["completion_tokens"] == 0
    assert meta["finish_reason"] == {"type": "length", "length": 0}
    assert len(meta["input_token_logprobs"]) == len(meta["input_top_logprobs"]) == len(prompt)
    assert meta["output_token_logprobs"] == []
    (top,), (chosen,) = meta["output_top_logprobs"], meta["output_token_ids_logprobs"]
    assert [entry[1] for entry in chosen] == [7, 5]
    # The entry is the distribution of the token that would come next, and the prompt is cached now.
    after = engine.generate(
        input_ids=prompt, sampling_params=greedy(1), return_logprob=True, top_logprobs_num=3
    )
    assert after["meta_info"]["cached_tokens"] == len(prompt) - 1
    assert [entry[1] for entry in top] == [entry[1] for entry in after["meta_info"]["output_top_logprobs"][0]]
    assert top[0][0] == pytest.approx(after["meta_info"]["output_top_logprobs"][0][0][0], abs=1e-5)


def test_a_batch_of_zero_tokens_and_ordinary_requests(engine):
    params = [greedy(0), greedy(3), greedy(0)]
    outputs = engine.generate(input_ids=[prompt_of(5)] * 3, sampling_params=params)
    assert [len(output["output_ids"]) for output in outputs] == [0, 3, 0]


def test_a_batch_member_that_does_not_fit_fails_the_call(engine):
    with pytest.raises(ValueError):
        engine.generate(input_ids=[prompt_of(5), prompt_of(CONTEXT - 1)], sampling_params=greedy(2))


@pytest.fixture(scope="module")
def truncating():
    with start(allow_auto_truncate=True, max_total_tokens=512) as engine:
        yield engine


@pytest.fixture
def warnings_of(caplog):
    logger = logging.getLogger("jaxgen")
    level = logger.level
    logger.setLevel("WARNING")
    yield caplog
    logger.setLevel(level)


def test_truncation_cuts_prompts_from_the_end(truncating, warnings_of):
    long = prompt_of(2 * CONTEXT)
    output = truncating.generate(input_ids=long, sampling_params=greedy(None), return_prompt_token_ids=True)
    assert output["prompt_token_ids"] == long[:MAX_REQ_INPUT_LEN]
    assert output["meta_info"]["prompt_tokens"] == MAX_REQ_INPUT_LEN
    assert output["meta_info"]["finish_reason"] == {"type": "length", "length": 4}
    assert warnings_of.records
    assert ends(truncating, MAX_REQ_INPUT_LEN, greedy(None)) == (MAX_REQ_INPUT_LEN, 4)


def test_truncation_lowers_explicit_lengths(truncating, warnings_of):
    assert ends(truncating, 100, greedy(1000)) == (100, CONTEXT - 102)
    assert any("1000" in record.getMessage() for record in warnings_of.records)


def test_a_request_within_its_limits_is_not_warned_about(truncating, warnings_of):
    assert ends(truncating, 100, greedy(CONTEXT - 100)) == (100, CONTEXT - 102)
    assert ends(truncating, 200, {"temperature": 0.0, "ignore_eos": True}) == (200, MAX_REQ_LEN - 201)
    assert not warnings_of.records


def test_a_pool_smaller_than_the_context_sets_the_limits():
    pool = 128
    with start(max_total_tokens=pool, max_running_requests=2, cuda_graph_bs_decode=[2]) as engine:
        assert engine.tokenizer_manager.max_req_input_len == pool - 6
        with pytest.raises(ValueError):
            engine.generate(input_ids=prompt_of(pool - 6), sampling_params=greedy(0))
        # The clip leaves one page and one token of the pool free.
        for prompt_len in (1, PAGE, PAGE + 1, 80):
            pages = -(-prompt_len // PAGE) * PAGE
            expected = min(pool - 1 - prompt_len - 1, pool - pages - PAGE - 1)
            assert ends(engine, prompt_len, greedy(None)) == (prompt_len, expected)
        assert ends(engine, pool - 7, greedy(5)) == (pool - 7, 0)
