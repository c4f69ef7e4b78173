"""`jaxgen bench latency`: time to the first token and per decode step of one batch, beside their floors."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from typing import Any

from jaxgen.bench import report, shapes
from jaxgen.bench.costs import ModelCosts, Rates
from jaxgen.bench.engines import Prompts, greedy, random_prompts, round_up
from jaxgen.engine import Engine

MOST_PREFILL_TOKENS = 8192


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark; returns the exit status."""
    record = report.header("latency", shapes.settings(args) | {"batch sizes": args.batch_sizes})
    largest = max(args.batch_sizes)
    with shapes.make_engine(
        args,
        context_length=round_up(args.input_len + args.output_len + 16, 128),
        max_running_requests=largest,
        cuda_graph_bs_decode=sorted(set(args.batch_sizes)),
        chunked_prefill_size=min(round_up(largest * args.input_len, 128), MOST_PREFILL_TOKENS),
    ) as engine:
        record["device"] = report.device()
        seconds = [_measure(args, engine, size) for size in args.batch_sizes]
        server_args = engine.server_args
    costs, rates = shapes.floors(server_args)
    rows = [_row(args, costs, rates, *measured) for measured in zip(args.batch_sizes, seconds)]
    report.table(
        [
            "batch",
            "prefill ms",
            "floor ms",
            "prefill tok/s",
            "ms/step",
            "floor ms",
            "of floor",
            "decode tok/s",
        ],
        [
            [
                row["batch"],
                row["prefill_ms"],
                row["prefill_floor_ms"],
                row["prefill_tokens_per_s"],
                row["decode_step_ms"],
                row["decode_floor_ms"],
                f"{row['decode_of_floor']:.1%}",
                row["decode_tokens_per_s"],
            ]
            for row in rows
        ],
    )
    return report.finish(record | {"rates": dataclasses.asdict(rates), "results": rows})


def _measure(args: argparse.Namespace, engine: Engine, size: int) -> dict[str, float]:
    """Median seconds of a batch: to the first token of all its prompts, and from there to the last."""
    vocab_size = engine.tokenizer_manager.model_config.vocab_size
    prompts = random_prompts([args.input_len] * size, vocab_size)
    _run_batch(engine, prompts, args.output_len)
    runs = [_run_batch(engine, prompts, args.output_len) for _ in range(args.repeats)]
    return {name: statistics.median(run[name] for run in runs) for name in ("prefill", "decode")}


def _run_batch(engine: Engine, prompts: Prompts, new_tokens: int) -> dict[str, float]:
    # One chunk at the first token and one at the end: streaming costs next to nothing in between.
    params = greedy(new_tokens) | {"stream_interval": new_tokens}
    started = time.perf_counter()
    first, seen = started, set()
    for chunk in engine.generate(input_ids=prompts, sampling_params=params, stream=True):
        if chunk["index"] not in seen:
            seen.add(chunk["index"])
            first = time.perf_counter()
    return {"prefill": first - started, "decode": time.perf_counter() - first}


def _row(
    args: argparse.Namespace, costs: ModelCosts, rates: Rates, size: int, seconds: dict[str, float]
) -> dict[str, Any]:
    # The first token comes out of the prefill, each of the others out of a decode step.
    steps = args.output_len - 1
    step = seconds["decode"] / steps
    floor = (
        sum(
            costs.decode_seconds([args.input_len + i] * size, rates, args.tp_size)
            for i in range(1, args.output_len)
        )
        / steps
    )
    prefill_floor = costs.prefill_seconds([args.input_len] * size, rates, args.tp_size)
    return {
        "batch": size,
        "seconds": seconds["prefill"] + seconds["decode"],
        "prefill_ms": seconds["prefill"] * 1e3,
        "prefill_floor_ms": prefill_floor * 1e3,
        "prefill_tokens_per_s": size * args.input_len / seconds["prefill"],
        "decode_step_ms": step * 1e3,
        "decode_floor_ms": floor * 1e3,
        "decode_of_floor": floor / step,
        "decode_tokens_per_s": size / step,
    }
