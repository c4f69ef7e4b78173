"""Engines as the benchmarks use them: token ids in and out, greedy, EOS ignored."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxgen.engine import Engine

Prompts = list[list[int]]


def random_prompts(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> Prompts:
    """Prompts of these lengths, the same for the same seed; the lowest ids, often special, are left out."""
    low = min(10, vocab_size - 1)
    rng = np.random.default_rng(seed)
    return [rng.integers(low, vocab_size, length).tolist() for length in lengths]


def greedy(new_tokens: int) -> dict[str, Any]:
    """Sampling parameters for exactly `new_tokens` greedy tokens."""
    return {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}


def generate_seconds(engine: Engine, prompts: Prompts, new_tokens: int | Sequence[int]) -> float:
    """Seconds until every prompt has its new tokens (one number for all, or one each)."""
    counts = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else list(new_tokens)
    started = time.perf_counter()
    results = engine.generate(input_ids=prompts, sampling_params=[greedy(count) for count in counts])
    seconds = time.perf_counter() - started
    found = [len(result["output_ids"]) for result in results]
    if found != counts:
        raise RuntimeError(f"Asked for {sum(counts)} tokens, got {sum(found)}: raise the context length")
    return seconds


def medians(measure: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median of each measurement, taken in turns so that a slow spell of the machine hits all of them."""
    samples: dict[str, list[float]] = {name: [] for name in measure}
    for _ in range(repeats):
        for name, function in measure.items():
            samples[name].append(function())
    return {name: statistics.median(values) for name, values in samples.items()}


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
