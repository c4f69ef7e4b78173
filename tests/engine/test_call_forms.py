"""What `generate` and `async_generate` return, for one prompt and for many, whole and streaming."""

import asyncio
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_engine import CONTEXT, golden_cases, greedy, prompt_of, start

from jaxgen import GenerateReqInput

PROMPTS = ["The fox", "A quick brown dog", "x"]


def collect(engine, prompt, params, *, mode, **more):
    """Runs one call in a mode such as "async stream"; returns its result, or its list of chunks."""
    stream = "stream" in mode
    if "async" not in mode:
        result = engine.generate(prompt, params, stream=stream, **more)
        return list(result) if stream else result

    async def run():
        result = await engine.async_generate(prompt, params, stream=stream, **more)
        return [chunk async for chunk in result] if stream else result

    return asyncio.run(run())


def finals(chunks):
    """The last chunk of each request, by position."""
    last = {}
    for chunk in chunks:
        last[chunk.get("index", 0)] = chunk
    return [last[index] for index in sorted(last)]


MODES = ["sync", "async", "sync stream", "async stream"]


@pytest.mark.parametrize("mode", MODES)
def test_a_single_prompt_gives_one_result(engine, mode):
    result = collect(engine, PROMPTS[0], greedy(6), mode=mode)
    if "stream" in mode:
        assert all(isinstance(chunk, dict) and "index" not in chunk for chunk in result)
        assert [chunk["meta_info"]["finish_reason"] is None for chunk in result] == (
            [True] * (len(result) - 1) + [False]
        )
        counts = [chunk["meta_info"]["completion_tokens"] for chunk in result]
        assert counts == sorted(counts)
        result = result[-1]
    assert type(result) is dict
    assert len(result["output_ids"]) == 6
    assert type(result["text"]) is str


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 3])
def test_a_list_of_prompts_gives_a_list_in_order(engine, mode, count):
    alone = [engine.generate(prompt, greedy(6)) for prompt in PROMPTS[:count]]
    result = collect(engine, PROMPTS[:count], greedy(6), mode=mode)
    assert type(result) is list
    if "stream" in mode:
        assert {chunk["index"] for chunk in result} == set(range(count))
        assert sum(chunk["meta_info"]["finish_reason"] is not None for chunk in result) == count
        result = finals(result)
    assert [output["text"] for output in result] == [output["text"] for output in alone]
    assert [output["output_ids"] for output in result] == [output["output_ids"] for output in alone]


@pytest.mark.parametrize("mode", MODES)
def test_no_prompts_give_no_results(engine, mode):
    assert collect(engine, [], greedy(4), mode=mode) == []


def test_kinds_of_the_returned_objects(engine):
    chunks = engine.generate("The fox", greedy(4), stream=True)
    assert iter(chunks) is chunks and not inspect.isasyncgen(chunks)
    assert next(chunks)["meta_info"]["completion_tokens"] >= 1
    chunks.close()
    pending = engine.async_generate("The fox", greedy(4), stream=True)
    assert inspect.isawaitable(pending)

    async def run():
        chunks = await pending
        assert inspect.isasyncgen(chunks)
        async for _ in chunks:
            pass

    asyncio.run(run())


@pytest.mark.parametrize("mode", MODES)
def test_text_ids_and_both_give_equal_greedy_output(engine, mode):
    """Also equal to what Hugging Face transformers generates."""
    case = golden_cases()[2]
    params = greedy(len(case["greedy_ids"]))

    def last(*args, **kwargs):
        result = collect(engine, *args, mode=mode, **kwargs)
        return result[-1] if "stream" in mode else result

    by_text = last(case["prompt"], params)
    by_ids = last(None, params, input_ids=case["prompt_ids"])
    by_array = last(None, params, input_ids=np.array(case["prompt_ids"]))
    by_both = last(case["prompt"], params, input_ids=case["prompt_ids"])
    for output in (by_text, by_ids, by_array, by_both):
        assert output["output_ids"] == case["greedy_ids"]
        assert output["text"] == by_text["text"]
        assert output["meta_info"]["prompt_tokens"] == len(case["prompt_ids"])


def test_ids_alone_decide_between_single_and_batch(engine):
    ids = prompt_of(5)
    assert type(engine.generate(input_ids=ids, sampling_params=greedy(2))) is dict
    assert len(engine.generate(input_ids=[ids], sampling_params=greedy(2))) == 1
    assert len(engine.generate(input_ids=np.array([ids, ids]), sampling_params=greedy(2))) == 2


def test_golden_batch_equals_golden_prompts_one_by_one(engine):
    cases = golden_cases()
    ids = [case["prompt_ids"] for case in cases]
    batch = engine.generate(input_ids=ids, sampling_params=greedy(32))
    assert [output["output_ids"] for output in batch] == [case["greedy_ids"] for case in cases]
    for case in cases:
        again = engine.generate(input_ids=case["prompt_ids"], sampling_params=greedy(32))
        assert again["output_ids"] == case["greedy_ids"]
        assert again["meta_info"]["cached_tokens"] == len(case["prompt_ids"]) - 1


