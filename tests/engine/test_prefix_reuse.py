"""How much of a prompt comes from the prefix cache, at every page size, and who may share it."""

import threading
import time

import pytest
from tiny_engine import greedy, prompt_of
from workload import assert_idle, internal_state, strict_engine


@pytest.fixture(scope="module", params=[8, 16, 64], ids="page {}".format)
def engine(request):
    with strict_engine(page_size=request.param) as engine:
        yield engine


@pytest.fixture(autouse=True)
def clean(engine):
    assert engine.flush_cache().success
    yield
    assert_idle(engine)


def cached(engine, prompt, new_tokens=1, **more):
    result = engine.generate(input_ids=prompt, sampling_params=greedy(new_tokens), **more)
    return result["meta_info"]["cached_tokens"]


def test_repeats_and_extensions_reuse_every_token(engine):
    prompt = prompt_of(100, 1)
    assert cached(engine, prompt) == 0
    assert cached(engine, prompt) == 99
    assert cached(engine, prompt + prompt_of(7, 2)) == 100
    assert cached(engine, prompt[:37]) == 36
    assert cached(engine, prompt[:37] + prompt_of(20, 3)) == 37
    assert cached(engine, prompt_of(5, 4) + prompt) == 0


def test_the_output_is_cached_without_its_last_token(engine):
    prompt = prompt_of(21, 5)
    result = engine.generate(input_ids=prompt, sampling_params=greedy(30))
    conversation = prompt + result["output_ids"] + prompt_of(10, 6)
    assert cached(engine, conversation) == 21 + 29


def test_reuse_does_not_change_the_output(engine):
    prompt = prompt_of(90, 7)
    call = {"sampling_params": greedy(20), "return_logprob": True}
    cold = engine.generate(input_ids=prompt, **call)
    engine.flush_cache()
    engine.generate(input_ids=prompt[:50] + prompt_of(60, 8), sampling_params=greedy(5))
    warm = engine.generate(input_ids=prompt, **call)
    assert warm["meta_info"]["cached_tokens"] == 50
    assert warm["output_ids"] == cold["output_ids"]
    got, want = (r["meta_info"]["output_token_logprobs"] for r in (warm, cold))
    assert [e[0] for e in got] == pytest.approx([e[0] for e in want], abs=1e-4)


def test_a_shared_partial_page_is_copied_not_overwritten(engine):
    """Three requests diverge inside one page at the same time."""
    stem = prompt_of(45, 9)
    prompts = [stem[:cut] + prompt_of(30, 10 + cut) for cut in (41, 43, 45)]
    expected = []
    for prompt in prompts:
        engine.flush_cache()
        expected.append(engine.generate(input_ids=prompt, sampling_params=greedy(12))["output_ids"])
    engine.flush_cache()
    engine.generate(input_ids=stem, sampling_params=greedy(3))
    for _ in range(2):
        results = engine.generate(input_ids=prompts, sampling_params=greedy(12))
        assert [result["output_ids"] for result in results] == expected
    assert cached(engine, stem) == 44


def test_a_salt_shares_only_with_itself(engine):
    prompt = prompt_of(50, 11)
    assert cached(engine, prompt) == 0
    assert cached(engine, prompt, cache_salt="a") == 0
    assert cached(engine, prompt, cache_salt="a") == 49
    assert cached(engine, prompt, cache_salt="b") == 0
    assert cached(engine, prompt, extra_key="a") == 0
    assert cached(engine, prompt) == 49


def test_prompt_logprobs_limit_the_reuse(engine):
    prompt = prompt_of(60, 12)
    cached(engine, prompt)
    for start, most in ((0, 0), (20, 20), (-1, 59)):
        assert cached(engine, prompt, return_logprob=True, logprob_start_len=start) <= most
    assert cached(engine, prompt, return_logprob=True, logprob_start_len=-1) == 59


def test_flush_is_refused_while_busy_and_empties_the_cache_when_idle(engine):
    prompt = prompt_of(40, 13)
    cached(engine, prompt)
    caller = threading.Thread(
        target=engine.generate, kwargs={"input_ids": [5] * 9, "sampling_params": greedy(200), "rid": "long"}
    )
    caller.start()
    while internal_state(engine)["running_batch_size"] == 0:
        time.sleep(0.001)
    refused = engine.flush_cache()
    assert refused.success is False and refused.message
    engine.abort_request("long")
    caller.join(20)
    assert cached(engine, prompt) == 39
    assert engine.flush_cache().success is True
    assert cached(engine, prompt) == 0


def test_an_evicted_prefix_is_computed_again(engine):
    prompt = prompt_of(100, 14)
    first = engine.generate(input_ids=prompt, sampling_params=greedy(8))["output_ids"]
    for i in range(25):  # more than the pool of 2,048 tokens holds
        engine.generate(input_ids=prompt_of(100, 100 + i), sampling_params=greedy(1))
    again = engine.generate(input_ids=prompt, sampling_params=greedy(8))
    assert again["meta_info"]["cached_tokens"] == 0
    assert again["output_ids"] == first


def test_no_reuse_without_the_radix_cache(engine):
    with strict_engine(disable_radix_cache=True) as other:
        prompt = prompt_of(40, 15)
        assert [cached(other, prompt) for _ in range(2)] == [0, 0]
        assert_idle(other)
