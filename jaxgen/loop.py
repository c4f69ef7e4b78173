"""The engine loop: receive, schedule, launch, collect, on one thread of the caller's process.

With overlap, step k+1 is launched before the results of step k are read, so the host works while the device
does. Everything the scheduler and the runner own is touched by this thread only; callers talk to it through
an inbox of functions.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from jaxgen.errors import EngineDeadError
from jaxgen.execution.compile import BackgroundCompilation
from jaxgen.execution.programs import StepKey
from jaxgen.execution.runner import Launched, Runner
from jaxgen.extras import Extras
from jaxgen.logprobs import StepLogprobs
from jaxgen.scheduling.plan import NEED_COLLECT, Plan
from jaxgen.scheduling.request import Request, abort_reason
from jaxgen.scheduling.scheduler import Scheduler
from jaxgen.scheduling.waiting import QueueFull
from jaxgen.startup import StartupReport
from jaxgen.wake import Wake

logger = logging.getLogger("jaxgen")
T = TypeVar("T")

IDLE_CHECK_SECONDS = 0.05
HANDOVER_SECONDS = 0.005  # two threads that compute take turns of this length


class Sink(Protocol):
    """Where a request's progress goes; called on the engine thread, so it must be quick."""

    def update(self, request: Request) -> None:
        """The request has a new token or has finished."""

    def add_input_logprobs(self, request: Request, start: int, logprobs: StepLogprobs) -> None:
        """Log-probabilities of the tokens after positions start, start + 1, ... of the prompt."""

    def add_output_logprobs(self, logprobs: StepLogprobs, row: int, token: int | None) -> None:
        """A row's log-probabilities, drawn from for this token; None if the request generates none."""

    def add_hidden(self, vectors: np.ndarray) -> None:
        """Final-norm vectors of a prompt's last chunk, [T0, D]."""

    def add_next_hidden(self, vector: np.ndarray) -> None:
        """The vector [D] from which a later token was drawn."""

    def fail(self, error: BaseException) -> None:
        """The engine died; `error` is the cause."""


class Throughput:
    """Generated tokens per second over the last full window."""

    WINDOW_SECONDS = 1.0

    def __init__(self) -> None:
        self.tokens_per_second = 0.0
        self._tokens = 0
        self._since = time.monotonic()

    def count(self, tokens: int) -> None:
        self._tokens += tokens
        now = time.monotonic()
        if now - self._since >= self.WINDOW_SECONDS:
            self.tokens_per_second = self._tokens / (now - self._since)
            self._tokens, self._since = 0, now


