"""Paged decode attention for Hopper in one launch: rope, KV write, split-KV attention and the merge of splits.

A block of threads serves one (kv head, split, lane): a memory warpgroup streams the pages of its share of
the lane's KV through shared memory, a compute warpgroup runs an online softmax over it in the log2 domain.
The share is cut from the lane's actual length, so the grid is static and splits without work leave at once.
The only split of a lane writes the result itself. Of several, each has a partial (output, maximum,
denominator): those of a cluster send theirs to the first one's shared memory, others leave them in global
memory, where the one that finishes last merges them in their order.

The token being decoded never travels through its page: its key and value take their rows of the tiles in
shared memory, and are written to the page after all reads of that part of it.

Where lanes have a prefix in common, another launch (`prefix_kernel`) has read it once for all. A lane then has the
blocks behind it, and the one split that takes the last of them starts from what was seen of the prefix.

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

from kernels_pallas import (
    cluster_merge,
    decode_parts,
    mosaic,
    prefetch,
    prefix_kernel,
    reference,
    tile_rows,
)
from kernels_pallas.decode_config import DecodeConfig, choose_config, scale_operands
from kernels_pallas.decode_memory import PageIds, Ring, Share, copies_of, longest_first, stream
from kernels_pallas.lowering import lower_once
from kernels_pallas.mosaic import LOG2E, MASKED, MULTIPROCESSORS
from kernels_pallas.prefill_config import UNIT
from kernels_pallas.prefix_kernel import Prefix

PARTIAL = "acc", "maximum", "denominator"


def paged_decode(
    q, k_pages, v_pages, page_table, lengths, *, sm_scale, window, softcap, sinks, k_scale, v_scale,
    deterministic, common_prefix,
):  # fmt: skip
    """`kernels_pallas.paged_decode` by the kernel; operands that `unsupported` accepts."""
    num_lanes, num_heads, head_dim = q.shape
    num_kv_heads = k_pages.shape[1]
    group = num_heads // num_kv_heads
    x = q.reshape(num_lanes, num_kv_heads, group, head_dim)
    config = choose_config(group, k_pages, page_table, deterministic)
    scale = float(head_dim**-0.5 if sm_scale is None else sm_scale)
    operands = (x, k_pages, v_pages, page_table, lengths, sinks, None, None, scale_operands(k_scale, v_scale))
    prefix = None
    if common_prefix is not None:
        prefix = prefix_kernel.attend(q, k_pages, v_pages, page_table, common_prefix, scale, softcap, k_scale)
    o, _, _ = _decode(*operands, scale, window, softcap, None, config, None, prefix=prefix)
    return o.reshape(q.shape)


def paged_decode_update(
    qkv, k_pages, v_pages, page_table, lengths, cos, sin, *, q_norm, k_norm, epsilon, sm_scale, window,
    softcap, sinks, k_scale, v_scale, deterministic, ahead, common_prefix,
):  # fmt: skip
    """`kernels_pallas.paged_decode_update` by the kernel; operands that both `unsupported*` accept."""
    num_lanes, num_kv_heads, rows, head_dim = qkv.shape
    config = choose_config(rows - 2, k_pages, page_table, deterministic)
    scale = float(head_dim**-0.5 if sm_scale is None else sm_scale)
    norms = None if q_norm is None else (q_norm, k_norm)
    scales = scale_operands(k_scale, v_scale)
    operands = (qkv, k_pages, v_pages, page_table, lengths, sinks, (cos, sin), norms, scales)
    options = scale, window, softcap, float(epsilon), config, None
    prefix = None
    if common_prefix is not None:
        q, _, _ = reference.prepare_heads(qkv, cos, sin, q_norm, k_norm, epsilon)
        prefix = prefix_kernel.attend(q, k_pages, v_pages, page_table, common_prefix, scale, softcap, k_scale)
    ahead = tuple(ahead) if num_lanes == 1 else ()
    o, k_pages, v_pages = _decode(*operands, *options, ahead=ahead, prefix=prefix)
    return o.reshape(num_lanes, num_kv_heads * (rows - 2), head_dim), k_pages, v_pages


@lower_once("scale", "window", "softcap", "epsilon", "config", "interpret")
def _decode(
    x, k_pages, v_pages, page_table, lengths, sinks, rope, norms, scales, scale, window, softcap, epsilon,
    config: DecodeConfig, interpret, ahead=(), prefix: Prefix | None = None,
):  # fmt: skip
    """x [B, K, G, H], or [B, K, G + 2, H] with `rope` = (cos, sin): then the new token is stored, too.

    Blocks of threads beside the lanes' fetch the weights `ahead`. `prefix` is what the lanes have seen already; it
    goes without a window. Returns o [B, K, G, H] and the pages.
    """
    num_lanes, num_kv_heads, rows, head_dim = x.shape
    page_size, max_pages = k_pages.shape[2], page_table.shape[1]
    update = rope is not None
    group = rows - 2 if update else rows
    padded = 8 if group <= 8 else 16  # columns of a wgmma
    block, stages = config.block_kv, config.stages
    interpreted = interpret is not None
    splits = config.num_splits
    clustered = config.clustered and not interpreted  # the interpreter has no shared memory of clusters
    # Partial results loaded together cost registers, which matter where blocks share a multiprocessor.
    few = num_lanes * num_kv_heads * splits <= MULTIPROCESSORS
    at_once = config.merged_at_once or (8 if few else 4)
    dtype = x.dtype
    eight_bit = k_pages.dtype.itemsize == 1
    # Of the 16-bit types only float16 has a direct conversion from float8, and it is an exact one.
    work = jnp.float16 if eight_bit else dtype
    layout = plgpu.Layout.WGMMA
    partial_shapes = (head_dim, padded), (padded,), (padded,)

    operands = {"x": x, "table": page_table, "lengths": lengths}
    if update:
        operands |= {"cos": rope[0], "sin": rope[1]}
    if norms is not None:
        operands |= {"q_norm": norms[0], "k_norm": norms[1]}
    if scales is not None:
        operands |= {"k_scale": scales[0].reshape(1), "v_scale": scales[1].reshape(1)}
    if sinks is not None:
        operands["sinks"] = sinks.astype(jnp.float32)
    if prefix is not None:
        operands |= {"prefix": prefix.tokens, "seen": prefix.o, "sums": prefix.sums}
    idle_lanes = 0  # blocks of threads as of further lanes, for multiprocessors that would have no work
    fetched = prefetch.shares(ahead)
    if any(fetched) and not interpreted:  # the interpreter has no L2 cache
        idle_lanes = max(mosaic.multiprocessors() // (num_kv_heads * splits) - num_lanes, 0)
    operands |= {f"ahead{i}": weight for i, weight in enumerate(ahead if idle_lanes else ())}
    if config.longest_first:
        skipped = None if prefix is None else lax.div(prefix.tokens[0], jnp.int32(UNIT)) * (UNIT // block)
        operands["lanes"] = longest_first(lengths, page_table, window, block, page_size, skipped)
    outputs = {"o": mosaic.out_like((num_lanes, num_kv_heads, group, head_dim), dtype, *operands.values())}
    if splits > 1 and not clustered:
        # Zeros that are back to zeros after every launch, so that all layers of a step can share them.
        clear = lax.shift_right_arithmetic(lengths, 31)
        operands["counters"] = jnp.broadcast_to(clear[:, None, None], (num_lanes, num_kv_heads, 1))
        for name, shape in zip(PARTIAL, partial_shapes, strict=True):
            whole = (num_lanes, num_kv_heads, splits, *shape)
            outputs[name] = mosaic.out_like(whole, jnp.float32, *operands.values())

    def kernel(
        *refs, x_smem, q_smem, k_smem, v_smem, p_smem, ticket, bars, wide=None, new=None, mailbox=None
    ):
        names = (*operands, "k", "v", *outputs)
        ref = dict(zip(names, refs, strict=True))
        x_bar, k_bar, v_bar, k_free, v_free = bars
        head, split, lane = lax.axis_index("head"), lax.axis_index("split"), lax.axis_index("lane")
        thread = lax.axis_index("thread")
        is_lane = lane < num_lanes
        if idle_lanes:
            number = ((lane - num_lanes) * num_kv_heads + head) * splits + split
            lane = lax.min(lane, jnp.int32(num_lanes - 1))
        if config.longest_first:
            fields = [ref["lanes"][lane, i] for i in range(2 + copies_of(block, page_size))]
            lane, length = fields[:2]
        else:
            length = ref["lengths"][lane]
        skipped = None
        if prefix is not None:
            units = lax.div(ref["prefix"][0], jnp.int32(UNIT))
            skipped = units * (UNIT // block)
        share = Share.of(length, window, split, splits, block, skipped)
        page_ids = PageIds(share, ref["table"].at[lane], length, block, page_size)
        # Before the branch that waits for the length.
        first_ids = tuple(fields[2:]) if config.longest_first else page_ids(jnp.int32(0))
        keys, values = Ring(k_smem, k_bar, k_free), Ring(v_smem, v_bar, v_free)
        has_work = (split < share.active) & is_lane if idle_lanes else split < share.active

        @pl.when((thread == 0) & has_work)
        def _compute():
            if prefix is not None:  # before the wait for x
                active = jnp.where(share.owner & (length > 0), units, jnp.int32(0))
                place = lane, head, padded, active
                seen = decode_parts.seen_before(ref["seen"], ref["sums"], *place, interpret=interpreted)
            if update:
                tile_rows.row_major(x_smem, interpret=interpreted)
                decode_parts.rotate(x_smem, x_bar, ref, lane, group, epsilon)
                if eight_bit:
                    decode_parts.quantise(x_smem, new, ref, group)
            else:
                plgpu.barrier_wait(x_bar)
            decode_parts.stage_queries(x_smem, q_smem)

            k_scale = 1.0 if scales is None else ref["k_scale"][0]

            def complete(slot, start):
                """Give tiles at an end of what the lane sees the new token, and no garbage as values."""
                position = length - 1
                if update:
                    for ring, row in ((keys, group), (values, group + 1)):
                        tile = ring.slots.at[slot]
                        token = new.at[row, 0] if eight_bit else x_smem.at[row]
                        tile_rows.insert(tile, token, position - start, interpret=interpreted)
                seen = share.first - start, length - start
                tile_rows.zero_outside(values.slots.at[slot], *seen, interpret=interpreted)
                plgpu.commit_smem()
                if update:

                    @pl.when((position - start < block) & (length <= max_pages * page_size))
                    def _write():  # all reads of this part of the page are done
                        page = ref["table"][lane, lax.div(position, jnp.int32(page_size))]
                        place = pl.ds(lax.rem(position, jnp.int32(page_size)), 1)
                        for name, row in (("k", group), ("v", group + 1)):
                            token = new.at[row, pl.ds(0, 1)] if eight_bit else x_smem.at[pl.ds(row, 1)]
                            plgpu.copy_smem_to_gmem(token, ref[name].at[page, head, place])

            def bounded(scores):
                """Scores in the log2 domain."""
                if softcap is None:
                    return scores * (k_scale * (scale * LOG2E))
                return jnp.tanh(scores * (k_scale * (scale / softcap))) * (softcap * LOG2E)

            def trip(i, state, edge):
                acc, maximum, denominator = state  # [H, G'], [G'], [block, G']
                slot = lax.rem(i, jnp.int32(stages))
                start = share.block(i) * block
                plgpu.barrier_wait(keys.arrived.at[slot])
                if edge or eight_bit:
                    plgpu.barrier_wait(values.arrived.at[slot])
                if edge:
                    complete(slot, start)
                if eight_bit:
                    scores = decode_parts.dot_eight_bit_keys(keys.slots.at[slot], q_smem, interpreted)
                else:
                    scores = mosaic.dot(keys.slots.at[slot], q_smem.transpose((1, 0)), (block, padded))
                    plgpu.barrier_arrive(keys.free.at[slot])
                scores = bounded(scores)
                if edge:
                    position = start + plgpu.broadcasted_iota(jnp.int32, (block, padded), 0, layout=layout)
                    visible = position < length
                    if window is not None:
                        visible &= position >= share.first
                    scores = jnp.where(visible, scores, MASKED)
                new_maximum = jnp.maximum(maximum, scores.max(axis=0))
                decay = jnp.exp2(maximum - new_maximum)
                weights = jnp.exp2(scores - lax.broadcast_in_dim(new_maximum, scores.shape, [1]))
                denominator = denominator * lax.broadcast_in_dim(decay, scores.shape, [1]) + weights
                p_smem.transpose((1, 0))[...] = weights.astype(work)
                tile = wide if eight_bit else values.slots.at[slot]
                acc = acc * lax.broadcast_in_dim(decay, acc.shape, [1])
                if eight_bit:
                    decode_parts.widen(values.slots.at[slot], wide)
                plgpu.commit_smem()
                if eight_bit:  # both were read as ordinary memory
                    plgpu.barrier_arrive(keys.free.at[slot])
                    plgpu.barrier_arrive(values.free.at[slot])
                elif not edge:
                    plgpu.barrier_wait(values.arrived.at[slot])
                product = mosaic.dot(tile.transpose((1, 0)), p_smem.transpose((1, 0)), (head_dim, padded))
                acc = acc + product
                if not eight_bit:
                    plgpu.barrier_arrive(values.free.at[slot])
                return acc, new_maximum, denominator

            sink = None if sinks is None else decode_parts.sink_logits(ref["sinks"], head, group, padded)
            state = decode_parts.seed((block, head_dim, padded), sink, share.owner & (length > 0))
            if prefix is not None:
                state = decode_parts.resume(state, seen)
            ragged = share.owner & (share.trips > 0)  # the last block has a tail, or the new token
            if not update:
                ragged &= lax.rem(length, jnp.int32(block)) > 0
            stop = share.trips - jnp.where(ragged, jnp.int32(1), jnp.int32(0))
            begin_whole = jnp.int32(0)
            if window is not None:  # the first block of the lane may begin before the window
                begin_whole = lax.min(jnp.where(split == 0, jnp.int32(1), jnp.int32(0)), stop)
                state = lax.fori_loop(0, begin_whole, functools.partial(trip, edge=True), state)
            state = lax.fori_loop(begin_whole, stop, functools.partial(trip, edge=False), state)
            acc, maximum, denominator = lax.fori_loop(
                stop, share.trips, functools.partial(trip, edge=True), state
            )
            partial = acc, maximum, denominator.sum(axis=0)

            def finish(acc, _, denominator):
                inverse = 1.0 / jnp.maximum(denominator, 1e-30)
                if scales is not None:
                    inverse = inverse * ref["v_scale"][0]
                result = acc * lax.broadcast_in_dim(inverse, acc.shape, [1])
                tile_rows.store_columns(ref["o"].at[lane, head], result.astype(dtype), interpret=interpreted)

            def merge_in_cluster(partial):
                @pl.when(split > 0)
                def _send():
                    cluster_merge.send(mailbox.at[split - 1], partial, decode_parts.PARTIAL)

                @pl.when(split == 0)
                def _collect():
                    cluster_merge.collect()
                    finish(*decode_parts.merge_received(partial, mailbox, share.active - 1))

            def merge_in_global_memory(partial):
                stored = [ref[name].at[lane, head] for name in PARTIAL]
                for target, value in zip(stored, partial, strict=True):
                    mosaic.store(target.at[split], value)
                counter, last = ref["counters"].at[lane, head], share.active - 1
                mosaic.arrive(counter, ticket, last, interpret=interpreted)

                @pl.when(ticket[0] == last)
                def _merge():
                    finish(*decode_parts.merge_stored(stored, share.active, at_once))

            if splits == 1:
                finish(*partial)
            else:

                @pl.when(share.active == 1)
                def _alone():
                    finish(*partial)

                @pl.when(share.active > 1)
                def _among_others():
                    (merge_in_cluster if clustered else merge_in_global_memory)(partial)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when((thread == 1) & has_work)
        def _memory():
            plgpu.copy_gmem_to_smem(ref["x"].at[lane, head], x_smem.at[pl.ds(0, rows)], x_bar)
            stream(share, (ref["k"], ref["v"]), (keys, values), page_ids, first_ids, head)

        if idle_lanes:
            token_bytes = 2 * num_kv_heads * head_dim * k_pages.dtype.itemsize

            # A long lane needs the memory itself, and would push the weights out of the cache.
            @pl.when((thread == 1) & ~is_lane & (length <= prefetch.MOST_BYTES // token_bytes))
            def _fetch_ahead():
                for i, nbytes in enumerate(fetched):
                    if nbytes:
                        prefetch.fetch(ref[f"ahead{i}"], nbytes, number, idle_lanes * num_kv_heads * splits)

    staged = -(-rows // 8) * 8
    scratch = {
        "x_smem": plgpu.SMEM((staged, head_dim), dtype),
        "q_smem": mosaic.operand_buffer((padded, head_dim), work),
        "k_smem": mosaic.operand_buffer((stages, block, head_dim), k_pages.dtype),
        "v_smem": mosaic.operand_buffer((stages, block, head_dim), k_pages.dtype),
        "p_smem": mosaic.operand_buffer((padded, block), work, like=head_dim),
        "ticket": plgpu.SMEM((1,), jnp.int32),
        "bars": [
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=copies_of(block, page_size), num_barriers=stages),
            plgpu.Barrier(num_arrivals=copies_of(block, page_size), num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        ],
    }
    if eight_bit:
        scratch["wide"] = mosaic.operand_buffer((block, head_dim), work)
        if update:
            apart = max(1, 128 // head_dim)  # the copy engine takes rows from multiples of 128 bytes
            scratch["new"] = plgpu.SMEM((staged, apart, head_dim), k_pages.dtype)
    lanes = num_lanes + idle_lanes
    grid = {"lane": lanes, "split": splits, "head": num_kv_heads}  # heads of a page lie side by side
    cluster = {}
    if clustered:
        scratch["mailbox"] = cluster_merge.mailbox(splits - 1, partial_shapes)
        cluster["split"] = grid.pop("split")
    launch = plgpu.kernel(
        kernel,
        out_type=tuple(outputs.values()),
        grid=tuple(grid.values()),  # the last changes fastest
        grid_names=tuple(grid),
        cluster=tuple(cluster.values()),
        cluster_names=tuple(cluster),
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
