"""Linear layers over weights kept in the checkpoint's own orientation."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgen.layers.param import LogicalAxes, param


class Linear(nnx.Module):
    """`y[..., *out] = sum_i x[..., i] * weight[*out, i] + bias[*out]`, any number of output axes.

    Several output axes let one matrix product feed a split (q, k, v or gate, up) without reshuffling the
    weights when they are loaded, and let a mesh axis cut through the middle of the output.
    """

    def __init__(
        self,
        out_shape: tuple[int, ...],
        in_size: int,
        axes: LogicalAxes,
        dtype: jnp.dtype,
        *,
        bias: bool = False,
    ):
        """`axes` names the axes of the weight `[*out_shape, in_size]`; the bias has all but the last."""
        self.weight = param((*out_shape, in_size), dtype, axes)
        self.bias = param(out_shape, dtype, axes[:-1]) if bias else None

    def __call__(self, x: jax.Array, *, out_dtype: jnp.dtype | None = None) -> jax.Array:
        """`x` is `[..., in_size]`; the result is `[..., *out_shape]` in `out_dtype`, else that of `x`."""
        weight = self.weight[...]
        contracted = ((x.ndim - 1,), (weight.ndim - 1,))
        y = jax.lax.dot_general(
            x, weight, (contracted, ((), ())), preferred_element_type=out_dtype or x.dtype
        )
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        return y
