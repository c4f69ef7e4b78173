"""The scheduler: which requests advance in the next device step, and on which pages.

Everything that device steps will have done once they ran is booked when they are planned: KV lengths, pages,
and the prefix cache. That is sound because steps run in the order of their plans, and it lets the loop plan
step k+1 before it has seen the tokens of step k. Only what depends on the tokens themselves waits for
`collect`.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgen.sampling_params import NAN_MATCH
from jaxgen.scheduling import environment
from jaxgen.scheduling.estimate import RETRACT_DECODE_STEPS, NewTokenRatio
from jaxgen.scheduling.kv import KVManager
from jaxgen.scheduling.lanes import Lanes
from jaxgen.scheduling.page_pool import PageError
from jaxgen.scheduling.plan import NEED_COLLECT, Plan, SchedulerConfig, Signal
from jaxgen.scheduling.prefill import Preemption, PrefillPlanner, Unservable
from jaxgen.scheduling.request import Request, abort_reason
from jaxgen.scheduling.retraction import retraction_order
from jaxgen.scheduling.waiting import QueueFull, WaitingQueue

PAUSE_MODES = ("abort", "retract", "in_place")
EXPIRY_CHECK_INTERVAL = 0.05  # seconds between looks at the time-outs


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Counts at one moment; pages satisfy free + cached + owned == total."""

    running: int
    waiting: int
    free_pages: int
    cached_pages: int
    owned_pages: int
    total_pages: int
    available_tokens: int
    new_token_ratio: float
    num_retractions: int
    paused: bool


