"""Paged decode attention for Hopper in one launch: rope, KV write, split-KV attention and the merge of splits.

A block of threads serves one (kv head, split, lane): a memory warpgroup streams the pages of its share of
the lane's KV through shared memory, a compute warpgroup runs an online softmax over it in the log2 domain.
The share is cut from the lane's actual length, so the grid is static and splits without work leave at once.
The only split of a lane writes the result itself; of several, each leaves a partial (output, maximum,
denominator) in global memory, and the one that finishes last merges them in their order.

The token being decoded never travels through its page: its score and value start the softmax of the last
split, which writes its key and value to the page after all reads of that page.

Everything is computed transposed, with KV tokens and head dims as the 64 rows of a wgmma and the few query
heads of a group as its columns: nothing is wasted on padding a group to 64 rows, and so few registers are
held that several blocks of threads share a multiprocessor and hide each other's start and end.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import decode_parts, mosaic
from kernels_pallas.decode_config import DecodeConfig, blocks_per_split, choose_config, scale_operands
from kernels_pallas.lowering import lower_once
from kernels_pallas.mosaic import LOG2E, MASKED


def paged_decode(
    q, k_pages, v_pages, page_table, lengths, *, sm_scale, window, softcap, sinks, k_scale, v_scale,
    deterministic,
):  # fmt: skip
    """`kernels_pallas.paged_decode` by the kernel; operands that `unsupported` accepts."""
    num_lanes, num_heads, head_dim = q.shape
    num_kv_heads = k_pages.shape[1]
    group = num_heads // num_kv_heads
    x = q.reshape(num_lanes, num_kv_heads, group, head_dim)
    config = choose_config(group, k_pages, page_table, deterministic)
    scale = float(head_dim**-0.5 if sm_scale is None else sm_scale)
    operands = (x, k_pages, v_pages, page_table, lengths, sinks, None, None, scale_operands(k_scale, v_scale))
    o, _, _ = _decode(*operands, scale, window, softcap, None, config, None)
    return o.reshape(q.shape)


def paged_decode_update(
    qkv, k_pages, v_pages, page_table, lengths, cos, sin, *, q_norm, k_norm, epsilon, sm_scale, window,
    softcap, sinks, k_scale, v_scale, deterministic,
):  # fmt: skip
    """`kernels_pallas.paged_decode_update` by the kernel; operands that both `unsupported*` accept."""
    num_lanes, num_kv_heads, rows, head_dim = qkv.shape
    config = choose_config(rows - 2, k_pages, page_table, deterministic)
    scale = float(head_dim**-0.5 if sm_scale is None else sm_scale)
    norms = None if q_norm is None else (q_norm, k_norm)
    scales = scale_operands(k_scale, v_scale)
    operands = (qkv, k_pages, v_pages, page_table, lengths, sinks, (cos, sin), norms, scales)
    o, k_pages, v_pages = _decode(*operands, scale, window, softcap, float(epsilon), config, None)
    return o.reshape(num_lanes, num_kv_heads * (rows - 2), head_dim), k_pages, v_pages


@lower_once("scale", "window", "softcap", "epsilon", "config", "interpret")
def _decode(
    x, k_pages, v_pages, page_table, lengths, sinks, rope, norms, scales, scale, window, softcap, epsilon,
    config: DecodeConfig, interpret,
):  # fmt: skip
    """x [B, K, G, H], or [B, K, G + 2, H] with `rope` = (cos, sin): then the new token is stored, too.

    Returns o [B, K, G, H] and the pages.
    """
    num_lanes, num_kv_heads, rows, head_dim = x.shape
    page_size, max_pages = k_pages.shape[2], page_table.shape[1]
    update = rope is not None
    group = rows - 2 if update else rows
    padded = 8 if group <= 8 else 16  # columns of a wgmma
    block, stages, splits = config.block_kv, config.stages, config.num_splits
    # Partial results loaded together cost registers, which matter where blocks share a multiprocessor.
    at_once = 4 if num_lanes * num_kv_heads * splits > 132 else 8
    copy_rows = min(page_size, block)
    copies = block // copy_rows
    blocks_per_page = max(page_size // block, 1)
    dtype = x.dtype
    eight_bit = k_pages.dtype.itemsize == 1
    # Of the 16-bit types only float16 has a direct conversion from float8, and it is an exact one.
    work = jnp.float16 if eight_bit else dtype
    layout = plgpu.Layout.WGMMA
    interpreted = interpret is not None

    operands = {"x": x, "table": page_table, "lengths": lengths}
    if update:
        operands |= {"cos": rope[0], "sin": rope[1]}
    if norms is not None:
        operands |= {"q_norm": norms[0], "k_norm": norms[1]}
    if scales is not None:
        operands |= {"k_scale": scales[0].reshape(1), "v_scale": scales[1].reshape(1)}
    if sinks is not None:
        operands["sinks"] = sinks.astype(jnp.float32)
    outputs = {"o": mosaic.out_like((num_lanes, num_kv_heads, group, head_dim), dtype, *operands.values())}
    if splits > 1:
        # Zeros that are back to zeros after every launch, so that all layers of a step can share them.
        clear = lax.shift_right_arithmetic(lengths, 31)
        operands["counters"] = jnp.broadcast_to(clear[:, None, None], (num_lanes, num_kv_heads, 1))
        partial = (num_lanes, num_kv_heads, splits)
        for name, shape in (("acc", (head_dim, padded)), ("maximum", (padded,)), ("denominator", (padded,))):
            outputs[name] = mosaic.out_like((*partial, *shape), jnp.float32, *operands.values())

    def kernel(
        *refs, x_smem, q_smem, k_smem, v_smem, p_smem, o_smem, s_smem, ticket, bars, wide=None, new=None
    ):
        names = (*operands, "k", "v", *outputs)
        ref = dict(zip(names, refs, strict=True))
        x_bar, k_bar, v_bar, k_free, v_free = bars
        head, split, lane = lax.axis_index("head"), lax.axis_index("split"), lax.axis_index("lane")
        length = ref["lengths"][lane]
        stored = lax.max(length - 1, jnp.int32(0)) if update else length  # tokens to read from pages
        first = jnp.int32(0) if window is None else lax.max(length - window, jnp.int32(0))
        first_block = lax.div(first, jnp.int32(block))
        num_blocks = lax.max(mosaic.ceil_div(stored, block) - first_block, jnp.int32(0))
        share = blocks_per_split(num_blocks, splits) if splits > 1 else num_blocks
        active = lax.max(lax.div(num_blocks + share - 1, lax.max(share, jnp.int32(1))), jnp.int32(1))
        begin = first_block + split * share
        trips = lax.min(share, num_blocks - split * share)
        thread = lax.axis_index("thread")

        @pl.when((thread == 0) & (split < active))
        def _compute():
            owner = split == active - 1  # of the new token and of the sinks
            if update:
                decode_parts.rotate(x_smem, x_bar, ref, lane, group, epsilon)
                if eight_bit:
                    decode_parts.quantise(x_smem, new, ref, group)
            else:
                plgpu.barrier_wait(x_bar)
            decode_parts.stage_queries(x_smem, q_smem)

            k_scale = 1.0 if scales is None else ref["k_scale"][0]

            def bounded(scores):
                """Scores in the log2 domain."""
                if softcap is None:
                    return scores * (k_scale * (scale * LOG2E))
                return jnp.tanh(scores * (k_scale * (scale / softcap))) * (softcap * LOG2E)

            def trip(i, state, edge):
                acc, maximum, denominator = state  # [H, G'], [G'], [block, G']
                slot = lax.rem(i, jnp.int32(stages))
                start = (begin + i) * block
                plgpu.barrier_wait(k_bar.at[slot])
                if eight_bit:
                    scores = decode_parts.dot_eight_bit_keys(k_smem.at[slot], q_smem, interpreted)
                else:
                    scores = mosaic.dot(k_smem.at[slot], q_smem.transpose((1, 0)), (block, padded))
                    plgpu.barrier_arrive(k_free.at[slot])
                scores = bounded(scores)
                if edge:
                    position = start + plgpu.broadcasted_iota(jnp.int32, (block, padded), 0, layout=layout)
                    visible = position < stored
                    if window is not None:
                        visible &= position >= first
                    scores = jnp.where(visible, scores, MASKED)
                new_maximum = jnp.maximum(maximum, scores.max(axis=0))
                decay = jnp.exp2(maximum - new_maximum)
                weights = jnp.exp2(scores - lax.broadcast_in_dim(new_maximum, scores.shape, [1]))
                denominator = denominator * lax.broadcast_in_dim(decay, scores.shape, [1]) + weights
                p_smem.transpose((1, 0))[...] = weights.astype(work)
                values = v_smem.at[slot]
                if eight_bit:
                    plgpu.barrier_wait(v_bar.at[slot])
                    decode_parts.widen(values, wide)
                    values = wide
                plgpu.commit_smem()
                acc = acc * lax.broadcast_in_dim(decay, acc.shape, [1])
                if eight_bit:  # both were read as ordinary memory
                    plgpu.barrier_arrive(k_free.at[slot])
                    plgpu.barrier_arrive(v_free.at[slot])
                else:
                    plgpu.barrier_wait(v_bar.at[slot])
                if edge:
                    mosaic.zero_rows_outside(values, block, head_dim, first - start, stored - start)
                product = mosaic.dot(values.transpose((1, 0)), p_smem.transpose((1, 0)), (head_dim, padded))
                acc = acc + product
                if not eight_bit:
                    plgpu.barrier_arrive(v_free.at[slot])
                return acc, new_maximum, denominator

            new_scores = None
            if update:
                new_scores = decode_parts.new_scores(x_smem, s_smem, group, padded, bounded)
            sink = None if sinks is None else decode_parts.sink_logits(ref["sinks"], head, group, padded)
            new_value = x_smem.at[group + 1] if update else None
            state = decode_parts.seed(
                (block, head_dim, padded), new_scores, new_value, sink, owner & (length > 0)
            )
            end_whole = lax.div(stored, jnp.int32(block)) - begin  # blocks without a tail
            stop = lax.min(lax.max(end_whole, jnp.int32(0)), trips)
            begin_whole = jnp.int32(0)
            if window is not None:  # the first block of the lane may begin before the window
                begin_whole = lax.min(jnp.where(split == 0, jnp.int32(1), jnp.int32(0)), stop)
                state = lax.fori_loop(0, begin_whole, functools.partial(trip, edge=True), state)
            state = lax.fori_loop(begin_whole, stop, functools.partial(trip, edge=False), state)
            acc, maximum, denominator = lax.fori_loop(stop, trips, functools.partial(trip, edge=True), state)
            denominator = denominator.sum(axis=0)

            if update:

                @pl.when(owner & (length > 0) & (length <= max_pages * page_size))
                def _write():
                    position = length - 1
                    page = ref["table"][lane, lax.div(position, jnp.int32(page_size))]
                    row = pl.ds(lax.rem(position, jnp.int32(page_size)), 1)
                    tokens = new if eight_bit else x_smem
                    for name, source in (("k", group), ("v", group + 1)):
                        plgpu.copy_smem_to_gmem(tokens.at[pl.ds(source, 1)], ref[name].at[page, head, row])

            def finish(acc, denominator):
                inverse = 1.0 / jnp.maximum(denominator, 1e-30)
                if scales is not None:
                    inverse = inverse * ref["v_scale"][0]
                result = acc * lax.broadcast_in_dim(inverse, acc.shape, [1])
                mosaic.store(o_smem.transpose((1, 0)), result.astype(dtype))
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(o_smem.at[pl.ds(0, group)], ref["o"].at[lane, head])

            if splits == 1:
                finish(acc, denominator)
            else:

                @pl.when(active == 1)
                def _alone():
                    finish(acc, denominator)

                @pl.when(active > 1)
                def _among_others():
                    accs, maxima, denominators = (
                        ref[name].at[lane, head] for name in ("acc", "maximum", "denominator")
                    )
                    mosaic.store(accs.at[split], acc)
                    mosaic.store(maxima.at[split], maximum)
                    mosaic.store(denominators.at[split], denominator)
                    mosaic.arrive(ref["counters"].at[lane, head], ticket, active - 1, interpret=interpreted)

                    @pl.when(ticket[0] == active - 1)
                    def _merge():
                        finish(*decode_parts.merge(accs, maxima, denominators, active, at_once))

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when((thread == 1) & (split < active))
        def _memory():
            plgpu.copy_gmem_to_smem(ref["x"].at[lane, head], x_smem.at[pl.ds(0, rows)], x_bar)
            last_page = lax.div(lax.max(stored - 1, jnp.int32(0)), jnp.int32(page_size))
            last_page = lax.min(last_page, jnp.int32(max_pages - 1))

            def page_ids(i):
                """Ids of the pages of trip i; past the lane's last page, that page again."""
                index = lax.div(begin + i, jnp.int32(blocks_per_page)) * copies
                return tuple(ref["table"][lane, lax.min(index + j, last_page)] for j in range(copies))

            def fetch(i, ids):
                slot = lax.rem(i, jnp.int32(stages))
                next_ids = page_ids(i + 1)  # the table is read a trip ahead of its use
                offset = lax.rem(begin + i, jnp.int32(blocks_per_page)) * block if blocks_per_page > 1 else 0
                streams = ((ref["k"], k_smem, k_bar, k_free), (ref["v"], v_smem, v_bar, v_free))
                for pages, smem, arrived, free in streams:

                    @pl.when(i >= stages)
                    def _wait(free=free):
                        plgpu.barrier_wait(free.at[slot])

                    for j, page in enumerate(ids):
                        source = pages.at[page, head]
                        if blocks_per_page > 1:
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

    staged = -(-rows // 8) * 8
    scratch = {
        "x_smem": plgpu.SMEM((staged, head_dim), dtype),
        "q_smem": mosaic.operand_buffer((padded, head_dim), work),
        "k_smem": mosaic.operand_buffer((stages, block, head_dim), k_pages.dtype),
        "v_smem": mosaic.operand_buffer((stages, block, head_dim), k_pages.dtype),
        "p_smem": mosaic.operand_buffer((padded, block), work, like=head_dim),
        "o_smem": plgpu.SMEM((padded, head_dim), dtype),
        "s_smem": plgpu.SMEM((staged,), jnp.float32),
        "ticket": plgpu.SMEM((1,), jnp.int32),
        "bars": [
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        ],
    }
    if eight_bit:
        scratch["wide"] = mosaic.operand_buffer((block, head_dim), work)
        if update:
            scratch["new"] = plgpu.SMEM((staged, head_dim), k_pages.dtype)
    launch = plgpu.kernel(
        kernel,
        out_type=tuple(outputs.values()),
        grid=(num_kv_heads, splits, num_lanes),
        grid_names=("head", "split", "lane"),
        num_threads=2,
        thread_name="thread",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    if not update:
        o, *_ = launch(*operands.values(), k_pages, v_pages)
        return o, k_pages, v_pages
    pages = jax.new_ref(k_pages), jax.new_ref(v_pages)
    o, *_ = launch(*operands.values(), *pages)
    return o, *(jax.freeze(page) for page in pages)
