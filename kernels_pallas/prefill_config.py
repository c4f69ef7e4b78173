"""What the ragged prefill kernel takes, and the configurations it can run with."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels_pallas import mosaic, tuning
from kernels_pallas.mosaic import MULTIPROCESSORS, ROWS

UNIT = 128  # tokens that a prefix common to all lanes is rounded down to, a multiple of every block
QUERY_SLOTS = 2  # tiles whose queries are in shared memory: one in work, one fetched
FP8 = jnp.dtype(jnp.float8_e4m3fn)
SHARED_BYTES = 226 << 10  # of a block of threads, but for its barriers
COPY_ALIGNMENT = 128  # bytes: where in shared memory the copy engine reads


@dataclass(frozen=True)
class PrefillConfig:
    """Tuning of one shape: KV tokens per trip, trips in flight, compute warpgroups (1 to 3).

    Two warpgroups can take turns at the tensor cores; `blocks` persistent blocks of threads run.
    """

    block_kv: int
    stages: int
    warpgroups: int = 2
    turns: bool = True
    blocks: int = MULTIPROCESSORS

    def shared_bytes(self, head_dim: int, kv_bits: int) -> int:
        """Shared memory of queries, keys and values of 16 bits, and what 8-bit pages and narrow rows add."""
        queries = (QUERY_SLOTS + 2 * (rows_apart(head_dim) > 1)) * self.warpgroups * ROWS
        landing = self.block_kv if kv_bits == 8 else 0
        return 2 * head_dim * (queries + 2 * self.stages * self.block_kv + landing)


DECODE_CONFIG = PrefillConfig(64, 2, 1, turns=False, blocks=2 * MULTIPROCESSORS)  # two a multiprocessor


def rows_apart(head_dim: int) -> int:
    """Rows of 16-bit values that the copy engine takes one by one lie this many rows apart; 1 for 128 bytes."""
    return COPY_ALIGNMENT // math.gcd(2 * head_dim, COPY_ALIGNMENT)


def default_config(head_dim: int) -> PrefillConfig:
    """The choice that fits the shared memory and the registers of each head dim."""
    return PrefillConfig(64, 2, 1, turns=False) if head_dim > 128 else PrefillConfig(128, 2)


def choose_config(q: jax.Array, k_pages: jax.Array) -> PrefillConfig:
    """The configuration for these operands."""
    num_tokens, num_heads, head_dim = q.shape
    _, num_kv_heads, page_size, _ = k_pages.shape
    shape = {
        "num_tokens": num_tokens,
        "num_kv_heads": num_kv_heads,
        "group": num_heads // num_kv_heads,
        "head_dim": head_dim,
        "page_size": page_size,
        "kv_bits": 8 * k_pages.dtype.itemsize,
    }
    return tuning.config_for("ragged_prefill", shape, default_config(head_dim), candidates)


def candidates(
    num_tokens: int, num_kv_heads: int, group: int, head_dim: int, page_size: int, kv_bits: int
) -> Iterator[PrefillConfig]:
    """Configurations worth measuring for a shape: as many stages as fit in shared memory, up to four."""
    schemes = [(2, True), (2, False), (3, False)]
    if head_dim > 128:  # the accumulators of two warpgroups take all registers
        schemes = [(1, False)]
    elif kv_bits == 8:  # the memory warpgroup widens the pages, and needs its registers
        schemes = schemes[:2]
    for (warpgroups, turns), block_kv in itertools.product(schemes, (64, 128)):
        for stages in (4, 3, 2):
            config = PrefillConfig(block_kv, stages, warpgroups, turns)
            if config.shared_bytes(head_dim, kv_bits) <= SHARED_BYTES:
                yield config
                break


def unsupported(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array) -> str | None:
    """Why the kernel cannot take these operands; None if it can."""
    _, num_kv_heads, page_size, head_dim = k_pages.shape
    group = q.shape[1] // num_kv_heads
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q is {q.dtype}, not bfloat16 or float16"
    if k_pages.dtype != v_pages.dtype or k_pages.dtype not in (q.dtype, FP8):
        return f"pages {k_pages.dtype} and {v_pages.dtype} are not both {q.dtype} or both {FP8}"
    if head_dim not in (64, 96, 128, 256):
        return f"head_dim {head_dim} is not 64, 96, 128 or 256"
    if k_pages.dtype == FP8 and head_dim == 96:
        return f"head_dim {head_dim} of {FP8} pages is not 64, 128 or 256"
    return mosaic.unsupported_paging(page_size, group)
