"""The public operations that join a matrix product of a decoder layer with what stands around it.

Axes: T tokens, D and N the columns and rows of the weight. Weights are [*out, in].
"""

import jax

from kernels_pallas import gemm_config, gemm_kernel, gemv_kernel, glu_kernel, reference
from kernels_pallas.norm_input import NormInput
from kernels_pallas.ops import Implementation, runs_kernel


def fused_linear(
    x: jax.Array | NormInput,
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
        x: [T, D]; with a norm also what `fused_linear_to_norm` made for that norm, which spares a launch.
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
    x = x if isinstance(x, NormInput) else NormInput(x)
    rows = x.rows
    if rows.ndim != 2 or weight.ndim < 2 or weight.shape[-1] != rows.shape[1]:
        raise ValueError(f"want x [T, D] and weight [*out, D], got {rows.shape} and {weight.shape}")
    if x.scaled is not None and norm is None:
        raise ValueError("x was made for a norm, so norm must be given")
    if norm is not None and norm.shape != rows.shape[1:]:
        raise ValueError(f"norm must be {rows.shape[1:]}, got {norm.shape}")
    if gated and (weight.ndim != 3 or weight.shape[0] != 2):
        raise ValueError(f"a gated weight must be [2, N, D], got {weight.shape}")
    out_shape = (rows.shape[0], *(weight.shape[1:-1] if gated else weight.shape[:-1]))
    _check_around(weight, bias, residual, out_shape)
    parts = weight.reshape(2 if gated else 1, -1, weight.shape[-1])
    if not _runs_kernel(rows, parts, bias, implementation):
        return reference.fused_linear(rows, weight, norm, epsilon, bias, gated, residual)
    bias_rows = None if bias is None else bias.reshape(parts.shape[:-1])
    residual_rows = None if residual is None else residual.reshape(rows.shape[0], -1)
    if rows.shape[0] == 1:
        y = gemv_kernel.run(rows, parts, norm, bias_rows, residual_rows, epsilon)
    elif rows.shape[0] <= gemm_config.MOST_TOKENS:
        y = gemm_kernel.run(x, parts, norm, bias_rows, residual_rows, None, epsilon).rows
    else:
        y = glu_kernel.run(rows if norm is None else reference.rms_norm(rows, norm, epsilon), parts)
        y = y if residual is None else residual + y
    return y.reshape(out_shape)


def fused_linear_to_norm(
    x: jax.Array,
    weight: jax.Array,
    next_norm: jax.Array,
    *,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> NormInput:
    """`residual + x @ weight + bias` for an RMS norm, whose own work the kernel of 8 to 256 tokens begins.

    Args:
        x: [T, D].
        weight: [N, D].
        next_norm: [N], the weight of the norm that reads the result.
        bias: [N].
        residual: [T, N].
        implementation: as in `paged_decode`.

    Returns:
        The result as `rows` [T, N], and what was prepared.

    Raises:
        ValueError: as `fused_linear`.
    """
    if weight.ndim != 2 or next_norm.shape != weight.shape[:1]:
        raise ValueError(f"want weight [N, D] and next_norm [N], got {weight.shape} and {next_norm.shape}")
    if 1 < x.shape[0] <= gemm_config.MOST_TOKENS and x.shape[1:] == weight.shape[1:]:
        _check_around(weight, bias, residual, (x.shape[0], weight.shape[0]))
        if _runs_kernel(x, weight[None], bias, implementation):
            bias = None if bias is None else bias[None]
            return gemm_kernel.run(NormInput(x), weight[None], None, bias, residual, next_norm, 0.0)
    return NormInput(fused_linear(x, weight, bias=bias, residual=residual, implementation=implementation))


def _check_around(weight, bias, residual, out_shape: tuple[int, ...]) -> None:
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise ValueError(f"bias must be {weight.shape[:-1]}, got {bias.shape}")
    if residual is not None and residual.shape != out_shape:
        raise ValueError(f"residual must be {out_shape}, got {residual.shape}")


def _runs_kernel(x, parts, bias, implementation: Implementation | None) -> bool:
    """Whether a kernel takes x [T, D] times parts [P, N, D]; raises where it must and cannot."""
    if x.shape[0] == 1:
        reason = gemv_kernel.unsupported(x, parts)
    elif x.shape[0] <= gemm_config.MOST_TOKENS:
        reason = gemm_kernel.unsupported(x, parts, forced=implementation is not None)
    else:
        reason = glu_kernel.unsupported(x, parts, bias)
    # Where XLA is as good, none is missed.
    return runs_kernel("fused_linear", implementation, reason, report=False)
