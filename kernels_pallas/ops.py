"""The public operations: shapes, supported ranges and errors. Each picks its implementation itself.

Axes: B lanes, T packed tokens, R rows, P pages, MP pages of a row, S page size, N query heads, K kv heads,
G = N // K, H head dim, V vocabulary. Key and value pages are `[P, K, S, H]`; a row's KV position t lives in
page `page_table[row, t // S]` at offset `t % S`. Pages that no row uses, and offsets past a row's length,
may hold anything.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kernels_pallas import (
    decode_config,
    decode_kernel,
    logprob_kernel,
    mosaic,
    prefill_config,
    prefill_kernel,
    reference,
    sample_kernel,
)
from kernels_pallas.checks import (
    check_attention,
    check_common_prefix,
    check_lanes,
    check_pages,
    check_scales,
    check_update,
)
from kernels_pallas.reference import LogitSummary, LogProbabilities

Implementation = Literal["reference", "mosaic"]
type Scale = jax.Array | float | None


def write_kv(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    *,
    k_scale: Scale = None,
    v_scale: Scale = None,
) -> tuple[jax.Array, jax.Array]:
    """Store the keys and values of T new tokens; in place when the pages are donated.

    Args:
        k_pages, v_pages: [P, K, S, H].
        k, v: [T, K, H], rounded to the dtype of the pages; 8-bit types saturate.
        slots: [T] int32, `page * S + offset`; slots outside [0, P * S) are dropped (padding).
            The slots inside are distinct.
        k_scale, v_scale: scalars by which k and v are divided before they are rounded; None is 1.

    Returns:
        (k_pages, v_pages) with the tokens stored.

    Raises:
        ValueError: shapes that do not fit together.
    """
    check_pages(k_pages, v_pages)
    check_scales(k_scale, v_scale)
    _, num_kv_heads, _, head_dim = k_pages.shape
    wanted = (slots.shape[0], num_kv_heads, head_dim)
    if k.shape != wanted or v.shape != wanted:
        raise ValueError(f"k and v must be [T, K, H] = {wanted}, got {k.shape} and {v.shape}")
    return reference.write_kv(k_pages, v_pages, k, v, slots, k_scale, v_scale)


def copy_pages(pages: jax.Array, src: jax.Array, dst: jax.Array) -> jax.Array:
    """Copy pages `src[i]` to `dst[i]`, all reads before all writes; in place when the pages are donated.

    Args:
        pages: [P, K, S, H].
        src, dst: [C] int32; a dst outside [0, P) is dropped (padding). The dst in range are distinct.

    Returns:
        pages with the copies made.
    """
    if pages.ndim != 4 or src.shape != dst.shape or src.ndim != 1:
        raise ValueError(
            f"want pages [P, K, S, H], src [C], dst [C]; got {pages.shape}, {src.shape}, {dst.shape}"
        )
    return reference.copy_pages(pages, src, dst)


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
    k_scale: Scale = None,
    v_scale: Scale = None,
    deterministic: bool = False,
    common_prefix: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Attention of one query token per lane over its paged keys and values (grouped-query).

    Args:
        q: [B, N, H]; N a multiple of K.
        k_pages, v_pages: [P, K, S, H].
        page_table: [B, MP] int32.
        lengths: [B] int32, KV tokens of the lane including the new one; lanes of length 0 give zeros.
        sm_scale: factor on the scores; H ** -0.5 by default.
        window: only the last `window` positions are seen, the query's own among them.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: [N], a logit per query head that takes part in the softmax and has no value.
        k_scale, v_scale: scalars by which the stored keys and values are multiplied, those that `write_kv`
            was given (pages of float8_e4m3fn); None is 1.
        deterministic: a kernel lane's bits do not depend on the size of its batch, at some cost in speed.
        common_prefix: [1] int32, tokens that all lanes of length above 0 have in the same pages, with which the first
            row of page_table begins even if its lane is empty. The kernel reads them once for all lanes, up to a
            multiple of 128 tokens and not the last of any lane, and a lane's result differs by rounding only. It is
            ignored with a window or `deterministic`, and by the reference.
        implementation: 'reference' or 'mosaic' forces one; by default the kernel where it can run.

    Returns:
        [B, N, H] in the dtype of q; the softmax and the sums are float32.

    Raises:
        ValueError: shapes that do not fit together, or an option out of range.
    """
    check_attention(q, k_pages, v_pages, page_table, lengths, window, softcap, sinks)
    check_scales(k_scale, v_scale)
    check_common_prefix(common_prefix)
    if page_table.shape[0] != q.shape[0]:
        raise ValueError(f"page_table has {page_table.shape[0]} rows for {q.shape[0]} lanes")
    reason = decode_config.unsupported(q, k_pages, v_pages)
    as_rows = reason is not None and prefill_config.unsupported(q, k_pages, v_pages) is None
    page_table, lengths = _in_own_buffers(k_pages, page_table, lengths)
    operands = (q, k_pages, v_pages, page_table, lengths)
    options: dict[str, Any] = {"sm_scale": sm_scale, "window": window, "softcap": softcap, "sinks": sinks}
    options |= {"k_scale": k_scale, "v_scale": v_scale}
    if runs_kernel("paged_decode", implementation, None if as_rows else reason):
        if as_rows:  # their bits do not depend on one another
            return prefill_kernel.paged_decode(*operands, **options)
        prefix = _shared(common_prefix, *operands, window, deterministic)
        return decode_kernel.paged_decode(
            *operands, **options, deterministic=deterministic, common_prefix=prefix
        )
    return reference.paged_decode(*operands, **options)


