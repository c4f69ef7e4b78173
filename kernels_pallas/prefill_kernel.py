"""Ragged causal attention over paged KV for Hopper: persistent blocks, wgmma, one TMA copy per page.

One block of threads per multiprocessor walks a list of (tile of query slabs, kv head), longest first
(`prefill_schedule`). Its memory warpgroup fetches the queries and the pages of the next tile while the compute
warpgroups finish the one before. The two compute warpgroups hold 64 rows each and take turns, one multiplying
while the other does its softmax. Blocks of keys that every query of a warpgroup sees skip the mask.
"""

import functools
from dataclasses import dataclass

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import mosaic, prefill_schedule
from kernels_pallas.mosaic import LOG2E, MASKED, ROWS
from kernels_pallas.prefill_schedule import FIELDS, SLAB

WG_SLABS = ROWS // SLAB
# Per thread of a compute and of the memory warpgroup, together no more than the launch has.
REGISTERS = {1: None, 2: (232, 40), 3: (160, 32)}
FP8_REGISTERS = {1: None, 2: (208, 88)}
FP8 = jnp.dtype(jnp.float8_e4m3fn)
L2_BYTES = 24 << 20  # of keys and values that stay in the cache while tiles share them
QUERY_SLOTS = 2  # tiles whose queries are in shared memory: one in work, one fetched


@dataclass(frozen=True)
class PrefillConfig:
    """Tuning of one shape: KV tokens per trip, trips in flight, compute warpgroups (1 to 3).

    Two warpgroups can take turns at the tensor cores; `blocks` persistent blocks of threads run.
    """

    block_kv: int
    stages: int
    warpgroups: int = 2
    turns: bool = True
    blocks: int = 132


def default_config(head_dim: int) -> PrefillConfig:
    """The choice that fits the shared memory and the registers of each head dim."""
    return PrefillConfig(64, 2, 1, turns=False) if head_dim > 128 else PrefillConfig(128, 2)


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
    if page_size not in (8, 16, 32, 64, 128):
        return f"page_size {page_size} is not 8, 16, 32, 64 or 128"
    if group > 16:
        return f"{group} query heads per kv head are more than 16"
    return None


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
    config = config or default_config(q.shape[2])
    scales = None
    if k_scale is not None or v_scale is not None:
        scales = jnp.stack([jnp.asarray(1.0 if x is None else x, jnp.float32) for x in (k_scale, v_scale)])
    operands = (q, k_pages, v_pages, page_table, cu_seqlens, lengths, sinks, span_ends, scales)
    return _prefill(*operands, scale, window, softcap, config, None)


