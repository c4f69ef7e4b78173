"""Order of service, priorities, queue bound and time-outs."""

from __future__ import annotations

import random
from typing import Any

import pytest
from scheduling_harness import VOCAB, Harness

from jaxgen.scheduling import (
    NEED_COLLECT,
    QueueFull,
    Request,
    Scheduler,
    SchedulerConfig,
    coarse,
    decode_buckets,
    decode_steps,
    prefill_buckets,
    sparse,
)
from jaxgen.scheduling.prefill import BATCHED_PLANS


def config(**fields: Any) -> SchedulerConfig:
    defaults: dict[str, Any] = {"num_pages": 256, "page_size": 8, "max_rows": 8, "context_length": 1024}
    return SchedulerConfig(**(defaults | fields))


def ids(n: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(2, VOCAB), k=n)


def service_order(harness: Harness) -> list[str]:
    """Ids in the order of their first chunk."""
    harness.keep_plans = True
    harness.run()
    chunks = [chunk.request.rid for plan in harness.plans for chunk in plan.chunks]
    return list(dict.fromkeys(chunks))


@pytest.mark.parametrize(("policy", "expected"), [("fcfs", "abcd"), ("lof", "bdac")])
def test_static_orders(policy: str, expected: str) -> None:
    harness = Harness(config(schedule_policy=policy, max_running_requests=1))
    for seed, (rid, new) in enumerate(zip("abcd", (3, 9, 1, 5))):
        harness.add(ids(5, seed), new, rid=rid)
    assert service_order(harness) == list(expected)


def test_random_order_serves_all_and_depends_on_the_seed() -> None:
    orders = set()
    for seed in range(5):
        harness = Harness(config(schedule_policy="random", max_running_requests=1, seed=seed))
        for n in range(6):
            harness.add(ids(5, n), 1, rid=str(n))
        orders.add(tuple(service_order(harness)))
    assert len(orders) > 1 and all(sorted(order) == list("012345") for order in orders)


def lpm_harness(waiting: int, **fields: Any) -> Harness:
    """A cached prompt, and a queue whose last request extends it."""
    harness = Harness(config(schedule_policy="lpm", max_running_requests=1, **fields))
    harness.add(ids(40, 1), 1, rid="first")
    harness.run()
    for n in range(waiting - 1):
        harness.add(ids(10, 100 + n), 1, rid=str(n))
    harness.add(ids(40, 1) + ids(5, 2), 1, rid="extends")
    return harness


def test_longest_cached_prefix_goes_first_while_the_queue_is_short() -> None:
    assert service_order(lpm_harness(128))[0] == "extends"
    assert service_order(lpm_harness(129))[0] == "0"
    assert service_order(lpm_harness(5, radix_cache=False))[0] == "0"


@pytest.mark.parametrize("shared", [32, 64])
@pytest.mark.parametrize(("policy", "count"), [("lpm", 4), ("lpm", 130), ("dfs-weight", 4)])
def test_a_shared_part_is_computed_once(policy: str, count: int, shared: int) -> None:
    harness = Harness(config(schedule_policy=policy, max_rows=130, num_pages=4096))
    stem = ids(shared, 1)
    requests = [harness.add(stem + ids(6, 2 + n), 2) for n in range(count)]
    harness.keep_plans = True
    harness.run()
    assert [len(plan.chunks) for plan in harness.plans if plan.chunks] == [1, count - 1]
    first, *others = [request.cached_tokens for request in requests]
    assert first == 0 and min(others) >= shared


def test_requests_that_may_not_reuse_are_not_held_back() -> None:
    harness = Harness(config(schedule_policy="lpm"))
    for n in range(3):
        harness.add([*ids(64, 1), n], 2, return_logprob=True, logprob_start=0)
    harness.keep_plans = True
    harness.run()
    assert [len(plan.chunks) for plan in harness.plans if plan.chunks] == [3]


