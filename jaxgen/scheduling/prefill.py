"""Forming a prefill step: the request in mid-chunk first, then as many waiting ones as fit."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxgen.scheduling import policy
from jaxgen.scheduling.estimate import NewTokenRatio, remaining_output
from jaxgen.scheduling.kv import KVManager
from jaxgen.scheduling.lanes import Lanes
from jaxgen.scheduling.plan import Chunk, Plan, SchedulerConfig
from jaxgen.scheduling.prefix_cache import Match
from jaxgen.scheduling.request import Request
from jaxgen.scheduling.retraction import preemption_victims
from jaxgen.scheduling.waiting import WaitingQueue

LEAST_PRIORITY = -(2**31)
# When requests wait for others to end, a prefill step for each one that does would cost more than a few idle rows:
# this share of the running requests is let go first, for at most so many plans.
BATCHED_SHARE = 1 / 32
BATCHED_PLANS = 16
NO_ROW = float("inf")


class Preemption(NamedTuple):
    """Nothing can be planned until these requests are retracted for a more urgent one."""

    victims: list[Request]


class Unservable(NamedTuple):
    """This request does not fit although nothing else runs."""

    request: Request


class PrefillPlanner:
    """Plans prefill steps over the scheduler's queue and running requests, both of which it updates.

    Attributes:
        chunked: the request in mid-chunk, if any; there is never more than one.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVManager,
        ratio: NewTokenRatio,
        waiting: WaitingQueue,
        running: dict[str, Request],
        lanes: Lanes,
    ) -> None:
        self._config = config
        self._kv = kv
        self._ratio = ratio
        self._waiting = waiting
        self._running = running
        self._lanes = lanes
        self._max_running = min(config.max_rows, config.max_running_requests or config.max_rows)
        self._max_chunks = config.prefill_max_requests or config.max_rows
        self._blocked_at: float | None = None
        self._held_until = 0  # running requests, after a refusal
        self._held_plans = 0
        self.chunked: Request | None = None

    def unblock(self) -> None:
        """The queue or the running requests changed: what did not fit may fit now."""
        self._blocked_at = None

    def plan(self, now: float) -> Plan | Preemption | Unservable | None:
        """The next prefill step, or why there is none (None: nothing waits, or what waits has to wait on)."""
        if self.chunked is None and (not self._waiting or self._is_blocked()):
            return None
        plan = Plan("prefill")
        budget = self._config.chunked_prefill_size or self._config.max_prefill_tokens
        riders = self._num_riders()
        if riders >= budget:
            riders = 0
        budget -= riders
        obstacle: Preemption | Unservable | None = None
        if self.chunked is not None:
            budget -= self._continue_chunked(self.chunked, plan, budget)
            if not plan.chunks:
                return Unservable(self.chunked) if len(self._running) == 1 else None
        if self.chunked is None:
            obstacle = self._admit(plan, budget, now)
        self._kv.end_plan()
        if not plan.chunks:
            return obstacle
        self._complete(plan, riders > 0)
        return plan

    def eviction_priority(self, request: Request) -> int:
        """What the `priority` eviction policy goes by: larger stays longer."""
        return int(max(self._waiting.urgency(request), LEAST_PRIORITY))

    def _is_blocked(self) -> bool:
        """Whether the request that did not fit last time cannot fit yet, so that looking again is a waste."""
        if not self._running:
            return False
        self._held_plans -= 1
        if len(self._running) > self._held_until and self._held_plans >= 0:
            return True
        if self._blocked_at is None:
            return False
        if self._blocked_at == NO_ROW:
            return True
        return self._kv.available * self._kv.page_size - self._reserved() < self._blocked_at

    def _reserved(self) -> float:
        running = self._running.values()
        rows: np.ndarray = np.fromiter((request.row for request in running), np.int64, len(running))
        return self._ratio.reserved(self._kv.rows, rows)

    def _num_riders(self) -> int:
        """Decode lanes that may ride along."""
        if not self._config.mixed_chunk:
            return 0
        self._lanes.refresh()
        if any(request.return_logprob for request in self._lanes.requests):
            return 0
        return len(self._lanes.requests)

    def _continue_chunked(self, request: Request, plan: Plan, budget: int) -> int:
        """Add the next chunk of the request in mid-chunk if its pages can be had; returns its tokens."""
        start = request.kv_len
        length = self._chunk_length(request, start, budget, first=True)
        if self._kv.pages_of(start + length) - len(request.pages) > self._kv.available:
            return 0
        self._add_chunk(plan, request, start, length)
        return length

    def _chunk_length(self, request: Request, start: int, budget: int, first: bool) -> int:
        """Tokens of the request that fit the budget; 0 if it should rather start with the next plan."""
        rest = request.num_tokens - start
        if rest <= budget:
            return rest
        if self._config.chunked_prefill_size is None:
            return rest if first else 0
        page_size = self._kv.page_size
        aligned = (start + budget) // page_size * page_size - start
        if aligned > 0:
            return aligned
        return budget if first else 0

    def _add_chunk(self, plan: Plan, request: Request, start: int, length: int) -> None:
        stop = start + length
        self._kv.grow(request, stop)
        self._kv.rows.kv_len[request.row] = stop
        last = stop == request.num_tokens
        self.chunked = None if last else request
        plan.chunks.append(Chunk(request, start, length, last))

    def _admit(self, plan: Plan, budget: int, now: float) -> Preemption | Unservable | None:
        """Take requests from the queue in the order of the policy, up to the first that does not fit."""
        reserved = self._reserved()
        obstacle: Preemption | Unservable | None = None
        admitted: list[Request] = []
        for request in policy.order(self._config.schedule_policy, self._waiting, self._kv):
            if budget <= 0 or len(plan.chunks) >= self._max_chunks or self.chunked is not None:
                break
            if len(self._running) >= self._max_running:
                obstacle = self._refuse(request, plan, NO_ROW, 0.0, needed_rows=1)
                break
            match = self._kv.match(request)
            length = self._chunk_length(request, match.length, budget, first=not plan.chunks)
            if length == 0:
                break
            page_size = self._kv.page_size
            available = self._kv.available_beside(match)
            pages = self._kv.pages_of(match.length + length) - len(match.pages)
            extend = request.num_tokens - len(match.pages) * page_size
            needed = extend + remaining_output(request) + page_size + reserved
            if needed > available * page_size or pages > available:
                if self._running:
                    shortage = max(needed - available * page_size, (pages - available) * page_size)
                    obstacle = self._refuse(request, plan, needed - reserved, shortage, needed_rows=0)
                    break
                fitting = self._fit_alone(request, match)
                if fitting is None:
                    obstacle = Unservable(request)
                    break
                match = fitting
                length = self._chunk_length(request, match.length, budget, first=True)
            self._start(plan, request, match, now)
            self._add_chunk(plan, request, match.length, length)
            admitted.append(request)
            budget -= length
            reserved += remaining_output(request) * self._ratio.of(request)
        for request in admitted:
            self._waiting.remove(request)
        return obstacle

    def _refuse(
        self, request: Request, plan: Plan, blocked_at: float, shortage: float, needed_rows: int
    ) -> Preemption | None:
        """The first waiting request does not fit beside those running: preempt, or remember what it needs."""
        config = self._config
        if not config.priority_scheduling:
            self._held_until = len(self._running) - int(len(self._running) * BATCHED_SHARE)
            self._held_plans = BATCHED_PLANS
        if plan.chunks:
            return None
        if config.priority_scheduling and config.priority_preemption:
            victims = preemption_victims(
                request,
                self._running.values(),
                shortage,
                needed_rows,
                threshold=config.priority_preemption_threshold,
                waiting=self._waiting,
                kv=self._kv,
                ratio=self._ratio,
            )
            if victims:
                return Preemption(victims)
        self._blocked_at = blocked_at
        return None

    def _fit_alone(self, request: Request, match: Match) -> Match | None:
        """A match with which a request has room for its tokens so far when nothing else runs."""
        pages = self._kv.pages_of(request.num_tokens) - len(match.pages)
        for attempt in (match, self._kv.without_tail(match)):
            if pages <= self._kv.available_beside(attempt):
                return attempt
        return None

    def _start(self, plan: Plan, request: Request, match: Match, now: float) -> None:
        self._kv.attach(request, match, request.params.ignore_eos)
        request.started_at = now
        if request.num_retractions == 0:
            request.cached_tokens = match.length
        self._running[request.rid] = request
        if match.tail is not None:
            self._kv.grow(request, match.length)
            plan.copies.append((match.tail.page, request.pages[len(match.pages)]))

    def _complete(self, plan: Plan, riders: bool) -> None:
        """Let decode lanes ride along, publish what the step computes, turn finished prompts into lanes."""
        if (
            riders
            and not any(chunk.request.return_logprob for chunk in plan.chunks)
            and self._kv.lanes_missing(self._lanes.rows) <= self._kv.available
        ):
            self._lanes.advance(plan)
        page_size = self._kv.page_size
        table = self._kv.rows
        for chunk in plan.chunks:
            request = chunk.request
            stop = chunk.stop if chunk.last else chunk.stop // page_size * page_size
            self._kv.publish(request, stop, self.eviction_priority(request))
            if chunk.last and table.kv_len[request.row] < table.limit[request.row]:
                self._lanes.join(request)
