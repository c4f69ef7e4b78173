"""Float64 NumPy models of the operations, and random paged inputs with poison where nothing may be read."""

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Paged:
    """Rows of keys and values [K, length, H] (float64) and the same data scattered over permuted pages."""

    keys: list[np.ndarray]
    values: list[np.ndarray]
    k_pages: np.ndarray  # [P, K, S, H]
    v_pages: np.ndarray
    page_table: np.ndarray  # [R, MP] int32
    lengths: np.ndarray  # [R] int32


def paged(
    rng,
    lengths,
    num_kv_heads,
    head_dim,
    page_size,
    *,
    common=0,
    spare_pages=3,
    poison=np.nan,
    dtype=np.float32,
):
    """Random KV of the given lengths; pages of no row and offsets past a length hold `poison`.

    The first `common` tokens, of whole pages, are the same for all rows of a length, which is greater; their pages
    are the first of the first row in any case.
    """
    lengths = np.asarray(lengths, np.int32)
    counts = [-(-int(n) // page_size) for n in lengths]
    max_pages = max([*counts, common // page_size, 1])
    num_pages = sum(counts) + max(spare_pages, common // page_size)
    order = rng.permutation(num_pages)
    shape = (num_pages, num_kv_heads, page_size, head_dim)
    k_pages, v_pages = np.full(shape, poison, dtype), np.full(shape, poison, dtype)
    page_table = np.full((len(lengths), max_pages), order[-1], np.int32)  # unused entries: a poisoned page
    keys, values, taken = [], [], 0
    shared = order[:0]
    if common:
        shared, taken = order[: common // page_size], common // page_size
        page_table[0, : len(shared)] = shared
        first = rng.normal(size=(2, num_kv_heads, common, head_dim)).astype(dtype)
    for row, length in enumerate(lengths):
        k = rng.normal(size=(num_kv_heads, length, head_dim)).astype(dtype)
        v = rng.normal(size=(num_kv_heads, length, head_dim)).astype(dtype)
        own = counts[row]
        if common and length:
            k[:, :common], v[:, :common] = first
            page_table[row, : len(shared)] = shared
            own -= len(shared)
        keys.append(k.astype(np.float64))
        values.append(v.astype(np.float64))
        page_table[row, counts[row] - own : counts[row]] = order[taken : taken + own]
        taken += own
        for t in range(length):
            page = page_table[row, t // page_size]
            k_pages[page, :, t % page_size] = k[:, t]
            v_pages[page, :, t % page_size] = v[:, t]
    return Paged(keys, values, k_pages, v_pages, page_table, lengths)


def scaled(kv: Paged, scales) -> Paged:
    """The keys and values (not the pages) times (k_scale, v_scale); the same with None."""
    k_scale, v_scale = scales or (1.0, 1.0)
    return replace(kv, keys=[k * k_scale for k in kv.keys], values=[v * v_scale for v in kv.values])


def attend(
    q, keys, values, first_position, *, sm_scale=None, window=None, softcap=None, sinks=None, span_ends=None
):
    """Attention of q [n, N, H] at first_position.. over keys, values [K, length, H]; float64 [n, N, H]."""
    n, num_heads, head_dim = q.shape
    num_kv_heads, length, _ = keys.shape
    q = q.astype(np.float64).reshape(n, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = q.transpose(1, 2, 0, 3) @ keys[:, None].swapaxes(2, 3)  # [K, G, n, length]
    scores *= head_dim**-0.5 if sm_scale is None else sm_scale
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    position = first_position + np.arange(n)[:, None]
    visible = np.arange(length)[None] <= position
    if span_ends is not None:
        visible |= np.arange(length)[None] < span_ends[:, None]
    if window is not None:
        visible &= np.arange(length)[None] > position - window
    scores = np.where(visible, scores, -np.inf)
    if sinks is not None:
        sink = sinks.astype(np.float64).reshape(num_kv_heads, -1, 1, 1)
        scores = np.concatenate([scores, np.broadcast_to(sink, (*scores.shape[:3], 1))], axis=-1)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out = weights[..., :length] @ values[:, None]  # [K, G, n, H]
    return out.transpose(2, 0, 1, 3).reshape(n, num_heads, head_dim)


def decode(q, kv: Paged, **options):
    """[B, N, H] float64: one query per row, at its last position."""
    out = np.zeros(q.shape, np.float64)
    for row, length in enumerate(kv.lengths):
        if length:
            out[row] = attend(q[row : row + 1], kv.keys[row], kv.values[row], length - 1, **options)[0]
    return out


def prefill(q, kv: Paged, cu_seqlens, *, span_ends=None, **options):
    """[T, N, H] float64; zeros past the last row."""
    out = np.zeros(q.shape, np.float64)
    for row, length in enumerate(kv.lengths):
        start, stop = cu_seqlens[row], cu_seqlens[row + 1]
        if stop > start:
            first = length - (stop - start)
            spans = None if span_ends is None else span_ends[start:stop]
            out[start:stop] = attend(
                q[start:stop], kv.keys[row], kv.values[row], first, span_ends=spans, **options
            )
    return out


def relative_error(got, want) -> float:
    """Norm of the difference over the norm of what is wanted; NaN if either holds one."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def kept_tokens(logits, temperature, top_k, top_p, min_p):
    """Mask [V] of one row by a sort: the tokens that top-k, top-p and min-p leave."""
    scaled = logits.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-logits.astype(np.float64), kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    kept = np.zeros(len(logits), bool)
    kept[order] = (np.arange(len(logits)) < top_k) & ((before <= top_p) | (top_p >= 1.0))
    return kept & (probabilities >= min_p * probabilities.max())