def test_without_prefix_cache_the_output_is_the_same():
    with start(disable_radix_cache=True) as engine:
        for _ in range(2):
            for case in golden_cases():
                output = engine.generate(input_ids=case["prompt_ids"], sampling_params=greedy(32))
                assert output["output_ids"] == case["greedy_ids"]
                assert output["meta_info"]["cached_tokens"] == 0


def test_one_parameter_record_per_prompt(engine):
    params = [greedy(2), greedy(5), None]
    outputs = engine.generate(PROMPTS, params)
    assert [len(o["output_ids"]) for o in outputs[:2]] == [2, 5]
    assert outputs[2]["meta_info"]["finish_reason"]["type"] in ("length", "stop")


def test_default_length_is_128_tokens(engine):
    output = engine.generate("The fox", {"temperature": 0, "ignore_eos": True})
    assert output["meta_info"]["finish_reason"] == {"type": "length", "length": 128}
    assert len(output["output_ids"]) == 128 < CONTEXT


@pytest.mark.parametrize("mode", MODES)
def test_three_samples_of_two_prompts(engine, mode):
    """Six results, prompt-major; ids are fresh; the warm-up that shares the prompt does not show."""
    prompts = ["The quick brown fox jumps over the lazy dog", "A quick brown dog sleeps"]
    params = {"temperature": 1.0, "max_new_tokens": 12, "n": 3, "sampling_seed": 7, "ignore_eos": True}
    result = collect(engine, prompts, params, mode=mode, rid=["a", "b"])
    if "stream" in mode:
        assert {chunk["index"] for chunk in result} == set(range(6))
        result = finals(result)
    assert len(result) == 6
    lengths = [output["meta_info"]["prompt_tokens"] for output in result]
    assert lengths[:3] == [lengths[0]] * 3 and lengths[3:] == [lengths[3]] * 3 and lengths[0] != lengths[3]
    assert all(o["meta_info"]["cached_tokens"] == o["meta_info"]["prompt_tokens"] - 1 for o in result)
    rids = {output["meta_info"]["id"] for output in result}
    assert len(rids) == 6 and not rids & {"a", "b"}
    assert len({tuple(output["output_ids"]) for output in result}) == 6
    # Sample j of a seeded prompt draws with seed + j.
    one = engine.generate(prompts[1], params | {"n": 1, "sampling_seed": 9})
    assert one["output_ids"] == result[5]["output_ids"]


def test_samples_of_one_prompt_are_a_list(engine):
    outputs = engine.generate("The fox", {"max_new_tokens": 3, "n": 2})
    assert type(outputs) is list and len(outputs) == 2


def test_request_ids(engine):
    one = engine.generate("The fox", greedy(2), rid="mine")
    assert one["meta_info"]["id"] == "mine"
    many = engine.generate(PROMPTS, greedy(2), rid="base")
    assert [output["meta_info"]["id"] for output in many] == ["base_0", "base_1", "base_2"]
    many = engine.generate(PROMPTS, greedy(2), rid=["a", "b", "c"])
    assert [output["meta_info"]["id"] for output in many] == ["a", "b", "c"]
    fresh = engine.generate("The fox", greedy(2))["meta_info"]["id"]
    assert len(fresh) == 32 and int(fresh, 16) >= 0


def test_first_fourteen_parameters_are_positional(engine):
    case = golden_cases()[1]
    args = [None, greedy(4), case["prompt_ids"], None, None, None, None, None, True, 0, 2, [5, 6], None, None]
    meta = engine.generate(*args)["meta_info"]
    assert len(meta["input_token_logprobs"]) == len(case["prompt_ids"])
    assert len(meta["output_top_logprobs"][0]) == 2
    assert [entry[1] for entry in meta["output_token_ids_logprobs"][0]] == [5, 6]


def test_programs_that_reach_through_the_tokenizer_manager(engine):
    """`generate_request` is an async generator whether or not the request streams."""
    manager = engine.tokenizer_manager

    async def run(**arguments):
        request = GenerateReqInput(prompt="The fox", sampling_params=greedy(6), **arguments)
        return [output async for output in manager.generate_request(request)]

    (whole,) = asyncio.run(run())
    *_, last = asyncio.run(run(stream=True))
    assert whole["output_ids"] == last["output_ids"] == engine.generate("The fox", greedy(6))["output_ids"]

    async def pause_and_continue():
        await manager.pause_generation(SimpleNamespace(mode="in_place"))
        task = asyncio.create_task(engine.async_generate("The fox", greedy(6)))
        await asyncio.sleep(0.05)
        assert engine.get_server_info()["internal_states"][0]["engine_paused"] and not task.done()
        await manager.continue_generation()
        return await task

    assert asyncio.run(pause_and_continue())["output_ids"] == whole["output_ids"]
    manager.abort_request(abort_all=True)
    manager.abort_request("nobody")