def test_depth_first_serves_the_heaviest_subtree_together() -> None:
    harness = Harness(config(schedule_policy="dfs-weight"))
    left, right = ids(40, 1), ids(40, 2)
    for rid, prompt in (("l", left), ("r", right)):
        harness.add(prompt, 1, rid=rid)
    harness.run()
    for rid, stem in (("l1", left), ("r1", right), ("l2", left), ("r2", right), ("r3", right)):
        harness.add(stem + ids(9, ord(rid[1]) + ord(rid[0])), 1, rid=rid)
    assert service_order(harness) == ["r1", "r2", "r3", "l1", "l2"]


def priority_config(**fields: Any) -> SchedulerConfig:
    return config(schedule_policy="fcfs", priority_scheduling=True, **fields)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, "cabd"), ({"low_priority_values_first": True}, "bacd"), ({"default_priority": 3}, "cdab")],
)
def test_priorities_order_the_queue(fields: dict[str, Any], expected: str) -> None:
    harness = Harness(priority_config(max_running_requests=1, **fields))
    for seed, (rid, priority) in enumerate(zip("abcd", (2, 1, 7, None))):
        harness.add(ids(5, seed), 2, rid=rid, priority=priority)
    assert service_order(harness) == list(expected)


def test_priority_is_ignored_when_disabled() -> None:
    harness = Harness(config(schedule_policy="fcfs", max_running_requests=1))
    for seed, (rid, priority) in enumerate(zip("ab", (1, 50))):
        harness.add(ids(5, seed), 2, rid=rid, priority=priority)
    assert service_order(harness) == ["a", "b"]


@pytest.mark.parametrize(
    ("difference", "enabled", "preempts"), [(10, True, False), (11, True, True), (11, False, False)]
)
def test_preemption_needs_more_than_the_threshold(difference: int, enabled: bool, preempts: bool) -> None:
    harness = Harness(priority_config(max_running_requests=1, priority_preemption=enabled))
    running = harness.add(ids(9), 30, priority=1)
    for _ in range(5):
        harness.step()
    urgent = harness.add(ids(9, 1), 3, priority=1 + difference)
    harness.run()
    assert running.num_retractions == preempts
    assert len(running.output_ids) == 30 and len(urgent.output_ids) == 3


def test_preemption_for_pages_takes_the_least_urgent_that_suffice() -> None:
    harness = Harness(priority_config(num_pages=12, priority_preemption_threshold=0))
    requests = [harness.add(ids(9, seed), 20, priority=seed) for seed in range(2)]
    for _ in range(4):
        harness.step()
    urgent = harness.add(ids(9, 9), 20, priority=9)
    harness.run()
    assert [request.num_retractions for request in requests] == [1, 0]
    assert urgent.num_retractions == 0


def test_retraction_by_priority() -> None:
    harness = Harness(
        priority_config(
            num_pages=10,
            retraction_policy="priority",
            schedule_conservativeness=0.0,
            priority_preemption=False,
        )
    )
    low, high = (harness.add(ids(9, p), 40, ignore_eos=False, priority=p) for p in (0, 1))
    low.eos_ids = high.eos_ids = frozenset()
    harness.run()
    assert low.num_retractions > 0 and high.num_retractions == 0


def test_full_queue() -> None:
    scheduler = Harness(config(max_queued_requests=2))
    for n in range(2):
        scheduler.add(ids(5, n))
    with pytest.raises(QueueFull, match=r"^The request queue is full\.$"):
        scheduler.add(ids(5, 9))
    assert "r2" not in scheduler.requests
    scheduler.run()


def test_a_more_urgent_request_displaces_the_least_urgent_queued_one() -> None:
    harness = Harness(priority_config(max_queued_requests=2))
    low, _ = harness.add(ids(5), priority=1), harness.add(ids(5, 1), priority=5)
    with pytest.raises(QueueFull):
        harness.add(ids(5, 2), priority=1)
    harness.add(ids(5, 2), priority=2, rid="new")
    assert harness.scheduler.drain_ended() == [low]
    assert low.finish_reason is not None and low.finish_reason["status_code"] == 503
    assert low.finish_reason["message"] == "The request is aborted by a higher priority request."
    harness.run()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_outs_of_waiting_and_running_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_REQ_WAITING_TIMEOUT", "5")
    monkeypatch.setenv("JAXGEN_REQ_RUNNING_TIMEOUT", "20")
    clock = Clock()
    harness = Harness(config(max_running_requests=1), clock=clock)
    running, waiting = harness.add(ids(9), 500), harness.add(ids(9, 1), 5)
    harness.step()
    clock.now += 4.0
    harness.step()
    assert waiting.finish_reason is None
    clock.now += 2.0
    harness.step()
    assert harness.ended == [waiting] and waiting.finish_reason is not None
    assert waiting.finish_reason["status_code"] == 503 and running.finish_reason is None
    clock.now += 20.0
    harness.step()
    assert running.finish_reason is not None and running.finish_reason["status_code"] == 503
    assert 0 < len(running.output_ids) < 500
    harness.run()


