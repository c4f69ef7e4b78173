"""The options of the device half, resolved."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxgen.layers.attention import AttentionBackends
from jaxgen.layers.quantization import Scheme


@dataclasses.dataclass(frozen=True)
class RunnerConfig:
    """Resolved once by the engine, then frozen. Sizes in tokens unless said."""

    page_size: int
    context_length: int
    rows: int  # R: rows of lane state, the most requests that can run at once
    decode_buckets: tuple[int, ...]  # lanes
    decode_steps: int | None  # tokens of each lane in one launch; None chooses by model and batch
    prefill_buckets: tuple[tuple[int, int], ...]  # (packed tokens, rows)
    param_dtype: Any
    kv_dtype: Any
    quantization: Scheme | None
    attention: AttentionBackends
    max_total_tokens: int | None
    mem_fraction_static: float | None
    return_hidden: bool
    original_logprobs: bool
    precompile_decode: bool
    precompile_prefill: bool
    strict_compile: bool
    background: bool  # rarer start-up steps are compiled while the engine serves
    chunked: bool  # prompts longer than the largest prefill bucket come in pieces
