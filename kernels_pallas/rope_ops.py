"""The public operation between a projection of packed tokens and their attention.

Axes as in `ops`.
"""

import jax
import jax.numpy as jnp

from kernels_pallas import reference, rope_kernel
from kernels_pallas.checks import check_heads, check_scales
from kernels_pallas.ops import Implementation, Scale, runs_kernel


def rope_and_write(
    qkv: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    slots: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    epsilon: float = 1e-6,
    k_scale: Scale = None,
    v_scale: Scale = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What lies between a projection of packed tokens and their attention: norm, rope and KV write.

    Rounding is that of the separate steps: q and k take the dtype of qkv after the norm and after the rope, with
    float32 inside.

    Args:
        qkv: [T, K, G + 2, H]; per kv head its G query heads, then k, then v.
        k_pages, v_pages: [P, K, S, H]; written in place when they are donated.
        slots: [T] int32, as in `write_kv`.
        cos, sin: [T, rotary_dim / 2] float32; dimension i rotates with i + rotary_dim / 2, the dimensions from
            rotary_dim on not at all.
        q_norm, k_norm: [H] weights of the root-mean-square norm of every head; both or neither.
        epsilon: added to the mean square.
        k_scale, v_scale: as in `write_kv`.
        implementation: as in `paged_decode`. The kernel takes 16-bit projections over pages of the same dtype or
            float8_e4m3fn, and whole tiles of tokens (8 to 128 by head dim).

    Returns:
        (q [T, N, H] in the dtype of qkv, k_pages, v_pages), as `ragged_prefill` takes them.

    Raises:
        ValueError: shapes that do not fit together, or a forced implementation that cannot run.
    """
    check_heads(qkv, k_pages, v_pages, cos, sin, q_norm, k_norm)
    check_scales(k_scale, v_scale)
    if slots.shape != qkv.shape[:1]:
        raise ValueError(f"slots must be [T] = {qkv.shape[:1]}, got {slots.shape}")
    reason = rope_kernel.unsupported(qkv, cos, k_pages)
    if runs_kernel("rope_and_write", implementation, reason, report=False):
        norms = None if q_norm is None else (q_norm, k_norm)
        scales = None if k_scale is None and v_scale is None else (k_scale, v_scale)
        cos, sin = cos.astype(jnp.float32), sin.astype(jnp.float32)
        slots = jnp.maximum(slots, -1)  # and so in a buffer of its own: see ops._in_own_buffers
        return rope_kernel.run(qkv, k_pages, v_pages, slots, cos, sin, norms, scales, float(epsilon))
    q, k, v = reference.prepare_heads(qkv, cos, sin, q_norm, k_norm, epsilon)
    return q, *reference.write_kv(k_pages, v_pages, k, v, slots, k_scale, v_scale)
