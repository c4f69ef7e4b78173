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
from kernels_pallas.mosaic import LOG2E, MULTIPROCESSORS, ROWS
from kernels_pallas.product_ring import ProductRing
from kernels_pallas.row_parts import LOWEST, NO_TOKEN

LAYOUT = plgpu.Layout.WGMMA
TILE = 128  # logits that a maximum and a sum of weights are of
SLICE = 32  # columns of logits that are stored at once
LEAST_TOKENS, MOST_TOKENS = 8, 512  # for one, XLA's product and `sample` are as fast
# Of a thread that multiplies and one that fetches, by warpgroups and columns, where those of the launch do not do.
REGISTERS = {(2, 256): (232, 40)}


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
    if tokens % 8 or not LEAST_TOKENS <= tokens <= MOST_TOKENS:
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


def largest(hidden, weight, needed, factor=None):
    """The ids [B] int32 of the largest logits, -1 where one is NaN, and logits [B, V] float32 of the `needed` [B] rows.

    With `factor` [B] float32 also maxima and sums of weights of every TILE logits of the needed rows, the sum of
    exp(factor * (logit - maximum)), in arrays that begin with [B, V // TILE]. V is a multiple of TILE then.
    """
    config = default_config(hidden.shape[0], weight.shape[1])
    return _run(hidden, weight, needed, factor, config, None)


