"""Work list of the ragged prefill kernel: packed rows cut into tiles of query slabs, longest first.

A slab is the queries of one query head at `SLAB` consecutive tokens of a row: the rows of one swizzle tile,
so the copy engine moves it in one piece, whatever the number of heads. The slabs of a row are numbered
(token group, head of the GQA group); a tile is a run of them, so no row of a tile is wasted but in the last
tokens of a row.
"""

import jax
import jax.numpy as jnp

SLAB = 8
FIELDS = 7  # integers of a tile
MAX_PARTS = 1000  # numbers of parts of the work


def row_tiles(num_tokens: int, group: int, tile_slabs: int) -> int:
    """The tiles of one row of so many tokens."""
    return -(-(-(-num_tokens // SLAB) * group) // tile_slabs)


def max_tiles(num_tokens: int, num_rows: int, group: int, tile_slabs: int) -> int:
    """Upper bound of the tiles of any rows that fit the packed tokens."""
    slabs = (-(-num_tokens // SLAB) + num_rows) * group
    return slabs // tile_slabs + num_rows


def tiles(
    cu_seqlens: jax.Array,
    lengths: jax.Array,
    span_ends: jax.Array | None,
    *,
    num_tiles: int,
    group: int,
    tile_slabs: int,
    block: int,
    window: int | None,
    cache_tokens: int,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The tiles of packed rows, part by part (`_parts`), those that look at the most keys first.

    Args:
        cu_seqlens, lengths, span_ends: as in `kernels_pallas.ragged_prefill`.
        num_tiles: from `max_tiles`.
        group: query heads per kv head.
        tile_slabs: slabs of a tile.
        block: KV tokens of a trip.
        cache_tokens: KV tokens that the L2 cache holds; tiles of rows beyond it are not run side by side.

    Returns:
        ([num_tiles * FIELDS] int32, per tile: row, the row's first packed token, its query tokens, its KV
        length, the tile's first slab in the row, its first block of keys, its number of blocks;
        [1] int32: the number of tiles that have work, which come first;
        [num_tiles, tile_slabs * SLAB] int32: end of the keys that each query of a tile sees, with span_ends).
    """
    counts = cu_seqlens[1:] - cu_seqlens[:-1]  # [R]
    slabs = -(-counts // SLAB) * group
    row_tiles = -(-slabs // tile_slabs)
    ends = jnp.cumsum(row_tiles)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    row = (tile[:, None] >= ends[None, :]).sum(axis=1, dtype=jnp.int32)
    row = jnp.minimum(row, counts.shape[0] - 1)
    slab = (tile - (ends - row_tiles)[row]) * tile_slabs
    offset = (lengths - counts)[row]
    last = jnp.minimum(slab + tile_slabs, slabs[row]) - 1
    stop = jnp.minimum(last // group * SLAB + SLAB, counts[row])  # past the last token
    stop, limits = offset + stop, None
    if span_ends is not None:
        query = jnp.arange(tile_slabs * SLAB, dtype=jnp.int32)
        token = (slab[:, None] + query // SLAB) // group * SLAB + query % SLAB  # [tiles, queries]
        token = jnp.minimum(token, counts[row][:, None] - 1)
        ends_seen = jnp.take(span_ends, cu_seqlens[row][:, None] + token, mode="clip")
        limits = jnp.minimum(jnp.maximum(ends_seen, offset[:, None] + token + 1), lengths[row][:, None])
        stop = jnp.maximum(stop, limits.max(axis=1))
    begin = jnp.zeros_like(slab)
    if window is not None:
        begin = jnp.maximum(offset + slab // group * SLAB - (window - 1), 0) // block
    trips = jnp.where(tile < ends[-1], -(-stop // block) - begin, 0)
    fields = jnp.stack([row, cu_seqlens[row], counts[row], lengths[row], slab, begin, trips], axis=1)
    part = jnp.where(trips > 0, _parts(jnp.where(counts > 0, lengths, 0), cache_tokens)[row], MAX_PARTS)
    order = jnp.argsort(part * 2**20 - trips)
    if limits is not None:
        limits = limits[order]
    return fields[order].reshape(-1), ends[-1:].astype(jnp.int32), limits


def _parts(lengths: jax.Array, cache_tokens: int) -> jax.Array:
    """Number [R] of the part of the work that each row belongs to: rows by falling length, a cache full each."""
    index = jnp.arange(lengths.shape[0])
    longer = lengths[None, :] > lengths[:, None]
    earlier = longer | ((lengths[None, :] == lengths[:, None]) & (index[None, :] < index[:, None]))
    before = jnp.where(earlier, lengths[None, :], 0).sum(axis=1)
    return jnp.minimum(before // cache_tokens, MAX_PARTS - 1)
