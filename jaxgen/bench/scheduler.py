"""`jaxgen bench scheduler`: what one iteration of the engine loop costs the host, the device left out.

The real loop and scheduler run with a runner that packs what the real one packs, launches nothing and answers
at once with fixed tokens. The time between two launches is then all host work: planning, page bookkeeping,
packing, collecting tokens.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from typing import Any

import numpy as np

from jaxgen.bench import report
from jaxgen.execution.batch import RowMirror, pack_decode, pack_prefill
from jaxgen.execution.runner import Launched, StepResult
from jaxgen.execution.sampler import PLAIN
from jaxgen.execution.step import StepOutput
from jaxgen.loop import EngineLoop
from jaxgen.sampling_params import SamplingParams
from jaxgen.scheduling.plan import Plan, SchedulerConfig
from jaxgen.scheduling.request import Request
from jaxgen.scheduling.scheduler import Scheduler

VOCAB_SIZE = 32000
PREFILL_ROWS = 64
PREFILL_TOKENS = 8192
WARM_UP = 50


class FakeRunner:
    """Packs plans as `Runner` does and times the launches of full decode steps; there is no device.

    Args:
        config: the scheduler's.
        wanted: decode launches of `lanes` lanes to time, after some to warm up.
    """

    def __init__(self, config: SchedulerConfig, lanes: int, wanted: int):
        self._rows, self._lanes, self._wanted = config.max_rows, lanes, wanted + WARM_UP
        max_pages = -(-config.context_length // config.page_size)
        self._mirror = RowMirror(config.max_rows, max_pages, 1, 1)
        self.launches: list[float] = []
        self.packing: list[float] = []
        self.done = threading.Event()

    def launch(self, plan: Plan) -> Launched:
        started = time.perf_counter()
        if plan.kind == "decode":
            self._decode(plan)
            if len(plan.lanes) == self._lanes and not self.done.is_set():
                self.launches.append(started)
                self.packing.append(time.perf_counter() - started)
                if len(self.launches) > self._wanted:
                    self.done.set()
        else:
            self._prefill(plan)
        requests = [*(chunk.request for chunk in plan.chunks), *plan.lanes]
        tokens: Any = np.full((plan.steps, max(1, len(requests))), 17, np.int32)
        output = StepOutput(None, None, None)
        return Launched(plan, tokens, np.arange(len(requests)), output, 0, False, False, False)

    def read(self, launched: Launched) -> StepResult:
        return StepResult(np.asarray(launched.tokens).ravel().tolist(), None, None, None)

    def _decode(self, plan: Plan) -> None:
        if plan.membership_changed or plan.page_updates:
            self._mirror.assign_pages(plan.page_updates)
            pack_decode(plan, self._lanes, self._rows)

    def _prefill(self, plan: Plan) -> None:
        fresh = [self._mirror.claim(chunk.request) for chunk in plan.chunks]
        self._mirror.assign_pages(plan.page_updates)
        pack_prefill(plan, self._mirror, fresh, PREFILL_TOKENS, PREFILL_ROWS, PLAIN)


class Silent:
    """A sink that is told of every token, as a caller that does not stream is, and does nothing."""

    def update(self, request: Request) -> None:
        pass

    def fail(self, error: BaseException) -> None:
        pass


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark; returns the exit status."""
    settings = {
        "requests": args.requests,
        "input": args.input_len,
        "iterations": args.iterations,
        "page size": args.page_size,
    }
    record = report.header("scheduler", settings)
    print()
    # Room for the iterations asked for and for those before the last prompt was admitted.
    new_tokens = args.iterations + WARM_UP + args.requests + 8
    context = args.input_len + args.requests + new_tokens + 8
    config = SchedulerConfig(
        # Admission reserves room for all of a request's output, and a page.
        num_pages=args.requests * (2 - -context // args.page_size),
        page_size=args.page_size,
        max_rows=args.requests,
        context_length=context,
        chunked_prefill_size=PREFILL_TOKENS,
        prefill_max_requests=PREFILL_ROWS,
    )
    runner = FakeRunner(config, args.requests, args.iterations)
    fake: Any = runner
    loop = EngineLoop(Scheduler(config), fake, overlap=True)
    try:
        loop.submit(_requests(args.requests, args.input_len, args.page_size, new_tokens))
        while not runner.done.wait(0.1):
            running = loop.alive and loop.call(lambda: loop.scheduler.has_unfinished)
            if not running and not runner.done.is_set():  # it may have been reached since the wait
                raise RuntimeError("The engine loop stopped early") from loop.error
    finally:
        loop.stop()
    periods = np.diff(runner.launches)[WARM_UP:]
    row = {
        "requests": args.requests,
        "iterations": len(periods),
        "median_ms": float(np.median(periods)) * 1e3,
        "p90_ms": float(np.quantile(periods, 0.9)) * 1e3,
        "max_ms": float(periods.max()) * 1e3,
        "packing_ms": statistics.median(runner.packing[WARM_UP:]) * 1e3,
    }
    report.table(
        ["requests", "iterations", "median ms", "p90 ms", "max ms", "of it packing ms"], [list(row.values())]
    )
    return report.finish(record | {"results": [row]})


def _requests(count: int, input_len: int, page_size: int, new_tokens: int) -> list[Request]:
    """Prompts of different content; lengths spread over a page, so that pages fill up at different steps."""
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0, max_new_tokens=new_tokens, ignore_eos=True).normalized()
    return [
        Request(
            rid=str(i),
            prompt_ids=rng.integers(100, VOCAB_SIZE, input_len + i % page_size).tolist(),
            params=params,
            vocab_size=VOCAB_SIZE,
            max_new_tokens=new_tokens,
            sink=Silent(),
        )
        for i in range(count)
    ]
