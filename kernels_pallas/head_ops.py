"""The public operation from final hidden vectors to tokens: the language-model head and the draw.

Axes: B lanes, D hidden size, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import head_kernel, ops, sample_kernel
from kernels_pallas.ops import Implementation, runs_kernel


def head_sample(
    hidden: jax.Array,
    weight: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    seeds: jax.Array,
    positions: jax.Array,
    *,
    wanted: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The logits `hidden @ weight^T` and, of each lane, the token that `sample` draws from them.

    The kernels find the token of a greedy lane while they multiply: its logits are not written out unless they are
    wanted. They take bfloat16 and a multiple of 8 lanes up to 512; anything else is a product and `sample`.

    Args:
        hidden: [B, D].
        weight: [V, D].
        temperature, top_k, top_p, min_p, seeds, positions: [B], as in `sample`.
        wanted: [B] bool, greedy lanes whose logits are wanted all the same; None is none of them.
        implementation: as in `paged_decode`.

    Returns:
        tokens [B] int32, -1 for a lane whose logits hold a NaN; logits [B, V] float32, summed in float32, in
        which the rows of greedy lanes that are not wanted may hold anything.

    Raises:
        ValueError: shapes that do not fit together, or a forced implementation that cannot run.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"want hidden [B, D] and weight [V, D], got {hidden.shape} and {weight.shape}")
    lanes = hidden.shape[:1]
    if wanted is not None and (wanted.shape != lanes or wanted.dtype != jnp.bool_):
        raise ValueError(f"wanted must be [B] = {lanes} bool, got {wanted.shape} {wanted.dtype}")
    if temperature.shape != lanes:
        raise ValueError(f"temperature must be [B] = {lanes}, got {temperature.shape}")
    options = temperature, top_k, top_p, min_p, seeds, positions
    logits = jax.ShapeDtypeStruct((*lanes, weight.shape[0]), jnp.float32)
    reason = head_kernel.unsupported(hidden, weight) or sample_kernel.unsupported(logits)
    # Where XLA's product and `sample` do as well, none is missed.
    if not runs_kernel("head_sample", implementation, reason, report=False):
        product = lax.dot_general(
            hidden, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        return ops.sample(product, *options, implementation=implementation), product
    read = temperature > 0.0 if wanted is None else (temperature > 0.0) | wanted
    greedy_tokens, written = head_kernel.largest(hidden, weight, read)
    return ops.sample(written, *options, greedy_tokens=greedy_tokens, implementation="mosaic"), written
