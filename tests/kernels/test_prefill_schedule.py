"""The work list of the prefill kernel: every query is in one tile, and tiles without work come last."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import prefill_schedule

GROUP, TILE_SLABS, BLOCK = 3, 4, 16
CHUNKS = st.tuples(st.sampled_from([0, 1, 5, 8, 30]), st.sampled_from([0, 3, 100]))  # new tokens, cached ones


@settings(max_examples=30, deadline=None, derandomize=True)
@given(rows=st.lists(CHUNKS, min_size=6, max_size=6), window=st.sampled_from([None, 7]))
def test_the_tiles_that_come_first_hold_every_query_once_with_all_that_it_sees(rows, window):
    counts, cached = np.array(rows).T
    lengths = np.where(counts > 0, counts + cached, 0).astype(np.int32)
    cu_seqlens = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    num_tiles = prefill_schedule.max_tiles(6 * 30, len(rows), GROUP, TILE_SLABS)
    schedule = {"group": GROUP, "tile_slabs": TILE_SLABS, "block": BLOCK, "cache_tokens": 64}
    tiles, total, _ = TILES(cu_seqlens, lengths, None, num_tiles=num_tiles, window=window, **schedule)
    seen = np.zeros((int(cu_seqlens[-1]), GROUP), int)
    for row, first, count, length, slab, begin, trips in np.asarray(tiles).reshape(num_tiles, -1)[: total[0]]:
        assert (first, count, length) == (cu_seqlens[row], counts[row], lengths[row])
        assert trips > 0
        for s in range(slab, slab + TILE_SLABS):
            for token in range(s // GROUP * 8, min(s // GROUP * 8 + 8, count)):
                seen[first + token, s % GROUP] += 1
                position = length - count + token
                oldest = 0 if window is None else max(position - window + 1, 0)
                assert begin * BLOCK <= oldest
                assert position < (begin + trips) * BLOCK
    assert (seen == 1).all()


TILES = jax.jit(
    prefill_schedule.tiles,
    static_argnames=("num_tiles", "group", "tile_slabs", "block", "window", "cache_tokens"),
)
