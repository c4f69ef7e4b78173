"""Where a request stops, and that streamed text is a growing prefix of the final text, through the engine."""

import asyncio
import itertools
import random

import pytest
from tiny_engine import greedy, prompt_of
from workload import assert_idle, strict_engine

from jaxgen.utils import async_stream_and_merge, stream_and_merge

TEXTS = ["The fox", "Grüße! 你好", "🙂🙂 once upon", 'print("step"', "a"]
# Half of all bytes are no character of their own, so random ids break characters all the time.
PROMPTS = [prompt_of(12, i) for i in range(10)]


@pytest.fixture(scope="module")
def engine():
    with strict_engine() as engine:
        yield engine
        assert_idle(engine)


@pytest.fixture(scope="module")
def incremental():
    with strict_engine(incremental_streaming_output=True) as engine:
        yield engine
        assert_idle(engine)


@pytest.fixture(scope="module")
def plain(engine):
    """(prompt, greedy text, greedy ids) of texts with enough different characters to stop at."""
    results = engine.generate(input_ids=PROMPTS, sampling_params=greedy(40))
    return [(p, r["text"], r["output_ids"]) for p, r in zip(PROMPTS, results)]


def cumulative(engine, **call):
    """The chunks of a single streamed request after checking what holds for all of them."""
    chunks = list(engine.generate(**call, stream=True))
    assert [chunk["meta_info"]["finish_reason"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [
        False
    ]
    for before, after in itertools.pairwise(chunks):
        assert after["text"].startswith(before["text"])
        assert after["output_ids"][: len(before["output_ids"])] == before["output_ids"]
        assert (
            before["meta_info"]["completion_tokens"] < after["meta_info"]["completion_tokens"]
            or after is chunks[-1]
        )
    return chunks


# Stopping


def test_any_substring_of_the_output_stops_it_there(engine, plain):
    """Whether it lies inside a token, begins in the middle of one or spans several."""
    rng = random.Random(0)
    for prompt, text, ids in plain:
        for _ in range(6):
            start = rng.randrange(0, len(text) - 5)
            stop = text[start : start + rng.randrange(1, 6)]
            if "\ufffd" in stop:
                continue  # bytes that are no character are not final until the next token
            result = engine.generate(input_ids=prompt, sampling_params=greedy(40, stop=[stop]))
            assert result["text"] == text[: text.index(stop)]
            assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
            assert result["output_ids"] == ids[: len(result["output_ids"])]
            kept = engine.generate(input_ids=prompt, sampling_params=greedy(40, stop=stop, no_stop_trim=True))
            assert kept["text"] == text[: text.index(stop) + len(stop)]
            assert kept["output_ids"] == result["output_ids"]
            for chunk in cumulative(engine, input_ids=prompt, sampling_params=greedy(40, stop=stop)):
                assert result["text"].startswith(chunk["text"])  # nothing shown that is trimmed later


def test_a_partial_match_is_withheld_and_comes_out_in_the_end(engine, plain):
    prompt, text, _ = plain[0]
    almost = text[-3:] + "never"
    chunks = cumulative(engine, input_ids=prompt, sampling_params=greedy(40, stop=almost))
    assert chunks[-1]["text"] == text
    assert all(not chunk["text"].endswith(text[-3:]) for chunk in chunks[:-1])
    assert chunks[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 40}


def test_stop_ids_and_ignore_eos(engine, plain):
    for prompt, _, ids in plain[:4]:
        position = ids.index(ids[20])
        stopped = engine.generate(
            input_ids=prompt,
            sampling_params={"temperature": 0.0, "max_new_tokens": 40, "stop_token_ids": [ids[20]]},
        )
        assert stopped["output_ids"] == ids[: position + 1]
        assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": ids[20]}
        shorter = engine.generate(input_ids=prompt, sampling_params=greedy(max(position, 1)))
        if position:
            assert stopped["text"] == shorter["text"]
        ignored = engine.generate(input_ids=prompt, sampling_params=greedy(40, stop_token_ids=[ids[20]]))
        assert ignored["output_ids"] == ids


def test_eos_ends_a_request_and_its_text_is_dropped(engine):
    eos = {"temperature": 0.0, "max_new_tokens": 9, "logit_bias": {1: 1000.0}}
    result = engine.generate(input_ids=[9, 8, 7], sampling_params=eos)
    assert (result["text"], result["output_ids"]) == ("", [1])
    assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": 1}
    later = engine.generate(input_ids=[9, 8, 7], sampling_params={**eos, "min_new_tokens": 4})
    assert len(later["output_ids"]) == 5 and later["output_ids"][-1] == 1
    assert 1 not in later["output_ids"][:-1]
    ignored = engine.generate(input_ids=[9, 8, 7], sampling_params={**eos, "ignore_eos": True})
    assert ignored["output_ids"] == [1] * 9 and ignored["text"] == ""
    shown = {**eos, "no_stop_trim": True, "skip_special_tokens": False}
    assert engine.generate(input_ids=[9, 8, 7], sampling_params=shown)["text"] == "<|end|>"


def test_min_new_tokens_does_not_hold_back_stop_strings(engine, plain):
    prompt, text, _ = plain[1]
    params = greedy(40, stop=text[1:3], min_new_tokens=0)
    early = engine.generate(input_ids=prompt, sampling_params=params)
    assert len(early["output_ids"]) < 30
    late = engine.generate(input_ids=prompt, sampling_params={**params, "min_new_tokens": 30})
    assert late["output_ids"] == early["output_ids"]


def test_a_pattern_ends_the_text_without_cutting_it(engine, plain):
    prompt, text, ids = plain[2]
    result = engine.generate(input_ids=prompt, sampling_params=greedy(40, stop_regex=r"[a-z]{2}"))
    assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": r"[a-z]{2}"}
    assert text.startswith(result["text"].rstrip("\ufffd"))
    assert result["output_ids"] == ids[: len(result["output_ids"])]


def test_stops_of_one_request_do_not_touch_its_neighbours(engine, plain):
    params = [greedy(40, stop=text[4:6]) if i % 2 else greedy(40) for i, (_, text, _) in enumerate(plain)]
    results = engine.generate(input_ids=PROMPTS, sampling_params=params)
    for i, (result, (_, text, _)) in enumerate(zip(results, plain)):
        assert result["text"] == (text[: text.index(text[4:6])] if i % 2 else text)


# Streaming


@pytest.mark.parametrize("interval", [1, 3, 100])
def test_text_grows_by_prefixes_to_the_whole(engine, plain, interval):
    for prompt, text, ids in plain:
        params = greedy(40, stream_interval=interval)
        chunks = cumulative(engine, input_ids=prompt, sampling_params=params)
        assert (chunks[-1]["text"], chunks[-1]["output_ids"]) == (text, ids)
        assert len(chunks) <= 2 + 40 // interval


def test_deltas_join_to_the_whole(incremental, plain):
    for prompt, text, ids in plain:
        call = {"input_ids": prompt, "sampling_params": greedy(40), "return_logprob": True}
        chunks = list(incremental.generate(**call, stream=True))
        assert "".join(chunk["text"] for chunk in chunks) == text
        assert [token for chunk in chunks for token in chunk["output_ids"]] == ids
        logprobs = [e for chunk in chunks for e in chunk["meta_info"]["output_token_logprobs"]]
        assert [entry[1] for entry in logprobs] == ids
        counts = [chunk["meta_info"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts) and counts[-1] == 40
        whole = incremental.generate(**call)  # the flag is ignored without streaming
        assert (whole["text"], whole["output_ids"]) == (text, ids)
    stop = plain[0][1][10:12]
    pieces = incremental.generate(input_ids=PROMPTS[0], sampling_params=greedy(40, stop=stop), stream=True)
    assert "".join(chunk["text"] for chunk in pieces) == plain[0][1].split(stop)[0]


def test_a_streamed_batch_is_told_apart_by_index(engine, plain):
    seen: dict[int, str] = {}
    finished = set()
    for chunk in engine.generate(input_ids=PROMPTS, sampling_params=greedy(40), stream=True):
        index = chunk["index"]
        assert index not in finished and chunk["text"].startswith(seen.get(index, ""))
        seen[index] = chunk["text"]
        if chunk["meta_info"]["finish_reason"]:
            finished.add(index)
    assert [seen[i] for i in range(len(PROMPTS))] == [text for _, text, _ in plain]


@pytest.mark.parametrize("mode", ["cumulative", "deltas"])
def test_merge_helpers_give_the_text_of_a_plain_call(engine, incremental, mode):
    chosen = engine if mode == "cumulative" else incremental
    params = greedy(30)

    async def merged(text):
        return "".join([piece async for piece in async_stream_and_merge(chosen, text, params)])

    for text in TEXTS:
        expected = engine.generate(text, params)["text"]
        assert stream_and_merge(chosen, text, params) == expected
        assert asyncio.run(merged(text)) == expected


def test_a_repeated_piece_survives_in_deltas(incremental):
    """The same token again and again: overlap trimming would swallow it."""
    params = greedy(12, logit_bias={90: 1000.0})
    expected = incremental.generate("x", params)
    assert expected["output_ids"] == [90] * 12
    assert stream_and_merge(incremental, "x", params) == expected["text"]


def test_without_a_tokenizer_there_are_only_ids():
    with strict_engine(skip_tokenizer_init=True, tokenizer_path=None) as engine:
        whole = engine.generate(input_ids=PROMPTS[0], sampling_params=greedy(10))
        assert "text" not in whole and len(whole["output_ids"]) == 10
        for chunk in engine.generate(input_ids=PROMPTS[0], sampling_params=greedy(10), stream=True):
            assert "text" not in chunk and chunk["output_ids"]
