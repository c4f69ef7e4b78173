"""Attention, KV-cache and sampling kernels for paged LLM inference. Depends on jax alone."""

from kernels_pallas.layer_ops import fused_linear
from kernels_pallas.ops import (
    Implementation,
    LogProbabilities,
    copy_pages,
    gumbel_noise,
    log_probabilities,
    paged_decode,
    paged_decode_update,
    ragged_prefill,
    sample,
    write_kv,
)

__all__ = [
    "Implementation",
    "LogProbabilities",
    "copy_pages",
    "fused_linear",
    "gumbel_noise",
    "log_probabilities",
    "paged_decode",
    "paged_decode_update",
    "ragged_prefill",
    "sample",
    "write_kv",
]
