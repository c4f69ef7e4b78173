"""What the decode kernel takes, and how it divides the work."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import mosaic


@dataclass(frozen=True)
class DecodeConfig:
    """Tuning of one shape: KV tokens per trip, trips in flight, shares a lane's KV is cut into at most."""

    block_kv: int
    stages: int
    num_splits: int


def default_config(num_lanes: int, num_kv_heads: int, head_dim: int, capacity: int) -> DecodeConfig:
    """Two blocks of threads per multiprocessor for any shape, if need be by splitting lanes.

    `capacity` is the KV tokens a row of the page table can hold.
    """
    slots, pairs = 2 * 132, max(num_lanes * num_kv_heads, 1)
    block_kv = 128 if head_dim == 64 and pairs >= slots else 64
    num_splits = min(slots // pairs, max(16, slots // 2 // pairs), -(-capacity // block_kv))
    return DecodeConfig(block_kv, 2, max(1, num_splits))


def choose_config(k_pages: jax.Array, page_table: jax.Array, deterministic: bool) -> DecodeConfig:
    """The configuration for these operands; if deterministic, one that divides a lane in the same way always."""
    if deterministic:
        return DecodeConfig(block_kv=64, stages=2, num_splits=8)
    _, num_kv_heads, page_size, head_dim = k_pages.shape
    num_lanes, max_pages = page_table.shape
    return default_config(num_lanes, num_kv_heads, head_dim, max_pages * page_size)


def blocks_per_split(num_blocks, num_splits: int):
    """KV blocks each split takes of a lane that has `num_blocks`: few splits for short lanes.

    A further split costs its part of the merge, which pays only where it takes several trips off the others.
    """
    fewer = lax.min(mosaic.ceil_div(num_blocks, 16), jnp.int32(4))
    return lax.max(mosaic.ceil_div(num_blocks, num_splits), fewer)


def unsupported(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array) -> str | None:
    """Why the kernel cannot take these operands; None if it can. q [B, N, H] (shape and dtype only)."""
    _, num_kv_heads, page_size, head_dim = k_pages.shape
    group = q.shape[1] // num_kv_heads
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q is {q.dtype}, not bfloat16 or float16"
    if not (q.dtype == k_pages.dtype == v_pages.dtype):
        return f"pages are {k_pages.dtype} and {v_pages.dtype}, not {q.dtype} like q"
    if head_dim not in (64, 128, 256):
        return f"head_dim {head_dim} is not 64, 128 or 256"
    return mosaic.unsupported_paging(page_size, group)


def unsupported_rope(rotary_dim: int, head_dim: int) -> str | None:
    """Why the kernel cannot rotate by that many dimensions itself; None if it can."""
    if rotary_dim % 64 or (head_dim - rotary_dim) % 32:
        return f"rotary_dim {rotary_dim} is not a multiple of 64"
    return None