@lower_once("config", "interpret")
def _run(hidden, weight, needed, factor, config: HeadConfig, interpret):
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

    def kernel(*refs, x_smem, w_smem, o_smem, full, free):
        ref = dict(zip((*operands, *outputs), refs, strict=True))
        cluster, rank, thread = lax.axis_index("block"), lax.axis_index("rank"), lax.axis_index("thread")
        sharer, group = lax.div(cluster, jnp.int32(groups)), lax.rem(cluster, jnp.int32(groups))
        token_tile = group * config.cluster + rank
        token = lax.min(token_tile * rows, jnp.int32(tokens - held))
        trips = mosaic.ceil_div(lax.max(tiles - sharer, jnp.int32(0)), sharers)

        def column_of(trip):
            return lax.min((sharer + trip * sharers) * columns, jnp.int32(vocab_size - columns))

        ring = ProductRing(x_smem, w_smem, full, free, chunks, trips)

        @pl.when(thread == workers)
        def _memory():
            if registers is not None:
                plgpu.set_max_registers(registers[1], action="decrease")

            def copy(column, i, slot):
                part, arrived = pl.ds(i * chunk, chunk), full.at[slot]
                source = ref["weight"].at[pl.ds(column, columns), part]
                plgpu.copy_gmem_to_smem(source, w_smem.at[slot], arrived, **shared)
                target = x_smem.at[slot, pl.ds(0, held)]
                plgpu.copy_gmem_to_smem(ref["x"].at[pl.ds(token, held), part], target, arrived)

            ring.fill(column_of, copy)

        @pl.when(thread < workers)
        def _multiply():
            if registers is not None:
                plgpu.set_max_registers(registers[0], action="increase")
            mine, all_mine = pl.ds(thread * ROWS, ROWS), pl.ds(token + thread * ROWS, ROWS)
            written = ref["needed"][token_tile * workers + thread] != 0

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
                    target = ref["logits"].at[pl.ds(token + thread * ROWS, count), place]
                    plgpu.copy_smem_to_gmem(buffer.at[pl.ds(0, count)], target)

                if held % ROWS == 0:
                    rows(ROWS)
                    return
                pl.when(thread < workers - 1)(lambda: rows(ROWS))
                pl.when(thread == workers - 1)(lambda: rows(held % ROWS))

            def summarise(logits, column):
                """Maximum and sum of weights of every TILE columns of logits [64, columns]."""
                layout = LAYOUT.reduce(1)
                scale = plgpu.load(ref["factor"].at[all_mine], layout=layout, optimized=False) * LOG2E
                for i in range(columns // TILE):
                    part = logits[:, i * TILE : (i + 1) * TILE]
                    top = jnp.maximum(part.max(axis=1), LOWEST)
                    exponents = (part - lax.broadcast_in_dim(top, part.shape, [0])) * lax.broadcast_in_dim(
                        scale, part.shape, [0]
                    )
                    place = all_mine, lax.div(column, jnp.int32(TILE)) + i
                    mosaic.store(ref["maxima"].at[*place], top)
                    mosaic.store(ref["sums"].at[*place], jnp.exp2(exponents).sum(axis=1))

            def tile(trip, state):
                best, ids = state
                logits = ring.product(trip, mine)
                column = column_of(trip)

                @pl.when(written)
                def _write():
                    write(logits, column)
                    if factor is not None:
                        summarise(logits, column)

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
            mosaic.store(ref["best"].at[sharer, all_mine], best)
            mosaic.store(ref["ids"].at[sharer, all_mine], jnp.where(best == best, ids, -1))
            plgpu.wait_smem_to_gmem(0)

    barrier: Any = plgpu.Barrier
    if config.cluster > 1:
        barrier = functools.partial(plgpu.ClusterBarrier, collective_axes=("rank",))
    padded = max(tokens, rows)
    operands = {
        "x": hidden,
        "weight": weight,
        "needed": _any_of_tiles(needed, rows, groups * config.cluster),
    }
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "best": ((sharers, padded), jnp.float32),
        "ids": ((sharers, padded), jnp.int32),
        "logits": ((tokens, vocab_size), jnp.float32),
    }
    if factor is not None:
        operands["factor"] = jnp.pad(factor.astype(jnp.float32), (0, padded - tokens))
        row = -(-vocab_size // TILE // TILE) * TILE  # of which threads read equal parts
        shapes |= dict.fromkeys(("maxima", "sums"), ((padded, row), jnp.float32))
    outputs = {name: mosaic.out_like(*shape, *operands.values()) for name, shape in shapes.items()}
    launch = plgpu.kernel(
        kernel,
        out_type=tuple(outputs.values()),
        grid=(sharers * groups,),
        grid_names=("block",),
        cluster=(config.cluster,),
        cluster_names=("rank",),
        num_threads=workers + 1,
        thread_name="thread",
        scratch_types={
            "x_smem": mosaic.operand_buffer((stages, rows, chunk), hidden.dtype),
            "w_smem": mosaic.operand_buffer((stages, columns, chunk), weight.dtype),
            "o_smem": mosaic.operand_buffer((workers, 2, ROWS, SLICE), jnp.float32),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "free": barrier(num_arrivals=workers, num_barriers=stages),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    best, ids, logits, *summary = launch(*operands.values())
    found = _first_largest(best[:, :tokens], ids[:, :tokens])
    return found, logits, *summary


def _any_of_tiles(needed: jax.Array, rows: int, tiles: int) -> jax.Array:
    """Whether logits of any of the 64 rows of a warpgroup are needed, int32; the last tile may overlap another."""
    tokens = needed.shape[0]
    if (tokens % ROWS == 0 and tokens % rows == 0) or tokens <= rows:
        padded = jnp.pad(needed, (0, tiles * rows - tokens))
        return padded.reshape(-1, ROWS).any(axis=1).astype(jnp.int32)
    parts = jnp.arange(tiles * rows // ROWS) * ROWS
    first = jnp.minimum(parts // rows * rows, tokens - rows) + parts % rows
    after = jnp.arange(tokens) - first[:, None]  # [parts, B]
    return (needed & (after >= 0) & (after < ROWS)).any(axis=1).astype(jnp.int32)


def _first_largest(values: jax.Array, ids: jax.Array) -> jax.Array:
    """Of values and ids [P, B]: the id of the largest of each column, the lowest among equals; that of a NaN if any."""

    def better(a, b):
        (x, i), (y, j) = a, b
        wins = (y > x) | (y != y) | ((x == y) & (j < i))
        return jnp.where(wins, y, x), jnp.where(wins, j, i)

    start = jnp.float32(-jnp.inf), jnp.int32(NO_TOKEN)
    return lax.reduce((values, ids), start, better, (0,))[1]
