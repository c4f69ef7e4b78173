"""Start-up steps that are compiled while the engine serves (a GPU's way; `background_compile=True` here)."""

import threading

import pytest
from tiny_engine import greedy, prompt_of, start
from workload import assert_complete, assert_idle, strict_engine, workload

from jaxgen.execution import kv_cache, step_choice, step_set
from jaxgen.execution.memory_plan import MemoryPlanner
from jaxgen.execution.programs import DECODE, PREFILL, Programs
from jaxgen.execution.sampler import PLAIN, Variant

FULL = Variant(edits=True, logprobs=True, top_logprobs=20)
# First: decode 1 and prefill 8, and the largest full ones.
OPTIONS = {
    "background_compile": True,
    "num_continuous_decode_steps": 4,
    "compilation_cache_dir": "",
    "cuda_graph_bs_decode": [1, 2, 4, 8],
    "cuda_graph_bs_prefill": [8, 32, 64],
}


@pytest.fixture(autouse=True)
def two_variants(monkeypatch):
    """What a GPU does: steps of their own for batches that want no more than tokens."""
    monkeypatch.setattr(step_set, "startup_variants", lambda platform, vocab_size: (PLAIN, FULL))
    monkeypatch.setattr(step_choice, "FIRST_RATIO", 8)


@pytest.fixture
def held(monkeypatch):
    """Holds up the compiler from the moment the engine is ready until the event is set."""
    event, build = threading.Event(), Programs.compile

    def compile_when_let(programs, key, shapes):
        if threading.current_thread().name.startswith("jaxgen-background"):
            event.wait(20)  # not for ever: a failing test shuts its engine down
        return build(programs, key, shapes)

    monkeypatch.setattr(Programs, "compile", compile_when_let)
    yield event
    event.set()


def steps_of(engine, kind):
    return {(key.size, not key.variant.plain) for key in engine._runner.steps if key.kind == kind}


def served(engine):
    results = engine.generate(**{k: v for k, v in workload().items() if k != "return_hidden_states"})
    for result in results:
        assert_complete(result)
    return [result["output_ids"] for result in results], results


def background_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("jaxgen-background")]


def test_every_request_is_served_before_the_rest_is_compiled(held):
    with strict_engine(**OPTIONS) as engine:
        assert steps_of(engine, DECODE) == {(1, False), (8, True)}
        assert steps_of(engine, PREFILL) == {(8, False), (64, True)}
        early, results = served(engine)
        assert engine.generate(input_ids=prompt_of(20), sampling_params=greedy(4))["output_ids"]
        assert not engine.wait_until_compiled(timeout=0.01)
        assert engine.startup_report.as_dict()["complete"] == 0
        held.set()
        assert engine.wait_until_compiled()
        assert steps_of(engine, DECODE) == {(1, False), (2, False), (4, False), (8, False)} | {
            (1, True),
            (4, True),
            (8, True),
        }
        assert steps_of(engine, PREFILL) == {(8, False), (32, False), (64, False), (64, True)}
        report = engine.startup_report.as_dict()
        assert report["complete"] > report["total"] > 0
        late, more = served(engine)
        assert late == early
        assert all(result["meta_info"]["cache_miss_count"] == 0 for result in results + more)
        assert_idle(engine)


def test_new_steps_take_over_while_the_engine_serves(monkeypatch):
    """Requests come and go during the whole of it, without strict_compile: nothing counts as a miss."""
    with start(**OPTIONS) as engine:
        used, run = set(), engine._runner._run
        monkeypatch.setattr(engine._runner, "_run", lambda key, *up: used.add(key) or run(key, *up))
        ended = False
        while not ended:
            ended = engine.wait_until_compiled(timeout=0)
            result = engine.generate(input_ids=[prompt_of(20)] * 2, sampling_params=greedy(8))
            assert result[0]["meta_info"]["cache_miss_count"] == 0
        monkeypatch.undo()
        assert (DECODE, 2, PLAIN) in {(key.kind, key.size, key.variant) for key in used}
        assert_idle(engine)


def test_a_step_that_fails_is_served_by_a_larger_one(monkeypatch, caplog):
    build = Programs.compile

    def failing(programs, key, shapes):
        if key.kind == DECODE and key.size == 2:
            raise RuntimeError("no such luck")
        return build(programs, key, shapes)

    monkeypatch.setattr(Programs, "compile", failing)
    with strict_engine(**OPTIONS, log_level="warning") as engine:
        assert engine.wait_until_compiled()
        assert (2, False) not in steps_of(engine, DECODE)
        results = engine.generate(input_ids=[prompt_of(5), prompt_of(6)], sampling_params=greedy(4))
        assert [len(result["output_ids"]) for result in results] == [4, 4]
        assert_idle(engine)
    assert "decode 2" in caplog.text and "no such luck" in caplog.text


def test_shutdown_drops_what_has_not_begun(held):
    engine = start(**OPTIONS)
    table = engine._runner.steps._table
    assert background_threads()
    threading.Timer(0.2, held.set).start()  # the steps in the compiler's hands
    added, add = [], table.add
    table.add = lambda key: added.append(key) or add(key)
    engine.shutdown()
    assert not background_threads()
    assert not added
    with pytest.raises(RuntimeError):
        engine.wait_until_compiled()


def test_requests_that_widen_the_lane_state_meanwhile(held):
    """More logit edits than steps were compiled for: everything is compiled anew, at the request's expense."""
    bias = {str(i): 1.0 for i in range(10, 310)}
    with start(**OPTIONS) as engine:
        result = engine.generate(input_ids=prompt_of(5), sampling_params=greedy(4, logit_bias=bias))
        assert result["meta_info"]["cache_miss_count"] > 0
        held.set()
        again = engine.generate(input_ids=prompt_of(5), sampling_params=greedy(4, logit_bias=bias))
        assert again["output_ids"] == result["output_ids"]
        engine.generate(input_ids=prompt_of(5), sampling_params=greedy(4))
        assert_idle(engine)


def test_steps_in_the_cache_are_there_from_the_start(tmp_path, held):
    held.set()
    options = OPTIONS | {"compilation_cache_dir": str(tmp_path)}
    with start(**options) as engine:
        engine.wait_until_compiled()
        complete = set(engine._runner.steps)
    held.clear()
    with start(**options) as engine:
        assert set(engine._runner.steps) == complete
        assert engine.wait_until_compiled(timeout=1)


@pytest.mark.parametrize("wrong", [0, 30 << 20])
def test_steps_that_need_other_memory_than_estimated(monkeypatch, wrong):
    """The pool then is what the compiled steps leave, not what the estimate did."""
    needed = []
    pool = MemoryPlanner.pool
    monkeypatch.setattr(kv_cache, "device_memory_bytes", lambda device: 320 << 20)
    monkeypatch.setattr(MemoryPlanner, "estimated_temporary", lambda planner, variant: wrong)
    monkeypatch.setattr(MemoryPlanner, "pool", lambda planner, t: needed.append(t) or pool(planner, t))
    with start(**OPTIONS | {"max_total_tokens": None, "background_compile": False}) as engine:
        assert needed[0] == wrong and 0 < needed[1] < 30 << 20
        shapes = {
            step.in_avals[0][1][0].shape[0]
            for step in [
                engine._runner.steps.get(key)
                for key in engine._runner.steps.choice.largest_keys(engine._runner.steps.shapes.widths)
            ]
        }
        assert shapes == {engine._runner.kv_shape.num_pages} == {engine._runner.kv[0].shape[0]}
        assert engine.generate(input_ids=prompt_of(5), sampling_params=greedy(4))["output_ids"]
        assert_idle(engine)