# Module level, so that all layers of a model share one trace and one compilation of the kernel.
@functools.partial(jax.jit, static_argnames=("scale", "window", "softcap", "config", "interpret"))
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
    block, stages, groups, blocks = config.block_kv, config.stages, config.warpgroups, config.blocks
    tile_slabs = groups * WG_SLABS
    num_tiles = prefill_schedule.max_tiles(num_tokens, lengths.shape[0], group, tile_slabs)
    copy_rows = min(page_size, block)
    copies = block // copy_rows
    blocks_per_page = max(page_size // block, 1)
    dtype = q.dtype
    fp8 = k_pages.dtype == FP8
    registers = FP8_REGISTERS[groups] if fp8 else REGISTERS[groups]
    layout = plgpu.Layout.WGMMA
    queries = q.reshape(num_tokens, num_kv_heads, group, head_dim)
    if interpret is not None:  # the copy engine zero-fills past the end, the interpreter does not
        queries = jnp.pad(queries, ((0, SLAB), (0, 0), (0, 0), (0, 0)))
    sink_rows = None
    if sinks is not None:  # [K, rows]: the heads of any run of slabs are 64 rows from some slab on
        sink_rows = sinks.astype(jnp.float32).reshape(num_kv_heads, group) * LOG2E
        sink_rows = jnp.repeat(jnp.tile(sink_rows, (1, WG_SLABS // group + 2)), SLAB, axis=1)

    query_buffer = mosaic.operand_buffer((QUERY_SLOTS, groups, ROWS, head_dim), dtype)
    columns, query_pieces = mosaic.tiles_of(query_buffer)
    if interpret is not None:  # members of a union are apart there, and no tiles to respect
        columns = head_dim
    parts = head_dim // columns  # copies of a slab

    def kernel(q_ref, k_ref, v_ref, table_ref, tiles_ref, total_ref, end_ref, *refs):
        sink_ref, *refs = refs if sinks is not None else (None, *refs)
        limits_ref, *refs = refs if span_ends is not None else (None, *refs)
        scales_ref, *refs = refs if scales is not None else (None, *refs)
        o_ref, (q_smem, q_pieces), k_smem, v_smem, landing, *barriers = refs
        q_bar, q_free, k_bar, v_bar, k_free, v_free, landed, turn, tail = barriers
        index = lax.axis_index("block")
        thread = lax.axis_index("thread")

        def place(n):
            """Which of the items of round n is this block's; odd rounds go backwards, for evenness."""
            return jnp.where(lax.rem(n, jnp.int32(2)) == 0, index, blocks - 1 - index)

        total = total_ref[0] * num_kv_heads
        rounds = lax.div(total, jnp.int32(blocks))
        num_items = rounds + (rounds * blocks + place(rounds) < total).astype(jnp.int32)

        def read_item(n):
            """kv head, tile and its fields (`prefill_schedule.tiles`) of this block's item n."""
            item = n * blocks + place(n)
            tile = lax.min(lax.div(item, jnp.int32(num_kv_heads)), jnp.int32(num_tiles - 1))
            head = lax.rem(item, jnp.int32(num_kv_heads))
            return head, tile, *(tiles_ref[tile * FIELDS + i] for i in range(FIELDS))

        def locate(slab):
            """First token in the row, and query head in the group, of a slab."""
            return lax.div(slab, jnp.int32(group)) * SLAB, lax.rem(slab, jnp.int32(group))

        def pieces(slot, warpgroup, s, first=0, rows=SLAB):
            """Rows of slab s of a warpgroup in shared memory, each with its columns.

            Mosaic puts a tiled buffer only in step with tiles of global memory, and tokens are not, so what
            moves is the columns of one swizzle tile.
            """
            if interpret is not None:
                return [(q_smem.at[slot, warpgroup, pl.ds(s * SLAB + first, rows)], pl.ds(0, head_dim))]
            return [
                (q_pieces.at[slot, warpgroup, s, c, pl.ds(first, rows)], pl.ds(c * columns, columns))
                for c in range(parts)
            ]

        def take_turn():
            if config.turns:
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

        @pl.when(thread < groups)
        def _compute():
            if registers is not None:
                plgpu.set_max_registers(registers[0], action="increase")

            score_scale = scale if scales is None else scale * scales_ref[0]

            def release_queries(n):
                """The output of item n has left shared memory; its place is free."""
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(q_free.at[lax.rem(n, jnp.int32(QUERY_SLOTS))])

            def work(n, carry):
                first_trip, head, tile, _, first, count, length, slab, begin, trips = carry
                upcoming = read_item(n + 1)
                q_slot = lax.rem(n, jnp.int32(QUERY_SLOTS))
                slab += thread * WG_SLABS
                offset = length - count
                position = offset + locate(slab)[0]  # of the first query
                row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=layout.reduce(1))
                query = offset + locate(slab + lax.div(row, jnp.int32(SLAB)))[0]
                query += lax.rem(row, jnp.int32(SLAB))  # [64] positions
                stop = query + 1  # of the keys that a query sees
                if span_ends is not None:
                    rows = limits_ref.at[tile, pl.ds(thread * ROWS, ROWS)]
                    ends = plgpu.load(rows, layout=layout.reduce(1), optimized=False)
                    stop = jnp.maximum(stop, ends)

                def trip(i, state, masked):
                    acc, maximum, denominator = state  # [64, H], [64], [64]
                    slot = lax.rem(first_trip + i, jnp.int32(stages))
                    start = (begin + i) * block
                    plgpu.barrier_wait(k_bar.at[slot])

                    def multiply(scores):
                        plgpu.wgmma(scores, q_smem.at[q_slot, thread], k_smem.at[slot].transpose((1, 0)))
                        take_turn()

                        @pl.when((i == 0) & (n > 0))
                        def _release():  # here the wait is hidden
                            release_queries(n - 1)

                        return scores[...]

                    scores = pl.run_scoped(multiply, plgpu.ACC((ROWS, block), jnp.float32))
                    plgpu.barrier_arrive(k_free.at[slot])
                    factor = score_scale * LOG2E
                    if softcap is not None:
                        scores = jnp.tanh(scores * (score_scale * (1.0 / softcap)))
                        factor = softcap * LOG2E
                    if masked:
                        key = start + plgpu.broadcasted_iota(jnp.int32, (ROWS, block), 1, layout=layout)
                        visible = key < lax.broadcast_in_dim(stop, key.shape, [0])
                        if window is not None:
                            visible &= key > lax.broadcast_in_dim(query - window, key.shape, [0])
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
                    if config.turns:
                        plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(v_bar.at[slot])
                    if config.turns:
                        plgpu.barrier_wait(turn)
                    if masked:

                        @pl.when(start + block > length)
                        def _tail():  # one warpgroup zeroes the values past the row for all
                            @pl.when(thread == 0)
                            def _zero():
                                mosaic.zero_rows_outside(v_smem.at[slot], block, head_dim, 0, length - start)
                                if groups > 1:
                                    plgpu.barrier_arrive(tail)

                            if groups > 1:

                                @pl.when(thread > 0)
                                def _wait():
                                    plgpu.barrier_wait(tail)

                    acc = mosaic.add_values(acc, weights, v_smem.at[slot], interpret=interpret is not None)
                    plgpu.barrier_arrive(v_free.at[slot])
                    return acc, new_maximum, denominator

                plgpu.barrier_wait(q_bar.at[q_slot])
                whole = lax.max(lax.div(position + 1, jnp.int32(block)) - begin, jnp.int32(0))
                whole = lax.min(whole, trips - 1)  # the last trip may have to zero the tail
                state = mosaic.softmax_state(ROWS, head_dim)
                begin_whole = jnp.int32(0)
                if window is not None:
                    newest = locate(slab + (WG_SLABS - 1))[0] + (
                        SLAB - 1
                    )  # the last query, maybe past the row
                    oldest = lax.max(offset + newest + 1 - window, jnp.int32(0))
                    begin_whole = lax.min(
                        lax.max(mosaic.ceil_div(oldest, block) - begin, jnp.int32(0)), whole
                    )
                    state = lax.fori_loop(0, begin_whole, functools.partial(trip, masked=True), state)
                state = lax.fori_loop(begin_whole, whole, functools.partial(trip, masked=False), state)
                acc, maximum, denominator = lax.fori_loop(
                    whole, trips, functools.partial(trip, masked=True), state
                )
                take_turn()
                if sinks is not None:
                    rows = sink_ref.at[head, pl.ds(locate(slab)[1] * SLAB, ROWS)]
                    sink = plgpu.load(rows, layout=layout.reduce(1), optimized=False)
                    new_maximum = jnp.maximum(maximum, sink)
                    decay = jnp.exp2(maximum - new_maximum)
                    denominator = denominator * decay + jnp.exp2(sink - new_maximum)
                    acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
                inverse = (1.0 if scales is None else scales_ref[1]) / jnp.maximum(denominator, 1e-30)
                out = (acc * lax.broadcast_in_dim(inverse, acc.shape, [0])).astype(dtype)
                complete = locate(slab + (WG_SLABS - 1))[0] + SLAB <= count

                q_smem[q_slot, thread] = out
                plgpu.commit_smem()

                def store(s, token, rows):
                    """Send rows of slab s, from token of the row on, to global memory."""
                    head_token, member = locate(slab + s)
                    for source, part in pieces(q_slot, thread, s, token - head_token, rows):
                        target = o_ref.at[pl.ds(first + token, rows), head, member, part]
                        plgpu.copy_smem_to_gmem(source, target)

                @pl.when(complete)
                def _store_all():
                    for s in range(WG_SLABS):
                        store(s, locate(slab + s)[0], SLAB)

                @pl.when(jnp.logical_not(complete))
                def _store_some():
                    @pl.loop(0, WG_SLABS)
                    def _slab(s):
                        token = locate(slab + s)[0]
                        pl.loop(token, lax.min(count, token + SLAB))(lambda j: store(s, j, 1))

                take_turn()
                return first_trip + trips, *upcoming

            if config.turns:
                pl.when(thread == 1)(take_turn)
            lax.fori_loop(0, num_items, work, (jnp.int32(0), *read_item(0)))
            if config.turns:
                pl.when(thread == 0)(take_turn)
            pl.when(num_items > 0)(lambda: release_queries(num_items - 1))

            @pl.when(end_ref[0] < num_tokens)
            def _padding():  # tokens behind the last row belong to no tile
                q_smem[0, thread] = plgpu.layout_cast(jnp.zeros((ROWS, head_dim), dtype), layout)
                plgpu.commit_smem()

                def clear(token, rows):
                    for head in range(num_kv_heads):
                        for member in range(group):
                            for source, part in pieces(0, thread, 0, rows=rows):
                                target = o_ref.at[pl.ds(token, rows), head, member, part]
                                plgpu.copy_smem_to_gmem(source, target)

                mine = end_ref[0] + (thread * blocks + index) * SLAB

                @pl.loop(mine, num_tokens, step=blocks * groups * SLAB)
                def _slab(token):
                    whole = token + SLAB <= num_tokens
                    pl.when(whole)(lambda: clear(token, SLAB))

                    @pl.when(jnp.logical_not(whole))
                    def _rest():
                        pl.loop(token, num_tokens)(lambda t: clear(t, 1))

            plgpu.wait_smem_to_gmem(0)

        @pl.when(thread == groups)
        def _memory():
            if registers is not None:
                plgpu.set_max_registers(registers[1], action="decrease")

            streams = ((k_ref, k_smem, k_bar, k_free), (v_ref, v_smem, v_bar, v_free))

            def fetch_queries(n, head, first, count, slab):
                slot = lax.rem(n, jnp.int32(QUERY_SLOTS))

                @pl.when(n >= QUERY_SLOTS)
                def _wait():
                    plgpu.barrier_wait(q_free.at[slot])

                last = mosaic.ceil_div(count, SLAB) * group - 1  # past it, that slab again
                for s in range(tile_slabs):
                    token, member = locate(lax.min(slab + s, last))
                    for target, part in pieces(slot, s // WG_SLABS, s % WG_SLABS):
                        source = q_ref.at[pl.ds(first + token, SLAB), head, member, part]
                        plgpu.copy_gmem_to_smem(source, target, q_bar.at[slot])

            def work(n, carry):
                first_trip, head, _, row, first, count, length, slab, begin, trips = carry
                upcoming = read_item(n + 1)
                last_page = lax.div(length - 1, jnp.int32(page_size))

                def page_ids(i):
                    """Ids of the pages of trip i; past the row's last page, that page again."""
                    page = lax.div(begin + i, jnp.int32(blocks_per_page)) * copies
                    return tuple(table_ref[row, lax.min(page + j, last_page)] for j in range(copies))

                def copy(i, ids, pages, target, arrived):
                    for j, page in enumerate(ids):
                        source = pages.at[page, head]
                        if blocks_per_page > 1:
                            part = lax.rem(begin + i, jnp.int32(blocks_per_page)) * block
                            source = pages.at[page, head, pl.ds(part, block)]
                        rows = target.at[pl.ds(j * copy_rows, copy_rows)]
                        plgpu.copy_gmem_to_smem(source, rows, arrived)

                def fetch(i, ids):
                    slot = lax.rem(first_trip + i, jnp.int32(stages))
                    next_ids = page_ids(i + 1)  # the table is read a trip ahead of its use
                    for stream, (pages, smem, arrived, free) in enumerate(streams):
                        if fp8:
                            plgpu.barrier_wait(landed.at[stream])

                        @pl.when(first_trip + i >= stages)
                        def _wait(free=free):
                            plgpu.barrier_wait(free.at[slot])

                        if not fp8:
                            copy(i, ids, pages, smem.at[slot], arrived.at[slot])
                            continue
                        mosaic.widen(landing.at[stream], smem.at[slot], block, dtype)
                        plgpu.barrier_arrive(arrived.at[slot])

                        @pl.when(i + 1 < trips)
                        def _next(stream=stream, pages=pages):
                            copy(i + 1, next_ids, pages, landing.at[stream], landed.at[stream])

                    return next_ids

                ids = page_ids(jnp.int32(0))
                fetch_queries(n, head, first, count, slab)
                if fp8:
                    for stream, (pages, *_) in enumerate(streams):
                        copy(jnp.int32(0), ids, pages, landing.at[stream], landed.at[stream])
                lax.fori_loop(0, trips, fetch, ids)
                return first_trip + trips, *upcoming

            num_trips, *_ = lax.fori_loop(0, num_items, work, (jnp.int32(0), *read_item(0)))

            # A barrier's every completion must be seen.
            @pl.loop(lax.max(num_trips - stages, jnp.int32(0)), num_trips)
            def _drain(i):
                plgpu.barrier_wait(k_free.at[lax.rem(i, jnp.int32(stages))])
                plgpu.barrier_wait(v_free.at[lax.rem(i, jnp.int32(stages))])

            @pl.loop(lax.max(num_items - QUERY_SLOTS, jnp.int32(0)), num_items)
            def _drain_queries(n):
                plgpu.barrier_wait(q_free.at[lax.rem(n, jnp.int32(QUERY_SLOTS))])

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
    end = jnp.minimum(cu_seqlens[-1:], num_tokens)
    operands = (queries, k_pages, v_pages, page_table, tiles, total, end)
    if sinks is not None:
        operands = (*operands, sink_rows)
    if limits is not None:
        operands = (*operands, limits)
    if scales is not None:
        operands = (*operands, scales)
    launch = plgpu.kernel(
        kernel,
        out_type=mosaic.out_like((num_tokens, num_kv_heads, group, head_dim), dtype, *operands),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=groups + 1,
        thread_name="thread",
        scratch_types=[
            plgpu.RefUnion(query_buffer, query_pieces),
            mosaic.operand_buffer((stages, block, head_dim), dtype),
            mosaic.operand_buffer((stages, block, head_dim), dtype),
            mosaic.operand_buffer((2, block, head_dim), FP8) if fp8 else None,
            plgpu.Barrier(num_arrivals=tile_slabs * parts, num_barriers=QUERY_SLOTS),
            plgpu.Barrier(num_arrivals=groups, num_barriers=QUERY_SLOTS),
            plgpu.Barrier(num_arrivals=1 if fp8 else copies, num_barriers=stages),
            plgpu.Barrier(num_arrivals=1 if fp8 else copies, num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            plgpu.Barrier(num_arrivals=copies, num_barriers=2) if fp8 else None,
            plgpu.Barrier(num_arrivals=groups),
            plgpu.Barrier(),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return launch(*operands).reshape(num_tokens, num_heads, head_dim)
