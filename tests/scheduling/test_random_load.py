"""Random load and configurations: every read is right, no page is lost, every output is as expected."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduling_harness import Harness, random_prompt

from jaxgen.scheduling import NEED_COLLECT, QueueFull, Scheduler, SchedulerConfig


def random_config(rng: random.Random) -> SchedulerConfig:
    page_size = rng.choice([1, 2, 4, 8, 16])
    longest = 64
    policy = rng.choice(["fcfs", "lpm", "random", "dfs-weight", "lof"])
    priority = policy in ("fcfs", "lof") and rng.random() < 0.5
    steps = [s for s in (1, 2, 3, 8) if s <= page_size]
    least_pages = -(-longest // page_size) + 3
    return SchedulerConfig(
        num_pages=rng.choice([least_pages, least_pages * 2, least_pages * 8]),
        page_size=page_size,
        max_rows=rng.choice([1, 2, 5, 16]),
        max_running_requests=rng.choice([None, 3]),
        context_length=longest,
        chunked_prefill_size=rng.choice([None, page_size, 4 * page_size, 32, 64]),
        max_prefill_tokens=rng.choice([8, 40, 200]),
        prefill_max_requests=rng.choice([None, 1, 3]),
        decode_steps=tuple((lanes, rng.choice(steps)) for lanes in (1, 2, 16)) if rng.random() < 0.5 else (),
        schedule_policy=policy,
        schedule_conservativeness=rng.choice([0.0, 0.3, 1.0]),
        radix_cache=rng.random() < 0.8,
        eviction_policy=rng.choice(["lru", "lfu", "slru", "priority"]),
        mixed_chunk=rng.random() < 0.4,
        max_queued_requests=rng.choice([None, None, 4]),
        priority_scheduling=priority,
        low_priority_values_first=rng.random() < 0.3,
        priority_preemption_threshold=rng.choice([0, 3]),
        retraction_policy="priority" if priority and rng.random() < 0.5 else "length",
        test_retract=rng.choice([0, 0, 0, 1, 3]),
        seed=rng.randrange(100),
    )


def add_request(harness: Harness, rng: random.Random) -> None:
    config = harness.scheduler.config
    prompt = random_prompt(rng, rng.choice([6, 20, 40]), list(harness.requests.values()))
    room = config.context_length - len(prompt) - 1
    with_logprobs = rng.random() < 0.15
    try:
        harness.add(
            prompt,
            rng.choice([0, 1, 2, 5, 20, room]),
            ignore_eos=rng.random() < 0.4,
            namespace=rng.choice(["", "", "b"]),
            priority=rng.choice([None, 0, 1, 5, 9]),
            return_logprob=with_logprobs,
            logprob_start=rng.randrange(-1, len(prompt) + 1) if with_logprobs else -1,
            frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
        )
    except QueueFull:
        assert config.max_queued_requests is not None


def disturb(harness: Harness, rng: random.Random) -> None:
    """Abort, pause or flush in the middle of the load."""
    scheduler = harness.scheduler
    kind = rng.randrange(8)
    if kind < 5:
        unfinished = [rid for rid, request in harness.requests.items() if request.finish_reason is None]
        if unfinished:
            rid = rng.choice(unfinished)
            (aborted,) = scheduler.abort(rid)
            assert aborted.finish_reason is not None and scheduler.abort(rid) == []
    elif kind == 5:
        scheduler.flush_cache()
    else:
        scheduler.pause(rng.choice(["abort", "retract", "in_place"]))
        while harness.step():
            scheduler.check_invariants()
        assert scheduler.schedule() is not NEED_COLLECT
        if rng.random() < 0.5:
            scheduler.flush_cache()
        scheduler.resume()


def check_matches(scheduler: Scheduler) -> None:
    """What is remembered of a waiting request's cached prefix is what a look at its whole prompt finds."""
    kv = scheduler._kv
    for request in scheduler._waiting:
        limit = request.match_limit if scheduler.config.radix_cache else 0
        anew = kv.cache.match(request.namespace, request.key(limit), limit)
        match = kv.match(request)
        assert (match.length, match.pages, match.tail) == (anew.length, anew.pages, anew.tail)
        assert match.node is anew.node or request.namespace.encode() not in kv.cache._roots


def run_load(seed: int, steps: int) -> int:
    """About `steps` iterations of random load, then whatever it takes to finish; returns the iterations."""
    rng = random.Random(seed)
    harness = Harness(random_config(rng), overlap=rng.random() < 0.7)
    rate = rng.choice([0.05, 0.2, 0.5])
    for _ in range(steps):
        while rng.random() < rate:
            add_request(harness, rng)
        harness.step()
        full_check = rng.random() < 0.05
        harness.scheduler.check_invariants(full_check)
        if full_check:
            check_matches(harness.scheduler)
        if rng.random() < 0.02:
            disturb(harness, rng)
            harness.scheduler.check_invariants()
    harness.run(full_check=False)
    codes = {request.finish_reason["status_code"] for request in harness.ended if request.finish_reason}
    assert 500 not in codes, "every request of this load fits the pool when it is alone"
    assert harness.scheduler.flush_cache()
    assert harness.scheduler.stats().free_pages == harness.scheduler.config.num_pages
    return harness.steps


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 60))
def test_short_random_loads(seed: int, steps: int) -> None:
    run_load(seed, steps)


@pytest.mark.parametrize("part", range(4))
def test_long_random_loads(part: int) -> None:
    done, seed = 0, 10_000 * part
    while done < 50_000:
        done += run_load(seed, 500)
        seed += 1
