"""Pausing in its three modes, full queues, time-outs and priorities, as callers see them."""

import asyncio
import os
import threading
import time
from types import SimpleNamespace
from unittest import mock

import pytest
from tiny_engine import greedy, prompt_of
from workload import assert_idle, internal_state, strict_engine

from jaxgen import RequestError


@pytest.fixture(scope="module")
def engine():
    with strict_engine() as engine:
        yield engine
        assert_idle(engine)


class Caller:
    """A `generate` call on a thread of its own."""

    def __init__(self, engine, **call):
        self.result = self.error = None

        def run():
            try:
                self.result = engine.generate(**call)
            except Exception as error:
                self.error = error

        self.thread = threading.Thread(target=run)
        self.thread.start()

    def join(self):
        self.thread.join(20)
        assert not self.thread.is_alive()
        return self.result


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def running(engine):
    return internal_state(engine)["running_batch_size"]


def long_call(i, **more):
    return {"input_ids": prompt_of(20, i), "sampling_params": greedy(200), **more}


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_paused_requests_go_on_as_if_nothing_had_happened(engine, mode):
    expected = [engine.generate(**long_call(i))["output_ids"] for i in range(3)]
    engine.flush_cache()
    callers = [Caller(engine, **long_call(i)) for i in range(3)]
    wait_for(lambda: running(engine) == 3)
    engine.pause_generation(mode)
    wait_for(lambda: internal_state(engine)["engine_paused"])
    if mode == "retract":
        wait_for(lambda: running(engine) == 0)
        assert internal_state(engine)["waiting_queue_size"] == 3
        assert engine.flush_cache().success  # although requests wait
        state = internal_state(engine)
        assert state["available_kv_tokens"] == state["memory_usage"]["token_capacity"]
    else:
        assert running(engine) == 3
        assert not engine.flush_cache().success
    late = Caller(engine, input_ids=[5] * 4, sampling_params=greedy(3))
    wait_for(lambda: len(engine._active) == 4)
    time.sleep(0.1)
    assert late.thread.is_alive()
    engine.continue_generation()
    assert [caller.join()["output_ids"] for caller in callers] == expected
    assert len(late.join()["output_ids"]) == 3
    retracted = 1 if mode == "retract" else 0
    assert [caller.result["meta_info"]["num_retractions"] for caller in callers] == [retracted] * 3


def test_pausing_by_abort_ends_everything_and_holds_what_comes(engine):
    callers = [Caller(engine, **long_call(i)) for i in range(10)]
    wait_for(lambda: len(engine._active) == 10 and running(engine) == 8)
    engine.pause_generation()
    for caller in callers:
        assert caller.join()["meta_info"]["finish_reason"]["type"] == "abort"
    late = Caller(engine, input_ids=[5] * 4, sampling_params=greedy(3))
    wait_for(lambda: internal_state(engine)["waiting_queue_size"] == 1)
    engine.continue_generation()
    assert len(late.join()["output_ids"]) == 3


def test_a_request_that_waits_in_a_pause_can_be_aborted(engine):
    engine.pause_generation("in_place")
    late = Caller(engine, input_ids=[5] * 4, sampling_params=greedy(3), rid="late")
    wait_for(lambda: internal_state(engine)["waiting_queue_size"] == 1)
    engine.abort_request("late")
    assert late.join()["meta_info"]["finish_reason"]["message"] == "Abort in waiting queue"
    engine.continue_generation()


def test_the_reference_path_to_pausing_is_awaitable(engine):
    async def main():
        manager = engine.tokenizer_manager
        task = asyncio.create_task(engine.async_generate(**long_call(1, rid="mine")))
        while not running(engine):
            await asyncio.sleep(0.001)
        await manager.pause_generation(SimpleNamespace(mode="in_place"))
        assert internal_state(engine)["engine_paused"]
        manager.abort_request("mine")
        await manager.continue_generation(SimpleNamespace())
        return await task

    result = asyncio.run(main())
    assert result["meta_info"]["finish_reason"]["type"] == "abort"
    assert not internal_state(engine)["engine_paused"]


def test_an_unknown_mode_is_refused(engine):
    with pytest.raises(ValueError, match="retract"):
        engine.pause_generation("sleep")
    assert not internal_state(engine)["engine_paused"]


