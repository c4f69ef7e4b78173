"""What the decode kernel takes, and how it divides the work."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import mosaic, tuning

BUFFER_BYTES = 200 << 10  # of shared memory for keys and values


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


def choose_config(group: int, k_pages: jax.Array, page_table: jax.Array, deterministic: bool) -> DecodeConfig:
    """The configuration for these operands; if deterministic, one that divides a lane in the same way always."""
    if deterministic:
        return DecodeConfig(block_kv=64, stages=2, num_splits=8)
    _, num_kv_heads, page_size, head_dim = k_pages.shape
    num_lanes, max_pages = page_table.shape
    shape = {
        "num_lanes": num_lanes,
        "num_kv_heads": num_kv_heads,
        "group": group,
        "head_dim": head_dim,
        "page_size": page_size,
        "kv_bits": 8 * k_pages.dtype.itemsize,
    }
    default = default_config(num_lanes, num_kv_heads, head_dim, max_pages * page_size)
    return tuning.config_for("paged_decode", shape, default, candidates)


def candidates(
    num_lanes: int, num_kv_heads: int, group: int, head_dim: int, page_size: int, kv_bits: int
) -> Iterator[DecodeConfig]:
    """Configurations worth measuring for a shape: those whose blocks of tokens fit in shared memory."""
    pairs = num_lanes * num_kv_heads
    for block_kv, stages in itertools.product((64, 128), (2, 3, 4, 6)):
        if 2 * stages * block_kv * head_dim * kv_bits // 8 > BUFFER_BYTES:
            continue
        for blocks_of_threads in (132, 264, 528):
            yield DecodeConfig(block_kv, stages, max(1, blocks_of_threads // pairs))


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
    if k_pages.dtype != v_pages.dtype or k_pages.dtype not in (q.dtype, jnp.float8_e4m3fn):
        return f"pages are {k_pages.dtype} and {v_pages.dtype}, neither {q.dtype} like q nor float8_e4m3fn"
    if head_dim not in (64, 128, 256):
        return f"head_dim {head_dim} is not 64, 128 or 256"
    return mosaic.unsupported_paging(page_size, group)


def unsupported_update(rotary_dim: int, k_pages: jax.Array) -> str | None:
    """Why the kernel cannot rotate by that many dimensions and store the token; None if it can."""
    head_dim = k_pages.shape[3]
    # The kernel's 8-bit write has not been seen right on a GPU at every head dim, and cannot be below 128: the copy
    # engine takes no rows from odd multiples of 64 bytes.
    if k_pages.dtype.itemsize == 1:
        return "the pages are 8-bit"
    if rotary_dim % 64 or (head_dim - rotary_dim) % 32:
        return f"rotary_dim {rotary_dim} is not a multiple of 64"
    return None


def scale_operands(k_scale, v_scale) -> tuple[jax.Array, jax.Array] | None:
    """The scales of 8-bit pages as float32 arrays; None if there are none."""
    if k_scale is None and v_scale is None:
        return None
    k, v = (jnp.asarray(1.0 if x is None else x, jnp.float32) for x in (k_scale, v_scale))
    return k, v