def test_a_pause_does_not_count_for_time_outs() -> None:
    clock = Clock()
    harness = Harness(config(max_running_requests=1, waiting_timeout=5.0, running_timeout=5.0), clock=clock)
    requests = [harness.add(ids(9, n), 5) for n in range(2)]
    harness.step()
    clock.now += 3.0
    harness.scheduler.pause("in_place")
    clock.now += 100.0
    harness.scheduler.resume()
    harness.run()
    assert harness.ended == [] and all(len(r.output_ids) == 5 for r in requests)


def test_zero_seconds_and_bad_values_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXGEN_REQ_WAITING_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="REQ_WAITING_TIMEOUT='soon'"):
        Scheduler(config())
    clock = Clock()
    harness = Harness(config(waiting_timeout=0.0), clock=clock)
    request: Request = harness.add(ids(5), 2)
    clock.now += 1e6
    assert harness.scheduler.schedule() not in (None, NEED_COLLECT)
    assert request.finish_reason is None


def test_decode_steps_of_a_launch() -> None:
    gib = 1 << 30
    assert decode_steps((1, 64, 128, 256, 512), gib, 64) == ((1, 8), (64, 8), (128, 4), (256, 2), (512, 1))
    assert decode_steps((1, 256), 3 * gib, 64) == ((1, 2), (256, 2))
    assert decode_steps((1, 256), 16 * gib, 64) == ((1, 1), (256, 1))
    assert decode_steps((1,), gib, 4) == ((1, 4),)
    assert decode_steps((1, 64), 16 * gib, 64, explicit=3) == ((1, 3), (64, 3))
    for wrong in (0, 65):
        with pytest.raises(ValueError, match="num_continuous_decode_steps"):
            decode_steps((1,), gib, 64, explicit=wrong)


def test_buckets() -> None:
    assert decode_buckets(1) == (1,)
    assert decode_buckets(160) == (1, *range(8, 64, 8), 64, 80, 96, 112, 128, 160)
    assert decode_buckets(512)[-4:] == (320, 384, 448, 512)
    assert decode_buckets(20, [4, 8, 64]) == (4, 8, 20)
    assert prefill_buckets(4096) == (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    assert prefill_buckets(100, 32) == (32, 64, 100)
    assert prefill_buckets(2048, 256, half_steps_from=512) == (256, 512, 768, 1024, 1536, 2048)
    assert coarse((1, 2, 4, 8, 24, 64, 80, 100)) == (1, 4, 64, 100)
    assert sparse((1, 2, 4, 8, 24, 64, 80, 100), 4) == (100, 24, 4, 1)
    with pytest.raises(ValueError):
        decode_buckets(4, [0])


@pytest.mark.parametrize(("ends", "together"), [((3, 6), True), ((3,), False)])
def test_rows_of_a_full_batch_are_given_away_by_the_dozen(ends: tuple[int, ...], together: bool) -> None:
    """A prefill step waits until a 32nd of the requests have ended, but not for long."""
    harness = Harness(config(max_rows=64, num_pages=1024))
    for index in range(64):
        harness.add(ids(5, index), ends[index] if index < len(ends) else 60)
    late = {harness.add(ids(5, 100 + index), 4).rid for index in range(2)}
    harness.keep_plans = True
    harness.run()
    prefills = [
        (i, {chunk.request.rid for chunk in p.chunks}) for i, p in enumerate(harness.plans) if p.chunks
    ]
    (_, first), (at, second), *rest = prefills
    assert len(first) == 64
    if together:
        assert second == late and not rest
    else:
        assert len(second) == 1 and BATCHED_PLANS < at < 30