def paged_decode_update(
    qkv: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    epsilon: float = 1e-6,
    sm_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    deterministic: bool = False,
    ahead: Sequence[jax.Array] = (),
    common_prefix: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A decode layer between its two projections: norm, rope, KV write and attention, as one launch.

    The new token of a lane is stored at position `lengths - 1`, in place when the pages are donated; no other
    lane may use its page. Rounding is that of the separate steps: q and k take the dtype of qkv after the
    norm and after the rope, with float32 inside.

    Args:
        qkv: [B, K, G + 2, H]; per kv head its G query heads, then k, then v.
        k_pages, v_pages: [P, K, S, H].
        page_table: [B, MP] int32.
        lengths: [B] int32, at most MP * S, KV tokens of the lane including the new one; lanes of length 0
            write nothing and give zeros.
        cos, sin: [B, rotary_dim / 2] float32; dimension i rotates with i + rotary_dim / 2, the dimensions
            from rotary_dim on not at all.
        q_norm, k_norm: [H] weights of the root-mean-square norm of every head; both or neither.
        epsilon: added to the mean square.
        sm_scale, window, softcap, sinks, deterministic, common_prefix, implementation: as in `paged_decode`. The new
            token is no part of the common prefix.
        k_scale, v_scale: as in `paged_decode`; the new token is divided by them and rounded to the dtype of
            the pages, and attended to as the pages hold it.
        ahead: weights [N, D] or [P, N, D] that the next products read, soonest first. With a single lane the
            kernel brings up to 16 MiB of them into the L2 cache; no result depends on them.

    Returns:
        (o [B, N, H] in the dtype of qkv, k_pages, v_pages).

    Raises:
        ValueError: shapes that do not fit together, or an option out of range.
    """
    check_update(qkv, k_pages, v_pages, page_table, lengths, cos, sin, q_norm, k_norm, window, softcap, sinks)
    check_scales(k_scale, v_scale)
    check_common_prefix(common_prefix)
    if any(weight.ndim not in (2, 3) for weight in ahead):
        raise ValueError(f"ahead must be weights [N, D] or [P, N, D], got {[w.shape for w in ahead]}")
    num_lanes, num_kv_heads, rows, head_dim = qkv.shape
    q = jax.ShapeDtypeStruct((num_lanes, num_kv_heads * (rows - 2), head_dim), qkv.dtype)
    reason = decode_config.unsupported(q, k_pages, v_pages)
    reason = reason or decode_config.unsupported_update(2 * cos.shape[1], k_pages)
    page_table, lengths = _in_own_buffers(k_pages, page_table, lengths)
    options: dict[str, Any] = {"sm_scale": sm_scale, "window": window, "softcap": softcap, "sinks": sinks}
    options |= {"k_scale": k_scale, "v_scale": v_scale}
    if runs_kernel("paged_decode_update", implementation, reason):
        return decode_kernel.paged_decode_update(
            qkv,
            k_pages,
            v_pages,
            page_table,
            lengths,
            cos.astype(jnp.float32),
            sin.astype(jnp.float32),
            q_norm=q_norm,
            k_norm=k_norm,
            epsilon=epsilon,
            deterministic=deterministic,
            ahead=ahead,
            common_prefix=_shared(
                common_prefix, q, k_pages, v_pages, page_table, lengths, window, deterministic
            ),
            **options,
        )
    queries, k, v = reference.prepare_heads(qkv, cos, sin, q_norm, k_norm, epsilon)
    slots = reference.last_slots(page_table, lengths, k_pages.shape[2])
    k_pages, v_pages = reference.write_kv(k_pages, v_pages, k, v, slots, k_scale, v_scale)
    # Where only the rope or the write is beyond the kernel, the attention still runs as one.
    o = paged_decode(
        queries,
        k_pages,
        v_pages,
        page_table,
        lengths,
        **options,
        deterministic=deterministic,
        common_prefix=common_prefix,
        implementation=implementation,
    )
    return o, k_pages, v_pages


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
    k_scale: Scale = None,
    v_scale: Scale = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Causal attention of packed chunks of query tokens over paged keys and values (grouped-query).

    The keys and values of the chunks are already in the pages. Query j of a row of n query tokens sits at
    position `lengths[row] - n + j` and sees the positions up to its own, so cached prefixes, later chunks,
    single decode tokens and a few speculative tokens are all the same case. The bits of a row
    from the kernel do not depend on the other rows.

    Args:
        q: [T, N, H] packed; row r holds tokens `cu_seqlens[r]` to `cu_seqlens[r + 1]`.
        k_pages, v_pages: [P, K, S, H].
        page_table: [R, MP] int32.
        cu_seqlens: [R + 1] int32, rising from 0; rows may be empty. Tokens from `cu_seqlens[-1]` on are
            padding.
        lengths: [R] int32, KV tokens of the row after this chunk.
        sm_scale, window, softcap, sinks, implementation: as in `paged_decode`; a window ends at its query.
        span_ends: [T] int32, per token the end (exclusive) of the positions it sees where that lies past its
            own: the tokens of an image see one another when each holds the end of the image. Never past
            the row's length. None is causal everywhere.
        k_scale, v_scale: as in `paged_decode`.

    Returns:
        [T, N, H] in the dtype of q; padding gives zeros.

    Raises:
        ValueError: shapes that do not fit together, or an option out of range.
    """
    check_attention(q, k_pages, v_pages, page_table, lengths, window, softcap, sinks)
    if cu_seqlens.shape != (page_table.shape[0] + 1,):
        raise ValueError(f"cu_seqlens must be [R + 1] = [{page_table.shape[0] + 1}], got {cu_seqlens.shape}")
    if span_ends is not None and (span_ends.shape != q.shape[:1] or span_ends.dtype != jnp.int32):
        raise ValueError(
            f"span_ends must be [T] = {q.shape[:1]} int32, got {span_ends.shape} {span_ends.dtype}"
        )
    check_scales(k_scale, v_scale)
    reason = prefill_config.unsupported(q, k_pages, v_pages)
    kernel = runs_kernel("ragged_prefill", implementation, reason)
    page_table, lengths = _in_own_buffers(k_pages, page_table, lengths)
    attend = prefill_kernel.ragged_prefill if kernel else reference.ragged_prefill
    return attend(
        q,
        k_pages,
        v_pages,
        page_table,
        cu_seqlens,
        lengths,
        sm_scale=sm_scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        span_ends=span_ends,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def sample(
    logits: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    seeds: jax.Array,
    positions: jax.Array,
    *,
    known: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Draw one token per lane: temperature, top-k with top-p, min-p, then a seeded Gumbel draw; no sort.

    A token is kept while fewer than top_k tokens lie strictly above it, their probability mass is at most
    top_p, and its own probability is at least min_p times the largest; ties count in the order of their ids.
    A lane's draw depends on its own row, seed and position only, so it is the same in any batch.

    Args:
        logits: [B, V] float32; a token at -inf is never drawn beside a finite one.
        temperature: [B] float32; 0 is greedy (the lowest id among the largest), whatever the others say.
        top_k: [B] int32, at least 1; V or more keeps all.
        top_p, min_p: [B] float32 in [0, 1]; 1 and 0 keep all.
        seeds: [B] int32 or uint32.
        positions: [B] int32.
        known: [B] int32, tokens of lanes that have been drawn, whose logits are not looked at; UNDRAWN (-2) of the
            others, none of which is greedy.
        implementation: as in `paged_decode`.

    Returns:
        [B] int32 token ids; -1 for a row that holds a NaN.

    Raises:
        ValueError: shapes that do not fit together, or a forced implementation that cannot run.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be [B, V], got {logits.shape}")
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    check_lanes(logits.shape[:1], **options, seeds=seeds, positions=positions, known=known)
    kernel = runs_kernel("sample", implementation, sample_kernel.unsupported(logits))
    draw = sample_kernel.sample if kernel else reference.sample
    top_k = jnp.maximum(top_k, 1)
    top_p, min_p = jnp.clip(top_p, 0.0, 1.0), jnp.clip(min_p, 0.0, 1.0)
    return draw(logits, temperature, top_k, top_p, min_p, seeds, positions, known)


def log_probabilities(
    logits: jax.Array,
    tokens: jax.Array,
    temperature: jax.Array,
    top_n: int,
    *,
    summary: LogitSummary | None = None,
    implementation: Implementation | None = None,
) -> LogProbabilities:
    """Natural log-probabilities of a given token and of the `top_n` likeliest, per lane; no sort of the row.

    They are of the softmax of logits / temperature, untruncated.

    Args:
        logits: [B, V] float32.
        tokens: [B] int32 in [0, V); a negative one counts as 0.
        temperature: [B] float32; 0 takes the logits as they are.
        top_n: 0 to V; the kernel takes up to 64.
        summary: of these logits at this temperature, from `head_sample`: then no pass over the logits is made.
        implementation: as in `paged_decode`.

    Returns:
        LogProbabilities: chosen [B], top_values and top_ids [B, top_n] (largest first, ties by the lowest id),
        and the normaliser [B], for further tokens: logit / temperature - normaliser. Rows that hold a NaN give
        NaN and any ids.

    Raises:
        ValueError: shapes that do not fit together, or a forced implementation that cannot run.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be [B, V], got {logits.shape}")
    check_lanes(logits.shape[:1], tokens=tokens, temperature=temperature)
    if not 0 <= top_n <= logits.shape[1]:
        raise ValueError(f"top_n must be in 0 to V = {logits.shape[1]}, got {top_n}")
    if summary is not None:
        return reference.log_probabilities_of_summary(logits, tokens, temperature, top_n, summary)
    kernel = runs_kernel("log_probabilities", implementation, logprob_kernel.unsupported(logits, top_n))
    compute = logprob_kernel.log_probabilities if kernel else reference.log_probabilities
    return compute(logits, tokens, temperature, top_n)


def gumbel_noise(seeds: jax.Array, positions: jax.Array, vocab_size: int) -> jax.Array:
    """Standard Gumbel noise [B, V] float32, a pure function of (seed, position, token id).

    A counter-based generator: two 32-bit keys are hashed from a lane's (seed, position), and a 32-bit
    multiply-xorshift hash of the token id under both keys gives the bits; `reference.py` is the definition.

    Args:
        seeds: [B] int32 or uint32.
        positions: [B] int32.
        vocab_size: V.
    """
    return reference.gumbel_noise(seeds, positions, vocab_size)


def runs_kernel(op: str, implementation: str | None, unsupported: str | None, *, report: bool = True) -> bool:
    """Whether the Mosaic GPU kernel runs; `unsupported` says why it cannot take the operands, or None.

    report: log that a GPU has to do without.
    """
    if implementation == "reference":
        return False
    if implementation == "mosaic":
        if unsupported is not None:
            raise ValueError(f"the {op} kernel cannot run: {unsupported}; use implementation=None")
        return True
    if implementation is not None:
        raise ValueError(f"implementation {implementation!r} is unknown; use None, 'reference' or 'mosaic'")
    reason = mosaic.device_without_kernels() or unsupported
    if report and reason is not None and mosaic.default_device().platform == "gpu":
        mosaic.report_fallback(op, reason)
    return reason is None


def _in_own_buffers(
    k_pages: jax.Array, page_table: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Page table and lengths brought into range by arithmetic that XLA cannot drop.

    XLA hands a contiguous slice of a larger array to a kernel in place, and Mosaic refuses a buffer that does
    not start at a multiple of 256 bytes. The result of a computation is a buffer of its own.
    """
    return jnp.clip(page_table, 0, k_pages.shape[0] - 1), jnp.maximum(lengths, 0)


def _shared(
    common_prefix: jax.Array | None,
    q,
    k_pages,
    v_pages,
    page_table,
    lengths,
    window: int | None,
    deterministic,
) -> jax.Array | None:
    """The common prefix that decode is to read once for all lanes, in a buffer of its own; None: each its own.

    Layers with a window see little of it, deterministic ones owe a lane the same bits whatever its neighbours are.
    """
    unsupported = prefill_config.unsupported(q, k_pages, v_pages) is not None
    if common_prefix is None or window is not None or deterministic or unsupported:
        return None
    capacity = page_table.shape[1] * k_pages.shape[2]
    shortest = jnp.where(lengths > 0, lengths, capacity).min()
    return jnp.clip(common_prefix, 0, jnp.maximum(shortest - 1, 0))
