"""No compiling while serving, failures that say why, and everything returned at the end."""

import gc
import threading
import time

import jax
import numpy as np
import pytest
from tiny_engine import check_idle, greedy, prompt_of, start
from workload import assert_complete, assert_idle, internal_state, strict_engine, workload

from jaxgen.scheduling.request import Request


def engine_threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("jaxgen")}


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.fixture(scope="module")
def engine():
    with strict_engine(enable_return_hidden_states=True) as engine:
        yield engine
        assert_idle(engine)


# Contract 1: no compiling while serving


def test_nothing_compiles_inside_the_start_up_buckets(engine):
    for result in engine.generate(**workload()):
        assert_complete(result)
    everything = {
        "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "frequency_penalty": 0.1,
        "presence_penalty": 0.1, "repetition_penalty": 1.1, "min_new_tokens": 3, "max_new_tokens": 6,
        "logit_bias": dict.fromkeys(range(200), 0.1), "stop": ["zq"], "stop_token_ids": [7], "n": 2,
    }  # fmt: skip
    results = engine.generate(
        input_ids=[prompt_of(length, length) for length in (1, 17, 64, 65, 130, 240)],
        sampling_params=everything,
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=20,
        token_ids_logprob=list(range(16)),
        return_hidden_states=True,
    )
    assert [result["meta_info"]["cache_miss_count"] for result in results] == [0] * 12


def test_a_wider_request_compiles_once_and_says_so():
    call = {
        "input_ids": prompt_of(9, 1),
        "sampling_params": greedy(5, logit_bias=dict.fromkeys(range(300), 0.0)),
        "return_logprob": True,
        "top_logprobs_num": 384,
        "token_ids_logprob": list(range(20)),
    }
    with start() as engine:
        narrow = engine.generate(input_ids=call["input_ids"], sampling_params=greedy(5), return_logprob=True)
        first = engine.generate(**call)
        again = engine.generate(**call)
        check_idle(engine)
    assert narrow["meta_info"]["cache_miss_count"] == 0
    assert first["meta_info"]["cache_miss_count"] > 0
    assert again["meta_info"]["cache_miss_count"] == 0
    for result in (first, again):
        assert result["output_ids"] == narrow["output_ids"]
        for entries in result["meta_info"]["output_top_logprobs"]:
            assert len(entries) == 384
            assert np.exp([entry[0] for entry in entries]).sum() == pytest.approx(1.0, abs=1e-4)
        for entries in result["meta_info"]["output_token_ids_logprobs"]:
            assert [entry[1] for entry in entries] == list(range(20))


@pytest.mark.parametrize(
    "demand",
    [
        {"sampling_params": greedy(5, logit_bias=dict.fromkeys(range(300), 0.0))},
        {"sampling_params": greedy(5), "return_logprob": True, "top_logprobs_num": 30},
        {"sampling_params": greedy(5), "return_logprob": True, "token_ids_logprob": list(range(40))},
    ],
    ids=["logit_bias", "top_logprobs", "token_ids"],
)
def test_strict_compile_refuses_what_would_compile_and_serves_the_next(engine, demand):
    with pytest.raises(ValueError, match="strict_compile"):
        engine.generate(input_ids=[5] * 9, **demand)
    stream = engine.generate(input_ids=[5] * 9, stream=True, **demand)
    with pytest.raises(ValueError, match="strict_compile"):
        next(stream)
    result = engine.generate(input_ids=[5] * 9, sampling_params=greedy(4))
    assert len(result["output_ids"]) == 4 and result["meta_info"]["cache_miss_count"] == 0


def test_strict_compile_bounds_batches_and_prompts_by_the_start_up_buckets():
    options = {"cuda_graph_max_bs_decode": 2, "cuda_graph_bs_decode": None, "strict_compile": True}
    with start(
        chunked_prefill_size=64, cuda_graph_bs_prefill=[32], cuda_graph_max_bs_prefill=32, **options
    ) as e:
        results = e.generate(input_ids=[prompt_of(100, i) for i in range(6)], sampling_params=greedy(4))
        assert [len(r["output_ids"]) for r in results] == [4] * 6
    with start(
        chunked_prefill_size=-1, cuda_graph_bs_prefill=[64], cuda_graph_max_bs_prefill=64, **options
    ) as e:
        with pytest.raises(ValueError, match="strict_compile"):
            e.generate(input_ids=prompt_of(100), sampling_params=greedy(4))
        assert len(e.generate(input_ids=prompt_of(60), sampling_params=greedy(4))["output_ids"]) == 4
    with pytest.raises(ValueError, match="strict_compile"):
        start(strict_compile=True, disable_cuda_graph=True)


def _error_of(engine, ids, params):
    with pytest.raises(RuntimeError) as caught:
        engine.generate(input_ids=ids, sampling_params=params)
    return caught.value


