"""Weights brought into the L2 cache while a kernel that waits leaves the memory idle.

Attention of a single lane is bound by latency and occupies few multiprocessors. Blocks of threads of the same launch
that have no other work ask the L2 cache for what the next products read. On an H100 that saved 1.2 us of a layer's 24
of Qwen2.5-0.5B. A half of Llama-3-8B's `out` in the cache saved nothing that could be told from noise, and a step of
the whole model took no less (README.md, with what did not help): so it is whole weights that are fetched, and of the
one behind them what then fits.
"""

import math

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.utils import inline_ptx, memref_ptr

from kernels_pallas.mosaic import MULTIPROCESSORS, THREADS

MOST_BYTES = 16 << 20  # what memory delivers in about the time of such an attention
PIECE = 2048  # bytes of a request

_REQUEST = """{{
    .reg .pred p;
    .reg .b32 i, piece, stretch, row;
    .reg .b64 at, offset;
    mov.u32 i, %tid.x;
    and.b32 i, i, 127;
    add.u32 i, i, $1;
    setp.lt.u32 p, i, {requests};
    rem.u32 stretch, i, {stretches};
    div.u32 piece, i, {stretches};
    mul.lo.u32 row, stretch, {rows};
    div.u32 row, row, {stretches};
    mul.wide.u32 at, row, {row_bytes};
    mul.wide.u32 offset, piece, {piece};
    add.u64 at, at, offset;
    min.u64 at, at, {last};
    add.u64 at, at, $0;
    @p cp.async.bulk.prefetch.L2.global [at], {piece};
}}"""


def shares(weights: tuple[jax.Array, ...]) -> list[int]:
    """Bytes to fetch of each weight: whole ones, and of one behind them what then fits, together up to MOST_BYTES.

    None of weights below a request's size, or whose rows the cache cannot be asked for.
    """
    left = MOST_BYTES
    taken: list[int] = []
    for weight in weights:
        nbytes = weight.size * weight.dtype.itemsize
        can_be_asked = nbytes >= PIECE and weight.shape[-1] * weight.dtype.itemsize % 16 == 0
        fits = nbytes <= left or any(taken)
        taken.append(min(left, nbytes) if can_be_asked and fits else 0)
        left -= taken[-1]
    return taken


def fetch(weight, nbytes: int, block, blocks: int) -> None:
    """Ask for `nbytes` of a weight [N, K] or [P, N, K] in global memory; `block` of `blocks` asks for its share.

    They are spread over the rows: the first bytes of as many equal stretches as there are multiprocessors. A warpgroup
    comes here.
    """
    *leading, columns = weight.shape
    row_bytes = columns * weight.dtype.itemsize
    rows, parts = math.prod(leading), leading[0] if len(leading) > 1 else 1
    stretches = parts * MULTIPROCESSORS
    pieces = -(-nbytes // (stretches * PIECE))
    requests = stretches * pieces
    code = _REQUEST.format(
        requests=requests,
        stretches=stretches,
        rows=rows,
        row_bytes=row_bytes,
        piece=PIECE,
        last=rows * row_bytes - PIECE,
    )

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())))
    def request(_, weight, first):
        inline_ptx(code, memref_ptr(weight), first.registers.item(), has_side_effects=True)

    @pl.loop(0, -(-requests // (THREADS * blocks)))
    def _round(i):
        request(weight, ((i * blocks + block) * THREADS).astype(jnp.int32))
