"""Ragged causal attention over paged KV for Hopper: wgmma, one TMA copy per page, warpgroups in ping-pong.

Query tokens are cut into tiles of one row each; a compute warpgroup holds 64 // G tokens with the G query
heads of one kv head, so the heads share every key they read and a row of few tokens wastes little. A block of
threads is one (kv head, tile): its two compute warpgroups take neighbouring tokens and take turns, one
multiplying while the other does its softmax, and a memory warpgroup streams the pages. Blocks of keys that
every query of the tile sees skip the mask.
"""

import functools
from dataclasses import dataclass

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import mosaic
from kernels_pallas.mosaic import LOG2E, MASKED, ROWS


@dataclass(frozen=True)
class PrefillConfig:
    """Tuning of one shape: KV tokens per trip, trips in flight, compute warpgroups (1 or 2)."""

    block_kv: int
    stages: int
    warpgroups: int = 2


def default_config(head_dim: int) -> PrefillConfig:
    """The choice that fits the shared memory and the registers of each head dim."""
    return PrefillConfig(64, 2, 1) if head_dim > 128 else PrefillConfig(128, 2, 2)


def unsupported(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array) -> str | None:
    """Why the kernel cannot take these operands; None if it can."""
    _, num_kv_heads, page_size, head_dim = k_pages.shape
    group = q.shape[1] // num_kv_heads
    if not (q.dtype == k_pages.dtype == v_pages.dtype) or q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q {q.dtype} and pages {k_pages.dtype} are not all bfloat16 (or all float16)"
    if head_dim not in (64, 128, 256):
        return f"head_dim {head_dim} is not 64, 128 or 256"
    if page_size not in (8, 16, 32, 64, 128):
        return f"page_size {page_size} is not 8, 16, 32, 64 or 128"
    if group > 16:
        return f"{group} query heads per kv head are more than 16"
    return None


def ragged_prefill(
    q, k_pages, v_pages, page_table, cu_seqlens, lengths, *, sm_scale, window, softcap, sinks, config=None
):
    """`kernels_pallas.ragged_prefill` by the kernel; operands that `unsupported` accepts."""
    scale = float(q.shape[2] ** -0.5 if sm_scale is None else sm_scale)
    config = config or default_config(q.shape[2])
    operands = (q, k_pages, v_pages, page_table, cu_seqlens, lengths, sinks)
    return _prefill(*operands, scale, window, softcap, config, None)