def test_a_full_queue_refuses_with_503():
    with strict_engine(max_running_requests=1, max_queued_requests=2, cuda_graph_bs_decode=[1]) as engine:
        first = Caller(engine, **long_call(0, rid="first"))
        wait_for(lambda: running(engine) == 1)
        queued = [Caller(engine, input_ids=[5], sampling_params=greedy(2)) for _ in range(2)]
        wait_for(lambda: internal_state(engine)["waiting_queue_size"] == 2)
        with pytest.raises(RequestError, match=r"The request queue is full\.") as caught:
            engine.generate(input_ids=[6], sampling_params=greedy(2))
        assert caught.value.status_code == 503 and isinstance(caught.value, RuntimeError)
        (chunk,) = engine.generate(input_ids=[6], sampling_params=greedy(2), stream=True)
        assert chunk["meta_info"]["finish_reason"]["status_code"] == 503
        assert [len(caller.join()["output_ids"]) for caller in queued] == [2, 2]
        assert len(first.join()["output_ids"]) == 200
        assert_idle(engine)


def test_one_refused_member_ends_the_whole_batch():
    with strict_engine(max_running_requests=1, max_queued_requests=2, cuda_graph_bs_decode=[1]) as engine:
        engine.pause_generation("in_place")
        with pytest.raises(RequestError):
            engine.generate(input_ids=[[5], [6], [7]], sampling_params=greedy(2))
        engine.continue_generation()
        wait_for(lambda: not engine._active)
        assert_idle(engine)


def slow_engine(monkeypatch, **environment):
    """One row, and at least 5 ms a step."""
    with mock.patch.dict(os.environ, environment):
        engine = strict_engine(max_running_requests=1, cuda_graph_bs_decode=[1])
    launch = engine._runner.launch
    monkeypatch.setattr(engine._runner, "launch", lambda plan: time.sleep(0.005) or launch(plan))
    return engine


def test_a_request_that_waits_too_long_ends_with_503(monkeypatch):
    with slow_engine(monkeypatch, JAXGEN_REQ_WAITING_TIMEOUT="0.2") as engine:
        first = Caller(engine, **long_call(0))
        wait_for(lambda: running(engine) == 1)
        with pytest.raises(RequestError, match="waited") as caught:
            engine.generate(input_ids=[5], sampling_params=greedy(2))
        assert caught.value.status_code == 503
        assert len(first.join()["output_ids"]) == 200
        assert_idle(engine)


def test_a_request_that_runs_too_long_ends_with_503_and_keeps_its_streamed_text(monkeypatch):
    with slow_engine(monkeypatch, SGLANG_REQ_RUNNING_TIMEOUT="0.3") as engine:
        *chunks, last = engine.generate(**long_call(1), stream=True)
        assert last["meta_info"]["finish_reason"]["status_code"] == 503
        assert 0 < len(last["output_ids"]) < 200
        assert last["text"].startswith(chunks[-1]["text"])
        with pytest.raises(RequestError, match="ran longer"):
            engine.generate(**long_call(2))
        assert_idle(engine)


def test_a_more_urgent_request_preempts_and_the_victim_loses_nothing():
    options = {"enable_priority_scheduling": True, "schedule_policy": "fcfs", "max_running_requests": 1}
    with strict_engine(**options, cuda_graph_bs_decode=[1]) as engine:
        expected = engine.generate(**long_call(0))["output_ids"]
        victim = Caller(engine, **long_call(0, priority=0))
        wait_for(lambda: running(engine) == 1)
        engine.pause_generation("in_place")
        others = {}
        for priority in (5, 10, 11):
            others[priority] = Caller(engine, input_ids=[5, 6], sampling_params=greedy(30), priority=priority)
            wait_for(lambda: internal_state(engine)["waiting_queue_size"] == len(others))
        engine.continue_generation()
        for caller in (victim, *others.values()):
            caller.join()
        finished = {p: c.result["meta_info"]["response_sent_to_client_ts"] for p, c in others.items()}
        finished[0] = victim.result["meta_info"]["response_sent_to_client_ts"]
        order = sorted(finished, key=finished.__getitem__)
        assert order[0] == 11  # exceeds 0 by more than the threshold of 10
        assert victim.result["output_ids"] == expected
        assert victim.result["meta_info"]["num_retractions"] == 1
        assert_idle(engine)
