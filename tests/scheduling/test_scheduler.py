"""What a user of the scheduler sees: reuse, chunks, admission, retraction, stops, abort and pause."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scheduling_harness import EOS, VOCAB, Harness, Params, expected_output, hashes

from jaxgen.scheduling import NEED_COLLECT, Plan, Request, Scheduler, SchedulerConfig
from jaxgen.scheduling.estimate import NewTokenRatio


def config(**fields: Any) -> SchedulerConfig:
    defaults: dict[str, Any] = {
        "num_pages": 64,
        "page_size": 16,
        "max_rows": 16,
        "context_length": 1024,
        "schedule_policy": "fcfs",
    }
    return SchedulerConfig(**(defaults | fields))


def ids(n: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(2, VOCAB), k=n)


def serve(harness: Harness, prompt: list[int], **fields: Any) -> Request:
    request = harness.add(prompt, **fields)
    harness.run()
    return request


def test_importing_the_package_does_not_import_jax() -> None:
    code = "import sys, jaxgen.scheduling; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("page_size", [1, 8, 16, 64])
def test_reuse_is_counted_in_tokens_at_every_page_size(page_size: int) -> None:
    harness = Harness(config(page_size=page_size, num_pages=2048 // page_size))
    prompt = ids(100)
    first = serve(harness, prompt)
    assert first.cached_tokens == 0
    assert serve(harness, prompt).cached_tokens == 99
    assert serve(harness, [*prompt, 7, 7]).cached_tokens == 100
    assert serve(harness, prompt[:50] + ids(20, 1)).cached_tokens == 50
    conversation = prompt + first.output_ids + ids(5, 2)
    assert serve(harness, conversation).cached_tokens == 100 + len(first.output_ids) - 1
    assert serve(harness, prompt, namespace="salt").cached_tokens == 0
    assert harness.scheduler.flush_cache()
    assert serve(harness, prompt).cached_tokens == 0


def test_without_radix_cache_nothing_is_reused_or_kept() -> None:
    harness = Harness(config(radix_cache=False))
    serve(harness, ids(40))
    assert serve(harness, ids(40)).cached_tokens == 0
    assert harness.scheduler.stats().free_pages == 64


@pytest.mark.parametrize(("start", "cached"), [(-1, 39), (0, 0), (1, 1), (39, 39), (40, 39)])
def test_logprob_start_limits_reuse(start: int, cached: int) -> None:
    harness = Harness(config())
    serve(harness, ids(40))
    assert serve(harness, ids(40), return_logprob=True, logprob_start=start).cached_tokens == cached


@pytest.mark.parametrize(("penalty", "start"), [(0.0, 43), (0.5, 40)])
def test_a_resumed_request_with_penalties_computes_its_output_again(penalty: float, start: int) -> None:
    harness = Harness(config(), overlap=False)
    harness.keep_plans = True
    request = harness.add(ids(40), 8, frequency_penalty=penalty)
    for _ in range(4):
        harness.step()
    harness.scheduler.pause("retract")
    assert harness.scheduler.schedule() is None
    harness.scheduler.resume()
    harness.step()
    assert harness.plans[-1].chunks[0].start == start
    assert (request.num_retractions, request.cached_tokens) == (1, 0)
    harness.run()


def test_chunks_are_page_aligned_and_the_unfinished_prompt_comes_first() -> None:
    harness = Harness(config(chunked_prefill_size=32))
    harness.keep_plans = True
    long, short = harness.add(ids(70), 2), harness.add(ids(20, 1), 2)
    harness.run()
    chunks = [[(c.request, c.start, c.length, c.last) for c in plan.chunks] for plan in harness.plans]
    assert chunks[0] == [(long, 0, 32, False)]
    assert chunks[1] == [(long, 32, 32, False)]
    assert chunks[2] == [(long, 64, 6, True), (short, 0, 20, True)]


def test_without_chunking_only_a_lone_prompt_may_exceed_the_budget() -> None:
    harness = Harness(config(max_prefill_tokens=50, radix_cache=False))
    harness.keep_plans = True
    for seed, length in enumerate((30, 15, 10, 80, 5)):
        harness.add(ids(length, seed), 2)
    harness.run()
    lengths = [[chunk.length for chunk in plan.chunks] for plan in harness.plans if plan.chunks]
    assert lengths == [[30, 15], [10], [80], [5]]


def test_prefill_rows_are_capped() -> None:
    harness = Harness(config(prefill_max_requests=2))
    harness.keep_plans = True
    for seed in range(5):
        harness.add(ids(4, seed), 2)
    harness.run()
    assert [len(plan.chunks) for plan in harness.plans if plan.chunks] == [2, 2, 1]


def test_decode_lanes_ride_along_unless_logprobs_are_returned() -> None:
    harness = Harness(config(mixed_chunk=True, chunked_prefill_size=32))
    harness.keep_plans = True
    harness.add(ids(10), 30)
    harness.step()
    harness.step()
    harness.add(ids(100, 1), 2)
    harness.step()
    assert [len(plan.lanes) for plan in harness.plans[-1:]] == [1]
    assert harness.plans[-1].num_tokens <= 32
    harness.run()
    harness.plans.clear()
    harness.add(ids(10, 3), 30)
    harness.step()
    harness.add(ids(100, 4), 2, return_logprob=True, logprob_start=0)
    harness.step()
    assert harness.plans[-1].chunks and not harness.plans[-1].lanes
    harness.run()


def test_a_prompt_of_no_new_tokens_is_only_computed() -> None:
    harness = Harness(config())
    request = serve(harness, ids(20), max_new_tokens=0)
    assert (request.output_ids, request.finish_reason) == ([], {"type": "length", "length": 0})
    assert serve(harness, [*ids(20), 3]).cached_tokens == 20


@pytest.mark.parametrize("overlap", [False, True])
def test_stop_ids_end_a_request_and_the_surplus_token_is_dropped(overlap: bool) -> None:
    prompt = next(p for p in (ids(12, seed) for seed in range(1000)) if 2 < len(_until_eos(p)) < 20)
    harness = Harness(config(), overlap)
    request = serve(harness, prompt, max_new_tokens=50, ignore_eos=False)
    assert request.finish_reason == {"type": "stop", "matched": EOS}
    assert request.output_ids == _until_eos(prompt)


def _until_eos(prompt: list[int]) -> list[int]:
    request = make_request(prompt, max_new_tokens=50)
    return expected_output(request)[0]


def make_request(prompt: list[int], **fields: Any) -> Request:
    defaults: dict[str, Any] = {
        "params": Params(),
        "vocab_size": VOCAB,
        "eos_ids": frozenset({EOS}),
        "eos_id": EOS,
    }
    return Request(prompt_ids=prompt, **(defaults | {"rid": "x", "max_new_tokens": 5} | fields))


class Stops:
    """A text stream that finds its stop in the given token."""

    def __init__(self, token: int) -> None:
        self.token, self.matched = token, "stop string"

    def push(self, token: int) -> Stops | None:
        return self if token == self.token else None


@pytest.mark.parametrize("bad", [-1, VOCAB])
def test_an_impossible_token_is_replaced_and_ends_the_request(bad: int) -> None:
    request = make_request([3], text=Stops(EOS))
    request.append(bad)
    assert (request.output_ids, request.finish_reason) == ([EOS], {"type": "stop", "matched": "NaN happened"})


def test_order_of_stop_checks() -> None:
    both = make_request([3], text=Stops(EOS), max_new_tokens=1)
    both.append(EOS)
    assert both.finish_reason == {"type": "stop", "matched": "stop string"}
    last = make_request([3], max_new_tokens=1)
    last.append(EOS)
    assert last.finish_reason == {"type": "stop", "matched": EOS}
    length = make_request([3], max_new_tokens=2)
    length.append(5)
    assert length.finish_reason is None
    length.append(5)
    assert length.finish_reason == {"type": "length", "length": 2}


def test_admission_keeps_room_for_the_output_of_running_requests() -> None:
    # 640 tokens of pool: each request needs 16 + 200 + 16, and keeps 200 * 0.7 reserved while it runs.
    harness = Harness(config(num_pages=40, schedule_conservativeness=1.0), overlap=False)
    for seed in range(5):
        harness.add(ids(16, seed), 200, ignore_eos=False)
    harness.step()
    assert harness.scheduler.stats().running == 3
    careful = Harness(config(num_pages=40), overlap=False)
    for seed in range(5):
        careful.add(ids(16, seed), 200, ignore_eos=True)
    careful.step()
    assert careful.scheduler.stats().running == 2


def test_running_requests_never_exceed_the_limit() -> None:
    harness = Harness(config(max_running_requests=3))
    for seed in range(10):
        harness.add(ids(8, seed), 4)
    while harness.step():
        assert harness.scheduler.stats().running <= 3
    harness.check_idle()


def test_retraction_takes_the_fewest_tokens_then_the_longest_prompt() -> None:
    harness = Harness(config(num_pages=14, page_size=4, schedule_conservativeness=0.0))
    never = frozenset({VOCAB + 1})
    first = harness.add(ids(8, 1), 30, ignore_eos=False)
    first.eos_ids = never
    for _ in range(3):
        harness.step()
    longer, shorter = (
        harness.add(ids(7, 2), 20, ignore_eos=False),
        harness.add(ids(6, 3), 20, ignore_eos=False),
    )
    longer.eos_ids = shorter.eos_ids = never
    order: list[str] = []
    while harness.step():
        harness.scheduler.check_invariants()
        order += [r.rid for r in (first, longer, shorter) if r.num_retractions and r.rid not in order]
    harness.check_idle()
    assert order[0] == longer.rid and first.num_retractions == 0
    assert harness.scheduler.stats().new_token_ratio > 0, "a retraction makes admission more careful"
    assert harness.scheduler.stats().num_retractions == longer.num_retractions + shorter.num_retractions


def test_retraction_waits_for_tokens_in_flight() -> None:
    harness = Harness(config(num_pages=10, page_size=4, schedule_conservativeness=0.0))
    for seed in range(3):
        harness.add(ids(6, seed), 20, ignore_eos=False).eos_ids = frozenset()
    outcomes = []
    for _ in range(200):
        outcome = harness.scheduler.schedule()
        outcomes.append(outcome)
        if isinstance(outcome, Plan):
            harness.launched.append((outcome, harness.device.launch(outcome)))
        while harness.launched and (len(harness.launched) > 1 or not isinstance(outcome, Plan)):
            harness.collect_one()
    assert NEED_COLLECT in outcomes
    after = outcomes[outcomes.index(NEED_COLLECT) + 1]
    assert isinstance(after, Plan)
    harness.check_idle()


def test_the_last_request_that_does_not_fit_ends_with_500() -> None:
    harness = Harness(config(num_pages=4, page_size=4))
    request = harness.add(ids(6), 40)
    harness.add(ids(5, 1), 2)
    harness.run()
    assert [r.rid for r in harness.ended] == [request.rid]
    assert request.finish_reason is not None and request.finish_reason["status_code"] == 500
    assert "16 tokens" in request.finish_reason["message"]
    assert len(request.output_ids) > 5


def test_a_prompt_larger_than_the_pool_ends_with_500_and_the_next_is_served() -> None:
    for chunk in (None, 8):
        harness = Harness(config(num_pages=4, page_size=4, chunked_prefill_size=chunk))
        huge, small = harness.add(ids(40), 2), harness.add(ids(5, 1), 2)
        harness.run()
        assert huge.finish_reason is not None and huge.finish_reason["status_code"] == 500
        assert small.finish_reason == {"type": "length", "length": 2}


def test_a_prompt_that_fills_the_pool_reuses_what_leaves_room() -> None:
    harness = Harness(config(num_pages=4, page_size=4))
    serve(harness, ids(14), max_new_tokens=0)
    request = serve(harness, ids(16), max_new_tokens=0)
    assert (request.cached_tokens, harness.ended) == (12, [])


@pytest.mark.parametrize("chunk", [None, 16])
def test_recomputing_a_cached_prompt_needs_no_more_pages_than_computing_it(chunk: int | None) -> None:
    harness = Harness(config(num_pages=8, page_size=8, chunked_prefill_size=chunk))
    serve(harness, ids(30), max_new_tokens=25)
    again = serve(harness, ids(30), max_new_tokens=25, return_logprob=True, logprob_start=0)
    assert (again.finish_reason, again.num_retractions) == ({"type": "length", "length": 25}, 0)


def test_a_lone_request_starts_anew_rather_than_end_for_pages_that_only_its_lock_holds() -> None:
    # 288 pages. Both requests compute the same 4 pages at once; those of the first stay locked by the second,
    # whose own 4,564 tokens need 286.
    scheduler = Scheduler(config(num_pages=288, context_length=5000))
    prompt = ids(64)
    scheduler.add(make_request(prompt, rid="short", max_new_tokens=2))
    long = make_request(prompt, max_new_tokens=4500, return_logprob=True, logprob_start=0)
    scheduler.add(long)
    for _ in range(5000):
        plan = scheduler.schedule()
        if not isinstance(plan, Plan):
            break
        scheduler.collect(plan, [5] * (len(plan.lanes) + sum(chunk.last for chunk in plan.chunks)))
        scheduler.retire()
    assert long.finish_reason == {"type": "length", "length": 4500}
    assert long.num_retractions == 1 and scheduler.drain_ended() == []


def test_a_request_that_waits_for_room_starts_as_soon_as_there_is_some() -> None:
    # 528 tokens of pool. The second request needs 17 + 200 + 16. The first holds its pages, and of the k
    # tokens it may still produce (0.7 - 0.001 * steps) * k are reserved: there is room after some 15 steps.
    harness = Harness(config(num_pages=33), overlap=False)
    long = harness.add(ids(16), 400, ignore_eos=False)
    long.eos_ids = frozenset()
    waiting = harness.add(ids(17, 1), 200)
    while not waiting.output_ids:
        assert harness.step()
        harness.scheduler.check_invariants()
    assert 10 < len(long.output_ids) < 30
    harness.run()


def test_a_row_is_given_to_the_next_request_as_soon_as_it_is_free() -> None:
    harness = Harness(config(max_running_requests=2), overlap=False)
    short, long, waiting = (harness.add(ids(9, new), new) for new in (3, 60, 5))
    while not waiting.output_ids:
        harness.step()
    assert short.finish_reason is not None and len(long.output_ids) < 6
    harness.run()


def test_kv_of_a_broken_forward_pass_is_not_cached() -> None:
    scheduler = Scheduler(config())
    request = make_request(ids(20), max_new_tokens=9)
    scheduler.add(request)
    for token in (5, 6, -1):
        plan = scheduler.schedule()
        assert isinstance(plan, Plan)
        scheduler.collect(plan, [token])
        scheduler.retire()
    assert request.finish_reason == {"type": "stop", "matched": "NaN happened"}
    follower = make_request([*ids(20), 5, 6, 7])
    scheduler.add(follower)
    scheduler.schedule()
    assert follower.cached_tokens == 20


def test_new_token_ratio() -> None:
    ratio = NewTokenRatio(1.0)
    assert ratio.value == 0.7 and NewTokenRatio(3.0).value == 1.0 and NewTokenRatio(0.0).value == 0.0
    for _ in range(300):
        ratio.decay()
    assert ratio.value == pytest.approx(0.7 * (1 + 0.14) / 2)
    for _ in range(400):
        ratio.decay()
    assert ratio.value == pytest.approx(0.7 * 0.14)
    request = make_request([1], max_new_tokens=99)
    request.output_ids = [2] * 30
    ratio.after_retraction([request])
    assert ratio.value == pytest.approx(0.5)


@pytest.mark.parametrize("pool", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("radix", [True, False])
@pytest.mark.parametrize("chunk", [None, 16])
def test_a_pool_just_above_one_request_serves_everything(pool: float, radix: bool, chunk: int | None) -> None:
    longest, page_size = 96, 8
    needed = longest // page_size + 1
    harness = Harness(
        config(
            num_pages=int(needed * pool),
            page_size=page_size,
            radix_cache=radix,
            chunked_prefill_size=chunk,
            schedule_conservativeness=0.0,
            schedule_policy="lpm",
        )
    )
    rng = random.Random(5)
    for seed in range(64):
        length = rng.randrange(1, 80)
        harness.add(ids(length, seed % 7), rng.randrange(1, longest - length), ignore_eos=False)
    harness.run(max_steps=30_000)
    reasons = {r.finish_reason["type"] for r in harness.requests.values() if r.finish_reason}
    assert reasons <= {"stop", "length"} and harness.ended == []


def test_forced_retraction_is_read_from_the_environment_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_TEST_RETRACT", "true")
    harness = Harness(config())
    monkeypatch.delenv("SGLANG_TEST_RETRACT")
    for seed in range(4):
        harness.add(ids(9, seed), 20)
    harness.run()
    assert harness.scheduler.stats().num_retractions > 3
    calm = Harness(config())
    for seed in range(4):
        calm.add(ids(9, seed), 20)
    calm.run()
    assert calm.scheduler.stats().num_retractions == 0
    monkeypatch.setenv("JAXGEN_TEST_RETRACT", "often")
    with pytest.raises(ValueError, match="TEST_RETRACT='often'"):
        Scheduler(config())


def test_abort_while_queued_running_and_unknown() -> None:
    harness = Harness(config(max_running_requests=1))
    running, queued = harness.add(ids(9), 50), harness.add(ids(9, 1), 50)
    for _ in range(4):
        harness.step()
    assert harness.scheduler.abort("nobody") == []
    assert harness.scheduler.abort(queued.rid) == [queued]
    assert harness.scheduler.abort(running.rid) == [running]
    assert queued.finish_reason == {
        "type": "abort", "message": "Abort in waiting queue", "status_code": None, "err_type": None
    }  # fmt: skip
    assert running.finish_reason is not None and running.finish_reason["message"] == "Aborted"
    assert 0 < len(running.output_ids) < 50
    harness.run()
    assert not harness.scheduler.has_unfinished


def test_pages_of_an_aborted_chunk_serve_the_next_step() -> None:
    harness = Harness(config(num_pages=5, page_size=16, chunked_prefill_size=16, radix_cache=False))
    first = harness.add(ids(60), 4)
    harness.step()
    harness.step()
    assert harness.scheduler.abort(first.rid) == [first]
    harness.add(ids(60, 1), 4)
    harness.run()


def test_pause_abort() -> None:
    harness = Harness(config(max_running_requests=1))
    requests = [harness.add(ids(9, seed), 50) for seed in range(2)]
    harness.step()
    assert harness.scheduler.pause("abort") == requests
    late = harness.add(ids(9, 7), 3)
    while harness.step():
        pass
    assert late.finish_reason is None
    harness.scheduler.resume()
    harness.run()
    with pytest.raises(ValueError, match="pause mode"):
        harness.scheduler.pause("sleep")


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_pause_keeps_tokens_and_continues(mode: str) -> None:
    harness = Harness(config(chunked_prefill_size=16))
    requests = [harness.add(ids(40, seed), 20) for seed in range(3)]
    for _ in range(7):
        harness.step()
    harness.scheduler.pause(mode)
    while harness.step():
        pass
    stats = harness.scheduler.stats()
    if mode == "retract":
        assert (stats.running, stats.waiting, stats.owned_pages) == (0, 3, 0)
        assert harness.scheduler.flush_cache() and harness.scheduler.stats().free_pages == 64
    else:
        assert stats.running > 0 and not harness.scheduler.flush_cache()
    assert any(0 < len(r.output_ids) < 20 for r in requests)
    harness.scheduler.resume()
    harness.run()


def test_flush_is_refused_while_anything_runs_or_waits() -> None:
    harness = Harness(config())
    serve(harness, ids(30))
    harness.add(ids(30, 1), 4)
    assert not harness.scheduler.flush_cache()
    harness.step()
    assert not harness.scheduler.flush_cache()
    assert harness.scheduler.stats().cached_pages > 0
    harness.run()
    assert harness.scheduler.flush_cache() and harness.scheduler.stats().cached_pages == 0


def test_membership_and_page_updates_tell_the_device_all_it_needs() -> None:
    harness = Harness(config(page_size=4), overlap=False)
    harness.keep_plans = True
    first = harness.add(ids(6), 12)
    harness.run()
    decodes = [plan for plan in harness.plans if plan.lanes]
    assert [plan.membership_changed for plan in decodes] == [True] + [False] * 10
    assert [plan.joined for plan in decodes] == [[first]] + [[]] * 10
    assert [plan.page_updates != [] for plan in decodes[:7]] == [
        False,
        False,
        True,
        False,
        False,
        False,
        True,
    ]
    assert all(plan.lanes is decodes[0].lanes for plan in decodes)
    assert decodes[0].lengths.dtype == np.int32 and decodes[0].lengths.tolist() == [7]


def test_a_result_can_be_handed_over_before_its_request_leaves() -> None:
    scheduler = Scheduler(config())
    request = make_request([1, 2, 3], max_new_tokens=1)
    scheduler.add(request)
    plan = scheduler.schedule()
    assert isinstance(plan, Plan)
    assert scheduler.collect(plan, [7]) == [request]
    assert request.output_ids == [7] and request.finish_reason is not None
    assert scheduler.stats().running == 1 and scheduler.is_done
    scheduler.retire()
    assert not scheduler.has_unfinished and request.pages == []
    scheduler.add(make_request([1, 2, 3]))
    assert not scheduler.is_done
    scheduler.check_invariants()


def test_collect_checks_the_number_of_tokens() -> None:
    scheduler = Scheduler(config())
    scheduler.add(make_request([1, 2, 3]))
    plan = scheduler.schedule()
    assert isinstance(plan, Plan)
    with pytest.raises(ValueError, match="2 tokens for a plan that samples 1"):
        scheduler.collect(plan, [1, 2])


def test_bad_requests_are_refused() -> None:
    scheduler = Scheduler(config())
    with pytest.raises(ValueError, match="empty prompt"):
        scheduler.add(make_request([]))
    scheduler.add(make_request([1]))
    with pytest.raises(ValueError, match="in use"):
        scheduler.add(make_request([1]))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_pages": 0},
        {"chunked_prefill_size": 0},
        {"schedule_policy": "best"},
        {"eviction_policy": "fifo"},
        {"schedule_conservativeness": -0.1},
        {"priority_scheduling": True, "schedule_policy": "lpm"},
        {"retraction_policy": "priority"},
    ],
)
def test_bad_configurations_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields)).split("_")[0]):
        replace(config(), **fields)


def test_the_harness_notices_a_wrong_read() -> None:
    harness = Harness(config(), overlap=False)
    harness.add(ids(20), 4)
    harness.step()
    harness.device.pages[:] = -1
    with pytest.raises(AssertionError, match="wrong history"):
        harness.step()
    assert hashes("", [1, 2])[0] != hashes("b", [1, 2])[0]
