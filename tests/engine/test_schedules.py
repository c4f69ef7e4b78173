"""The same requests give the same results under every schedule the engine can be forced into."""

import os
from unittest import mock

import pytest
from tiny_engine import GOLDEN, golden_cases, greedy, prompt_of
from workload import assert_complete, assert_idle, assert_same, one_of, strict_engine, workload

from jaxgen.execution import step_set
from jaxgen.execution.sampler import PLAIN, Variant

HIDDEN = {"enable_return_hidden_states": True}

SCHEDULES = {
    "batched": {},
    "overlap off": {"disable_overlap_schedule": True},
    "mixed chunk": {"enable_mixed_chunk": True},
    "small chunks": {"chunked_prefill_size": 16, "cuda_graph_bs_prefill": [16]},
    "chunking off": {"chunked_prefill_size": -1, "max_prefill_tokens": 144, "cuda_graph_bs_prefill": None},
    "no prefix cache": {"disable_radix_cache": True},
    "pool for two": {"max_total_tokens": 320},
    "one row": {"max_running_requests": 1, "cuda_graph_bs_decode": [1]},
    "decode buckets": {"cuda_graph_bs_decode": [1, 2, 3, 8]},
    "eager admission": {"max_total_tokens": 400, "schedule_conservativeness": 0.0},
}


@pytest.fixture(scope="module")
def reference():
    """Each request alone on a fresh cache."""
    call = workload()
    with strict_engine(**HIDDEN) as engine:
        results = []
        for i in range(len(call["input_ids"])):
            results.append(engine.generate(**one_of(call, i)))
            assert engine.flush_cache().success
    for result in results:
        assert_complete(result)
    return results


