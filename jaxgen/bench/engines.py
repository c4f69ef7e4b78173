"""Engines as the benchmarks use them: token ids in and out, timed from call to result."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgen.engine import Engine

Prompts = list[list[int]]
Params = Sequence[dict[str, Any]]


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of Engine for `--model` and `--load-format`: a configuration file has random weights and no
    tokenizer."""
    is_config = args.model.endswith(".json")
    return {
        "model_path": args.model,
        "load_format": args.load_format or ("dummy" if is_config else "auto"),
        "skip_tokenizer_init": is_config,
    }


def random_prompts(lengths: Sequence[int], vocab_size: int, seed: int | np.random.Generator = 0) -> Prompts:
    """Prompts of these lengths, the same for the same seed; the lowest ids, often special, are left out."""
    low = min(10, vocab_size - 1)
    rng = np.random.default_rng(seed)
    return [rng.integers(low, vocab_size, length).tolist() for length in lengths]


def vocab_size_of(engine: Engine) -> int:
    return engine.tokenizer_manager.model_config.vocab_size


def greedy(new_tokens: int) -> dict[str, Any]:
    """Sampling parameters for exactly `new_tokens` greedy tokens."""
    return {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}


@dataclass(frozen=True)
class Timing:
    """Seconds of a call, steps compiled meanwhile, and seconds until every request had its first token."""

    seconds: float
    compiles: int
    first_token: float = math.nan


def timed_generate(engine: Engine, prompts: Prompts, params: Params, **options: Any) -> Timing:
    """Times one call of `generate`; `options` are further parameters of it."""
    started = time.perf_counter()
    results = engine.generate(input_ids=prompts, sampling_params=list(params), **options)
    seconds = time.perf_counter() - started
    return Timing(seconds, _check(results, params))


def timed_stream(engine: Engine, prompts: Prompts, params: Params, **options: Any) -> Timing:
    """Times one streaming call with a chunk at the first token and one at the end of each request.

    Streaming so costs next to nothing in between.
    """
    params = [p | {"stream_interval": p["max_new_tokens"]} for p in params]
    first: dict[int, float] = {}
    last: dict[int, dict[str, Any]] = {}
    started = time.perf_counter()
    for chunk in engine.generate(input_ids=prompts, sampling_params=params, stream=True, **options):
        index = chunk["index"]
        first.setdefault(index, time.perf_counter())
        last[index] = chunk
    seconds = time.perf_counter() - started
    results = [last[index] for index in range(len(prompts))]
    return Timing(seconds, _check(results, params), max(first.values()) - started)


def generate_seconds(engine: Engine, prompts: Prompts, new_tokens: int) -> float:
    """Seconds until every prompt has so many greedy tokens."""
    return timed_generate(engine, prompts, [greedy(new_tokens)] * len(prompts)).seconds


def _check(results: Sequence[dict[str, Any]], params: Params) -> int:
    """Steps compiled while these results were made; RuntimeError if one is shorter than asked for."""
    wanted = [p["max_new_tokens"] for p in params]
    found = [len(result["output_ids"]) for result in results]
    if found != wanted:
        raise RuntimeError(f"Asked for {sum(wanted)} tokens, got {sum(found)}: raise the context length")
    return max(result["meta_info"]["cache_miss_count"] for result in results)


def medians(measure: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median of each measurement, taken in turns so that a slow spell of the machine hits all of them."""
    samples: dict[str, list[float]] = {name: [] for name in measure}
    for _ in range(repeats):
        for name, function in measure.items():
            samples[name].append(function())
    return {name: statistics.median(values) for name, values in samples.items()}


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
