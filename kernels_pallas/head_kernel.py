"""The language-model head of a decode step for Hopper: a product that keeps only the largest logit of each token.

Logits are as many bytes as half the weight at 256 tokens, and greedy sampling would write them out only to read them
once. Here every persistent block of threads takes columns of the vocabulary in turn, keeps the best of each token in
registers from tile to tile, and hands one pair of logit and id per token over at its end. Logits go to memory for
those rows of 64 tokens among which one is to be sampled.

One warpgroup fetches, the others multiply 64 tokens each and drift apart until one multiplies while the other looks
for the largest. The blocks of a cluster have different tokens and share each tile of the weight.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import mosaic
from kernels_pallas.lowering import lower_once
from kernels_pallas.mosaic import MULTIPROCESSORS, ROWS

LAYOUT = plgpu.Layout.WGMMA
SLICE = 32  # columns of logits that are stored at once
NO_TOKEN = 2**30
MOST_TOKENS = 512
# Of a thread that multiplies and one that fetches, by warpgroups and columns, where those of the launch do not do.
REGISTERS = {(2, 256): (232, 40), (4, 128): (112, 24)}


@dataclass(frozen=True)
class HeadConfig:
    """Tiling of a head.

    columns: of the vocabulary in a tile. warpgroups: that multiply, 64 tokens each. cluster: blocks of different
    tokens that share the weight. chunk: of the hidden size, in a slot of the ring. stages: slots. blocks: in all.
    """

    columns: int = 128
    warpgroups: int = 1
    cluster: int = 1
    chunk: int = 64
    stages: int = 8
    blocks: int = MULTIPROCESSORS


def unsupported(hidden: jax.Array, weight: jax.Array) -> str | None:
    """Why the kernel cannot take hidden [B, D] and weight [V, D]; None if it can."""
    if hidden.dtype != jnp.bfloat16 or weight.dtype != jnp.bfloat16:
        return f"hidden and weight are {hidden.dtype} and {weight.dtype}, not bfloat16"
    tokens, (vocab_size, size) = hidden.shape[0], weight.shape
    if tokens % 8 or not 8 <= tokens <= MOST_TOKENS:
        return f"there are {tokens} tokens, not a multiple of 8 up to {MOST_TOKENS}"
    if vocab_size % 8 or vocab_size < 256 or size % 64:
        return f"the weight {weight.shape} is not a multiple of 8 from 256 on by a multiple of 64"
    return None


def default_config(tokens: int, size: int) -> HeadConfig:
    blocks = mosaic.multiprocessors()
    if tokens > 2 * ROWS:
        return HeadConfig(256, 2, 2, 64, 4, blocks)
    if tokens > ROWS:
        return HeadConfig(128, 2, 1, 64, 6, blocks)
    if size % 128:
        return HeadConfig(128, 1, 1, 64, 8, blocks)
    return HeadConfig(128, 1, 1, 128, 4, blocks)


def largest(hidden, weight, needed):
    """The ids [B] int32 of the largest logits, -1 where one is NaN; logits [B, V] float32 of the `needed` [B] rows."""
    return _run(hidden, weight, needed, default_config(hidden.shape[0], weight.shape[1]), None)


@lower_once("config", "interpret")
def _run(hidden, weight, needed, config: HeadConfig, interpret):
    tokens, size = hidden.shape
    vocab_size = weight.shape[0]
    columns, chunk, stages, workers = config.columns, config.chunk, config.stages, config.warpgroups
    rows = workers * ROWS  # of a block
    held = min(rows, tokens)  # of them, tokens
    groups = -(-tokens // (rows * config.cluster))  # of tokens, each of one cluster
    sharers = config.blocks // config.cluster // groups  # clusters that share the vocabulary
    tiles = -(-vocab_size // columns)
    chunks = size // chunk
    registers = REGISTERS.get((workers, columns)) if interpret is None else None
    shared = {"collective_axes": "rank"} if config.cluster > 1 else {}

    # The last tile of tokens may overlap the one before: both find the same.
    first_tokens = [min(tile * rows, tokens - held) for tile in range(groups * config.cluster)]

    def kernel(
        x_ref, weight_ref, needed_ref, best_ref, ids_ref, logits_ref, x_smem, w_smem, o_smem, full, free
    ):
        cluster, rank, thread = lax.axis_index("block"), lax.axis_index("rank"), lax.axis_index("thread")
        sharer, group = lax.div(cluster, jnp.int32(groups)), lax.rem(cluster, jnp.int32(groups))
        token_tile = group * config.cluster + rank
        token = lax.min(token_tile * rows, jnp.int32(tokens - held))
        trips = mosaic.ceil_div(lax.max(tiles - sharer, jnp.int32(0)), sharers)

        def column_of(trip):
            return lax.min((sharer + trip * sharers) * columns, jnp.int32(vocab_size - columns))

        def slot_of(step):
            return lax.rem(step, jnp.int32(stages))

        @pl.when(thread == workers)
        def _memory():
            if registers is not None:
                plgpu.set_max_registers(registers[1], action="decrease")

            @pl.loop(0, trips)
            def _tile(trip):
                column = column_of(trip)

                @pl.loop(0, chunks)
                def _chunk(i):
                    step = trip * chunks + i
                    slot = slot_of(step)

                    @pl.when(step >= stages)
                    def _wait():
                        plgpu.barrier_wait(free.at[slot])

                    part = pl.ds(i * chunk, chunk)
                    arrived = full.at[slot]
                    source = weight_ref.at[pl.ds(column, columns), part]
                    plgpu.copy_gmem_to_smem(source, w_smem.at[slot], arrived, **shared)
                    target = x_smem.at[slot, pl.ds(0, held)]
                    plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(token, held), part], target, arrived)

            steps = trips * chunks

            @pl.loop(lax.max(steps - stages, jnp.int32(0)), steps)
            def _drain(step):  # a barrier's every completion must be seen
                plgpu.barrier_wait(free.at[slot_of(step)])

        @pl.when(thread < workers)
        def _multiply():
            if registers is not None:
                plgpu.set_max_registers(registers[0], action="increase")
            mine = pl.ds(thread * ROWS, ROWS)
            written = needed_ref[token_tile * workers + thread] != 0

            def product(trip):
                def accumulate(acc):
                    @pl.loop(0, chunks)
                    def _chunk(i):
                        step = trip * chunks + i
                        slot = slot_of(step)
                        plgpu.barrier_wait(full.at[slot])
                        plgpu.wgmma(acc, x_smem.at[slot, mine], w_smem.at[slot].transpose((1, 0)))
                        plgpu.wgmma_wait(1)

                        @pl.when(i > 0)
                        def _release():
                            plgpu.barrier_arrive(free.at[slot_of(step - 1)])

                    value = acc[...]
                    plgpu.barrier_arrive(free.at[slot_of(trip * chunks + chunks - 1)])
                    return value

                return pl.run_scoped(accumulate, plgpu.ACC((ROWS, columns), jnp.float32))

            def write(logits, column):
                """Logits [64, columns] to memory, in slices through two buffers."""
                for i in range(columns // SLICE):
                    buffer = o_smem.at[thread, i % 2]
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    buffer[...] = logits[:, i * SLICE : (i + 1) * SLICE]
                    plgpu.commit_smem()
                    send(buffer, pl.ds(column + i * SLICE, SLICE))

            def send(buffer, place):
                def rows(count):
                    target = logits_ref.at[pl.ds(token + thread * ROWS, count), place]
                    plgpu.copy_smem_to_gmem(buffer.at[pl.ds(0, count)], target)

                if held % ROWS == 0:
                    rows(ROWS)
                    return
                pl.when(thread < workers - 1)(lambda: rows(ROWS))
                pl.when(thread == workers - 1)(lambda: rows(held % ROWS))

            def tile(trip, state):
                best, ids = state
                logits = product(trip)
                column = column_of(trip)
                pl.when(written)(lambda: write(logits, column))
                largest = logits.max(axis=1)
                found = logits == lax.broadcast_in_dim(largest, logits.shape, [0])
                place = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=LAYOUT)
                none = plgpu.layout_cast(jnp.full(logits.shape, -NO_TOKEN, jnp.int32), LAYOUT)
                first = column - jnp.where(found, -place, none).max(axis=1)
                ids = jnp.where(largest > best, first, ids)
                return jnp.maximum(best, largest), ids  # NaN if any is

            def row(value, dtype):
                return plgpu.layout_cast(jnp.full((ROWS,), value, dtype), LAYOUT.reduce(1))

            best, ids = lax.fori_loop(0, trips, tile, (row(-jnp.inf, jnp.float32), row(0, jnp.int32)))
            place = pl.ds(token + thread * ROWS, ROWS)
            mosaic.store(best_ref.at[sharer, place], best)
            mosaic.store(ids_ref.at[sharer, place], ids)
            plgpu.wait_smem_to_gmem(0)

    barrier: Any = plgpu.Barrier
    if config.cluster > 1:
        barrier = functools.partial(plgpu.ClusterBarrier, collective_axes=("rank",))
    padded = max(tokens, rows)
    operands = hidden, weight, _tiles_with(needed, first_tokens, workers)
    launch = plgpu.kernel(
        kernel,
        out_type=(
            mosaic.out_like((sharers, padded), jnp.float32, *operands),
            mosaic.out_like((sharers, padded), jnp.int32, *operands),
            mosaic.out_like((tokens, vocab_size), jnp.float32, *operands),
        ),
        grid=(sharers * groups,),
        grid_names=("block",),
        cluster=(config.cluster,),
        cluster_names=("rank",),
        num_threads=workers + 1,
        thread_name="thread",
        scratch_types=[
            mosaic.operand_buffer((stages, rows, chunk), hidden.dtype),
            mosaic.operand_buffer((stages, columns, chunk), weight.dtype),
            mosaic.operand_buffer((workers, 2, ROWS, SLICE), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            barrier(num_arrivals=workers, num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    best, ids, logits = launch(*operands)
    return _first_largest(best[:, :tokens], ids[:, :tokens]), logits


def _tiles_with(needed: jax.Array, starts: list[int], workers: int) -> jax.Array:
    """Of each 64 rows that a warpgroup multiplies, whether logits are needed of one, int32."""
    parts = [
        needed[start + i * ROWS : start + (i + 1) * ROWS].any() for start in starts for i in range(workers)
    ]
    return jnp.stack(parts).astype(jnp.int32)


def _first_largest(values: jax.Array, ids: jax.Array) -> jax.Array:
    """Of values and ids [P, B]: the id of the largest of each column, the lowest among equals, -1 beside a NaN."""

    def better(a, b):
        (x, i), (y, j) = a, b
        wins = (y > x) | (y != y) | ((x == y) & (j < i))
        return jnp.where(wins, y, x), jnp.where(wins, j, i)

    start = jnp.float32(-jnp.inf), jnp.int32(NO_TOKEN)
    value, token = lax.reduce((values, ids), start, better, (0,))
    return jnp.where(value != value, -1, token)
