"""The public operation that joins a matrix product of a decoder layer with what stands around it.

Axes: T tokens, D and N the columns and rows of the weight. Weights are [*out, in].
"""

from collections.abc import Callable

import jax

from kernels_pallas import gemm_config, gemm_kernel, gemv_kernel, glu_kernel, reference
from kernels_pallas.ops import Implementation, runs_kernel


def fused_linear(
    x: jax.Array,
    weight: jax.Array,
    *,
    norm: jax.Array | None = None,
    epsilon: float = 0.0,
    bias: jax.Array | None = None,
    gated: bool = False,
    residual: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """`residual + act(rms_norm(x) @ weight + bias)`, where each of norm, act, bias and residual may be missing.

    In bfloat16, kernels take a single token, a multiple of 8 up to 256, and the gated product of many (512 and more,
    a multiple of 256); XLA's products do the rest. Kernels sum in float32, apply the activation to the sums, and
    round before the residual and after it.

    Args:
        x: [T, D].
        weight: [*out, D]; gated: [2, N, D].
        norm: [D], the norm's weight; None leaves x as it is.
        epsilon: added to the mean square of the norm.
        bias: [*out].
        gated: the result is silu of the first half times the second, [T, N].
        residual: [T, *out], gated [T, N].
        implementation: as in `paged_decode`.

    Returns:
        [T, *out], gated [T, N], in the dtype of x.

    Raises:
        ValueError: shapes that do not fit together, or a forced implementation that cannot run.
    """
    if x.ndim != 2 or weight.ndim < 2 or weight.shape[-1] != x.shape[1]:
        raise ValueError(f"want x [T, D] and weight [*out, D], got {x.shape} and {weight.shape}")
    if norm is not None and norm.shape != x.shape[1:]:
        raise ValueError(f"norm must be {x.shape[1:]}, got {norm.shape}")
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise ValueError(f"bias must be {weight.shape[:-1]}, got {bias.shape}")
    if gated and (weight.ndim != 3 or weight.shape[0] != 2):
        raise ValueError(f"a gated weight must be [2, N, D], got {weight.shape}")
    out_shape = (x.shape[0], *(weight.shape[1:-1] if gated else weight.shape[:-1]))
    if residual is not None and residual.shape != out_shape:
        raise ValueError(f"residual must be {out_shape}, got {residual.shape}")
    parts = weight.reshape(2 if gated else 1, -1, weight.shape[-1])
    bias_rows = None if bias is None else bias.reshape(parts.shape[:-1])
    residual_rows = None if residual is None else residual.reshape(x.shape[0], -1)
    around = norm, bias_rows, residual_rows, epsilon
    run: Callable[..., jax.Array]
    if x.shape[0] == 1:
        reason, run = gemv_kernel.unsupported(x, parts), gemv_kernel.run
    elif x.shape[0] <= gemm_config.MOST_TOKENS:
        reason, run = gemm_kernel.unsupported(x, parts, forced=implementation is not None), gemm_kernel.run
    else:
        reason, run = glu_kernel.unsupported(x, parts, bias), _run_glu
    # Where XLA is as good, none is missed.
    if not runs_kernel("fused_linear", implementation, reason, report=False):
        return reference.fused_linear(x, weight, norm, epsilon, bias, gated, residual)
    return run(x, parts, *around).reshape(out_shape)


def _run_glu(x, parts, norm, bias, residual, epsilon: float):
    y = glu_kernel.run(x if norm is None else reference.rms_norm(x, norm, epsilon), parts)
    return y if residual is None else residual + y
