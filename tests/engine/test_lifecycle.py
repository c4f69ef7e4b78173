"""Construction, shutdown, garbage collection, and the end of an engine whose thread has failed."""

import asyncio
import collections
import dataclasses
import gc
import json
import logging
import threading
import time

import jax
import pytest
from tiny_engine import OPTIONS, TOKENIZER, check_idle, golden_cases, greedy, prompt_of, start

import jaxgen
from jaxgen import Engine, ServerArgs
from jaxgen.responses import Response

CASE = golden_cases()[1]


def ask(engine):
    return engine.generate(input_ids=CASE["prompt_ids"], sampling_params=greedy(8))["output_ids"]


def held() -> tuple[int, int]:
    """(device arrays alive, engine threads alive)."""
    gc.collect()
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("jaxgen")]
    return len(jax.live_arrays()), len(threads)


def test_options_are_keyword_only_and_checked():
    with pytest.raises(TypeError, match="model_path"):
        Engine()
    with pytest.raises(TypeError):
        Engine(OPTIONS["model_path"])
    with pytest.raises(TypeError, match="max_running_requests"):
        start(max_runing_requests=3)
    with pytest.raises(TypeError, match="model_path"):
        Engine(**OPTIONS | {"modelpath": "x"})


BAD_OPTIONS = {
    "chunk of no whole pages": {"chunked_prefill_size": 40, "page_size": 16},
    "colon in the served name": {"served_model_name": "a:b"},
    "priority with lpm": {"enable_priority_scheduling": True, "schedule_policy": "lpm"},
    "priority retraction alone": {"retraction_policy": "priority"},
    "negative conservativeness": {"schedule_conservativeness": -0.1},
    "no adapters per batch": {"max_loras_per_batch": 0},
    "LoRA without adapters": {"enable_lora": True},
    "two tokenizer batching modes": {
        "enable_tokenizer_batch_encode": True,
        "enable_dynamic_batch_tokenizer": True,
    },
    "four gc thresholds": {"gc_threshold": [1, 2, 3, 4]},
    "hidden mode": {"return_hidden_states_mode": "first"},
    "policy": {"schedule_policy": "best"},
    "dtype": {"dtype": "int3"},
    "load format": {"load_format": "zip"},
    "pool for half a request": {"max_total_tokens": 16},
    "context beyond the model's": {"context_length": 100_000},
    "overrides that are no JSON": {"json_model_override_args": "{"},
    "unknown architecture": {"json_model_override_args": '{"architectures": ["Mamba"]}'},
    "no such model": {"model_path": "/nowhere/at/all"},
    "no tokenizer": {"tokenizer_path": None},
    "more devices than there are": {"tp_size": 64},
    "page size": {"page_size": 7},
    "log level": {"log_level": "loud"},
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_configuration_raises_and_leaves_nothing_behind(case):
    before = held()
    with pytest.raises((ValueError, AssertionError, RuntimeError)) as failure:
        start(**BAD_OPTIONS[case])
    assert str(failure.value)
    del failure
    assert held() == before


def test_log_level_is_error_unless_given():
    with start() as engine:
        assert engine.server_args.log_level == "error"
        assert logging.getLogger("jaxgen").level == logging.ERROR
        root = logging.getLogger().level
    assert ServerArgs(model_path="x").log_level == "info"
    with start(log_level="warning") as engine:
        assert engine.server_args.log_level == "warning"
    assert logging.getLogger().level == root


def test_ready_made_records():
    args = ServerArgs(**OPTIONS, weight_version="v7")
    with Engine(server_args=args, model_path="ignored", weight_version="ignored") as engine:
        assert engine.generate("x", greedy(1))["meta_info"]["weight_version"] == "v7"
        assert engine.server_args.model_path == OPTIONS["model_path"]
        json.dumps(engine.get_server_info())
        info = engine.get_server_info()
        assert {field.name for field in dataclasses.fields(ServerArgs)} <= set(info)
        assert info["version"] == jaxgen.__version__
        assert info["max_total_num_tokens"] == OPTIONS["max_total_tokens"]
    with Engine(**dataclasses.asdict(args)) as engine:
        assert ask(engine) == CASE["greedy_ids"][:8]


def test_leaving_the_block_shuts_down_and_swallows_nothing():
    before = held()
    with pytest.raises(ZeroDivisionError):
        with start() as engine:
            assert held()[1] == before[1] + 1
            1 / 0  # noqa: B018
    assert held() == before
    for call in (
        lambda: engine.generate("x"),
        lambda: engine.generate("x", stream=True),
        lambda: asyncio.run(engine.async_generate("x")),
        lambda: engine.encode("x"),
        engine.flush_cache,
        engine.get_server_info,
        engine.get_model_info,
        engine.abort_request,
        engine.pause_generation,
        engine.continue_generation,
        engine.stop_profile,
        engine.freeze_gc,
        engine.get_all_child_pids,
    ):
        with pytest.raises(RuntimeError, match="shut down"):
            call()
    engine.shutdown()


def test_a_second_engine_after_shutdown_serves_the_same():
    before = held()
    for _ in range(2):
        engine = start()
        assert ask(engine) == CASE["greedy_ids"][:8]
        engine.shutdown()
        engine.shutdown()
        assert held() == before


def calls_until(end, engine, calls):
    """Runs the calls in threads, `end`s the engine once it works, and returns what the calls raised."""
    errors = []

    def pending(call):
        try:
            call()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=pending, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    end()
    for thread in threads:
        thread.join()
    return errors


def long_calls(engine, **request):
    request.setdefault("sampling_params", greedy(150))
    return [
        lambda: engine.generate(**request),
        lambda: list(engine.generate(**request, stream=True)),
        lambda: asyncio.run(engine.async_generate(**request)),
    ]


def test_shutdown_ends_pending_calls():
    def run():
        engine = start()

        def shut_down_when_running():
            while not engine.get_server_info()["internal_states"][0]["running_batch_size"]:
                time.sleep(0.001)
            closers = [threading.Thread(target=engine.shutdown) for _ in range(3)]
            for thread in closers:
                thread.start()
            for thread in closers:
                thread.join()

        prompts = [prompt_of(100, i) for i in range(16)]
        errors = calls_until(shut_down_when_running, engine, long_calls(engine, input_ids=prompts))
        assert len(errors) == 3
        for error in errors:
            assert isinstance(error, RuntimeError)
            assert "shut down" in str(error)

    before = held()
    run()
    assert held() == before


def test_an_engine_that_nobody_holds_gives_its_memory_back():
    before = held()
    engine = start()
    ask(engine)
    list(engine.generate("The fox", greedy(4), stream=True, return_logprob=True))
    del engine
    for _ in range(100):
        if held() == before:
            break
        time.sleep(0.01)
    assert held() == before


def test_an_exception_on_the_engine_thread_reaches_every_caller(caplog):
    before = held()
    engine = start()
    cause = OSError("the device is on fire")
    launch = engine._runner.launch
    steps = []

    def failing_launch(plan):
        steps.append(plan)
        if len(steps) == 20:
            raise cause
        return launch(plan)

    engine._runner.launch = failing_launch
    calls = long_calls(engine, input_ids=prompt_of(20)) + long_calls(
        engine, prompt="many samples", sampling_params=greedy(150) | {"n": 3}
    )
    errors = calls_until(lambda: None, engine, calls * 3)
    assert len(errors) == 18
    for error in errors:
        assert isinstance(error, RuntimeError)
        assert error.__cause__ is cause
    for later in (lambda: engine.generate("x"), engine.flush_cache, engine.get_server_info):
        with pytest.raises(RuntimeError, match="on fire") as failure:
            later()
        assert failure.value.__cause__ is cause
    engine._loop._thread.join(10)  # callers hear of the end a moment before the thread is gone
    assert held()[1] == before[1]
    assert "on fire" in caplog.text
    engine.shutdown()
    with start() as another:
        assert ask(another) == CASE["greedy_ids"][:8]
        check_idle(another)


def test_a_tokenizer_is_where_programs_look_for_it():
    with start() as engine:
        tokenizer = engine.tokenizer_manager.tokenizer
        assert tokenizer.decode(tokenizer.encode("The fox", add_special_tokens=False)) == "The fox"
        assert engine.tokenizer_manager.server_args.tokenizer_path == str(TOKENIZER)
        assert engine.tokenizer_manager.model_config.vocab_size == 384


def test_a_profile_can_start_and_end_while_requests_run(tmp_path):
    with start() as engine:
        chunks = engine.generate(input_ids=CASE["prompt_ids"], sampling_params=greedy(32), stream=True)
        next(chunks)
        engine.start_profile(str(tmp_path))
        next(chunks)
        engine.stop_profile()
        *_, last = chunks
        assert last["output_ids"] == CASE["greedy_ids"][:32]
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_an_engine_that_nobody_holds_gives_its_memory_back_without_a_collection():
    """What is alive after start-up is exempt from collections, so that an engine must not be part of a cycle."""
    before = held()
    gc.disable()
    try:
        engine = start()
        exempt = gc.get_freeze_count()
        del engine
        assert gc.get_freeze_count() < exempt / 10
        assert held() == before
    finally:
        gc.enable()


@pytest.fixture
def thresholds():
    """The collector's own thresholds, whatever engines of other tests have made of them."""
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield gc.get_threshold()
    gc.set_threshold(*before)


def test_collections_are_rare_only_while_a_call_is_under_way(thresholds):
    with start() as engine:
        assert gc.get_threshold() == thresholds
        streams = [engine.generate("x", greedy(8), stream=True) for _ in range(2)]
        for stream in streams:
            next(stream)
            assert all(now > outside for now, outside in zip(gc.get_threshold(), thresholds))
        streams[0].close()
        assert gc.get_threshold() != thresholds
        list(streams[1])
        assert gc.get_threshold() == thresholds
        with pytest.raises(ValueError, match="temperature"):
            engine.generate("x", {"temperature": -1})
        assert gc.get_threshold() == thresholds


def test_collections_are_rare_while_a_call_is_checked(engine, thresholds):
    """It makes most of its objects then, and a collection would look at all its prompts."""
    seen = []

    class Watched(collections.UserDict):
        def __getitem__(self, key):
            seen.append(gc.get_threshold())
            return super().__getitem__(key)

    engine.generate("x", Watched(greedy(1)))
    assert seen and all(now > outside for found in seen for now, outside in zip(found, thresholds))
    assert gc.get_threshold() == thresholds


def test_a_collection_that_was_put_off_waits_for_the_next_prompt(engine, thresholds):
    """It runs on the engine's thread, while the device computes."""
    seen = []

    def note(phase, info):
        if phase == "start" and info["generation"] > 0:
            seen.append((info["generation"], threading.current_thread().name))

    gc.collect()
    for _ in range(thresholds[1] + 1):
        gc.collect(0)
    gc.callbacks.append(note)
    try:
        engine.generate("x", greedy(2))
    finally:
        gc.callbacks.remove(note)
    assert seen == [(1, "jaxgen-engine")]


def test_given_thresholds_hold_for_the_life_of_the_engine(thresholds):
    with start(gc_threshold=[5000, 20]) as engine:
        assert gc.get_threshold() == (5000, 20, thresholds[2])
        for _ in engine.generate("x", greedy(2), stream=True):
            assert gc.get_threshold() == (5000, 20, thresholds[2])
    assert gc.get_threshold() == thresholds


def test_pages_go_back_as_soon_as_the_results_are_taken(engine, monkeypatch):
    monkeypatch.setattr("jaxgen.loop.HANDOVER_SECONDS", 1000.0)
    scheduler = engine._loop.scheduler
    for stream in (False, True):
        result = engine.generate(input_ids=prompt_of(20), sampling_params=greedy(3), stream=stream)
        last = list(result)[-1] if stream else result
        assert len(last["output_ids"]) == 3
        deadline = time.monotonic() + 20
        while scheduler.has_unfinished and time.monotonic() < deadline:
            time.sleep(0.001)
        assert not scheduler.has_unfinished


def test_results_are_freed_without_a_collection(engine):
    """Full collections are rare, so a call and its responses must not be a cycle."""
    options = {"sampling_params": greedy(4), "return_logprob": True, "top_logprobs_num": 2}
    prompts = [prompt_of(9), prompt_of(7)]

    async def asynchronously():
        await engine.async_generate(input_ids=prompts, **options)
        async for _ in await engine.async_generate(input_ids=prompts, stream=True, **options):
            pass

    def responses():
        return sum(isinstance(found, Response) for found in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = responses()
        engine.generate(input_ids=prompts, **options)
        list(engine.generate(input_ids=prompts, stream=True, **options))
        asyncio.run(asynchronously())
        engine.get_server_info()  # the engine's thread is past the last delivery
        assert responses() == before
    finally:
        gc.enable()