class EngineLoop:
    """Runs scheduler and runner on a thread of its own until `stop()`."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        overlap: bool,
        meanwhile: Callable[[], None] = lambda: None,
    ):
        """`meanwhile` is called while the device computes prompts, which leaves this thread some time."""
        self.scheduler = scheduler
        self.runner = runner
        self._overlap = overlap
        self._meanwhile = meanwhile
        self._inbox: collections.deque[Callable[[], object]] = collections.deque()
        self._wake = Wake()
        self._stopping = False
        self._pending: Launched | None = None
        self._live: dict[str, Request] = {}
        self._held: dict[str, list[Request]] = {}  # requests that wait for the end of another
        # Re-entrant: collecting a dropped iterator aborts its requests, from whatever line is running.
        self._lock = threading.RLock()
        self.error: BaseException | None = None
        self.throughput = Throughput()
        self._thread = threading.Thread(target=self._run, name="jaxgen-engine", daemon=True)
        self._thread.start()

    # ---- called from any thread

    def submit(self, requests: Iterable[Request]) -> None:
        """Queues requests; a request that the queue refuses finishes through its sink."""
        requests = list(requests)
        self.post(lambda: self._admit(requests))

    def submit_after(self, first: Request, rest: Iterable[Request]) -> None:
        """Queues `first`, and `rest` once it has ended; `first` reports to nobody."""
        rest = list(rest)
        self.post(lambda: self._admit_after(first, rest))

    def abort(self, rids: Iterable[str]) -> None:
        """Ends the named requests after the current step; unknown ids are ignored. Does not wait."""
        rids = list(rids)
        self.post(lambda: self._abort(rids))

    def results_taken(self) -> None:
        """A caller has made its results: the engine thread need not stand back for it any longer."""
        self._wake.set()

    def call(self, function: Callable[[], T]) -> T:
        """Runs `function` on the engine thread between two steps and returns its result."""
        if threading.current_thread() is self._thread:
            return function()
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:  # handed to the caller
                future.set_exception(error)

        self.post(run)
        while True:
            try:
                return future.result(timeout=0.1)
            except concurrent.futures.TimeoutError:
                if not self._thread.is_alive() and not future.done():
                    raise EngineDeadError("The engine has stopped") from self.error

    def call_idle(self, function: Callable[[], T]) -> T:
        """As `call`, while the device does nothing: a profiler must not attach to a step under way."""

        def run() -> T:
            self._collect()
            self.runner.wait()
            return function()

        return self.call(run)

    def post_if_idle(self, function: Callable[[], object]) -> None:
        """Runs `function` on the engine thread if it has no request then; does not wait."""

        def run() -> None:
            if self._pending is None and not self.scheduler.has_unfinished:
                function()

        self.post(run)

    def pause(self, mode: str) -> None:
        """Holds generation: "abort" ends every request, "retract" requeues the running, "in_place" freezes them."""
        self.call(lambda: self._deliver(self.scheduler.pause(mode)))

    def resume(self) -> None:
        """Goes on after `pause`."""
        self.call(self.scheduler.resume)

    def stop(self) -> None:
        """Ends the thread after the current step; pending requests fail with EngineDeadError. Idempotent."""
        self._stopping = True
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    def post(self, item: Callable[[], object]) -> None:
        """Runs `item` on the engine thread between two steps; does not wait."""
        with self._lock:
            if self._stopping or self.error is not None:
                raise EngineDeadError("The engine has been shut down or has failed") from self.error
            self._inbox.append(item)
        self._wake.set()

    # ---- on the engine thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._receive()
                if not self._step():
                    self._wait_for_work()
        except BaseException as error:  # whatever it was, callers must hear of it
            logger.exception("The engine loop failed")
            self.error = error
        finally:
            self._fail_all()

    def _receive(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _wait_for_work(self) -> None:
        if self._inbox or self._stopping:  # collecting a step may have cleared what would wake this thread
            return
        # Unfinished but unplannable work is waiting for a time-out or for `resume`.
        self._wake.wait(IDLE_CHECK_SECONDS if self.scheduler.has_unfinished else None)

    def _step(self) -> bool:
        """One iteration; False when there was nothing to do."""
        plan = self.scheduler.schedule()
        self._deliver(self.scheduler.drain_ended())
        if plan is NEED_COLLECT:
            self._collect()
            return True
        launched = None
        if isinstance(plan, Plan):
            launched = self.runner.launch(plan)
            if plan.chunks:
                self._meanwhile()
        worked = launched is not None or self._pending is not None
        self._collect()  # the step before, while this one runs
        self._pending = launched
        if not self._overlap:
            self._collect()
        return worked

    def _collect(self) -> None:
        """Reads the pending step, hands its tokens to the scheduler and the news to the sinks."""
        launched, self._pending = self._pending, None
        if launched is None:
            return
        result = self.runner.read(launched)
        plan = launched.plan
        extras = Extras(plan, result)
        tokens = result.tokens
        if plan.chunks:
            last = [tokens[i] for i, chunk in enumerate(plan.chunks) if chunk.last]
            tokens = last + tokens[len(plan.chunks) : len(plan.chunks) + len(plan.lanes)]
        self.throughput.count(len(tokens))
        changed = self.scheduler.collect(plan, tokens)
        extras.record()
        self._wake.clear()
        self._deliver(changed)
        if self.scheduler.is_done and not self._inbox:
            self._wake.wait(HANDOVER_SECONDS)  # callers first: nothing can be launched until one of them asks
        self.scheduler.retire()

    def _deliver(self, requests: Iterable[Request]) -> None:
        for request in requests:
            sink, ended = request.sink, request.finish_reason is not None
            if sink is not None:
                sink.update(request)
            if not ended:
                continue
            self._live.pop(request.rid, None)
            if sink is None:
                self._release_held(request)
            request.sink = None  # the runner remembers requests, and must not keep their results or callers

    def _admit(self, requests: Sequence[Request]) -> None:
        self._live.update((request.rid, request) for request in requests)
        for request in requests:
            try:
                self.scheduler.add(request)
            except QueueFull as error:
                request.finish_reason = abort_reason(str(error), 503, "ServiceUnavailableError")
                self._deliver([request])
        self._deliver(self.scheduler.drain_ended())

    def _admit_after(self, first: Request, rest: list[Request]) -> None:
        self._live.update((request.rid, request) for request in rest)
        self._held[first.rid] = rest
        self._admit([first])

    def _release_held(self, first: Request) -> None:
        """Admits what waited for `first`, less what was aborted meanwhile; its failure is theirs."""
        waiting = [r for r in self._held.pop(first.rid, []) if r.finish_reason is None]
        reason = first.finish_reason
        if reason is not None and reason["type"] == "abort":
            for request in waiting:
                request.finish_reason = reason
            self._deliver(waiting)
        else:
            self._admit(waiting)

    def _abort(self, rids: Iterable[str]) -> None:
        for rid in rids:
            ended = self.scheduler.abort(rid)
            held = self._live.get(rid)
            if not ended and held is not None and held.finish_reason is None:
                held.finish_reason = abort_reason("Abort in waiting queue")
                ended = [held]
            self._deliver(ended)

    def flush_cache(self) -> bool:
        """Empties the prefix cache unless something runs or waits. On the engine thread only."""
        self._collect()
        return not self._held and self.scheduler.flush_cache()

    def _fail_all(self) -> None:
        with self._lock:
            self._stopping = True
        cause = self.error or EngineDeadError("The engine was shut down while requests were pending")
        while self._inbox:  # submissions that were never admitted, calls that were never made
            try:
                self._inbox.popleft()()
            except Exception as error:
                logger.debug("Dropped while stopping: %s", error)
        for request in list(self._live.values()):
            if request.sink is not None:
                request.sink.fail(cause)
                request.sink = None
        self._live.clear()
        self._held.clear()
        self._pending = None  # its results are device memory


def start_background(
    runner: Runner, loop: EngineLoop, report: StartupReport
) -> BackgroundCompilation[StepKey]:
    """Compiles the rest of the start-up steps while `loop` serves; a new one is tried out when it is idle."""
    started_with = len(report.details)

    def on_ready(key: StepKey) -> None:
        report.add(f"step {key}", time.perf_counter() - report.started, nested=True)
        with contextlib.suppress(EngineDeadError):
            loop.post_if_idle(lambda: runner.run_empty(key))

    def on_end() -> None:
        report.finish_background(len(report.details) - started_with)
        with contextlib.suppress(EngineDeadError):
            loop.post(lambda: setattr(loop.scheduler, "single_step", not runner.steps.is_complete))

    loop.scheduler.single_step = not runner.steps.is_complete
    return runner.steps.compile_rest(on_ready, on_end)