def _tiles(cu_seqlens, lengths, tokens: int, num_tiles: int):
    """Per tile [num_tiles] int32: row, first token, token count (0: no work), first token's KV position."""
    counts = cu_seqlens[1:] - cu_seqlens[:-1]
    tiles = -(-counts // tokens)  # [R]
    ends = jnp.cumsum(tiles)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    row = jnp.minimum((tile[:, None] >= ends[None, :]).sum(axis=1, dtype=jnp.int32), counts.shape[0] - 1)
    begin = (tile - (ends - tiles)[row]) * tokens  # inside the row
    count = jnp.where(tile < ends[-1], jnp.minimum(counts[row] - begin, tokens), 0)
    first = jnp.where(count > 0, cu_seqlens[row] + begin, 0)
    position = jnp.where(count > 0, (lengths - counts)[row] + begin, 0)
    return row, first, count, position


# Module level, so that all layers of a model share one trace and one compilation of the kernel.
@functools.partial(jax.jit, static_argnames=("scale", "window", "softcap", "config", "interpret"))
def _prefill(
    q, k_pages, v_pages, page_table, cu_seqlens, lengths, sinks, scale, window, softcap, config, interpret
):
    num_tokens, num_heads, head_dim = q.shape
    _, num_kv_heads, page_size, _ = k_pages.shape
    group = num_heads // num_kv_heads
    block, stages, groups = config.block_kv, config.stages, config.warpgroups
    tokens = ROWS // group  # of one warpgroup
    rows = tokens * group
    tile_tokens = groups * tokens
    num_tiles = -(-num_tokens // tile_tokens) + lengths.shape[0]
    copy_rows = min(page_size, block)
    copies = block // copy_rows
    blocks_per_page = max(page_size // block, 1)
    dtype = q.dtype
    layout = plgpu.Layout.WGMMA
    # Every warpgroup loads whole tiles, so the queries need one tile of slack behind them.
    queries = q.reshape(num_tokens, num_kv_heads, group, head_dim)
    if interpret is not None:  # the copy engine zero-fills there, the interpreter does not
        queries = jnp.pad(queries, ((0, tile_tokens), (0, 0), (0, 0), (0, 0)))
    sink_rows = None
    if sinks is not None:  # [K, 64], in the order of a warpgroup's rows
        sink_rows = jnp.repeat(sinks.astype(jnp.float32).reshape(num_kv_heads, group) * LOG2E, tokens, axis=1)
        sink_rows = jnp.pad(sink_rows, ((0, 0), (0, ROWS - rows)))

    def kernel(q_ref, k_ref, v_ref, table_ref, row_ref, first_ref, count_ref, position_ref, *refs):
        sink_ref, *others = refs if sinks is not None else (None, *refs)
        o_ref, q_smem, k_smem, v_smem, staging, sink_smem, *barriers = others
        q_bar, k_bar, v_bar, k_free, v_free, turn, tail = barriers
        head = lax.axis_index("head")
        # Later tiles of a row see more keys: start them first.
        tile = num_tiles - 1 - lax.axis_index("tile")
        row, first, count, position = row_ref[tile], first_ref[tile], count_ref[tile], position_ref[tile]
        stop_position = position + count
        begin = jnp.int32(0)
        if window is not None:
            begin = lax.div(lax.max(position - (window - 1), jnp.int32(0)), jnp.int32(block))
        trips = jnp.where(count > 0, mosaic.ceil_div(stop_position, block) - begin, 0)
        thread = lax.axis_index("thread")

        def take_turn():
            if groups == 2:
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

        @pl.when((thread < groups) & (trips > 0))
        def _compute():
            plgpu.set_max_registers(232, action="increase")  # 2 * 232 + 40 is what the launch has
            my_first = first + thread * tokens
            my_position = position + thread * tokens
            for g in range(group):  # rows are ordered (query head, token)
                source = q_ref.at[pl.ds(my_first, tokens), head, g]
                plgpu.copy_gmem_to_smem(
                    source, staging.at[thread, pl.ds(g * tokens, tokens)], q_bar.at[thread]
                )
            if sinks is not None:
                plgpu.copy_gmem_to_smem(sink_ref.at[head], sink_smem.at[thread], q_bar.at[thread])
            plgpu.barrier_wait(q_bar.at[thread])
            # The copy engine places unaligned rows only untiled, wgmma reads only tiled.
            q_smem[thread] = plgpu.load(staging.at[thread], layout=layout, optimized=False)
            plgpu.commit_smem()

            def trip(i, state, masked):
                acc, maximum, denominator = state  # [64, H], [64], [64]
                slot = lax.rem(i, jnp.int32(stages))
                start = (begin + i) * block
                plgpu.barrier_wait(k_bar.at[slot])

                def multiply(scores):
                    plgpu.wgmma(scores, q_smem.at[thread], k_smem.at[slot].transpose((1, 0)))
                    take_turn()
                    return scores[...]

                scores = pl.run_scoped(multiply, plgpu.ACC((ROWS, block), jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])
                factor = scale * LOG2E
                if softcap is not None:
                    scores = jnp.tanh(scores * (scale / softcap))
                    factor = softcap * LOG2E
                if masked:
                    key = start + plgpu.broadcasted_iota(jnp.int32, (ROWS, block), 1, layout=layout)
                    query = plgpu.broadcasted_iota(jnp.int32, (ROWS, block), 0, layout=layout)
                    query = my_position + lax.rem(query, jnp.int32(tokens))
                    visible = key <= query
                    if window is not None:
                        visible &= key > query - window
                    scores = jnp.where(visible, scores, MASKED)
                new_maximum = jnp.maximum(maximum, scores.max(axis=1) * factor)
                decay = jnp.exp2(maximum - new_maximum)
                weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(new_maximum, scores.shape, [0]))
                acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
                denominator = denominator * decay + weights.sum(axis=1)
                weights = weights.astype(dtype)
                acc, new_maximum, denominator, weights = lax.optimization_barrier(
                    (acc, new_maximum, denominator, weights)
                )
                if groups == 2:
                    plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_bar.at[slot])
                if groups == 2:
                    plgpu.barrier_wait(turn)
                if masked:

                    @pl.when(i == trips - 1)
                    def _tail():  # one warpgroup zeroes the values past the row for both
                        @pl.when(thread == 0)
                        def _zero():
                            stop = stop_position - start
                            mosaic.zero_rows_outside(v_smem.at[slot], block, head_dim, 0, stop)
                            if groups == 2:
                                plgpu.barrier_arrive(tail)

                        if groups == 2:

                            @pl.when(thread == 1)
                            def _wait():
                                plgpu.barrier_wait(tail)

                acc = mosaic.add_values(acc, weights, v_smem.at[slot], interpret=interpret is not None)
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, new_maximum, denominator

            if groups == 2:
                pl.when(thread == 1)(take_turn)
            whole = lax.min(lax.max(lax.div(position + 1, jnp.int32(block)) - begin, jnp.int32(0)), trips)
            whole = lax.min(whole, trips - 1)  # the last trip zeroes the tail
            state = mosaic.softmax_state(ROWS, head_dim)
            if window is None:
                begin_whole = jnp.int32(0)
            else:
                oldest = lax.max(stop_position - window, jnp.int32(0))  # seen by the last query
                begin_whole = lax.min(mosaic.ceil_div(oldest, block) - begin, whole)
                state = lax.fori_loop(0, begin_whole, functools.partial(trip, masked=True), state)
            state = lax.fori_loop(begin_whole, whole, functools.partial(trip, masked=False), state)
            state = lax.fori_loop(whole, trips, functools.partial(trip, masked=True), state)
            if groups == 2:
                pl.when(thread == 0)(take_turn)
            acc, maximum, denominator = state
            if sinks is not None:
                sink = plgpu.load(sink_smem.at[thread], layout=layout.reduce(1), optimized=False)
                new_maximum = jnp.maximum(maximum, sink)
                decay = jnp.exp2(maximum - new_maximum)
                denominator = denominator * decay + jnp.exp2(sink - new_maximum)
                acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
            inverse = 1.0 / jnp.maximum(denominator, 1e-30)
            acc = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
            mosaic.store(staging.at[thread], acc.astype(dtype))
            plgpu.commit_smem()
            left = count - thread * tokens

            @pl.when(left >= tokens)
            def _store_all():
                for g in range(group):
                    source = staging.at[thread, pl.ds(g * tokens, tokens)]
                    plgpu.copy_smem_to_gmem(source, o_ref.at[pl.ds(my_first, tokens), head, g])

            @pl.when(left < tokens)
            def _store_some():  # what lies behind belongs to another tile
                @pl.loop(0, lax.max(left, jnp.int32(0)))
                def _token(j):
                    for g in range(group):
                        source = staging.at[thread, pl.ds(g * tokens + j, 1)]
                        plgpu.copy_smem_to_gmem(source, o_ref.at[pl.ds(my_first + j, 1), head, g])

            plgpu.wait_smem_to_gmem(0)

        @pl.when((thread == groups) & (trips > 0))
        def _memory():
            plgpu.set_max_registers(40, action="decrease")
            last_page = lax.div(stop_position - 1, jnp.int32(page_size))

            def page_ids(i):
                """Ids of the pages of trip i; past the row's last page, that page again."""
                index = lax.div(begin + i, jnp.int32(blocks_per_page)) * copies
                return tuple(table_ref[row, lax.min(index + j, last_page)] for j in range(copies))

            def fetch(i, ids):
                slot = lax.rem(i, jnp.int32(stages))
                next_ids = page_ids(i + 1)  # the table is read a trip ahead of its use
                streams = ((k_ref, k_smem, k_bar, k_free), (v_ref, v_smem, v_bar, v_free))
                for pages, smem, arrived, free in streams:

                    @pl.when(i >= stages)
                    def _wait(free=free):
                        plgpu.barrier_wait(free.at[slot])

                    for j, page in enumerate(ids):
                        source = pages.at[page, head]
                        if blocks_per_page > 1:
                            offset = lax.rem(begin + i, jnp.int32(blocks_per_page)) * block
                            source = pages.at[page, head, pl.ds(offset, block)]
                        target = smem.at[slot, pl.ds(j * copy_rows, copy_rows)]
                        plgpu.copy_gmem_to_smem(source, target, arrived.at[slot])
                return next_ids

            lax.fori_loop(0, trips, fetch, page_ids(jnp.int32(0)))

            @pl.loop(lax.max(trips - stages, jnp.int32(0)), trips)
            def _drain(i):  # a barrier's every completion must be seen
                slot = lax.rem(i, jnp.int32(stages))
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])

    tiles = _tiles(cu_seqlens, lengths, tile_tokens, num_tiles)
    operands = (queries, k_pages, v_pages, page_table, *tiles)
    if sinks is not None:
        operands = (*operands, sink_rows)
    launch = plgpu.kernel(
        kernel,
        out_type=mosaic.out_like((num_tokens, num_kv_heads, group, head_dim), dtype, *operands),
        grid=(num_kv_heads, num_tiles),
        grid_names=("head", "tile"),
        num_threads=groups + 1,
        thread_name="thread",
        scratch_types=[
            mosaic.operand_buffer((groups, ROWS, head_dim), dtype),
            mosaic.operand_buffer((stages, block, head_dim), dtype),
            mosaic.operand_buffer((stages, block, head_dim), dtype),
            plgpu.SMEM((groups, ROWS, head_dim), dtype),
            plgpu.SMEM((groups, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=group + (sinks is not None), num_barriers=groups),
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups),
            plgpu.Barrier(),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    out = launch(*operands).reshape(num_tokens, num_heads, head_dim)
    # Tokens behind the last row belong to no tile: nothing wrote them.
    padding = jnp.arange(num_tokens) >= cu_seqlens[-1]
    return jnp.where(padding[:, None, None], 0, out)
