"""Runs workloads on an engine; prompts are drawn anew for each run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxgen.bench.engines import Prompts, random_prompts, timed_generate, timed_stream, vocab_size_of
from jaxgen.bench.workloads import Workload
from jaxgen.engine import Engine


@dataclass(frozen=True)
class Run:
    """Seconds by figure, and the steps that were compiled meanwhile.

    Figures: "decode" (one step) and "first token" (of all requests); "prefill" or "output" (the whole call);
    "cold" and "warm" (the whole call, the common prefix not in the prefix cache or in it).
    """

    seconds: dict[str, float]
    compiles: int


def measure(engine: Engine, group: Sequence[Workload], repeats: int) -> list[list[Run]]:
    """The runs of each workload of a group, in turns, after one run each to warm up.

    They start from an empty prefix cache, so that what was measured before does not matter.
    """
    flush(engine)
    rng = np.random.default_rng(0)
    for workload in group:
        run_once(engine, workload, rng)
    turns = [[run_once(engine, workload, rng) for workload in group] for _ in range(repeats)]
    return [list(runs) for runs in zip(*turns)]


def run_once(engine: Engine, workload: Workload, rng: np.random.Generator) -> Run:
    """One run with prompts from `rng`; the lengths are the workload's own."""
    inputs, outputs = workload.lengths()
    (prefix,) = random_prompts([workload.prefix], vocab_size_of(engine), rng)
    params = [workload.sampling_params(length) for length in outputs]
    options = {}
    if workload.top_logprobs:
        options = {"return_logprob": True, "top_logprobs_num": workload.top_logprobs}

    def prompts() -> Prompts:
        return [prefix + own for own in random_prompts(inputs, vocab_size_of(engine), rng)]

    if workload.measure == "decode":
        timing = timed_stream(engine, prompts(), params, **options)
        step = (timing.seconds - timing.first_token) / (max(outputs) - 1)
        return Run({"decode": step, "first token": timing.first_token}, timing.compiles)
    if workload.measure == "prefix":
        flush(engine)
        cold, warm = (timed_generate(engine, prompts(), params, **options) for _ in range(2))
        return Run({"cold": cold.seconds, "warm": warm.seconds}, max(cold.compiles, warm.compiles))
    timing = timed_generate(engine, prompts(), params, **options)
    return Run({workload.measure: timing.seconds}, timing.compiles)


def flush(engine: Engine) -> None:
    """Empties the prefix cache."""
    flushed = engine.flush_cache()
    if not flushed.success:
        raise RuntimeError(flushed.message)
