"""Draws of a small top_k on Hopper that read few logits: those of the tiles whose maxima are largest.

The k largest logits of a row are in the k tiles of the largest maxima. A search among the maxima, which the head
leaves (see `head_kernel`), finds a threshold that at least k of them reach, and at most MOST_TILES. Every token that
the row may keep reaches it, too, so the tiles below are not looked at. A row without such a threshold, as of many
equal logits, is left to `sample_kernel`, and so is one of a larger top_k.

One warpgroup takes a row: it starts a copy of each tile as it finds it, and then draws as `Sampler` does.
"""

from collections.abc import Callable

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import mosaic
from kernels_pallas.head_kernel import TILE
from kernels_pallas.lowering import lower_once
from kernels_pallas.reference import UNDRAWN
from kernels_pallas.row_parts import LOWEST, NO_TOKEN, weight
from kernels_pallas.row_sampler import REJECTED, Sampler

MOST_TILES = 64
MOST_TOP_K = 56  # leaves room between a threshold that is too low and one too high
MOST_HALVINGS = 40


class TilePart:
    """A row's tiles of logits in shared memory, as the parts of a row that `Sampler` knows; a trip is a tile."""

    def __init__(self, lane, logits_ref, smem, tiles, arrived):
        self.lane, self.logits_ref = lane, logits_ref
        self.smem, self.tiles, self.arrived = smem, tiles, arrived
        self.size = smem.shape[1]
        self.count = jnp.int32(0)

    def full(self, value, dtype=jnp.float32):
        return _full(self.size, value, dtype)

    def tokens(self, trips):
        """Ids of the tokens at the places of a tile, `trips` an array or a scalar."""
        return trips * self.size + _places(self.size)

    def value(self, token):
        return self.logits_ref[self.lane, jnp.clip(token, 0, self.logits_ref.shape[1] - 1)]

    def exchange(self, turn, values):
        """What `RowPart.exchange` gives where a row has one part."""
        del turn
        return [[value.astype(jnp.float32) for value in values]]

    def fetch(self, maxima, threshold, count):
        """Start the copies of the `count` tiles whose maxima, an array, reach the threshold; wait for them."""
        self.count = count
        places, none = _places(maxima.shape[0]), _full(maxima.shape[0], -NO_TOKEN, jnp.int32)

        def copy(j, last):
            tile = -jnp.max(jnp.where((maxima >= threshold) & (places > last), -places, none))
            self.tiles[j] = tile
            source = self.logits_ref.at[self.lane, pl.ds(tile * self.size, self.size)]
            plgpu.copy_gmem_to_smem(source, self.smem.at[j], self.arrived.at[lax.div(j, jnp.int32(2))])
            return tile

        lax.fori_loop(0, count, copy, jnp.int32(-1))
        plgpu.commit_smem()
        pairs = lax.div(count + 1, jnp.int32(2))
        pl.when(lax.rem(count, jnp.int32(2)) == 1)(lambda: plgpu.barrier_arrive(self.arrived.at[pairs - 1]))
        pl.loop(0, pairs)(lambda j: plgpu.barrier_wait(self.arrived.at[j]))

    def fold(self, step: Callable, state):
        """step(tile, x, state) over the tiles, by rising ids."""

        def trip(j, state):
            x = plgpu.load(self.smem.at[j], layout=_layout(self.size), optimized=False)
            return step(self.tiles[j], x, state)

        return lax.fori_loop(0, self.count, trip, state)


def _layout(size: int):
    return plgpu.Layout.WG_STRIDED((size,), vec_size=1)


def _full(size: int, value, dtype=jnp.float32):
    return plgpu.layout_cast(jnp.full((size,), value, dtype), _layout(size))


def _places(size: int):
    return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=_layout(size))


