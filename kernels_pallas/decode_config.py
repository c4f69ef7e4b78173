"""What the decode kernel takes, and how it divides the work."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import mosaic, tuning
from kernels_pallas.mosaic import MULTIPROCESSORS

BUFFER_BYTES = 200 << 10  # of shared memory for keys and values, and for what splits send each other
CLUSTER = 8  # the largest that every GPU with clusters runs


@dataclass(frozen=True)
class DecodeConfig:
    """Tuning of one shape: KV tokens per trip, trips in flight, shares a lane's KV is cut into at most.

    Up to eight shares can be `clustered`: merged in shared memory instead of global memory. In global memory, some are
    merged at once, which decides roundings; 0 chooses how many by the size of the launch.
    """

    block_kv: int
    stages: int
    num_splits: int
    clustered: bool = False
    merged_at_once: int = 0
    longest_first: bool = False  # of unsplit lanes


def default_config(
    num_lanes: int, num_kv_heads: int, group: int, head_dim: int, capacity: int
) -> DecodeConfig:
    """The configuration for a shape that has not been tuned.

    `capacity` is the KV tokens a row of the page table can hold.
    """
    block_kv, pairs, slots = 64, max(num_lanes * num_kv_heads, 1), 2 * MULTIPROCESSORS
    few = DecodeConfig(block_kv, 2, CLUSTER, clustered=True)
    if pairs * CLUSTER <= MULTIPROCESSORS and 1 < capacity / block_kv <= 16 * CLUSTER:
        if buffer_bytes(few, group, head_dim) <= BUFFER_BYTES:
            return few
    # Heads of 64 dims leave room for so much in flight that a block of threads a multiprocessor is enough. Where one
    # lane is far longer than the others, blocks of 128 tokens get through it in fewer trips.
    if head_dim == 64 and 0.8 * MULTIPROCESSORS < pairs <= MULTIPROCESSORS:
        return DecodeConfig(128, 3, 1)
    # A block of threads a multiprocessor, two to a lane, merges sooner than four that meet in global memory: 8 lanes of
    # 1,024 take 16.8 us instead of 18.8, of 16,384 183.5 instead of 185.9, of 100 to 8,000 41.5 instead of 44.5. One of
    # 16,384 beside seven of 200 takes 58.8 instead of 50.4.
    if head_dim == 128 and 0.8 * MULTIPROCESSORS < 2 * pairs <= MULTIPROCESSORS and capacity > 2 * block_kv:
        return DecodeConfig(2 * block_kv, 2, 2, clustered=True)
    # Two blocks of threads per multiprocessor, if need be by splitting lanes.
    num_splits = max(1, min(slots // pairs, max(16, slots // 2 // pairs), -(-capacity // block_kv)))
    if num_splits > 1:  # of two, 16 lanes of 4,096 take 94.1 us, and 96.7 merged in global memory
        return DecodeConfig(block_kv, 2, num_splits, clustered=num_splits == 2)
    stages = 3 if head_dim == 128 else 2
    return DecodeConfig(block_kv, stages, 1, longest_first=_in_waves(pairs, head_dim))


def _in_waves(pairs: int, head_dim: int) -> bool:
    """Whether blocks of threads, one a pair, come in a few waves: a long lane had better not be in the last.

    Those of narrower heads are so small that most multiprocessors take all theirs at once.
    """
    return head_dim > 64 and 2 * MULTIPROCESSORS < pairs <= 8 * MULTIPROCESSORS


def buffer_bytes(config: DecodeConfig, group: int, head_dim: int, kv_bits: int = 16) -> int:
    """Shared memory that the ring of keys and values and the mailbox of a cluster take."""
    partial = 4 * (head_dim + 64) * (8 if group <= 8 else 16)
    mailbox = (config.num_splits - 1) * partial if config.clustered else 0
    return 2 * config.stages * config.block_kv * head_dim * kv_bits // 8 + mailbox


def choose_config(group: int, k_pages: jax.Array, page_table: jax.Array, deterministic: bool) -> DecodeConfig:
    """The configuration for these operands; if deterministic, one that divides a lane in the same way always."""
    if deterministic:
        return DecodeConfig(block_kv=64, stages=2, num_splits=8, merged_at_once=4)
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
    default = default_config(num_lanes, num_kv_heads, group, head_dim, max_pages * page_size)
    return tuning.config_for("paged_decode", shape, default, candidates)


def candidates(
    num_lanes: int, num_kv_heads: int, group: int, head_dim: int, page_size: int, kv_bits: int
) -> Iterator[DecodeConfig]:
    """Configurations worth measuring for a shape: those whose blocks of tokens fit in shared memory."""
    pairs = num_lanes * num_kv_heads
    shares = sorted({max(1, n * MULTIPROCESSORS // pairs) for n in (1, 2, 4)})
    clusters = {n for n in shares if 1 < n < CLUSTER}
    if pairs * CLUSTER <= MULTIPROCESSORS:
        clusters.add(CLUSTER)
    for block_kv, stages in itertools.product((64, 128), (2, 3, 4, 6)):
        configs = [
            DecodeConfig(block_kv, stages, n, longest_first=n == 1 and _in_waves(pairs, head_dim))
            for n in shares
        ]
        configs += [DecodeConfig(block_kv, stages, n, clustered=True) for n in clusters]
        yield from (x for x in configs if buffer_bytes(x, group, head_dim, kv_bits) <= BUFFER_BYTES)


def active_splits(num_blocks, num_splits: int):
    """Splits, at least one, that share a lane of `num_blocks` KV blocks: few for short lanes.

    A further split costs its part of the merge, which pays only where it takes several trips off the others.
    """
    fewest = lax.min(mosaic.ceil_div(num_blocks, 16), jnp.int32(4))
    share = lax.max(lax.max(mosaic.ceil_div(num_blocks, num_splits), fewest), jnp.int32(1))
    return lax.max(lax.div(num_blocks + share - 1, share), jnp.int32(1))


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
    if rotary_dim % 64 or (head_dim - rotary_dim) % 32:
        return f"rotary_dim {rotary_dim} is not a multiple of 64"
    return None


def scale_operands(k_scale, v_scale) -> tuple[jax.Array, jax.Array] | None:
    """The scales of 8-bit pages as float32 arrays; None if there are none."""
    if k_scale is None and v_scale is None:
        return None
    k, v = (jnp.asarray(1.0 if x is None else x, jnp.float32) for x in (k_scale, v_scale))
    return k, v
