"""How the KV of a batch is divided over blocks of threads: each runs one job, or its stretch of all the work."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.decode_config import DecodeConfig, blocks_per_split


@dataclass(frozen=True)
class Reach:
    """What of a lane's KV is read: from position `first` on, and how the tokens in pages fall into blocks."""

    block: int
    window: int | None
    update: bool  # the newest token is not in its page yet

    def of(self, length) -> tuple[Any, Any, Any, Any]:
        """(tokens in pages, first position seen, its block, blocks to read) for a length, or an array of them."""
        stored = jnp.maximum(length - 1, 0) if self.update else length
        # length * 0: in a kernel, zeros_like is an array constant, which Mosaic refuses under a mesh.
        first = length * 0 if self.window is None else jnp.maximum(length - self.window, 0)
        first_block = _div(first, self.block)
        return (
            stored,
            first,
            first_block,
            jnp.maximum(_div(stored + self.block - 1, self.block) - first_block, 0),
        )


@dataclass(frozen=True)
class Job:
    """One block of threads' share of the KV of one (lane, kv head); traced scalars."""

    lane: Any
    head: Any
    length: Any
    stored: Any
    first: Any
    starts: Any  # whether its first block is the lane's
    begin: Any  # block of the lane's KV
    trips: Any  # blocks
    split: Any  # of the shares of this (lane, kv head) this is number `split`,
    count: Any  # of `count`
    base: Any  # place of split 0's partial result, and
    stride: int  # the distance to the places of the others

    def place(self, split):
        """Where the partial result of a split lies."""
        if self.stride == 1:
            return self.base + split
        return self.base + split * self.stride + jnp.where(split == 0, 1, 0)


def num_places(num_lanes: int, num_kv_heads: int, config: DecodeConfig) -> int:
    """Partial results that may exist at once."""
    return 2 * config.workers if config.workers else num_lanes * num_kv_heads * config.num_splits


def grid_job(reach: Reach, config: DecodeConfig, num_kv_heads: int, lane, head, split, length) -> Job:
    """The job of a block of threads in a grid of (head, split, lane); nothing to do if split >= count."""
    stored, first, first_block, num_blocks = reach.of(length)
    share = blocks_per_split(num_blocks, config.num_splits) if config.num_splits > 1 else num_blocks
    share = jnp.maximum(share, 1)
    count = jnp.maximum(lax.div(num_blocks + share - 1, share), 1)
    begin = split * share
    return Job(
        lane=lane,
        head=head,
        length=length,
        stored=stored,
        first=first,
        starts=split == 0,
        begin=first_block + begin,
        trips=jnp.minimum(share, num_blocks - begin),
        split=split,
        count=count,
        base=(lane * num_kv_heads + head) * config.num_splits,
        stride=1,
    )


# A worker's row in the list of work: where its stretch begins, how long it is, how long all stretches are.
LANE, HEAD, AT, UNITS, JOBS, STRETCH = range(6)


def work_list(reach: Reach, config: DecodeConfig, num_kv_heads: int, lengths: jax.Array) -> jax.Array:
    """[workers, 6] int32: the blocks of all (lane, kv head) in a row, cut into equal stretches.

    A (lane, kv head) with nothing to read counts as one block: its result has to be written all the same.
    Depends on the lengths alone, so XLA computes it once for all layers.
    """
    units = jnp.maximum(reach.of(lengths)[3], 1)  # [B]
    ends = jnp.cumsum(units) * num_kv_heads
    total = ends[-1]
    fewest = jnp.minimum(_div(units.max() + 15, 16), 4)  # as in blocks_per_split
    stretch = jnp.maximum(_div(total + config.workers - 1, config.workers), fewest)
    start = jnp.minimum(jnp.arange(config.workers, dtype=jnp.int32) * stretch, total)
    stop = jnp.minimum(start + stretch, total)

    def pair(unit):  # [workers] -> lane, head and the block within
        lane = (ends[None, :] <= unit[:, None]).sum(axis=1, dtype=jnp.int32)
        lane = jnp.minimum(lane, lengths.shape[0] - 1)
        within = unit - (ends[lane] - units[lane] * num_kv_heads)
        return lane, lax.div(within, units[lane]), lax.rem(within, units[lane])

    lane, head, at = pair(start)
    last_lane, last_head, _ = pair(stop - 1)
    jobs = (last_lane - lane) * num_kv_heads + last_head - head + 1
    jobs = jnp.where(stop > start, jobs, 0)
    columns = (lane, head, at, stop - start, jobs, jnp.broadcast_to(stretch, lane.shape))
    return jnp.stack(columns, axis=1).astype(jnp.int32)


def run_stretch(reach: Reach, num_kv_heads: int, work, lengths, worker, run):
    """`run(job, number, trips done before)` for every job of a worker; returns (jobs, trips done)."""
    units, stretch = work[worker, UNITS], work[worker, STRETCH]

    def step(number, state):
        lane, head, at, left, done = state
        length = lengths[lane]
        stored, first, first_block, num_blocks = reach.of(length)
        size = jnp.maximum(num_blocks, 1)
        take = jnp.minimum(size - at, left)
        begins = worker * stretch + (units - left) - at  # where this (lane, kv head) begins in all the work
        first_worker = lax.div(begins, stretch)
        job = Job(
            lane=lane,
            head=head,
            length=length,
            stored=stored,
            first=first,
            starts=at == 0,
            begin=first_block + at,
            trips=jnp.minimum(take, num_blocks),
            split=worker - first_worker,
            count=lax.div(begins + size - 1, stretch) - first_worker + 1,
            base=first_worker * 2,
            stride=2,
        )
        run(job, number, done)
        ended = at + take == size
        wraps = ended & (head == num_kv_heads - 1)
        next_head = jnp.where(wraps, 0, jnp.where(ended, head + 1, head))
        next_lane = jnp.where(wraps, lane + 1, lane)
        return next_lane, next_head, jnp.where(ended, 0, at + take), left - take, done + job.trips

    start = (work[worker, LANE], work[worker, HEAD], work[worker, AT], units, jnp.int32(0))
    jobs = work[worker, JOBS]
    *_, done = lax.fori_loop(0, jobs, step, start)
    return jobs, done


def _div(x, n: int):
    """x // n of an array, or of a scalar in a kernel, which must not meet the array constant of full_like."""
    return lax.div(x, lax.full_like(x, n) if x.ndim else jnp.int32(n))
