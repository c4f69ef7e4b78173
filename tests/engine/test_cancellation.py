"""Requests that nobody waits for any more end at once, and everything they held comes back."""

import asyncio
import gc
import os
import random
import signal
import threading
import time

import pytest
from tiny_engine import greedy, prompt_of
from workload import assert_idle, internal_state, strict_engine


@pytest.fixture(scope="module")
def engine():
    with strict_engine(enable_return_hidden_states=True) as engine:
        yield engine
        assert_idle(engine)


def wait_until_idle(engine, seconds=20.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        state = internal_state(engine)
        if state["running_batch_size"] == state["waiting_queue_size"] == 0 and not engine._active:
            break
        time.sleep(0.01)
    assert_idle(engine)
    assert not engine._active


@pytest.fixture
def steps(engine, monkeypatch):
    """Counts device steps, each made to last at least 5 ms: a LONG request takes 230 of them."""
    launch, launched = engine._runner.launch, []
    monkeypatch.setattr(
        engine._runner, "launch", lambda plan: time.sleep(0.005) or launched.append(plan) or launch(plan)
    )
    return launched


def wait_until_running(engine):
    deadline = time.monotonic() + 20.0
    while internal_state(engine)["running_batch_size"] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def in_thread(call):
    """Runs `call` on a thread; returns (thread, list that will hold its result or exception)."""
    box = []

    def run():
        try:
            box.append(call())
        except Exception as error:
            box.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, box


LONG = greedy(230)


def test_abort_by_id_returns_the_text_so_far(engine):
    thread, box = in_thread(lambda: engine.generate(input_ids=[5] * 10, sampling_params=LONG, rid="mine"))
    wait_until_running(engine)
    engine.abort_request("other")
    engine.abort_request("min")  # the reference would match the prefix
    engine.abort_request("mine")
    thread.join(20)
    (result,) = box
    reason = result["meta_info"]["finish_reason"]
    assert reason["type"] == "abort" and reason["message"] == "Aborted" and reason["status_code"] is None
    assert result["meta_info"]["completion_tokens"] == len(result["output_ids"]) < 230
    assert isinstance(result["text"], str)
    wait_until_idle(engine)


def test_abort_of_a_batch_by_its_base_id_reaches_queued_members(engine):
    call = {"input_ids": [prompt_of(20, i) for i in range(20)], "sampling_params": LONG, "rid": "batch"}
    thread, box = in_thread(lambda: engine.generate(**call))
    wait_until_running(engine)
    engine.abort_request("batch")
    thread.join(20)
    reasons = [result["meta_info"]["finish_reason"] for result in box[0]]
    assert {reason["type"] for reason in reasons} == {"abort"}
    assert "Abort in waiting queue" in {reason["message"] for reason in reasons}  # only eight run at a time
    for result in box[0]:
        assert result["meta_info"]["prompt_tokens"] == 20 and "cached_tokens" in result["meta_info"]
    wait_until_idle(engine)


def test_abort_all_ends_everything_and_the_engine_goes_on(engine):
    threads = [
        in_thread(lambda i=i: engine.generate(input_ids=prompt_of(9, i), sampling_params=LONG))
        for i in range(12)
    ]
    wait_until_running(engine)
    while len(engine._active) < 12:
        time.sleep(0.001)
    engine.abort_request(abort_all=True)
    for thread, box in threads:
        thread.join(20)
        assert box[0]["meta_info"]["finish_reason"]["type"] == "abort"
    wait_until_idle(engine)
    result = engine.generate(input_ids=[4, 5, 6], sampling_params=greedy(4))
    assert len(result["output_ids"]) == 4


def test_abort_of_samples_that_wait_for_their_shared_prompt(engine):
    call = {"input_ids": prompt_of(200, 3), "sampling_params": {**LONG, "max_new_tokens": 50, "n": 4}}
    chunks = engine.generate(**call, stream=True)
    next(chunks)
    chunks.close()
    wait_until_idle(engine)


def test_abort_in_the_queue_of_a_request_for_prompt_logprobs(engine):
    call = {
        "input_ids": [prompt_of(200, i) for i in range(12)],
        "sampling_params": LONG | {"max_new_tokens": 50},
    }
    thread, box = in_thread(
        lambda: engine.generate(**call, rid="scored", return_logprob=True, logprob_start_len=0)
    )
    wait_until_running(engine)
    engine.abort_request("scored")
    thread.join(20)
    for result in box[0]:
        assert len(result["meta_info"]["input_token_logprobs"]) <= 200
        assert len(result["meta_info"]["output_token_logprobs"]) == len(result["output_ids"])
    wait_until_idle(engine)


def test_streaming_abort_ends_with_a_final_chunk(engine):
    seen = []
    for chunk in engine.generate(input_ids=[5] * 10, sampling_params=LONG, rid="s", stream=True):
        seen.append(chunk)
        if len(seen) == 3:
            engine.abort_request("s")
    assert seen[-1]["meta_info"]["finish_reason"]["type"] == "abort"
    assert all(chunk["meta_info"]["finish_reason"] is None for chunk in seen[:-1])
    wait_until_idle(engine)


def test_closed_and_dropped_iterators_abort(engine, steps):
    for drop in (lambda it: it.close(), lambda it: None):
        stream = engine.generate(input_ids=[5] * 10, sampling_params=LONG, stream=True)
        next(stream)
        drop(stream)
        del stream
        gc.collect()
        wait_until_idle(engine)
        assert len(steps) < 150
        steps.clear()


def test_iterators_in_a_dropped_cycle_abort(engine):
    """The garbage collector may close an iterator on any thread, at any line."""
    for i in range(30):
        stream = engine.generate(input_ids=prompt_of(8, i), sampling_params=LONG, stream=True)
        next(stream)
        cycle = [stream]
        cycle.append(cycle)
        del stream, cycle
    gc.collect()
    wait_until_idle(engine)


def test_cancelled_tasks_and_closed_async_iterators_abort(engine, steps):
    async def main():
        async def one(i):
            return await engine.async_generate(input_ids=prompt_of(9, i), sampling_params=LONG)

        tasks = [asyncio.create_task(one(i)) for i in range(6)]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        await asyncio.to_thread(wait_until_idle, engine)
        assert len(steps) < 150
        steps.clear()

        stream = await engine.async_generate(input_ids=prompt_of(9, 1), sampling_params=LONG, stream=True)
        async for _ in stream:
            break
        await stream.aclose()

    asyncio.run(main())
    wait_until_idle(engine)
    assert len(steps) < 150


def test_an_interrupted_call_aborts_and_the_engine_goes_on(engine, steps):
    """Ctrl-C on the main thread."""
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        engine.generate(input_ids=[5] * 10, sampling_params=LONG)
    wait_until_idle(engine)
    assert len(steps) < 150
    assert len(engine.generate(input_ids=[5], sampling_params=greedy(3))["output_ids"]) == 3


def test_storm_of_cancellations_leaves_nothing_behind(engine):
    """300 requests of every kind, ended at random points in every way there is."""
    random_ = random.Random(7)

    def request(i):
        params = greedy(random_.randrange(1, 60))
        if i % 3 == 0:
            params |= {"temperature": 1.0, "sampling_seed": i, "repetition_penalty": 1.3}
        if i % 7 == 0:
            params |= {"n": 2}
        return {
            "input_ids": prompt_of(random_.randrange(1, 150), i % 40),
            "sampling_params": params,
            "return_logprob": i % 5 == 0,
            "logprob_start_len": 0 if i % 2 else -1,
            "return_hidden_states": i % 11 == 0,
            "rid": None if i % 7 == 0 else f"storm-{i}",
        }

    def sync_stream(i, call, stop):
        stream = engine.generate(**call, stream=True)
        for step, _ in enumerate(stream):
            if step >= stop:
                break
        if i % 2:
            stream.close()

    async def async_call(i, call, stop):
        if i % 2:
            await asyncio.wait_for(engine.async_generate(**call), timeout=stop / 400)
            return
        stream = await engine.async_generate(**call, stream=True)
        step = 0
        async for _ in stream:
            step += 1
            if step > stop:
                break
        await stream.aclose()

    calls = [(i, request(i), random_.randrange(0, 12)) for i in range(300)]

    def sync_share(share):
        for i, call, stop in share:
            if i % 5 == 1 and call["rid"]:
                timer = threading.Timer(stop / 400, engine.abort_request, (call["rid"],))
                timer.start()
                engine.generate(**call)
                timer.join()
            else:
                sync_stream(i, call, stop)

    async def async_share(share):
        results = await asyncio.gather(*(async_call(*one) for one in share), return_exceptions=True)
        unexpected = [r for r in results if isinstance(r, BaseException) and not isinstance(r, TimeoutError)]
        assert not unexpected, unexpected

    threads = [in_thread(lambda k=k: sync_share(calls[k:150:5])) for k in range(5)]
    threads.append(in_thread(lambda: asyncio.run(async_share(calls[150:]))))
    for thread, box in threads:
        thread.join(120)
        assert not thread.is_alive() and box == [None], box
    wait_until_idle(engine)
    assert engine.flush_cache().success
    stats = engine._loop.call(engine._loop.scheduler.stats)
    assert stats.free_pages == stats.total_pages
