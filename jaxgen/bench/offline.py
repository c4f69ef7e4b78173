"""`jaxgen bench offline`: many prompts at once, tokens per second, beside the floor."""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np

from jaxgen.bench import report, shapes
from jaxgen.bench.costs import ModelCosts, Rates
from jaxgen.bench.engines import generate_seconds, medians, random_prompts, round_up


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark; returns the exit status."""
    settings = {
        "prompts": args.num_prompts,
        "range ratio": args.range_ratio,
        "max running": args.max_running_requests,
    }
    record = report.header("offline", shapes.settings(args) | settings)
    rng = np.random.default_rng(0)
    inputs = _lengths(rng, args.input_len, args.range_ratio, args.num_prompts)
    outputs = _lengths(rng, args.output_len, args.range_ratio, args.num_prompts)
    lanes = min(args.max_running_requests, args.num_prompts)
    with shapes.make_engine(
        args,
        context_length=round_up(args.input_len + args.output_len + 16, 128),
        max_running_requests=lanes,
        cuda_graph_max_bs_decode=lanes,
    ) as engine:
        record["device"] = report.device()
        prompts = random_prompts(inputs, engine.tokenizer_manager.model_config.vocab_size)
        generate_seconds(engine, prompts, outputs)
        seconds = medians({"all": lambda: generate_seconds(engine, prompts, outputs)}, args.repeats)["all"]
        server_args = engine.server_args
    costs, rates = shapes.floors(server_args)
    floor = _floor(costs, rates, inputs, outputs, lanes, args.tp_size)
    row = {
        "prompts": args.num_prompts,
        "input_tokens": sum(inputs),
        "output_tokens": sum(outputs),
        "seconds": seconds,
        "floor_seconds": floor,
        "of_floor": floor / seconds,
        "output_tokens_per_s": sum(outputs) / seconds,
        "total_tokens_per_s": (sum(inputs) + sum(outputs)) / seconds,
        "prompts_per_s": args.num_prompts / seconds,
    }
    report.table(
        ["prompts", "in", "out", "seconds", "floor s", "of floor", "output tok/s", "total tok/s"],
        [
            [
                row["prompts"],
                row["input_tokens"],
                row["output_tokens"],
                seconds,
                floor,
                f"{row['of_floor']:.1%}",
                row["output_tokens_per_s"],
                row["total_tokens_per_s"],
            ]
        ],
    )
    return report.finish(record | {"rates": dataclasses.asdict(rates), "results": [row]})


def _lengths(rng: np.random.Generator, most: int, ratio: float, count: int) -> list[int]:
    least = max(1, round(most * ratio))
    return rng.integers(least, most + 1, count).tolist()


def _floor(
    costs: ModelCosts, rates: Rates, inputs: list[int], outputs: list[int], lanes: int, devices: int
) -> float:
    """Seconds of all prefills, and of decode steps that always have every lane filled."""
    tokens = sum(outputs) - len(outputs)  # the first token of each prompt comes out of its prefill
    if tokens == 0:
        return costs.prefill_seconds(inputs, rates, devices)
    keys = sum(
        out * prompt + out * (out + 1) // 2 for prompt, out in zip(inputs, (out - 1 for out in outputs))
    )
    step = costs.decode_seconds([round(keys / tokens)] * lanes, rates, devices)
    return costs.prefill_seconds(inputs, rates, devices) + step * tokens / lanes
