"""The memory warpgroup of the ragged prefill kernel: queries and pages into shared memory, ahead of their use."""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import mosaic
from kernels_pallas.prefill_block import WG_SLABS, Block, Item, query_slot
from kernels_pallas.prefill_config import QUERY_SLOTS
from kernels_pallas.prefill_schedule import SLAB


def fetch_all(block: Block) -> None:
    """Fetch what the items of a block need, in order."""
    problem, refs = block.problem, block.refs
    if problem.registers is not None:
        plgpu.set_max_registers(problem.registers[1], action="decrease")
    stages = jnp.int32(problem.config.stages)

    def work(n, item, first_trip):
        ids = _page_ids(block, item, jnp.int32(0))
        _fetch_queries(block, n, item)
        if problem.fp8:
            for stream, pages in enumerate((refs.k, refs.v)):
                target, landed = refs.landing.at[stream], refs.landed.at[stream]
                _copy_pages(block, item, jnp.int32(0), ids, pages, target, landed)
        lax.fori_loop(0, item.trips, lambda i, ids: _fetch_block(block, item, first_trip, i, ids), ids)

    num_trips = block.for_each_item(work)

    # A barrier's every completion must be seen.
    @pl.loop(lax.max(num_trips - stages, jnp.int32(0)), num_trips)
    def _drain(i):
        plgpu.barrier_wait(refs.k_free.at[lax.rem(i, stages)])
        plgpu.barrier_wait(refs.v_free.at[lax.rem(i, stages)])

    @pl.loop(lax.max(block.num_items - QUERY_SLOTS, jnp.int32(0)), block.num_items)
    def _drain_queries(n):
        plgpu.barrier_wait(refs.q_free.at[query_slot(n)])


def _fetch_queries(block: Block, n, item: Item) -> None:
    problem, refs = block.problem, block.refs
    slot = query_slot(n)

    @pl.when(n >= QUERY_SLOTS)
    def _wait():
        plgpu.barrier_wait(refs.q_free.at[slot])

    last = mosaic.ceil_div(item.count, SLAB) * problem.group - 1  # past it, that slab again
    for s in range(problem.tile_slabs):
        token, member = block.locate(lax.min(item.slab + s, last))
        for target, columns in block.query_rows(slot, s // WG_SLABS, s % WG_SLABS):
            source = refs.q.at[pl.ds(item.first + token, SLAB), item.head, member, columns]
            plgpu.copy_gmem_to_smem(source, target, refs.q_bar.at[slot])


def _page_ids(block: Block, item: Item, i) -> tuple:
    """Ids of the pages of trip i; past the row's last page, that page again."""
    problem = block.problem
    last = lax.div(item.length - 1, jnp.int32(problem.page_size))
    page = lax.div(item.begin + i, jnp.int32(problem.blocks_per_page)) * problem.copies
    return tuple(block.refs.table[item.row, lax.min(page + j, last)] for j in range(problem.copies))


def _copy_pages(block: Block, item: Item, i, ids, pages, target, arrived) -> None:
    problem = block.problem
    rows = problem.copy_rows
    for j, page in enumerate(ids):
        source = pages.at[page, item.head]
        if problem.blocks_per_page > 1:
            part = lax.rem(item.begin + i, jnp.int32(problem.blocks_per_page)) * rows
            source = pages.at[page, item.head, pl.ds(part, rows)]
        plgpu.copy_gmem_to_smem(source, target.at[pl.ds(j * rows, rows)], arrived)


def _fetch_block(block: Block, item: Item, first_trip, i, ids) -> tuple:
    """Fetch the keys and values of trip i from pages `ids`; returns the ids of the next trip."""
    problem, refs, stages = block.problem, block.refs, block.problem.config.stages
    slot = lax.rem(first_trip + i, jnp.int32(stages))
    next_ids = _page_ids(block, item, i + 1)  # the table is read a trip ahead of its use
    keys = (refs.k, refs.k_smem, refs.k_bar, refs.k_free)
    values = (refs.v, refs.v_smem, refs.v_bar, refs.v_free)
    for stream, (pages, smem, arrived, free) in enumerate((keys, values)):
        if problem.fp8:
            landing, landed = refs.landing.at[stream], refs.landed.at[stream]
            plgpu.barrier_wait(landed)

        @pl.when(first_trip + i >= stages)
        def _wait(free=free):
            plgpu.barrier_wait(free.at[slot])

        if not problem.fp8:
            _copy_pages(block, item, i, ids, pages, smem.at[slot], arrived.at[slot])
            continue
        mosaic.widen(landing, smem.at[slot], problem.config.block_kv, problem.dtype)
        plgpu.barrier_arrive(arrived.at[slot])

        @pl.when(i + 1 < item.trips)
        def _next(pages=pages, landing=landing, landed=landed):
            _copy_pages(block, item, i + 1, next_ids, pages, landing, landed)

    return next_ids
