"""Paged decode attention for Hopper: split-KV, one TMA copy per page, wgmma, float32 partial results.

A block of threads serves one (kv head, split, lane): a memory warpgroup streams the pages of its share of
the lane's KV through shared memory, a compute warpgroup runs an online softmax over it in the log2 domain.
The share is cut from the lane's actual length, so the grid is static and short lanes leave at once. One split
writes the result itself; several write partial (output, maximum, denominator) that XLA merges.

Everything is computed transposed, with KV tokens and head dims as the 64 rows of a wgmma and the few query
heads of a group as its columns: nothing is wasted on padding a group to 64 rows, and so few registers are
held that several blocks of threads share a multiprocessor and hide each other's start and end.
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
class DecodeConfig:
    """Tuning of one shape: KV tokens per trip, trips in flight, shares a lane's KV is cut into."""

    block_kv: int
    stages: int
    num_splits: int


def default_config(num_lanes: int, num_kv_heads: int, head_dim: int, capacity: int) -> DecodeConfig:
    """Two blocks of threads per multiprocessor for any shape, if need be by splitting lanes.

    `capacity` is the KV tokens a row of the page table can hold.
    """
    slots, pairs = 2 * 132, max(num_lanes * num_kv_heads, 1)
    block_kv = 128 if head_dim == 64 and pairs >= slots else 64
    # Splits beyond 16 per lane cost more in merging than they gain, unless the chip would stand half empty.
    num_splits = min(slots // pairs, max(16, slots // 2 // pairs), -(-capacity // block_kv))
    return DecodeConfig(block_kv, 2, max(1, num_splits))


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


def paged_decode(
    q, k_pages, v_pages, page_table, lengths, *, sm_scale, window, softcap, sinks, deterministic
):
    """`kernels_pallas.paged_decode` by the kernel; operands that `unsupported` accepts."""
    if deterministic:
        config = DecodeConfig(block_kv=64, stages=2, num_splits=8)  # whatever the batch
    else:
        _, num_kv_heads, page_size, head_dim = k_pages.shape
        config = default_config(q.shape[0], num_kv_heads, head_dim, page_table.shape[1] * page_size)
    scale = float(q.shape[2] ** -0.5 if sm_scale is None else sm_scale)
    return _decode(q, k_pages, v_pages, page_table, lengths, sinks, scale, window, softcap, config, None)


# Module level, so that all layers of a model share one trace and one compilation of the kernel.
@functools.partial(
    jax.jit, static_argnames=("scale", "window", "softcap", "config", "interpret"), inline=False
)
def _decode(q, k_pages, v_pages, page_table, lengths, sinks, scale, window, softcap, config, interpret):
    num_lanes, num_heads, head_dim = q.shape
    num_kv_heads = k_pages.shape[1]
    group = num_heads // num_kv_heads
    o, m, l = _partials(  # noqa: E741
        q, k_pages, v_pages, page_table, lengths, scale, window, softcap, config, sinks is None, interpret
    )
    if m is None:
        return o.reshape(num_lanes, num_heads, head_dim)
    return _merge(o[..., :group], m[..., :group], l[..., :group], sinks).astype(q.dtype)


def _merge(o, m, l, sinks):  # noqa: E741
    """Splits o [B, splits, K, H, G], m and l [B, splits, K, G] float32 as one softmax, [B, N, H] float32.

    Written out split by split: XLA fuses elementwise work into one kernel, and reductions into several.
    """
    num_lanes, num_splits, num_kv_heads, head_dim, group = o.shape
    maximum = functools.reduce(jnp.maximum, [m[:, s] for s in range(num_splits)])  # [B, K, G]
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(num_kv_heads, group) * LOG2E
        maximum = jnp.maximum(maximum, sink)
    weights = [jnp.exp2(m[:, s] - maximum) for s in range(num_splits)]
    denominator = sum(l[:, s] * weights[s] for s in range(num_splits))
    if sinks is not None:
        denominator += jnp.exp2(sink - maximum)
    out = sum(o[:, s] * weights[s][:, :, None, :] for s in range(num_splits))
    # An empty split has weight 0 or, where all are empty, an output of 0.
    out = out / jnp.maximum(denominator, 1e-30)[:, :, None, :]
    return out.swapaxes(-1, -2).reshape(num_lanes, num_kv_heads * group, head_dim)


def _partials(
    q, k_pages, v_pages, page_table, lengths, scale, window, softcap, config, may_finish, interpret
):
    """Launch: float32 o [B, splits, K, H, G'], m and l [B, splits, K, G']; or final o [B, K, G, H] alone."""
    num_lanes, num_heads, head_dim = q.shape
    _, num_kv_heads, page_size, _ = k_pages.shape
    group = num_heads // num_kv_heads
    padded = 8 if group <= 8 else 16
    block, stages, splits = config.block_kv, config.stages, config.num_splits
    copy_rows = min(page_size, block)
    copies = block // copy_rows
    blocks_per_page = max(page_size // block, 1)
    finish = splits == 1 and may_finish
    dtype = q.dtype
    rows_v = (
        -(-head_dim // ROWS) * ROWS
    )  # V is the left operand: whole tiles of 64 head dims, the rest garbage
    # Copies into tiled shared memory move whole groups of 8 rows. XLA fuses the padding into q's producer.
    queries = q.reshape(num_lanes, num_kv_heads, group, head_dim)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, padded - group), (0, 0)))

    def kernel(q_ref, k_ref, v_ref, table_ref, lengths_ref, *refs):
        if finish:
            o_ref, q_smem, k_smem, v_smem, p_smem, o_smem, q_bar, k_bar, v_bar, k_free, v_free = refs
        else:
            o_ref, m_ref, l_ref, *scratch = refs
            q_smem, k_smem, v_smem, p_smem, o_smem, m_smem, l_smem, *barriers = scratch
            q_bar, k_bar, v_bar, k_free, v_free = barriers
        head, split, lane = lax.axis_index("head"), lax.axis_index("split"), lax.axis_index("lane")
        length = lengths_ref[lane]
        first = jnp.int32(0) if window is None else lax.max(length - window, jnp.int32(0))
        first_block = lax.div(first, jnp.int32(block))
        num_blocks = mosaic.ceil_div(length, block)
        share = mosaic.ceil_div(num_blocks - first_block, splits)
        begin = lax.min(first_block + split * share, num_blocks)
        trips = lax.min(begin + share, num_blocks) - begin
        thread = lax.axis_index("thread")

        @pl.when(thread == 0)
        def _compute():
            plgpu.copy_gmem_to_smem(q_ref.at[lane, head], q_smem, q_bar)
            plgpu.barrier_wait(q_bar)
            layout = plgpu.Layout.WGMMA

            def trip(i, state, edge):
                acc, maximum, denominator = state  # [rows_v, G'], [G'], [block, G']
                slot = lax.rem(i, jnp.int32(stages))
                start = (begin + i) * block
                plgpu.barrier_wait(k_bar.at[slot])
                scores = mosaic.dot(k_smem.at[slot], q_smem.transpose((1, 0)), (block, padded))
                plgpu.barrier_arrive(k_free.at[slot])
                if softcap is None:
                    scores = scores * (scale * LOG2E)
                else:
                    scores = jnp.tanh(scores * (scale / softcap)) * (softcap * LOG2E)
                if edge:
                    position = start + plgpu.broadcasted_iota(jnp.int32, (block, padded), 0, layout=layout)
                    visible = position < length
                    if window is not None:
                        visible &= position >= first
                    scores = jnp.where(visible, scores, MASKED)
                new_maximum = jnp.maximum(maximum, scores.max(axis=0))
                decay = jnp.exp2(maximum - new_maximum)
                weights = jnp.exp2(scores - lax.broadcast_in_dim(new_maximum, scores.shape, [1]))
                denominator = denominator * lax.broadcast_in_dim(decay, scores.shape, [1]) + weights
                p_smem.transpose((1, 0))[...] = weights.astype(dtype)
                plgpu.commit_smem()
                acc = acc * lax.broadcast_in_dim(decay, acc.shape, [1])
                plgpu.barrier_wait(v_bar.at[slot])
                if edge:
                    mosaic.zero_rows_outside(v_smem.at[slot], block, rows_v, first - start, length - start)
                values = v_smem.at[slot].transpose((1, 0))
                acc = acc + mosaic.dot(values, p_smem.transpose((1, 0)), (rows_v, padded))
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, new_maximum, denominator

            acc = plgpu.layout_cast(jnp.zeros((rows_v, padded), jnp.float32), layout)
            maximum = plgpu.layout_cast(jnp.full((padded,), MASKED, jnp.float32), layout.reduce(0))
            denominator = plgpu.layout_cast(jnp.zeros((block, padded), jnp.float32), layout)
            state = (acc, maximum, denominator)
            whole = lax.div(length, jnp.int32(block))  # blocks without a tail
            stop = lax.min(lax.max(whole - begin, jnp.int32(0)), trips)
            begin_whole = jnp.int32(0)
            if window is not None:  # the first block of the lane may begin before the window
                begin_whole = lax.min(jnp.where(begin == first_block, jnp.int32(1), jnp.int32(0)), stop)
                state = lax.fori_loop(0, begin_whole, functools.partial(trip, edge=True), state)
            state = lax.fori_loop(begin_whole, stop, functools.partial(trip, edge=False), state)
            acc, maximum, denominator = lax.fori_loop(stop, trips, functools.partial(trip, edge=True), state)
            denominator = denominator.sum(axis=0)
            if finish:
                inverse = 1.0 / jnp.maximum(denominator, 1e-30)
                result = acc * lax.broadcast_in_dim(inverse, acc.shape, [1])
                mosaic.store(o_smem.transpose((1, 0)), result.astype(dtype))
            else:
                mosaic.store(o_smem, acc)
                m_smem[...] = maximum
                l_smem[...] = denominator
            plgpu.commit_smem()
            if finish:
                plgpu.copy_smem_to_gmem(o_smem.at[pl.ds(0, group)], o_ref.at[lane, head])
            else:
                plgpu.copy_smem_to_gmem(o_smem.at[pl.ds(0, head_dim)], o_ref.at[lane, split, head])
                plgpu.copy_smem_to_gmem(m_smem, m_ref.at[lane, split, head])
                plgpu.copy_smem_to_gmem(l_smem, l_ref.at[lane, split, head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(thread == 1)
        def _memory():
            last_page = lax.max(lax.div(length - 1, jnp.int32(page_size)), jnp.int32(0))

            def page_ids(i):
                """Ids of the pages of trip i; past the lane's last page, that page again."""
                index = lax.div(begin + i, jnp.int32(blocks_per_page)) * copies
                return tuple(table_ref[lane, lax.min(index + j, last_page)] for j in range(copies))

            def fetch(i, ids):
                slot = lax.rem(i, jnp.int32(stages))
                next_ids = page_ids(i + 1)  # the table is read a trip ahead of its use
                offset = lax.rem(begin + i, jnp.int32(blocks_per_page)) * block if blocks_per_page > 1 else 0
                streams = ((k_ref, k_smem, k_bar, k_free), (v_ref, v_smem, v_bar, v_free))
                for pages, smem, arrived, free in streams:

                    @pl.when(i >= stages)
                    def _wait(free=free):
                        plgpu.barrier_wait(free.at[slot])

                    for j, page in enumerate(ids):
                        source = pages.at[page, head]
                        if blocks_per_page > 1:
                            source = pages.at[page, head, pl.ds(offset, block)]
                        target = smem.at[slot, pl.ds(j * copy_rows, copy_rows)]
                        if smem.shape[2] != head_dim:
                            target = smem.at[slot, pl.ds(j * copy_rows, copy_rows), pl.ds(0, head_dim)]
                        plgpu.copy_gmem_to_smem(source, target, arrived.at[slot])
                return next_ids

            lax.fori_loop(0, trips, fetch, page_ids(jnp.int32(0)))

            @pl.loop(lax.max(trips - stages, jnp.int32(0)), trips)
            def _drain(i):  # a barrier's every completion must be seen
                slot = lax.rem(i, jnp.int32(stages))
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])

    operands = (queries, k_pages, v_pages, page_table, lengths)
    partial_shape = (num_lanes, splits, num_kv_heads, padded)
    if finish:
        out_type = mosaic.out_like((num_lanes, num_kv_heads, group, head_dim), dtype, *operands)
    else:
        out_type = (
            mosaic.out_like((*partial_shape[:3], head_dim, padded), jnp.float32, *operands),
            mosaic.out_like(partial_shape, jnp.float32, *operands),
            mosaic.out_like(partial_shape, jnp.float32, *operands),
        )
    vectors = [] if finish else [plgpu.SMEM((padded,), jnp.float32)] * 2
    launch = plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(num_kv_heads, splits, num_lanes),
        grid_names=("head", "split", "lane"),
        num_threads=2,
        thread_name="thread",
        scratch_types=[
            mosaic.operand_buffer((padded, head_dim), dtype),
            mosaic.operand_buffer((stages, block, head_dim), dtype),
            mosaic.operand_buffer((stages, block, rows_v), dtype, like=head_dim),
            mosaic.operand_buffer((padded, block), dtype, like=head_dim),
            plgpu.SMEM((padded, rows_v), dtype) if finish else plgpu.SMEM((rows_v, padded), jnp.float32),
            *vectors,
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    outputs = launch(*operands)
    return (outputs, None, None) if finish else outputs