def check_against(reference, engine):
    for result, expected in zip(engine.generate(**workload()), reference, strict=True):
        assert_complete(result)
        assert_same(result, expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_results_do_not_depend_on_the_schedule(reference, schedule):
    with strict_engine(**HIDDEN, **SCHEDULES[schedule]) as engine:
        check_against(reference, engine)
        assert_idle(engine)
        check_against(reference, engine)  # now from the prefix cache
        assert_idle(engine)


@pytest.mark.parametrize("options", [{}, {"enable_mixed_chunk": True}, {"disable_overlap_schedule": True}])
def test_forced_retraction_changes_nothing(reference, options):
    """All together, then each beside a request with a shorter prompt, which never is the one to go."""
    with mock.patch.dict(os.environ, JAXGEN_TEST_RETRACT="1"):
        engine = strict_engine(**HIDDEN, **options)
    with engine:
        together = engine.generate(**workload())
        assert sum(result["meta_info"]["num_retractions"] for result in together) >= 5
        engine.flush_cache()
        in_turn = []
        for i in range(len(together)):
            call = one_of(workload(), i)
            beside = {name: [value, value] for name, value in call.items()}
            beside["input_ids"][1], beside["sampling_params"][1] = [4], greedy(60)
            in_turn.append(engine.generate(**beside)[0])
        # The first is as short as its neighbour, and the sixth may end before it is its turn.
        assert sum(result["meta_info"]["num_retractions"] > 1 for result in in_turn) >= 7
        for results in (together, in_turn):
            for result, expected in zip(results, reference, strict=True):
                assert_complete(result)
                assert_same(result, expected)
                assert result["meta_info"]["cached_tokens"] < result["meta_info"]["prompt_tokens"]
        assert_idle(engine)


@pytest.mark.parametrize("retract", ["0", "3"])
def test_lanes_that_ride_along_with_prefill_chunks(monkeypatch, retract):
    """Long prompts arrive while others decode, so that decoding goes on inside prefill steps."""
    prompts = [prompt_of(n, n) for n in (15, 16, 30, 47, 150, 151, 152, 153)]
    penalised = greedy(60, repetition_penalty=1.4, logit_bias={9: 3.0})
    params = [greedy(60), penalised, greedy(60), penalised] + [greedy(20)] * 4
    call = {"input_ids": prompts, "sampling_params": params, "return_hidden_states": True}
    with strict_engine(**HIDDEN) as engine:
        expected = engine.generate(**call)
    monkeypatch.setenv("JAXGEN_TEST_RETRACT", retract)
    with strict_engine(**HIDDEN, enable_mixed_chunk=True) as engine:
        plans = []
        launch = engine._runner.launch
        monkeypatch.setattr(engine._runner, "launch", lambda plan: plans.append(plan) or launch(plan))
        results = engine.generate(**call)
        assert_idle(engine)
    mixed = [plan for plan in plans if plan.chunks and plan.lanes]
    assert len(mixed) >= 6
    assert sum(len(plan.page_updates) for plan in mixed) >= 3
    for result, reference in zip(results, expected, strict=True):
        assert_complete(result)
        assert_same(result, reference)


def test_forced_retraction_never_repeats_streamed_text():
    call = {"input_ids": [prompt_of(20, i) for i in range(6)], "sampling_params": greedy(20)}
    with mock.patch.dict(os.environ, JAXGEN_TEST_RETRACT="2"):
        engine = strict_engine()
    with engine:
        whole = engine.generate(**call)
        engine.flush_cache()
        seen = dict.fromkeys(range(6), (0, ""))
        last = {}
        for chunk in engine.generate(**call, stream=True):
            i, tokens = chunk["index"], chunk["meta_info"]["completion_tokens"]
            assert tokens > seen[i][0] and chunk["text"].startswith(seen[i][1])
            seen[i] = tokens, chunk["text"]
            last[i] = chunk
        assert sum(chunk["meta_info"]["num_retractions"] for chunk in last.values()) > 0
        assert [last[i]["text"] for i in range(6)] == [result["text"] for result in whole]
        assert_idle(engine)


def test_real_retraction_when_the_pool_runs_dry():
    """Optimistic admission over a pool that cannot hold what it admits."""
    # End-of-sequence cannot be drawn, yet admission counts on it.
    params = {"temperature": 0.0, "max_new_tokens": 90, "logit_bias": {1: -1000.0}}
    call = {"input_ids": [prompt_of(10, i) for i in range(8)], "sampling_params": params}
    with strict_engine() as roomy:
        expected = [result["output_ids"] for result in roomy.generate(**call)]
    with strict_engine(max_total_tokens=320, schedule_conservativeness=0.0) as engine:
        results = engine.generate(**call)
        assert sum(result["meta_info"]["num_retractions"] for result in results) > 0
        assert [result["output_ids"] for result in results] == expected
        assert_idle(engine)


def test_a_pool_of_little_more_than_one_request_serves_sixteen():
    call = {"input_ids": [prompt_of(20, i) for i in range(16)], "sampling_params": greedy(8)}
    with strict_engine() as roomy:
        expected = [result["output_ids"] for result in roomy.generate(**call)]
    with strict_engine(max_total_tokens=64) as engine:
        assert [result["output_ids"] for result in engine.generate(**call)] == expected
        assert_idle(engine)


def check_against_hugging_face(family, **options):
    cases = golden_cases(family)
    with strict_engine(model_path=str(GOLDEN / family), **options) as engine:
        for _ in range(2):  # cold, then with every prompt cached
            results = engine.generate(
                input_ids=[case["prompt_ids"] for case in cases],
                sampling_params=greedy(len(cases[0]["greedy_ids"])),
            )
            assert [result["output_ids"] for result in results] == [case["greedy_ids"] for case in cases]


@pytest.mark.parametrize("family", ["llama2", "llama3"])
def test_greedy_batch_is_what_hugging_face_computes(family):
    check_against_hugging_face(family)


@pytest.mark.parametrize("options", [{}, {"enable_mixed_chunk": True, "chunked_prefill_size": 32}])
@pytest.mark.parametrize("family", ["llama3", "mistral"])
def test_steps_for_tokens_alone_give_what_hugging_face_computes(family, options, monkeypatch):
    """A GPU's plain steps, which compute the last layer for the last token of each row; one model has windows."""
    monkeypatch.setattr(step_set, "startup_variants", lambda platform, vocab_size: (PLAIN,))
    check_against_hugging_face(family, cuda_graph_bs_prefill=None, **options)


def test_one_row_reaches_the_context_length():
    """With one row the pool must still not be the limit of a request that fits the context."""
    with strict_engine(max_running_requests=1, cuda_graph_bs_decode=[1], max_total_tokens=512) as engine:
        result = engine.generate(input_ids=[5] * 10, sampling_params={**greedy(1), "max_new_tokens": None})
        assert result["meta_info"]["finish_reason"] == {"type": "length", "length": 255 - 10 - 1}


def test_steps_that_do_only_what_the_batch_needs(reference, monkeypatch):
    """What a GPU does: steps of their own for batches that want no more than tokens."""
    variants = (PLAIN, Variant(False, True, 5), Variant(True, True, 20))
    monkeypatch.setattr(step_set, "startup_variants", lambda platform, vocab_size: variants)
    with strict_engine(**HIDDEN) as engine:
        for key in list(engine._runner.steps):
            engine._runner.run_empty(key)  # as start-up on a GPU does
        used = []
        choose = engine._runner._variant
        monkeypatch.setattr(engine._runner, "_variant", lambda rows: used.append(choose(rows)) or used[-1])
        check_against(reference, engine)
        for i in (8, 2, 1, 0, 4, 3):  # rows change hands between programs
            result = engine.generate(**{**one_of(workload(), i), "return_logprob": False})
            scored = engine.generate(
                **{**one_of(workload(), i), "return_logprob": True, "top_logprobs_num": 2}
            )
            assert scored["output_ids"] == result["output_ids"]
            assert result["output_ids"] == reference[i]["output_ids"]
        assert set(used) == set(variants)
        assert_idle(engine)


def test_compiling_on_demand_gives_the_same(reference):
    options = {"disable_cuda_graph": True, "strict_compile": False}
    with strict_engine(**HIDDEN, **options) as engine:
        results = engine.generate(**workload())
        assert max(result["meta_info"]["cache_miss_count"] for result in results) > 0
        for result, expected in zip(results, reference, strict=True):
            assert_same(result, expected)
        assert engine.generate(**one_of(workload(), 1))["meta_info"]["cache_miss_count"] == 0
