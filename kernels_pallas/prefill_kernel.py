"""Ragged causal attention over paged KV for Hopper: persistent blocks, wgmma, one TMA copy per page.

One block of threads per multiprocessor walks a list of (tile of query slabs, kv head), longest first
(`prefill_schedule`). Its memory warpgroup (`prefill_memory`) fetches the queries and the pages of the next tile
while the compute warpgroups (`prefill_compute`) finish the one before. The two compute warpgroups hold 64 rows
each and take turns, one multiplying while the other does its softmax. Blocks of keys that every query of a
warpgroup sees skip the mask.
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import mosaic, prefill_config, prefill_schedule
from kernels_pallas.lowering import lower_once
from kernels_pallas.mosaic import LOG2E, ROWS
from kernels_pallas.prefill_block import WG_SLABS, Block, Problem, Refs
from kernels_pallas.prefill_compute import attend_all
from kernels_pallas.prefill_config import FP8, QUERY_SLOTS
from kernels_pallas.prefill_memory import fetch_all
from kernels_pallas.prefill_schedule import SLAB

L2_BYTES = 24 << 20  # of keys and values that stay in the cache while tiles share them


def ragged_prefill(
    q,
    k_pages,
    v_pages,
    page_table,
    cu_seqlens,
    lengths,
    *,
    sm_scale,
    window,
    softcap,
    sinks,
    span_ends=None,
    k_scale=None,
    v_scale=None,
    config=None,
):
    """`kernels_pallas.ragged_prefill` by the kernel; operands that `unsupported` accepts."""
    scale = float(q.shape[2] ** -0.5 if sm_scale is None else sm_scale)
    config = config or prefill_config.choose_config(q, k_pages)
    scales = None
    if k_scale is not None or v_scale is not None:
        scales = jnp.stack([jnp.asarray(1.0 if x is None else x, jnp.float32) for x in (k_scale, v_scale)])
    operands = (q, k_pages, v_pages, page_table, cu_seqlens, lengths, sinks, span_ends, scales)
    return _prefill(*operands, scale, window, softcap, config, None)


def paged_decode(q, k_pages, v_pages, page_table, lengths, **options):
    """`kernels_pallas.paged_decode` as rows of one token: for the head dims that `decode_kernel` cannot take."""
    ends = jnp.arange(q.shape[0] + 1, dtype=jnp.int32)
    # A row has a key: lanes of length 0 look at one that may hold anything.
    operands = (q, k_pages, v_pages, page_table, ends, jnp.maximum(lengths, 1))
    o = ragged_prefill(*operands, **options, config=prefill_config.DECODE_CONFIG)
    return jnp.where(lengths[:, None, None] > 0, o, 0)


@lower_once("scale", "window", "softcap", "config", "interpret")
def _prefill(
    q,
    k_pages,
    v_pages,
    page_table,
    cu_seqlens,
    lengths,
    sinks,
    span_ends,
    scales,
    scale,
    window,
    softcap,
    config,
    interpret,
):
    num_tokens, num_heads, head_dim = q.shape
    _, num_kv_heads, page_size, _ = k_pages.shape
    group = num_heads // num_kv_heads
    block, stages, groups = config.block_kv, config.stages, config.warpgroups
    tile_slabs = groups * WG_SLABS
    num_tiles = prefill_schedule.max_tiles(num_tokens, lengths.shape[0], group, tile_slabs)
    query_buffer = mosaic.operand_buffer((QUERY_SLOTS, groups, ROWS, head_dim), q.dtype)
    columns, query_pieces = mosaic.tiles_of(query_buffer)
    rows_apart = prefill_config.rows_apart(head_dim)
    problem = Problem(
        num_tokens=num_tokens,
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        page_size=page_size,
        num_tiles=num_tiles,
        dtype=q.dtype,
        fp8=k_pages.dtype == FP8,
        scale=scale,
        window=window,
        softcap=softcap,
        config=config,
        columns=columns if interpret is None else head_dim,
        sends_rows=rows_apart == 1,
        interpret=interpret is not None,
    )
    tiles, total, limits = prefill_schedule.tiles(
        cu_seqlens,
        lengths,
        span_ends,
        num_tiles=num_tiles,
        group=group,
        tile_slabs=tile_slabs,
        block=block,
        window=window,
        cache_tokens=L2_BYTES // (2 * num_kv_heads * head_dim * k_pages.dtype.itemsize),
    )
    queries = q.reshape(num_tokens, num_kv_heads, group, head_dim)
    if problem.interpret:  # the copy engine zero-fills past the end, the interpreter does not
        queries = jnp.pad(queries, ((0, SLAB), (0, 0), (0, 0), (0, 0)))
    sink_rows = None if sinks is None else _sink_rows(sinks, num_kv_heads)
    end = jnp.minimum(cu_seqlens[-1:], num_tokens)
    operands = (queries, k_pages, v_pages, page_table, tiles, total, end)
    optional = (sink_rows, limits, scales)
    given = [x for x in optional if x is not None]

    def kernel(*refs):
        inputs, rest = refs[: len(operands)], iter(refs[len(operands) :])
        extras = [None if x is None else next(rest) for x in optional]
        out, (q_smem, q_pieces), *scratch = rest
        fields = [*inputs, *extras, out, q_smem, q_pieces, *scratch]
        threads = Block(problem, Refs(*fields))
        pl.when(threads.thread < groups)(lambda: attend_all(threads))
        pl.when(threads.thread == groups)(lambda: fetch_all(threads))

    arrivals = 1 if problem.fp8 else problem.copies  # the memory warpgroup's, or its copies'
    launch = plgpu.kernel(
        kernel,
        out_type=mosaic.out_like(q.shape[:1] + queries.shape[1:], q.dtype, *operands, *given),
        grid=(config.blocks,),
        grid_names=("block",),
        num_threads=groups + 1,
        thread_name="thread",
        scratch_types=[
            plgpu.RefUnion(query_buffer, query_pieces),
            None if problem.sends_rows else plgpu.SMEM((groups, ROWS, rows_apart, head_dim), q.dtype),
            mosaic.operand_buffer((stages, block, head_dim), q.dtype),
            mosaic.operand_buffer((stages, block, head_dim), q.dtype),
            mosaic.operand_buffer((2, block, head_dim), FP8) if problem.fp8 else None,
            plgpu.Barrier(num_arrivals=tile_slabs * (head_dim // problem.columns), num_barriers=QUERY_SLOTS),
            plgpu.Barrier(num_arrivals=groups, num_barriers=QUERY_SLOTS),
            plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
            plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            plgpu.Barrier(num_arrivals=problem.copies, num_barriers=2) if problem.fp8 else None,
            plgpu.Barrier(num_arrivals=groups),
            plgpu.Barrier(),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return launch(*operands, *given).reshape(num_tokens, num_heads, head_dim)


def _sink_rows(sinks: jax.Array, num_kv_heads: int) -> jax.Array:
    """Logits [K, rows] times log2(e): the heads of any run of slabs are 64 rows from some slab on."""
    heads = sinks.astype(jnp.float32).reshape(num_kv_heads, -1) * LOG2E  # [K, G]
    return jnp.repeat(jnp.tile(heads, (1, WG_SLABS // heads.shape[1] + 2)), SLAB, axis=1)
