"""The compute warpgroups of the ragged prefill kernel: 64 rows of queries each, over all keys that they see."""

import functools

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import mosaic
from kernels_pallas.mosaic import LOG2E, MASKED, ROWS
from kernels_pallas.prefill_block import WG_SLABS, Block, Item, query_slot, take_turn
from kernels_pallas.prefill_schedule import SLAB

LAYOUT = plgpu.Layout.WGMMA


def attend_all(block: Block) -> None:
    """Attention of the items of a block, in order; zeros for padding."""
    problem, refs = block.problem, block.refs
    if problem.registers is not None:
        plgpu.set_max_registers(problem.registers[0], action="increase")
    if problem.config.turns:
        pl.when(block.thread == 1)(lambda: take_turn(block))
    block.for_each_item(functools.partial(_attend, block))
    if problem.config.turns:
        pl.when(block.thread == 0)(lambda: take_turn(block))
    pl.when(block.num_items > 0)(lambda: _release_queries(block, block.num_items - 1))
    if refs.end is not None:
        pl.when(refs.end[0] < problem.num_tokens)(lambda: _clear_padding(block))
    plgpu.wait_smem_to_gmem(0)


def _release_queries(block: Block, n) -> None:
    """The output of item n has left shared memory; its place is free."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(block.refs.q_free.at[query_slot(n)])


def _attend(block: Block, n, item: Item, first_trip) -> None:
    problem, refs = block.problem, block.refs
    slab = item.slab + block.thread * WG_SLABS
    scale = problem.scale if refs.scales is None else problem.scale * refs.scales[0]
    trip = functools.partial(_trip, block, n, item, first_trip, scale)
    if problem.parts is None:
        state = _causal(block, n, item, slab, trip)
    else:
        plgpu.barrier_wait(refs.q_bar.at[query_slot(n)])
        whole = functools.partial(trip, None, None, masked=False)
        state = lax.fori_loop(0, item.trips, whole, mosaic.softmax_state(ROWS, problem.head_dim))
        _store_sums(block, item, slab, state)
    take_turn(block)
    _store(block, n, item, slab, _normalise(block, item, slab, state))
    take_turn(block)


def _causal(block: Block, n, item: Item, slab, trip):
    """The sums over all keys that the queries of a warpgroup see: each those up to its own, or to its limit."""
    problem, refs, window = block.problem, block.refs, block.problem.window
    size = problem.config.block_kv
    offset = item.length - item.count
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=LAYOUT.reduce(1))
    query = offset + block.locate(slab + lax.div(row, jnp.int32(SLAB)))[0]
    query += lax.rem(row, jnp.int32(SLAB))  # [64] positions
    stop = query + 1  # of the keys that a query sees
    if refs.limits is not None:
        rows = refs.limits.at[item.tile, pl.ds(block.thread * ROWS, ROWS)]
        stop = jnp.maximum(stop, plgpu.load(rows, layout=LAYOUT.reduce(1), optimized=False))
    trip = functools.partial(trip, query, stop)
    plgpu.barrier_wait(refs.q_bar.at[query_slot(n)])

    # Blocks that every query sees are not masked, but for the last, which may have to zero the tail.
    oldest = offset + block.locate(slab)[0]
    whole = lax.max(lax.div(oldest + 1, jnp.int32(size)) - item.begin, jnp.int32(0))
    whole = lax.min(whole, item.trips - 1)
    state = mosaic.softmax_state(ROWS, problem.head_dim)
    begin_whole = jnp.int32(0)
    if window is not None:
        newest = offset + block.locate(slab + (WG_SLABS - 1))[0] + (SLAB - 1)
        seen_by_all = mosaic.ceil_div(lax.max(newest + 1 - window, jnp.int32(0)), size)
        begin_whole = lax.min(lax.max(seen_by_all - item.begin, jnp.int32(0)), whole)
        state = lax.fori_loop(0, begin_whole, functools.partial(trip, masked=True), state)
    state = lax.fori_loop(begin_whole, whole, functools.partial(trip, masked=False), state)
    return lax.fori_loop(whole, item.trips, functools.partial(trip, masked=True), state)


def _trip(block: Block, n, item: Item, first_trip, scale, query, stop, i, state, *, masked: bool):
    """One block of keys: scores, softmax, values."""
    problem, refs, config = block.problem, block.refs, block.problem.config
    size = config.block_kv
    acc, maximum, denominator = state  # [64, H], [64], [64]
    slot = lax.rem(first_trip + i, jnp.int32(config.stages))
    start = (item.begin + i) * size
    plgpu.barrier_wait(refs.k_bar.at[slot])

    def multiply(scores):
        queries = refs.q_smem.at[query_slot(n), block.thread]
        plgpu.wgmma(scores, queries, refs.k_smem.at[slot].transpose((1, 0)))
        take_turn(block)

        @pl.when((i == 0) & (n > 0))
        def _release():  # here the wait is hidden
            _release_queries(block, n - 1)

        return scores[...]

    scores = pl.run_scoped(multiply, plgpu.ACC((ROWS, size), jnp.float32))
    plgpu.barrier_arrive(refs.k_free.at[slot])
    factor = scale * LOG2E
    if problem.softcap is not None:
        scores = jnp.tanh(scores * (scale * (1.0 / problem.softcap)))
        factor = problem.softcap * LOG2E
    if masked:
        key = start + plgpu.broadcasted_iota(jnp.int32, (ROWS, size), 1, layout=LAYOUT)
        visible = key < lax.broadcast_in_dim(stop, key.shape, [0])
        if problem.window is not None:
            visible &= key > lax.broadcast_in_dim(query - problem.window, key.shape, [0])
        scores = jnp.where(visible, scores, MASKED)
    new_maximum = jnp.maximum(maximum, scores.max(axis=1) * factor)
    decay = jnp.exp2(maximum - new_maximum)
    weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(new_maximum, scores.shape, [0]))
    acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
    denominator = denominator * decay + weights.sum(axis=1)
    weights = weights.astype(problem.dtype)
    acc, new_maximum, denominator, weights = lax.optimization_barrier(
        (acc, new_maximum, denominator, weights)
    )
    if config.turns:
        plgpu.barrier_arrive(refs.turn)
    plgpu.barrier_wait(refs.v_bar.at[slot])
    if config.turns:
        plgpu.barrier_wait(refs.turn)
    values = refs.v_smem.at[slot]
    if masked:
        pl.when(start + size > item.length)(lambda: _zero_tail(block, values, item.length - start))
    acc = mosaic.add_values(acc, weights, values, interpret=problem.interpret)
    plgpu.barrier_arrive(refs.v_free.at[slot])
    return acc, new_maximum, denominator


def _zero_tail(block: Block, values, stop) -> None:
    """Zero the values past the row; one warpgroup does it for all."""
    problem, many = block.problem, block.problem.config.warpgroups > 1

    @pl.when(block.thread == 0)
    def _zero():
        mosaic.zero_rows_outside(values, problem.config.block_kv, problem.head_dim, 0, stop)
        if many:
            plgpu.barrier_arrive(block.refs.tail)

    if many:
        pl.when(block.thread > 0)(lambda: plgpu.barrier_wait(block.refs.tail))


def _normalise(block: Block, item: Item, slab, state):
    """Output [64, H] of what a warpgroup has summed up."""
    refs = block.refs
    acc, maximum, denominator = state
    if refs.sinks is not None:
        rows = refs.sinks.at[item.head, pl.ds(block.locate(slab)[1] * SLAB, ROWS)]
        sink = plgpu.load(rows, layout=LAYOUT.reduce(1), optimized=False)
        new_maximum = jnp.maximum(maximum, sink)
        decay = jnp.exp2(maximum - new_maximum)
        denominator = denominator * decay + jnp.exp2(sink - new_maximum)
        acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
    inverse = (1.0 if refs.scales is None else refs.scales[1]) / jnp.maximum(denominator, 1e-30)
    return (acc * lax.broadcast_in_dim(inverse, acc.shape, [0])).astype(block.problem.dtype)


def _store_sums(block: Block, item: Item, slab, state) -> None:
    """Store the logarithms, to base 2, of the sums of the softmax that the output will be divided by."""
    _, maximum, denominator = state
    rows = block.refs.sums.at[block.part(item.tile), item.head, pl.ds(slab * SLAB, ROWS)]
    mosaic.store(rows, maximum + jnp.log2(denominator))


def _store(block: Block, n, item: Item, slab, out) -> None:
    """Send the output of a warpgroup to global memory by way of where its queries were."""
    refs, slot, row = block.refs, query_slot(n), item.first
    if block.problem.parts is not None:
        row = block.part(item.tile) * block.problem.num_tokens
    refs.q_smem[slot, block.thread] = out
    plgpu.commit_smem()

    def send(s, token, rows):
        """Rows of slab s, from `token` of the row on."""
        first, member = block.locate(slab + s)
        for source, columns in block.query_rows(slot, block.thread, s, token - first, rows):
            target = refs.out.at[pl.ds(row + token, rows), item.head, member, columns]
            plgpu.copy_smem_to_gmem(source, target)

    complete = block.locate(slab + (WG_SLABS - 1))[0] + SLAB <= item.count

    @pl.when(complete)
    def _all():
        for s in range(WG_SLABS):
            send(s, block.locate(slab + s)[0], SLAB)

    def send_row(s, token):
        if block.problem.sends_rows:
            send(s, token, 1)
            return
        first, member = block.locate(slab + s)
        source = refs.rows.at[block.thread, pl.ds(s * SLAB + token - first, 1), 0]
        plgpu.copy_smem_to_gmem(source, refs.out.at[pl.ds(row + token, 1), item.head, member])

    @pl.when(jnp.logical_not(complete))
    def _some():
        if not block.problem.sends_rows:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            mosaic.store(refs.rows.at[block.thread, :, 0], out)
            plgpu.commit_smem()

        @pl.loop(0, WG_SLABS)
        def _slab(s):
            token = block.locate(slab + s)[0]
            pl.loop(token, lax.min(item.count, token + SLAB))(lambda j: send_row(s, j))


def _clear_padding(block: Block) -> None:
    """Zero the output of the tokens behind the last row, which belong to no tile."""
    problem, refs, config = block.problem, block.refs, block.problem.config
    zeros = jnp.zeros((ROWS, problem.head_dim), problem.dtype)
    refs.q_smem[0, block.thread] = plgpu.layout_cast(zeros, LAYOUT)
    plgpu.commit_smem()

    def clear(token, rows):
        for head in range(problem.num_kv_heads):
            for member in range(problem.group):
                for source, columns in block.query_rows(0, block.thread, 0, rows=rows):
                    target = refs.out.at[pl.ds(token, rows), head, member, columns]
                    plgpu.copy_smem_to_gmem(source, target)

    first = refs.end[0] + (block.thread * config.blocks + block.index) * SLAB

    @pl.loop(first, problem.num_tokens, step=config.blocks * config.warpgroups * SLAB)
    def _slab(token):
        whole = token + SLAB <= problem.num_tokens
        pl.when(whole)(lambda: clear(token, SLAB))

        @pl.when(jnp.logical_not(whole))
        def _rest():
            pl.loop(token, problem.num_tokens)(lambda t: clear(t, 1))
