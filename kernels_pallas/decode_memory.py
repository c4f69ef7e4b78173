"""Which of a lane's KV a block of threads of the decode kernel takes, and how it comes to shared memory."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import mosaic
from kernels_pallas.decode_config import active_splits

Scalar = Any  # int32, traced


@dataclass(frozen=True)
class Share:
    """The KV blocks of a lane that one of its splits takes: `trips` of them, `active` apart from each other.

    Splits take turns, so that where each begins does not wait for the length, and that shares are even.
    """

    first: Scalar  # position that the lane sees
    begin: Scalar  # block
    active: Scalar  # splits that have work
    trips: Scalar
    owner: Scalar  # of the lane's last block, if it has any

    @classmethod
    def of(cls, length, window: int | None, split, num_splits: int, block: int, skipped=None) -> "Share":
        """The share of `split` in a lane of `length` tokens, of which it sees the last `window`.

        `skipped` KV blocks, where it has them, are left to others; then there is no window.
        """
        first = jnp.int32(0) if window is None else lax.max(length - window, jnp.int32(0))
        if skipped is None:
            first_block = lax.div(first, jnp.int32(block))
            num_blocks = mosaic.ceil_div(length, block) - first_block
        else:
            first_block = skipped
            num_blocks = lax.max(mosaic.ceil_div(length, block) - skipped, jnp.int32(0))
        active = active_splits(num_blocks, num_splits) if num_splits > 1 else jnp.int32(1)
        trips = lax.div(num_blocks - 1 - split + active, active) if num_splits > 1 else num_blocks
        owner = split == lax.rem(lax.max(num_blocks - 1, jnp.int32(0)), active)
        return cls(first, first_block + split, active, trips, owner)

    def block(self, i):
        """The number, among all of the lane, of the KV block of trip i."""
        return self.begin + i * self.active


@dataclass(frozen=True)
class Ring:
    """Slots [stages, block, H] of shared memory for one of keys and values, and their barriers."""

    slots: Any
    arrived: Any
    free: Any


def copies_of(block: int, page_size: int) -> int:
    """Pages that a KV block is copied from."""
    return max(block // page_size, 1)


@dataclass(frozen=True)
class PageIds:
    """Ids of the pages of the KV blocks of a share; table [MP] is the lane's."""

    share: Share
    table: Any
    length: Scalar
    block: int
    page_size: int

    def __call__(self, i) -> tuple[Scalar, ...]:
        """Ids of trip i; past the lane's last page, the first of them again."""
        blocks_per_page, copies = max(self.page_size // self.block, 1), copies_of(self.block, self.page_size)
        index = lax.div(self.share.block(i), jnp.int32(blocks_per_page)) * copies
        places = [lax.min(index + j, jnp.int32(self.table.shape[0] - 1)) for j in range(copies)]
        ids = [self.table[place] for place in places]  # no load waits for the length
        last_page = lax.div(self.length - 1, jnp.int32(self.page_size))
        return ids[0], *(jnp.where(index + j <= last_page, ids[j], ids[0]) for j in range(1, copies))


def longest_first(
    lengths: jax.Array, page_table: jax.Array, window: int | None, block: int, page_size: int, skipped=None
) -> jax.Array:
    """The lanes in the order of falling length: number, length and the ids of the pages of the first KV block.

    Blocks of threads take them from lengths [B] and page_table [B, MP], both int32, by one load. `skipped` blocks are
    left to others. [B, 2 + copies].
    """

    def fields(lane, length, table):
        share = Share.of(length, window, jnp.int32(0), 1, block, skipped)
        return jnp.stack([lane, length, *PageIds(share, table, length, block, page_size)(jnp.int32(0))])

    lane = jnp.arange(lengths.shape[0], dtype=jnp.int32)
    ahead = (lengths[None] > lengths[:, None]) | (
        (lengths[None] == lengths[:, None]) & (lane < lane[:, None])
    )
    rank = ahead.sum(axis=1, dtype=jnp.int32)
    unsorted = jax.vmap(fields)(lane, lengths, page_table)  # [B, 2 + copies]
    here = rank[:, None] == lane  # [B, place]; small sums cost less than a sort
    return jnp.where(here[:, :, None], unsorted[:, None], 0).sum(axis=0, dtype=jnp.int32)


def stream(share: Share, sources, rings, page_ids: PageIds, first_ids: tuple[Scalar, ...], head) -> None:
    """Copy the share's blocks of the pages `sources` [P, K, S, H] through the rings."""
    (stages, block, _), page_size = rings[0].slots.shape, sources[0].shape[2]
    copies, blocks_per_page = copies_of(block, page_size), max(page_size // block, 1)
    rows = block // copies

    def fetch(i, ids):
        slot = lax.rem(i, jnp.int32(stages))
        next_ids = page_ids(i + 1)  # the table is read a trip ahead of its use
        offset = lax.rem(share.block(i), jnp.int32(blocks_per_page)) * block
        for pages, ring in zip(sources, rings, strict=True):

            @pl.when(i >= stages)
            def _wait(ring=ring):
                plgpu.barrier_wait(ring.free.at[slot])

            for j, page in enumerate(ids):
                source = (
                    pages.at[page, head, pl.ds(offset, rows)] if blocks_per_page > 1 else pages.at[page, head]
                )
                target = ring.slots.at[slot, pl.ds(j * rows, rows)]
                plgpu.copy_gmem_to_smem(source, target, ring.arrived.at[slot])
        return next_ids

    lax.fori_loop(0, share.trips, fetch, first_ids)

    @pl.loop(lax.max(share.trips - stages, jnp.int32(0)), share.trips)
    def _drain(i):  # a barrier's every completion must be seen
        for ring in rings:
            plgpu.barrier_wait(ring.free.at[lax.rem(i, jnp.int32(stages))])
