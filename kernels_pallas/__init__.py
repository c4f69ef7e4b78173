"""Attention, KV-cache and sampling kernels for paged LLM inference. Depends on jax alone."""

from kernels_pallas.head_ops import HeadSample, head_sample
from kernels_pallas.layer_ops import fused_linear, fused_linear_to_norm
from kernels_pallas.norm_input import NormInput
from kernels_pallas.ops import (
    Implementation,
    LogitSummary,
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
from kernels_pallas.rope_ops import rope_and_write

__all__ = [
    "HeadSample",
    "Implementation",
    "LogProbabilities",
    "LogitSummary",
    "NormInput",
    "copy_pages",
    "fused_linear",
    "fused_linear_to_norm",
    "gumbel_noise",
    "head_sample",
    "log_probabilities",
    "paged_decode",
    "paged_decode_update",
    "ragged_prefill",
    "rope_and_write",
    "sample",
    "write_kv",
]
