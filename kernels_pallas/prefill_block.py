"""What the warpgroups of a block of threads of the ragged prefill kernel share: sizes, references, its items."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.mosaic import ROWS
from kernels_pallas.prefill_config import QUERY_SLOTS, UNIT, PrefillConfig
from kernels_pallas.prefill_schedule import FIELDS, SLAB

WG_SLABS = ROWS // SLAB


@dataclass(frozen=True)
class Problem:
    """Static numbers of one compilation of the kernel."""

    num_tokens: int
    num_kv_heads: int
    group: int  # query heads per kv head
    head_dim: int
    page_size: int
    num_tiles: int
    dtype: Any
    fp8: bool
    scale: float
    window: int | None
    softcap: float | None
    config: PrefillConfig
    columns: int  # of one copy of query rows
    sends_rows: bool  # the copy engine takes single rows of the tiles of queries
    interpret: bool
    parts: int | None = None  # of one row's keys, seen by every query; None: a work list of rows, causal

    @property
    def tile_slabs(self) -> int:
        return self.config.warpgroups * WG_SLABS

    @property
    def copy_rows(self) -> int:
        """KV tokens of one copy: a page, or the part of it that fills a block."""
        return min(self.page_size, self.config.block_kv)

    @property
    def copies(self) -> int:
        return self.config.block_kv // self.copy_rows

    @property
    def blocks_per_page(self) -> int:
        return max(self.page_size // self.config.block_kv, 1)

    @property
    def registers(self) -> tuple[int, int] | None:
        """Of a thread of a compute and of the memory warpgroup, together no more than the launch has."""
        if self.config.warpgroups == 1:
            return None
        if self.fp8:
            return {2: (208, 88)}[self.config.warpgroups]
        return {2: (232, 40), 3: (160, 32)}[self.config.warpgroups]


@dataclass(frozen=True)
class Refs:
    """References of the kernel; the optional operands are None where they are not given."""

    q: Any  # [T, K, G, H]
    k: Any  # [P, K, S, H]
    v: Any
    table: Any  # [R, MP]
    out: Any  # [T, K, G, H], or of each part of the keys
    q_smem: Any  # [QUERY_SLOTS, warpgroups, 64, H]: queries, then their output
    q_pieces: Any  # the same memory as swizzle tiles
    rows: Any  # [warpgroups, 64, any, H]: output to send row by row, where `q_pieces` cannot be
    k_smem: Any  # [stages, block, H]
    v_smem: Any
    landing: Any  # [2, block, H]: keys and values of 8 bits
    q_bar: Any  # queries have come; the barriers below: their place is free, keys, values, ...
    q_free: Any
    k_bar: Any
    v_bar: Any
    k_free: Any
    v_free: Any
    landed: Any
    turn: Any
    tail: Any
    tiles: Any = None  # `prefill_schedule.tiles`
    total: Any = None
    end: Any = None  # [1]: packed tokens that are not padding
    sinks: Any = None  # [K, rows], in the order of a tile's rows
    limits: Any = None  # [num_tiles, rows]
    scales: Any = None  # [2]: of keys, of values
    prefix: Any = None  # [1]: instead of the work list, tokens of the one row
    sums: Any = None  # [parts, K, rows]: log2 of the sums of the softmax, in the order of the tiles' rows


@dataclass(frozen=True)
class Item:
    """A tile and a kv head: what is done at once, scalars all."""

    head: jax.Array
    tile: jax.Array
    row: jax.Array
    first: jax.Array  # packed token of the row's first query
    count: jax.Array  # query tokens of the row
    length: jax.Array  # its KV tokens
    slab: jax.Array  # the tile's first slab in the row
    begin: jax.Array  # its first block of keys
    trips: jax.Array  # and their number


class Block:
    """One block of threads: its items and where their slabs lie."""

    def __init__(self, problem: Problem, refs: Refs):
        self.problem, self.refs = problem, refs
        self.index = lax.axis_index("block")
        self.thread = lax.axis_index("thread")
        if problem.parts is None:
            total = refs.total[0] * problem.num_kv_heads
        else:
            self.units = lax.div(refs.prefix[0], jnp.int32(UNIT))
            total = lax.min(self.units, jnp.int32(problem.parts)) * (problem.num_tiles * problem.num_kv_heads)
        rounds = lax.div(total, jnp.int32(problem.config.blocks))
        last = rounds * problem.config.blocks + self._place(rounds) < total
        self.num_items = rounds + last.astype(jnp.int32)

    def _place(self, n):
        """Which of the items of round n is this block's; odd rounds go backwards, for evenness."""
        backwards = self.problem.config.blocks - 1 - self.index
        return jnp.where(lax.rem(n, jnp.int32(2)) == 0, self.index, backwards)

    def read_item(self, n) -> tuple:
        """Scalars of the `Item` n of this block; past its last one, of any."""
        heads = jnp.int32(self.problem.num_kv_heads)
        item = n * self.problem.config.blocks + self._place(n)
        tile = lax.div(item, heads)
        if self.problem.parts is not None:
            return lax.rem(item, heads), tile, *self._part_fields(tile)
        tile = lax.min(tile, jnp.int32(self.problem.num_tiles - 1))
        fields = (self.refs.tiles[tile * FIELDS + i] for i in range(FIELDS))
        return lax.rem(item, heads), tile, *fields

    def _part_fields(self, tile) -> tuple:
        """The further fields of an `Item`, of one row whose keys come in parts: tiles count through all parts."""
        problem, zero = self.problem, jnp.int32(0)
        size = UNIT // problem.config.block_kv
        active = lax.max(lax.min(self.units, jnp.int32(problem.parts)), jnp.int32(1))
        part = self.part(tile)
        begin, end = (lax.div(self.units * p, active) * size for p in (part, part + 1))
        slab = (tile - part * problem.num_tiles) * problem.tile_slabs
        return zero, zero, jnp.int32(problem.num_tokens), self.units * UNIT, slab, begin, end - begin

    def part(self, tile):
        """Which part of the keys a tile looks at."""
        return lax.div(tile, jnp.int32(self.problem.num_tiles))

    def for_each_item(self, work):
        """Run work(n, item, trips of the items before) for each item; returns the trips of all."""

        def step(n, carry):
            first_trip, *fields = carry
            upcoming = self.read_item(n + 1)  # read an item ahead of its use
            item = Item(*fields)
            work(n, item, first_trip)
            return first_trip + item.trips, *upcoming

        return lax.fori_loop(0, self.num_items, step, (jnp.int32(0), *self.read_item(0)))[0]

    def locate(self, slab):
        """First token in the row, and query head in the group, of a slab."""
        group = jnp.int32(self.problem.group)
        return lax.div(slab, group) * SLAB, lax.rem(slab, group)

    def query_rows(self, slot, warpgroup, s, first=0, rows=SLAB) -> list:
        """Rows of slab s of a warpgroup in shared memory, each with its columns.

        Mosaic puts a tiled buffer only in step with tiles of global memory, and tokens are not, so what
        moves is the columns of one swizzle tile.
        """
        columns = self.problem.columns
        if self.problem.interpret:  # members of a union are apart there, and no tiles to respect
            return [(self.refs.q_smem.at[slot, warpgroup, pl.ds(s * SLAB + first, rows)], pl.ds(0, columns))]
        return [
            (self.refs.q_pieces.at[slot, warpgroup, s, c, pl.ds(first, rows)], pl.ds(c * columns, columns))
            for c in range(self.problem.head_dim // columns)
        ]


def query_slot(n):
    return lax.rem(n, jnp.int32(QUERY_SLOTS))


def take_turn(block: Block) -> None:
    """Hand the tensor cores to the other warpgroup, and wait until it hands them back."""
    if block.problem.config.turns:
        plgpu.barrier_arrive(block.refs.turn)
        plgpu.barrier_wait(block.refs.turn)