@pytest.mark.parametrize("chunk", [144, 208])
def test_chunk_sizes_that_are_no_power_of_two(engine, chunk):
    call = {
        "input_ids": prompt_of(230, 1),
        "sampling_params": greedy(3),
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    expected = engine.generate(**call)
    with strict_engine(chunked_prefill_size=chunk, cuda_graph_bs_prefill=[chunk]) as other:
        result = other.generate(**call)
    assert result["output_ids"] == expected["output_ids"]
    got, want = (r["meta_info"]["input_token_logprobs"] for r in (result, expected))
    np.testing.assert_allclose([e[0] for e in got[1:]], [e[0] for e in want[1:]], atol=1e-4)


def test_larger_batches_than_the_largest_bucket_still_run(engine):
    call = {"input_ids": [prompt_of(10, i) for i in range(8)], "sampling_params": greedy(6)}
    expected = [result["output_ids"] for result in engine.generate(**call)]
    with start(cuda_graph_max_bs_decode=2, cuda_graph_bs_decode=None) as small:
        results = small.generate(**call)
        assert [result["output_ids"] for result in results] == expected
        assert max(result["meta_info"]["cache_miss_count"] for result in results) > 0
        assert [r["meta_info"]["cache_miss_count"] for r in small.generate(**call)] == [0] * 8


# Contract 4: failures


def test_a_failing_step_fails_every_pending_call_with_its_cause(monkeypatch):
    before = engine_threads()
    engine = strict_engine()
    stream = engine.generate(input_ids=[6] * 5, sampling_params=greedy(240), stream=True)
    next(stream)
    errors: list[BaseException] = []
    waiting = threading.Thread(target=lambda: errors.append(_error_of(engine, [5] * 9, greedy(240))))
    waiting.start()
    while internal_state(engine)["running_batch_size"] < 2:
        time.sleep(0.001)

    def broken(plan):
        raise ZeroDivisionError("the device caught fire")

    monkeypatch.setattr(engine._runner, "launch", broken)
    waiting.join(20)
    with pytest.raises(RuntimeError, match="caught fire") as caught:
        list(stream)
    errors += [caught.value, _error_of(engine, [5] * 9, greedy(1))]
    for error in errors:
        assert "caught fire" in str(error) and isinstance(error.__cause__, ZeroDivisionError)
    with pytest.raises(RuntimeError):
        engine.get_server_info()
    engine.shutdown()
    assert engine_threads() == before


def test_bad_starts_leave_nothing_behind():
    threads, memory = engine_threads(), live_bytes()
    for options, error in [
        ({"model_path": "no/such/model"}, (ValueError, RuntimeError)),
        ({"tokenizer_path": "no/such/tokenizer"}, (ValueError, RuntimeError, OSError)),
        ({"max_total_tokens": 16}, ValueError),
        ({"tp_size": 7}, ValueError),
        ({"tp_size": 2}, ValueError),  # 3 kv heads
        ({"chunked_prefill_size": 40}, (ValueError, AssertionError)),
        ({"context_length": 100000}, ValueError),
    ]:
        with pytest.raises(error):
            start(**options)
    assert engine_threads() == threads
    assert live_bytes() <= memory  # less, where something older was collected meanwhile


# Contract 5: the end


def test_shutdown_returns_all_memory_and_a_second_engine_starts_at_once():
    memory, threads = live_bytes(), engine_threads()
    outputs = []
    for _ in range(2):
        engine = start(enable_return_hidden_states=True)
        outputs.append([result["output_ids"] for result in engine.generate(**workload())])
        assert live_bytes() > memory
        engine.shutdown()
        # The engine object, and its results, are still referenced.
        assert live_bytes() <= memory  # less, where something older was collected meanwhile
        assert engine_threads() == threads
        engine.shutdown()
        for method in (engine.get_server_info, engine.flush_cache, engine.abort_request):
            with pytest.raises(RuntimeError, match="shut down"):
                method()
        with pytest.raises(RuntimeError, match="shut down"):
            engine.generate(input_ids=[1], sampling_params=greedy(1))
    assert outputs[0] == outputs[1]


def test_shutdown_in_the_middle_of_everything():
    memory, threads = live_bytes(), engine_threads()
    engine = strict_engine()
    errors: list[BaseException] = []
    callers = [
        threading.Thread(target=lambda i=i: errors.append(_error_of(engine, prompt_of(9, i), greedy(240))))
        for i in range(12)
    ]
    for caller in callers:
        caller.start()
    while len(engine._active) < 12:
        time.sleep(0.001)
    engine.shutdown()
    for caller in callers:
        caller.join(20)
    assert len(errors) == 12 and all(isinstance(error, RuntimeError) for error in errors)
    del callers
    assert live_bytes() <= memory  # less, where something older was collected meanwhile
    assert engine_threads() == threads


def test_finished_requests_are_not_kept_alive(engine):
    engine.generate(**workload())
    internal_state(engine)  # the engine thread has gone on
    gc.collect()
    leftover = [thing for thing in gc.get_objects() if isinstance(thing, Request)]
    assert not leftover