def _threshold(maxima, top_k, highest):
    """A threshold that top_k to MOST_TILES of the maxima reach, if it is found, and their number."""

    def reached(value):
        size = maxima.shape[0]
        return jnp.sum(jnp.where(maxima >= value, _full(size, 1, jnp.int32), _full(size, 0, jnp.int32)))

    def halve(state):
        low, high, count, halvings = state
        middle = low + (high - low) * 0.5
        found = reached(middle)
        enough = found >= top_k
        low, high = jnp.where(enough, middle, low), jnp.where(enough, high, middle)
        return low, high, jnp.where(enough, found, count), halvings + 1

    lowest = -jnp.max(jnp.where(maxima > LOWEST, -maxima, _full(maxima.shape[0], LOWEST)))
    start = lowest, highest, reached(lowest), jnp.int32(0)
    low, _, count, _ = lax.while_loop(lambda s: (s[2] > MOST_TILES) & (s[3] < MOST_HALVINGS), halve, start)
    return low, count


def _draw(part: TilePart, options, greedy_ref, maxima_ref, sums_ref, out_ref, num_tiles: int):
    lane = part.lane
    greedy_token, is_greedy = greedy_ref[lane], options[4, lane] != 0
    top_k = options[1, lane].astype(jnp.int32)
    known = is_greedy | (greedy_token < 0)
    small = ~known & (top_k <= MOST_TOP_K)

    def store(token):
        out_ref[lane] = token

    pl.when(~small)(lambda: store(jnp.where(known, greedy_token, UNDRAWN)))

    @pl.when(small)
    def _small():
        row, size = Sampler(part, options), maxima_ref.shape[1]
        maxima, sums = (
            plgpu.load(ref.at[lane], layout=_layout(size), optimized=False) for ref in (maxima_ref, sums_ref)
        )
        exists = _places(size) < num_tiles
        maxima = jnp.where(exists, maxima, _full(size, LOWEST))
        maximum = jnp.max(maxima)
        masses = sums * weight(maxima, maximum, row.factor)
        total = jnp.sum(jnp.where(exists, masses, _full(size, 0.0)))
        threshold, count = _threshold(maxima, top_k, maximum)
        solved = (count >= top_k) & (count <= MOST_TILES) & (maximum < -LOWEST)
        pl.when(~solved)(lambda: store(jnp.int32(UNDRAWN)))

        @pl.when(solved)
        def _solved():
            part.fetch(maxima, threshold, count)
            all_tokens = jnp.int32(NO_TOKEN), threshold
            store(row.settle(None, all_tokens, jnp.int32(REJECTED), maximum, total))


def draw(logits, options, greedy_tokens, maxima, sums):
    """Tokens [B] int32: of greedy lanes theirs, of lanes with a small top_k drawn ones, UNDRAWN of others.

    options: of `row_sampler.options_of`. greedy_tokens, maxima, sums: of `head_kernel.largest` at the lanes'
    temperatures; a negative token, of a lane with a NaN, stands.
    """
    return _run(logits, options, greedy_tokens, maxima, sums, None)


@lower_once("interpret")
def _run(logits, options, greedy_tokens, maxima, sums, interpret):
    num_lanes, vocab_size = logits.shape
    operands = logits, options, greedy_tokens, maxima, sums

    def kernel(logits_ref, options_ref, greedy_ref, maxima_ref, sums_ref, out_ref, smem, tiles, arrived):
        part = TilePart(lax.axis_index("lane"), logits_ref, smem, tiles, arrived)
        _draw(part, options_ref, greedy_ref, maxima_ref, sums_ref, out_ref, vocab_size // TILE)

    launch = plgpu.kernel(
        kernel,
        out_type=mosaic.out_like((num_lanes,), jnp.int32, *operands),
        grid=(num_lanes,),
        grid_names=("lane",),
        num_threads=1,
        thread_name="thread",
        scratch_types=[
            plgpu.SMEM((MOST_TILES, TILE), jnp.float32),
            plgpu.SMEM((MOST_TILES,), jnp.int32),
            plgpu.Barrier(num_arrivals=2, num_barriers=MOST_TILES // 2),  # 32 at most: one for two tiles
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return launch(*operands)
