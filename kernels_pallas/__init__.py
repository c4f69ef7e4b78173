"""Attention, KV-cache and sampling kernels for paged LLM inference. Depends on jax alone."""

from kernels_pallas.ops import (
    Implementation,
    copy_pages,
    gumbel_noise,
    paged_decode,
    paged_decode_update,
    ragged_prefill,
    sample,
    write_kv,
)

__all__ = [
    "Implementation",
    "copy_pages",
    "gumbel_noise",
    "paged_decode",
    "paged_decode_update",
    "ragged_prefill",
    "sample",
    "write_kv",
]
