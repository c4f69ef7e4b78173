"""Every op of the package in plain jax.numpy: the kernels' specification, and the path of other devices.

Attention walks blocks of pages with dynamic trip counts and an online softmax in float32, so its cost follows
the actual lengths and not the capacity of the page table. Works under `jit` and inside `shard_map` over the
kv heads. Axes: B lanes, T packed tokens, R rows, P pages, MP pages of a row, S page size, N query heads,
K kv heads, G = N // K, H head dim, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

DECODE_BLOCK = 128  # KV tokens a decode step looks at per trip
PREFILL_BLOCK = 128
PREFILL_TILE = 64  # query tokens of one row handled together
_MASKED = -1e30  # finite: exp(masked - masked) must not be NaN


def write_kv(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Store the keys and values of T tokens. See `kernels_pallas.write_kv`."""
    num_pages, _, page_size, _ = k_pages.shape
    k, v = _stored(k, k_scale, k_pages.dtype), _stored(v, v_scale, v_pages.dtype)
    if slots.shape[0] == 1:
        # XLA turns the scatter of a single row into a dynamic-update-slice, around which it may copy the whole
        # pool; two rows, one of them dropped, are written in place.
        slots = jnp.concatenate([slots, jnp.full_like(slots, num_pages * page_size)])
        k, v = (jnp.concatenate([x, x]) for x in (k, v))
    inside = (slots >= 0) & (slots < num_pages * page_size)
    page = jnp.where(inside, slots // page_size, num_pages)
    offset = slots % page_size
    return _scatter(k_pages, k, page, offset), _scatter(v_pages, v, page, offset)


def _scatter(pages: jax.Array, x: jax.Array, page: jax.Array, offset: jax.Array) -> jax.Array:
    """pages [P, K, S, H] with x [T, K, H] at (page, offset); dropped where page is P."""
    dtype = pages.dtype
    if dtype.itemsize == 1:  # as integers: to scatter 8-bit floats, XLA would widen all of the pool on a CPU
        pages, x = (lax.bitcast_convert_type(y, jnp.uint8) for y in (pages, x))
    # The two index arrays surround a slice, so the indexed view is [T, K, H].
    pages = pages.at[page, :, offset].set(x, mode="drop")
    return lax.bitcast_convert_type(pages, dtype) if dtype.itemsize == 1 else pages


def _stored(x: jax.Array, scale: jax.Array | float | None, dtype) -> jax.Array:
    """x as pages hold it: divided by the scale, and saturated where the type is an 8-bit one."""
    if scale is not None:
        x = x.astype(jnp.float32) * (1.0 / scale)
    if jnp.dtype(dtype).itemsize == 1:
        largest = float(jnp.finfo(dtype).max)
        x = jnp.clip(x.astype(jnp.float32), -largest, largest)
    return x.astype(dtype)


def prepare_heads(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    q_norm: jax.Array | None,
    k_norm: jax.Array | None,
    epsilon: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, N, H], keys and values [B, K, H] of a projection [B, K, G + 2, H], normalised and rotated.

    With these, `write_kv` at `last_slots` and `paged_decode` are `kernels_pallas.paged_decode_update`.
    """
    num_lanes, _, rows, head_dim = qkv.shape
    qk, v = qkv[:, :, :-1], qkv[:, :, -1]
    if q_norm is not None and k_norm is not None:
        qk = rms_norm(qk, jnp.stack([q_norm] * (rows - 2) + [k_norm]), epsilon)  # weight [G + 1, H]
    qk = rotate(qk, cos, sin)
    return qk[:, :, :-1].reshape(num_lanes, -1, head_dim), qk[:, :, -1], v


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary position embedding of x [T, ..., H] by cos, sin [T, rotary_dim / 2].

    Dimension i pairs with i + rotary_dim / 2; those beyond rotary_dim pass through. float32 inside, dtype
    of `x` outside.
    """
    half = cos.shape[-1]
    shape = (cos.shape[0], *(1,) * (x.ndim - 2), half)
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    x32 = x.astype(jnp.float32)
    first, second, rest = x32[..., :half], x32[..., half : 2 * half], x32[..., 2 * half :]
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def last_slots(page_table: jax.Array, lengths: jax.Array, page_size: int) -> jax.Array:
    """KV slot [B] of each lane's last token; -1 for lanes without one, or longer than their page table."""
    position = lengths - 1
    index = jnp.clip(position // page_size, 0, page_table.shape[1] - 1)
    page = jnp.take_along_axis(page_table, index[:, None], axis=1)[:, 0]
    inside = (position >= 0) & (position < page_table.shape[1] * page_size)
    return jnp.where(inside, page * page_size + position % page_size, -1)


def copy_pages(pages: jax.Array, src: jax.Array, dst: jax.Array) -> jax.Array:
    """Copy whole pages; all reads happen before all writes. See `kernels_pallas.copy_pages`."""
    num_pages = pages.shape[0]
    target = jnp.where((dst >= 0) & (dst < num_pages), dst, num_pages)
    return pages.at[target].set(pages[jnp.clip(src, 0, num_pages - 1)], mode="drop")


def paged_decode(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    *,
    sm_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
) -> jax.Array:
    """Attention of one query token per lane. See `kernels_pallas.paged_decode`."""
    num_lanes, num_heads, head_dim = q.shape
    _, num_kv_heads, page_size, _ = k_pages.shape
    group = num_heads // num_kv_heads
    scale = (head_dim**-0.5 if sm_scale is None else sm_scale) * (1.0 if k_scale is None else k_scale)
    block_pages, page_table = _page_blocks(page_table, page_size, DECODE_BLOCK)
    block = block_pages * page_size

    queries = q.astype(jnp.float32).reshape(num_lanes, num_kv_heads, group, head_dim) * scale
    first = (
        jnp.zeros_like(lengths) if window is None else jnp.maximum(lengths - window, 0)
    )  # [B] first visible

    def step(i, carry):
        ids = lax.dynamic_slice_in_dim(page_table, i * block_pages, block_pages, axis=1)  # [B, n]
        position = i * block + jnp.arange(block, dtype=jnp.int32)
        visible = (position >= first[:, None]) & (position < lengths[:, None])  # [B, block]
        keys = _gather(k_pages, ids)  # [B, K, block, H]
        values = jnp.where(visible[:, None, :, None], _gather(v_pages, ids), 0.0)
        scores = jnp.einsum("bkgh,bksh->bkgs", queries, keys, precision=lax.Precision.HIGHEST)
        return _accumulate(carry, scores, visible[:, None, None, :], values, softcap)

    begin = jnp.min(jnp.where(lengths > 0, first, jnp.iinfo(jnp.int32).max)) // block
    end = -(-jnp.max(lengths) // block)
    carry = lax.fori_loop(begin, end, step, _empty(queries))
    out = _normalise(carry, _sinks(sinks, num_kv_heads, group))
    out = jnp.where((lengths > 0)[:, None, None, None], out, 0.0) * (1.0 if v_scale is None else v_scale)
    return out.reshape(num_lanes, num_heads, head_dim).astype(q.dtype)


def ragged_prefill(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    cu_seqlens: jax.Array,
    lengths: jax.Array,
    *,
    sm_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    span_ends: jax.Array | None = None,
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
) -> jax.Array:
    """Causal attention of packed query tokens of several rows. See `kernels_pallas.ragged_prefill`."""
    num_tokens, num_heads, head_dim = q.shape
    _, num_kv_heads, page_size, _ = k_pages.shape
    num_rows = page_table.shape[0]
    group = num_heads // num_kv_heads
    scale = head_dim**-0.5 if sm_scale is None else sm_scale
    if k_scale is not None:
        scale = scale * k_scale
    block_pages, page_table = _page_blocks(page_table, page_size, PREFILL_BLOCK)
    block = block_pages * page_size
    tile = _tile_size(num_tokens, num_rows)

    row_tokens = cu_seqlens[1:] - cu_seqlens[:-1]  # [R]
    tile_ends = jnp.cumsum(-(-row_tokens // tile))  # [R] tiles of the rows so far
    # One tile of slack, so that the slices of the last tile never clamp.
    queries = jnp.pad(q.astype(jnp.float32) * scale, ((0, tile), (0, 0), (0, 0)))
    sink_logits = _sinks(sinks, num_kv_heads, group, repeats=tile)
    if span_ends is not None:
        span_ends = jnp.pad(span_ends, (0, tile))

    def attend(t, out):
        row = jnp.searchsorted(tile_ends, t, side="right").astype(jnp.int32)
        index = t - (tile_ends[row] - -(-row_tokens[row] // tile))  # tile number inside the row
        token = cu_seqlens[row] + index * tile
        count = jnp.minimum(row_tokens[row] - index * tile, tile)
        position = lengths[row] - row_tokens[row] + index * tile  # of the tile's first query
        query_position = position + jnp.arange(tile, dtype=jnp.int32)  # [tile]
        stop = query_position + 1  # [tile] past the keys that a query sees
        if span_ends is not None:
            stop = jnp.maximum(stop, lax.dynamic_slice_in_dim(span_ends, token, tile))
            stop = jnp.minimum(stop, lengths[row])
        chunk = lax.dynamic_slice_in_dim(queries, token, tile)  # [tile, N, H]
        chunk = chunk.reshape(tile, num_kv_heads, group, head_dim)
        chunk = chunk.transpose(1, 2, 0, 3).reshape(num_kv_heads, group * tile, head_dim)
        row_pages = page_table[row]

        def step(i, carry):
            ids = lax.dynamic_slice_in_dim(row_pages, i * block_pages, block_pages)
            key_position = i * block + jnp.arange(block, dtype=jnp.int32)
            visible = key_position[None, :] < stop[:, None]  # [tile, block]
            if window is not None:
                visible &= key_position[None, :] > query_position[:, None] - window
            keys = _gather(k_pages, ids)  # [K, block, H]
            written = (key_position < lengths[row])[None, :, None]
            values = jnp.where(written, _gather(v_pages, ids), 0.0)
            scores = jnp.einsum("kqh,ksh->kqs", chunk, keys, precision=lax.Precision.HIGHEST)
            return _accumulate(carry, scores, jnp.tile(visible, (group, 1))[None], values, softcap)

        begin = 0 if window is None else jnp.maximum(position - window + 1, 0) // block
        end = -(-jnp.max(jnp.where(jnp.arange(tile) < count, stop, 0)) // block)
        result = _normalise(lax.fori_loop(begin, end, step, _empty(chunk)), sink_logits)
        result = result.reshape(num_kv_heads, group, tile, head_dim).transpose(2, 0, 1, 3)
        result = jnp.where((jnp.arange(tile) < count)[:, None, None, None], result, 0.0)
        result = result.reshape(tile, num_heads, head_dim)
        # Rows come in packed order, so what a tile writes past its row is overwritten by the row's successor.
        return lax.dynamic_update_slice_in_dim(out, result, token, axis=0)

    out = lax.fori_loop(0, tile_ends[-1], attend, jnp.zeros_like(queries))
    if v_scale is not None:
        out = out * v_scale
    return out[:num_tokens].astype(q.dtype)


def _page_blocks(page_table: jax.Array, page_size: int, block: int) -> tuple[int, jax.Array]:
    """Pages per block, and the table padded to whole blocks (with page 0: what it holds is masked)."""
    block_pages = min(max(1, block // page_size), page_table.shape[1])
    missing = -page_table.shape[1] % block_pages
    return block_pages, jnp.pad(page_table, ((0, 0), (0, missing)))


def _tile_size(num_tokens: int, num_rows: int) -> int:
    """Query tokens per tile: large tiles for long chunks, small ones where rows hold few tokens each."""
    mean = -(-num_tokens // max(num_rows, 1))
    return min(PREFILL_TILE, max(8, 1 << (mean - 1).bit_length()))


def _gather(pages: jax.Array, ids: jax.Array) -> jax.Array:
    """Pages [P, K, S, H] at ids [..., n] as float32 [..., K, n * S, H]."""
    _, num_kv_heads, page_size, head_dim = pages.shape
    if pages.dtype.itemsize == 1:
        # Else XLA widens the whole pool on a CPU, once before the loop instead of a block in each trip.
        pages, ids = lax.optimization_barrier((pages, ids))
    block = jnp.take(pages, ids, axis=0, mode="clip")  # [..., n, K, S, H]
    block = jnp.moveaxis(block, -4, -3)  # [..., K, n, S, H]
    shape = (*ids.shape[:-1], num_kv_heads, ids.shape[-1] * page_size, head_dim)
    return block.reshape(shape).astype(jnp.float32)


def _empty(queries: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Accumulator, running maximum and denominator of an online softmax that has seen nothing."""
    acc = jnp.zeros_like(queries)  # [..., Q, H]; *_like keeps what shard_map knows of the operand
    return acc, jnp.full_like(queries[..., 0], _MASKED), acc[..., 0]


def _accumulate(carry, scores, visible, values, softcap):
    """One online-softmax update: scores [..., Q, S], values [..., S, H]."""
    acc, maximum, denominator = carry
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(visible, scores, _MASKED)
    new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
    decay = jnp.exp(maximum - new_maximum)
    weights = jnp.where(visible, jnp.exp(scores - new_maximum[..., None]), 0.0)
    update = jnp.einsum("...qs,...sh->...qh", weights, values, precision=lax.Precision.HIGHEST)
    return acc * decay[..., None] + update, new_maximum, denominator * decay + weights.sum(axis=-1)


def _sinks(sinks: jax.Array | None, num_kv_heads: int, group: int, repeats: int = 1) -> jax.Array | None:
    """Sink logits [N] as [K, G * repeats], each query head's logit repeated for its query tokens."""
    if sinks is None:
        return None
    return jnp.repeat(sinks.astype(jnp.float32).reshape(num_kv_heads, group), repeats, axis=1)


def _normalise(carry, sinks: jax.Array | None) -> jax.Array:
    """Divide by the denominator; a sink adds exp(sink) to it and nothing to the output."""
    acc, maximum, denominator = carry
    if sinks is not None:
        new_maximum = jnp.maximum(maximum, sinks)
        decay = jnp.exp(maximum - new_maximum)
        acc, denominator = acc * decay[..., None], denominator * decay + jnp.exp(sinks - new_maximum)
    return acc / jnp.maximum(denominator, 1e-30)[..., None]


def gumbel_noise(seeds: jax.Array, positions: jax.Array, vocab_size: int) -> jax.Array:
    """Standard Gumbel noise [B, V] float32. See `kernels_pallas.gumbel_noise`."""
    first, second = row_keys(seeds, positions)
    tokens = jnp.arange(vocab_size, dtype=jnp.uint32)
    return gumbel_from_bits(hash_tokens(first[:, None], second[:, None], tokens[None, :]))


def row_keys(seeds: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two 32-bit keys per lane; two, so that no two lanes see shifted copies of one noise sequence."""
    seed, position = seeds.astype(jnp.uint32), positions.astype(jnp.uint32)
    first = mix32(mix32(seed + jnp.uint32(0x9E3779B9)) ^ position)
    return first, mix32(mix32(first + jnp.uint32(0x7F4A7C15)) ^ seed)


def mix32(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: a bijection of uint32 whose output bits all depend on all input bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def hash_tokens(first: jax.Array, second: jax.Array, tokens: jax.Array) -> jax.Array:
    """32 random bits of a (lane, token id); all uint32, broadcast together."""
    x = tokens * jnp.uint32(0x9E3779B1)
    x = (x ^ (x >> 16) ^ (first ^ (first >> 16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13) ^ second) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def gumbel_from_bits(bits: jax.Array) -> jax.Array:
    """-log(-log(1 - u)), u = (bits + 1/2) / 2**32: finest where u is small, which are the winning draws."""
    u = jnp.minimum(bits.astype(jnp.float32) * 2.0**-32 + 2.0**-33, 1.0 - 2.0**-24)
    series = u * (1.0 + u * (0.5 + u * (1.0 / 3.0 + u * 0.25)))  # 1 - u would round the small u away
    exponential = jnp.where(u < 2.0**-6, series, -jnp.log(1.0 - u))
    return -jnp.log(exponential)


UNDRAWN = -2  # in the place of a token that has not been drawn


def sample(
    logits: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    seeds: jax.Array,
    positions: jax.Array,
    known: jax.Array | None = None,
) -> jax.Array:
    """One token per lane. See `kernels_pallas.sample`.

    Top-k, top-p and min-p each keep a prefix of the tokens ordered by (logit descending, id ascending). So
    the noisy maximum of the kept tokens is found without a sort: take the noisy maximum of all tokens; while
    the tokens before it in the order say that it is not kept, take the noisy maximum of those. Each trip is
    one pass, and the first candidate is already kept with the probability of the whole prefix.
    """
    logits = logits.astype(jnp.float32)
    maximum = logits.max(axis=-1)  # [B]
    bad = jnp.isnan(logits).any(axis=-1)  # a maximum may lose the NaN on CPUs
    greedy = temperature <= 0.0
    vocab_size = logits.shape[1]
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, 1)

    def draw():
        safe = jnp.where(greedy, 1.0, temperature)[:, None]
        top = maximum[:, None]
        # The shift keeps tiny temperatures finite.
        scaled = jnp.where(logits == top, 0.0, (logits - top) / safe)
        weights = jnp.exp(scaled)
        noisy = lax.optimization_barrier(scaled + gumbel_noise(seeds, positions, vocab_size))
        budget = jnp.where(top_p < 1.0, top_p * weights.sum(axis=-1), jnp.inf)  # mass that may lie before
        done = greedy | bad | ((top_k >= vocab_size) & (top_p >= 1.0) & (min_p <= 0.0))

        def check(state):
            token, done = state
            candidate = jnp.take_along_axis(logits, token[:, None], axis=1)
            before = (logits > candidate) | ((logits == candidate) & (ids < token[:, None]))
            count = before.sum(axis=-1, dtype=jnp.int32)
            mass = jnp.where(before, weights, 0.0).sum(axis=-1)
            weight = jnp.take_along_axis(weights, token[:, None], axis=1)[:, 0]
            kept = (count < top_k) & (mass <= budget) & (weight >= min_p)
            done |= kept | (count == 0)  # the first token of the order is always kept
            return jnp.where(done, token, _first_argmax(jnp.where(before, noisy, -jnp.inf))), done

        token = _first_argmax(noisy)
        # A NaN row has no maximum to find; any index will do until the end.
        return lax.while_loop(lambda s: ~s[1].all(), check, (jnp.minimum(token, vocab_size - 1), done))[0]

    best = _first_argmax(logits)
    tokens = jnp.where(greedy, best, lax.cond(greedy.all(), lambda: best, draw))
    tokens = jnp.where(bad, -1, tokens)
    return tokens if known is None else jnp.where(known == UNDRAWN, tokens, known)


def _first_argmax(x: jax.Array) -> jax.Array:
    """Lowest index of the row maximum, [B] int32; two plain reductions, which CPUs run faster than argmax."""
    x = lax.optimization_barrier(x)  # both passes must see the same rounding of x
    index = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(x == x.max(axis=-1, keepdims=True), index, x.shape[1]).min(axis=-1)


class LogProbabilities(NamedTuple):
    """Natural log-probabilities of B rows: the chosen token's, and those of the n likeliest tokens."""

    chosen: jax.Array  # [B] float32
    top_values: jax.Array  # [B, n] float32, largest first; ties by the lowest id
    top_ids: jax.Array  # [B, n] int32
    normaliser: jax.Array  # [B] float32: a token's is its logit / temperature minus this


class LogitSummary(NamedTuple):
    """Of T tiles of V / T neighbouring logits of B rows: maxima, and sums of exp((logit - maximum) / temperature)."""

    maxima: jax.Array  # [B, T] float32, finite: -inf is a large negative number
    sums: jax.Array  # [B, T] float32


def log_probabilities(
    logits: jax.Array, tokens: jax.Array, temperature: jax.Array, top_n: int
) -> LogProbabilities:
    """Log-probabilities of given and of the likeliest tokens. See `kernels_pallas.log_probabilities`."""
    scaled = logits / _divisor(temperature)
    normaliser = jax.nn.logsumexp(scaled, axis=-1, keepdims=True)  # [B, 1]
    values, ids = lax.top_k(scaled, top_n)
    return _log_probabilities(scaled, tokens, values, ids, normaliser)


def log_probabilities_of_summary(
    logits: jax.Array, tokens: jax.Array, temperature: jax.Array, top_n: int, summary: LogitSummary
) -> LogProbabilities:
    """`log_probabilities` of logits that have been summarised at this temperature: few of them are looked at.

    The n largest logits, ties by the lowest id, are in the n tiles of the largest maxima, ties by the first tile:
    before a logit in any other come those n maxima.
    """
    divisor = _divisor(temperature)  # [B, 1]
    maxima, sums = summary
    shift = maxima.max(axis=-1, keepdims=True)
    total = (sums * jnp.exp((maxima - shift) / divisor)).sum(axis=-1, keepdims=True)
    normaliser = shift / divisor + jnp.log(total)
    tiles = jnp.sort(lax.top_k(maxima, min(top_n, maxima.shape[1]))[1], axis=-1)  # [B, n]
    split = logits.reshape(logits.shape[0], maxima.shape[1], -1)
    found = jnp.take_along_axis(split, tiles[:, :, None], axis=1)  # [B, n, V / T]
    values, places = lax.top_k(found.reshape(logits.shape[0], -1), top_n)
    size = split.shape[2]
    ids = jnp.take_along_axis(tiles, places // size, axis=1) * size + places % size
    return _log_probabilities(logits, tokens, values, ids, normaliser, divisor)


def _divisor(temperature: jax.Array) -> jax.Array:
    return jnp.where(temperature > 0.0, temperature, 1.0)[:, None]


def _log_probabilities(logits, tokens, values, ids, normaliser, divisor=1.0) -> LogProbabilities:
    chosen = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[:, None], axis=-1)
    return LogProbabilities(
        (chosen / divisor - normaliser)[:, 0],
        values / divisor - normaliser,
        ids.astype(jnp.int32),
        normaliser[:, 0],
    )


def fused_linear(
    x: jax.Array,
    weight: jax.Array,
    norm: jax.Array | None,
    epsilon: float,
    bias: jax.Array | None,
    gated: bool,
    residual: jax.Array | None,
) -> jax.Array:
    """A product with what stands around it in a decoder layer. See `kernels_pallas.fused_linear`."""
    h = x if norm is None else rms_norm(x, norm, epsilon)
    matrix = weight.reshape(-1, weight.shape[-1])
    y = lax.dot_general(h, matrix, (((1,), (1,)), ((), ())), preferred_element_type=x.dtype)
    if bias is not None:
        y = y + bias.reshape(-1).astype(y.dtype)
    y = y.reshape(x.shape[0], *weight.shape[:-1])
    if gated:
        y = jax.nn.silu(y[:, 0]) * y[:, 1]
    return y if residual is None else residual + y


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
    """Normalise the last axis of `x`, scale by `weight` (broadcast); float32 inside, dtype of `x` outside."""
    x32 = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return (x32 * inverse * weight.astype(jnp.float32)).astype(x.dtype)
