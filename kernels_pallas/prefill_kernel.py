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
    problem = problem_of(q, k_pages, lengths.shape[0], scale, window, softcap, config, interpret)
    num_kv_heads, group = problem.num_kv_heads, problem.group
    tiles, total, limits = prefill_schedule.tiles(
        cu_seqlens,
        lengths,
        span_ends,
        num_tiles=problem.num_tiles,
        group=group,
        tile_slabs=problem.tile_slabs,
        block=config.block_kv,
        window=window,
        cache_tokens=L2_BYTES // (2 * num_kv_heads * problem.head_dim * k_pages.dtype.itemsize),
    )
    operands = {
        "tiles": tiles,
        "total": total,
        "end": jnp.minimum(cu_seqlens[-1:], problem.num_tokens),
        "sinks": None if sinks is None else _sink_rows(sinks, num_kv_heads),
        "limits": limits,
        "scales": scales,
    }
    given = {name: x for name, x in operands.items() if x is not None}
    return launch(problem, q, k_pages, v_pages, page_table, given, {}, interpret)["out"].reshape(q.shape)


def problem_of(q, k_pages, num_rows, scale, window, softcap, config, interpret, parts=None) -> Problem:
    """The static numbers for packed queries q [T, N, H] of `num_rows` rows."""
    num_tokens, num_heads, head_dim = q.shape
    _, num_kv_heads, page_size, _ = k_pages.shape
    group = num_heads // num_kv_heads
    columns, _ = mosaic.tiles_of(_query_buffer(config, head_dim, q.dtype))
    tile_slabs = config.warpgroups * WG_SLABS
    if parts is None:
        num_tiles = prefill_schedule.max_tiles(num_tokens, num_rows, group, tile_slabs)
    else:
        num_tiles = prefill_schedule.row_tiles(num_tokens, group, tile_slabs)
    return Problem(
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
        sends_rows=prefill_config.rows_apart(head_dim) == 1,
        interpret=interpret is not None,
        parts=parts,
    )


def _query_buffer(config, head_dim: int, dtype) -> plgpu.SMEM:
    return mosaic.operand_buffer((QUERY_SLOTS, config.warpgroups, ROWS, head_dim), dtype)


def launch(
    problem: Problem, q, k_pages, v_pages, page_table, given: dict, further: dict, interpret
) -> dict[str, jax.Array]:
    """Run the kernel: `given` are its further operands by their names in `Refs`, `further` the types of outputs.

    Returns "out" [parts * T, K, G, H] and what `further` names.
    """
    config, head_dim, group = problem.config, problem.head_dim, problem.group
    block, stages, groups = config.block_kv, config.stages, config.warpgroups
    queries = q.reshape(problem.num_tokens, problem.num_kv_heads, group, head_dim)
    shape = (problem.num_tokens * (problem.parts or 1), *queries.shape[1:])
    if problem.interpret:  # the copy engine zero-fills past the end, the interpreter does not
        queries = jnp.pad(queries, ((0, SLAB), (0, 0), (0, 0), (0, 0)))
    operands = {"q": queries, "k": k_pages, "v": v_pages, "table": page_table, **given}
    outputs = {"out": mosaic.out_like(shape, q.dtype, *operands.values()), **further}
    query_buffer = _query_buffer(config, head_dim, q.dtype)
    _, query_pieces = mosaic.tiles_of(query_buffer)
    rows_apart = prefill_config.rows_apart(head_dim)
    arrivals = 1 if problem.fp8 else problem.copies  # the memory warpgroup's, or its copies'
    scratch = {
        "queries": plgpu.RefUnion(query_buffer, query_pieces),
        "rows": None if problem.sends_rows else plgpu.SMEM((groups, ROWS, rows_apart, head_dim), q.dtype),
        "k_smem": mosaic.operand_buffer((stages, block, head_dim), q.dtype),
        "v_smem": mosaic.operand_buffer((stages, block, head_dim), q.dtype),
        "landing": mosaic.operand_buffer((2, block, head_dim), FP8) if problem.fp8 else None,
        "q_bar": plgpu.Barrier(
            num_arrivals=problem.tile_slabs * (head_dim // problem.columns), num_barriers=QUERY_SLOTS
        ),
        "q_free": plgpu.Barrier(num_arrivals=groups, num_barriers=QUERY_SLOTS),
        "k_bar": plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        "v_bar": plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        "landed": plgpu.Barrier(num_arrivals=problem.copies, num_barriers=2) if problem.fp8 else None,
        "turn": plgpu.Barrier(num_arrivals=groups),
        "tail": plgpu.Barrier(),
    }

    def kernel(*refs):
        named = dict(zip((*operands, *outputs, *scratch), refs, strict=True))
        named["q_smem"], named["q_pieces"] = named.pop("queries")
        threads = Block(problem, Refs(**named))
        pl.when(threads.thread < groups)(lambda: attend_all(threads))
        pl.when(threads.thread == groups)(lambda: fetch_all(threads))

    results = plgpu.kernel(
        kernel,
        out_type=tuple(outputs.values()),
        grid=(config.blocks,),
        grid_names=("block",),
        num_threads=groups + 1,
        thread_name="thread",
        scratch_types=list(scratch.values()),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*operands.values())
    return dict(zip(outputs, results, strict=True))


def _sink_rows(sinks: jax.Array, num_kv_heads: int) -> jax.Array:
    """Logits [K, rows] times log2(e): the heads of any run of slabs are 64 rows from some slab on."""
    heads = sinks.astype(jnp.float32).reshape(num_kv_heads, -1) * LOG2E  # [K, G]
    return jnp.repeat(jnp.tile(heads, (1, WG_SLABS // heads.shape[1] + 2)), SLAB, axis=1)
