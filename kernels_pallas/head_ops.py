"""The public operation from final hidden vectors to tokens: the language-model head and the draw.

Axes: B lanes, D hidden size, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import head_kernel, ops, row_sampler, sample_kernel, tile_draw_kernel
from kernels_pallas.checks import check_lanes
from kernels_pallas.ops import Implementation, runs_kernel
from kernels_pallas.reference import UNDRAWN, LogitSummary


class HeadSample(NamedTuple):
    """Tokens [B] int32, -1 for a lane whose logits hold a NaN; logits [B, V] float32; the summary, or None."""

    tokens: jax.Array
    logits: jax.Array
    summary: LogitSummary | None


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
    summary_temperature: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> HeadSample:
    """The logits `hidden @ weight^T` and, of each lane, the token that `sample` draws from them.

    The kernels find the token of a greedy lane while they multiply: its logits are not written out unless they are
    wanted. They take bfloat16 and a multiple of 8 lanes up to 512; anything else is a product and `sample`.

    Args:
        hidden: [B, D].
        weight: [V, D].
        temperature, top_k, top_p, min_p, seeds, positions: [B], as in `sample`.
        wanted: [B] bool, greedy lanes whose logits are wanted all the same; None is none of them.
        summary_temperature: [B] float32, the temperature (0: none) of the log-probabilities that a summary is wanted
            for. It is given where it comes with the product.
        implementation: as in `paged_decode`.

    Returns:
        The logits are summed in float32; their rows, and those of the summary, may hold anything for greedy lanes
        that are not wanted.

    Raises:
        ValueError: shapes that do not fit together, or a forced implementation that cannot run.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"want hidden [B, D] and weight [V, D], got {hidden.shape} and {weight.shape}")
    lanes = hidden.shape[:1]
    if wanted is not None and (wanted.shape != lanes or wanted.dtype != jnp.bool_):
        raise ValueError(f"wanted must be [B] = {lanes} bool, got {wanted.shape} {wanted.dtype}")
    named = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    check_lanes(lanes, **named, seeds=seeds, positions=positions, summary_temperature=summary_temperature)
    options = temperature, top_k, top_p, min_p, seeds, positions
    logits = jax.ShapeDtypeStruct((*lanes, weight.shape[0]), jnp.float32)
    reason = head_kernel.unsupported(hidden, weight) or sample_kernel.unsupported(logits)
    # Where XLA's product and `sample` do as well, none is missed.
    if not runs_kernel("head_sample", implementation, reason, report=False):
        product = lax.dot_general(
            hidden, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        return HeadSample(ops.sample(product, *options, implementation=implementation), product, None)
    is_drawn = temperature > 0.0
    own = summary_temperature is None  # then the summary is for the draw
    factor, num_tiles = None, weight.shape[0] // head_kernel.TILE
    if weight.shape[0] % head_kernel.TILE == 0:
        divisor = temperature if summary_temperature is None else summary_temperature
        factor = 1.0 / jnp.where(divisor > 0.0, divisor, 1.0)
    read = is_drawn if wanted is None else is_drawn | wanted
    greedy, written, *parts = head_kernel.largest(hidden, weight, read, factor)
    cut = sample_kernel.cut_of(*written.shape)
    numbers = row_sampler.options_of(*options, cut)
    if parts and own:
        known = tile_draw_kernel.draw(written, numbers, greedy, *parts)
    else:
        known = jnp.where(is_drawn & (greedy >= 0), UNDRAWN, greedy)
    tokens = sample_kernel.draw(written, numbers, known, cut)
    summary = None if own or not parts else LogitSummary(*(part[: lanes[0], :num_tiles] for part in parts))
    return HeadSample(tokens, written, summary)
