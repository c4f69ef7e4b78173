"""Shapes and options of the public operations: ValueError names what does not fit."""

import jax
import jax.numpy as jnp


def check_pages(k_pages: jax.Array, v_pages: jax.Array) -> None:
    if k_pages.ndim != 4 or k_pages.shape != v_pages.shape:
        raise ValueError(
            f"k_pages and v_pages must both be [P, K, S, H], got {k_pages.shape} and {v_pages.shape}"
        )


def check_scales(k_scale, v_scale) -> None:
    for name, value in (("k_scale", k_scale), ("v_scale", v_scale)):
        if value is not None and jnp.ndim(value):
            raise ValueError(f"{name} must be a scalar, got shape {jnp.shape(value)}")


def check_attention(q, k_pages, v_pages, page_table, lengths, window, softcap, sinks) -> None:
    check_pages(k_pages, v_pages)
    _, num_kv_heads, _, head_dim = k_pages.shape
    if q.ndim != 3 or q.shape[2] != head_dim or q.shape[1] % num_kv_heads:
        raise ValueError(
            f"q must be [tokens, N, H={head_dim}] with N a multiple of K={num_kv_heads}, got {q.shape}"
        )
    if page_table.ndim != 2 or lengths.shape != page_table.shape[:1]:
        raise ValueError(
            f"want page_table [R, MP] and lengths [R], got {page_table.shape} and {lengths.shape}"
        )
    if page_table.dtype != jnp.int32 or lengths.dtype != jnp.int32:
        raise ValueError(f"page_table and lengths must be int32, got {page_table.dtype} and {lengths.dtype}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (or None), got {window}")
    if softcap is not None and softcap <= 0.0:
        raise ValueError(f"softcap must be positive (or None), got {softcap}")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks must be [N] = [{q.shape[1]}], got {sinks.shape}")


def check_common_prefix(common_prefix) -> None:
    if common_prefix is not None and (common_prefix.shape != (1,) or common_prefix.dtype != jnp.int32):
        raise ValueError(f"common_prefix must be [1] int32, got {common_prefix.shape} {common_prefix.dtype}")


def check_update(
    qkv, k_pages, v_pages, page_table, lengths, cos, sin, q_norm, k_norm, window, softcap, sinks
) -> None:
    check_heads(qkv, k_pages, v_pages, cos, sin, q_norm, k_norm)
    num_lanes, num_kv_heads, rows, head_dim = qkv.shape
    if num_lanes != page_table.shape[0]:
        raise ValueError(f"qkv must be [B={page_table.shape[0]}, K, G + 2, H], got {qkv.shape}")
    q = jax.ShapeDtypeStruct((num_lanes, num_kv_heads * (rows - 2), head_dim), qkv.dtype)
    check_attention(q, k_pages, v_pages, page_table, lengths, window, softcap, sinks)


def check_heads(qkv, k_pages, v_pages, cos, sin, q_norm, k_norm) -> None:
    """What a projection needs to be normalised, rotated and stored."""
    check_pages(k_pages, v_pages)
    _, num_kv_heads, _, head_dim = k_pages.shape
    if qkv.ndim != 4 or qkv.shape[2] < 3 or qkv.shape[3] != head_dim:
        raise ValueError(f"qkv must be [tokens, K, G + 2, H={head_dim}], got {qkv.shape}")
    if qkv.shape[1] != num_kv_heads:
        raise ValueError(f"qkv has {qkv.shape[1]} kv heads, the pages {num_kv_heads}")
    num_tokens = qkv.shape[0]
    if cos.shape != sin.shape or cos.ndim != 2 or cos.shape[0] != num_tokens or 2 * cos.shape[1] > head_dim:
        raise ValueError(
            f"cos and sin must be [{num_tokens}, rotary_dim / 2 <= {head_dim // 2}], "
            f"got {cos.shape} and {sin.shape}"
        )
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm must both be given or both be None")
    if q_norm is not None and k_norm is not None and not q_norm.shape == k_norm.shape == (head_dim,):
        raise ValueError(f"q_norm and k_norm must be [{head_dim}], got {q_norm.shape} and {k_norm.shape}")


def check_lanes(lanes: tuple[int, ...], **options: jax.Array | None) -> None:
    """What is given of the options has one value per lane."""
    for name, option in options.items():
        if option is not None and option.shape != lanes:
            raise ValueError(f"{name} must be [B] = {lanes}, got {option.shape}")