class Scheduler:
    """Queue, running requests and KV pages of one engine. Not thread-safe: one loop owns it.

    A request has a row and pages from its first chunk until it finishes, is aborted or is retracted. The loop
    calls `schedule`, launches the plan, and may call `schedule` again before it collects; plans are collected
    in order, each with the tokens of its step.
    """

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self._clock = clock
        self._kv = KVManager(config)
        self._ratio = NewTokenRatio(config.schedule_conservativeness)
        self._waiting = WaitingQueue(config)
        self._running: dict[str, Request] = {}
        self._lanes = Lanes(self._kv)
        self._prefill = PrefillPlanner(
            config, self._kv, self._ratio, self._waiting, self._running, self._lanes
        )
        self._ended: list[Request] = []
        self._leaving: list[Request] = []
        self._paused: str | None = None
        self._paused_at = 0.0
        self._num_retractions = 0
        self._decode_steps = 0
        self.single_step = False  # set while launches of several steps are not compiled yet
        self._most_steps = max((steps for _, steps in config.decode_steps), default=1)
        self._retract_interval = (
            environment.retract_interval() if config.test_retract is None else config.test_retract
        )
        self._waiting_timeout = environment.timeout("REQ_WAITING_TIMEOUT", config.waiting_timeout)
        self._running_timeout = environment.timeout("REQ_RUNNING_TIMEOUT", config.running_timeout)
        self._next_expiry_check = float("-inf")
        self._again = False  # a request ended or was retracted while planning, so planning anew may succeed

    # Requests in and out

    def add(self, request: Request) -> None:
        """Queue a request.

        Under priority scheduling a full queue drops its least urgent request for a more urgent one; it
        appears in `drain_ended`.

        Raises:
            QueueFull: `max_queued_requests` requests are waiting already.
            ValueError: empty prompt, or an id that is in use.
        """
        if not request.prompt_ids:
            raise ValueError(f"request {request.rid!r} has an empty prompt")
        if request.rid in self._running or self._waiting.get(request.rid) is not None:
            raise ValueError(f"request id {request.rid!r} is in use by an unfinished request")
        limit = self.config.max_queued_requests
        if limit is not None and len(self._waiting) >= limit:
            last = self._waiting.last() if self.config.priority_scheduling and limit else None
            if last is None or self._waiting.urgency(last) >= self._waiting.urgency(request):
                raise QueueFull("The request queue is full.")
            message = "The request is aborted by a higher priority request."
            self._end_early(last, message, 503, "ServiceUnavailableError")
        request.queued_at = self._clock()
        self._waiting.add(request)
        self._prefill.unblock()

    def abort(self, rid: str) -> list[Request]:
        """End the request with exactly this id at once; returns it in a list, or an empty list if unknown."""
        request = self._running.get(rid)
        if request is not None:
            self._end(request, abort_reason("Aborted"))
            return [request]
        request = self._waiting.get(rid)
        if request is not None:
            self._end(request, abort_reason("Abort in waiting queue"))
            return [request]
        return []

    def abort_all(self) -> list[Request]:
        """End every request."""
        rids = [*self._running, *(request.rid for request in self._waiting)]
        return [request for rid in rids for request in self.abort(rid)]

    def drain_ended(self) -> list[Request]:
        """Requests that the scheduler itself ended since the last call: time-outs, no memory, displaced."""
        ended, self._ended = self._ended, []
        return ended

    # The cycle: schedule, launch, collect, retire

    def schedule(self) -> Plan | Signal | None:
        """The next step, NEED_COLLECT, or None.

        None means that nothing can be launched now. If launched plans are not yet collected, collect them and
        ask again; otherwise nothing happens until a request is added.
        """
        self.check_invariants(full=False)
        if self._paused is not None:
            return self._finish_pause()
        self._expire()
        outcome: Plan | Signal | None = None
        self._again = True
        while outcome is None and self._again:
            self._again = False
            outcome = self._plan_prefill()
            if outcome is None:
                outcome = self._plan_decode()
        return outcome

    def collect(self, plan: Plan, tokens: Sequence[int] | np.ndarray) -> list[Request]:
        """Take the tokens of a launched plan: of each last chunk in order, then of each lane, step by step.

        Returns the requests that got a token or finished. Tokens of requests that ended meanwhile are
        dropped, as are those after the last of a request. Before the next plan `retire` must be called: the
        caller may hand results over first.

        Raises:
            ValueError: the number of tokens is not the plan's.
        """
        values: Sequence[int] = tokens.tolist() if isinstance(tokens, np.ndarray) else tokens
        prefilled = [chunk.request for chunk in plan.chunks if chunk.last]
        split = len(prefilled)
        sampled = split + plan.steps * len(plan.lanes)
        if len(values) != sampled:
            raise ValueError(f"{len(values)} tokens for a plan that samples {sampled}")
        changed: list[Request] = []
        for request, token in zip(prefilled, values):
            if request.finish_reason is None:
                if request.max_new_tokens == 0:
                    request.finish_reason = {"type": "length", "length": 0}
                else:
                    request.append(token)
                changed.append(request)
        alive = [request for request in plan.lanes if request.finish_reason is None]
        for start in range(split, sampled, len(plan.lanes) or 1):
            for request, token in zip(plan.lanes, values[start : start + len(plan.lanes)]):
                if request.finish_reason is None:
                    request.append(token)
        changed += alive
        self._leaving += [request for request in changed if request.finish_reason is not None]
        return changed

    def retire(self) -> None:
        """Take rows and pages back from the requests that ended in `collect`."""
        leaving, self._leaving = self._leaving, []
        for request in leaving:
            self._finish(request)

    def _plan_prefill(self) -> Plan | Signal | None:
        """A prefill step, if any; retracts for a more urgent request and ends one that can never fit."""
        outcome = self._prefill.plan(self._clock())
        while isinstance(outcome, Preemption):
            if any(request.inflight for request in outcome.victims):
                return NEED_COLLECT
            for request in outcome.victims:
                self._retract(request)
            outcome = self._prefill.plan(self._clock())
        if isinstance(outcome, Unservable):
            self._give_up(outcome.request)
            return None
        return outcome

    def _plan_decode(self) -> Plan | Signal | None:
        """The next tokens of every lane, after retracting as many requests as the pool demands."""
        self._lanes.refresh()
        if not self._lanes.requests:
            return None
        steps = self._steps()
        forced = self._retraction_is_due()
        if forced or self._kv.lanes_missing(self._lanes.rows, steps) > self._kv.available:
            if any(request.inflight for request in self._running.values()):
                return NEED_COLLECT
            self._make_room(forced)
            if not self._lanes.requests:
                return None
            steps = self._steps()
        self._decode_steps += 1
        self._ratio.decay(steps)
        plan = Plan("decode")
        self._lanes.advance(plan, steps)
        return plan

    def _steps(self) -> int:
        """Tokens of each lane in the next decode plan."""
        if self.single_step:
            return 1
        table = self.config.decode_steps
        index = bisect.bisect_left(table, len(self._lanes.requests), key=lambda entry: entry[0])
        return table[index][1] if index < len(table) else 1

    def _retraction_is_due(self) -> bool:
        """Whether the test switch asks for a retraction now; the last running request always stays."""
        interval = self._retract_interval
        return interval > 0 and len(self._running) > 1 and self._decode_steps % interval == interval - 1

    def _make_room(self, forced: bool) -> None:
        """Retract until the lanes that stay have pages for some steps; a last one that lacks them ends."""
        urgency = self._waiting.urgency
        victims = retraction_order(self._running.values(), self.config.retraction_policy, urgency)
        ahead = self._most_steps
        if forced:
            self._retract(victims.pop(0))
        else:
            ahead = max(ahead, RETRACT_DECODE_STEPS)
        self._lanes.refresh()
        while len(victims) > 1 and self._kv.lanes_missing(self._lanes.rows, ahead) > self._kv.available:
            self._retract(victims.pop(0))
            self._lanes.refresh()
        if self._kv.lanes_missing(self._lanes.rows, self._steps()) > self._kv.available:
            self._give_up(victims[0])
            self._lanes.refresh()
        self._ratio.after_retraction(list(self._running.values()))

    # Leaving

    def _finish(self, request: Request) -> None:
        """A request ended by itself: its KV stays cached, without the last token, which has none."""
        reason = request.finish_reason
        if reason is not None and reason.get("matched") != NAN_MATCH:
            self._publish(request, len(request.prompt_ids) + max(len(request.output_ids) - 1, 0))
        self._release(request)
        # Freed here, while steps run, rather than by the caller when the last of its requests has ended.
        request.prompt_array = request.prompt_key = None

    def _retract(self, request: Request) -> None:
        """Take row and pages from a running request and queue it again; it keeps its output."""
        self._publish(request, request.kv_len)
        self._release(request)
        request.num_retractions += 1
        self._num_retractions += 1
        request.queued_at = self._clock()
        self._waiting.add(request)
        self._again = True

    def _publish(self, request: Request, num_tokens: int) -> None:
        self._kv.publish(request, num_tokens, self._prefill.eviction_priority(request))

    def _release(self, request: Request) -> None:
        """Return row and pages of a running request."""
        del self._running[request.rid]
        self._lanes.leave(request)
        if self._prefill.chunked is request:
            self._prefill.chunked = None
        self._kv.release(request)
        self._prefill.unblock()

    def _end(self, request: Request, reason: dict[str, Any]) -> None:
        """End an unfinished request, wherever it is."""
        request.finish_reason = reason
        if request.rid in self._running:
            self._release(request)
        else:
            self._waiting.remove(request)
            self._prefill.unblock()

    def _end_early(self, request: Request, message: str, status_code: int, err_type: str) -> None:
        """The scheduler itself ends a request; `drain_ended` reports it."""
        self._end(request, abort_reason(message, status_code, err_type))
        self._ended.append(request)
        self._again = True

    def _give_up(self, request: Request) -> None:
        """The only running request, or a waiting one while none runs, lacks pages.

        Its lock can pin equal pages that others computed and left. If it would fit without them it starts
        anew, alone; otherwise it ends.
        """
        running = request.row >= 0
        if running and self._kv.pages_of(request.kv_len + 1) <= self._kv.pool.num_pages:
            self._retract(request)
            return
        message = (
            f"The KV pool of {self._kv.pool.num_pages * self._kv.page_size} tokens cannot hold this request "
            f"({request.num_tokens} tokens so far) even alone. Raise max_total_tokens or shorten the request."
        )
        self._end_early(request, message, 500, "InternalServerError")

    def _expire(self) -> None:
        """End requests that waited or ran for too long."""
        if self._waiting_timeout is None and self._running_timeout is None:
            return
        now = self._clock()
        if now < self._next_expiry_check:
            return
        self._next_expiry_check = now + EXPIRY_CHECK_INTERVAL
        if self._waiting_timeout is not None:
            for request in [r for r in self._waiting if now - r.queued_at > self._waiting_timeout]:
                message = f"The request waited longer than {self._waiting_timeout:g} s."
                self._end_early(request, message, 503, "ServiceUnavailableError")
        if self._running_timeout is not None:
            for request in [r for r in self._running.values() if now - r.started_at > self._running_timeout]:
                message = f"The request ran longer than {self._running_timeout:g} s."
                self._end_early(request, message, 503, "ServiceUnavailableError")

    # Pause, cache, state

    def pause(self, mode: str = "abort") -> list[Request]:
        """Hold everything until `resume`; requests added meanwhile wait. Returns the requests that this
        aborted.

        Args:
            mode: "abort" ends every request; "retract" queues running ones again without pages (their KV
                stays in the prefix cache until `flush_cache`); "in_place" keeps them as they are.

        Raises:
            ValueError: another mode.
        """
        if mode not in PAUSE_MODES:
            raise ValueError(f"pause mode must be one of {', '.join(PAUSE_MODES)}; got {mode!r}")
        if self._paused is None:
            self._paused_at = self._clock()
        self._paused = mode
        return self.abort_all() if mode == "abort" else []

    def resume(self) -> None:
        """Undo `pause`; the time since does not count for time-outs."""
        if self._paused is None:
            return
        self._paused = None
        for request in (*self._running.values(), *self._waiting):
            request.queued_at = self._later(request.queued_at)
            request.started_at = self._later(request.started_at)
        self._prefill.unblock()

    def _later(self, moment: float) -> float:
        """A moment moved by the part of the pause that came after it."""
        return moment + self._clock() - max(self._paused_at, moment)

    @property
    def paused(self) -> bool:
        return self._paused is not None

    def _finish_pause(self) -> Signal | None:
        """Retract what still runs under a pause that asks for it, once its tokens are all known."""
        if self._paused == "retract" and self._running:
            if any(request.inflight for request in self._running.values()):
                return NEED_COLLECT
            for request in list(self._running.values()):
                self._retract(request)
        return None

    def flush_cache(self) -> bool:
        """Empty the prefix cache; False, and nothing, while a request runs or waits (but see `pause`)."""
        if self._finish_pause() is NEED_COLLECT or self._running:
            return False
        if self._waiting and self._paused != "retract":
            return False
        self._kv.cache.evict(self._kv.pool.num_pages)
        return True

    @property
    def is_done(self) -> bool:
        """Whether all requests have ended, though some may not have retired."""
        return len(self._leaving) == len(self._running) and not self._waiting

    @property
    def has_unfinished(self) -> bool:
        """Whether any request runs or waits."""
        return bool(self._running) or bool(self._waiting)

    def stats(self) -> SchedulerStats:
        pool = self._kv.pool
        return SchedulerStats(
            running=len(self._running),
            waiting=len(self._waiting),
            free_pages=pool.num_free,
            cached_pages=pool.num_cached,
            owned_pages=pool.num_owned,
            total_pages=pool.num_pages,
            available_tokens=self._kv.available * self._kv.page_size,
            new_token_ratio=self._ratio.value,
            num_retractions=self._num_retractions,
            paused=self.paused,
        )

    def check_invariants(self, full: bool = True) -> None:
        """Check that no page, row or lock is lost; `full` costs time in proportion to the pool.

        Raises:
            PageError: naming what is wrong.
        """
        pool, cache = self._kv.pool, self._kv.cache
        pool.check_counts()
        if not self._running and (pool.num_owned or cache.num_unlocked != pool.num_cached):
            raise PageError(
                f"nothing runs, but {pool.num_owned} pages are owned and "
                f"{pool.num_cached - cache.num_unlocked} cached pages are locked"
            )
        if full:
            self._kv.check(list(self._running.values()))
