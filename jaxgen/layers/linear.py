"""Linear layers over weights kept in the checkpoint's own orientation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxgen.layers.param import TENSOR_AXIS, LogicalAxes, param


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
        mesh: Mesh | None = None,
    ):
        """`axes` names the axes of the weight `[*out_shape, in_size]`; the bias has all but the last.

        `mesh` is needed only where its tensor axis is wider than one.
        """
        self.weight = param((*out_shape, in_size), dtype, axes)
        self.bias = param(out_shape, dtype, axes[:-1]) if bias else None
        # A mesh axis may cut an output axis behind the first; such a weight must keep its axes apart.
        self.is_cut = mesh is not None and mesh.shape[TENSOR_AXIS] > 1 and any(axes[1:-1])

    def __call__(self, x: jax.Array, *, out_dtype: jnp.dtype | None = None) -> jax.Array:
        """`x` is `[..., in_size]`; the result is `[..., *out_shape]` in `out_dtype`, else that of `x`."""
        weight = self.weight[...]
        out_shape = weight.shape[:-1]
        if not self.is_cut:
            # As one matrix: with several output axes XLA transposes the weight in every step on a CPU.
            weight = weight.reshape(-1, weight.shape[-1])
        contracted = ((x.ndim - 1,), (weight.ndim - 1,))
        y = jax.lax.dot_general(
            x, weight, (contracted, ((), ())), preferred_element_type=out_dtype or x.dtype
        )
        if self.bias is not None:
            # Before the reshape: XLA then adds it inside the product.
            y = y + self.bias[...].reshape(weight.shape[:-1]).astype(y.dtype)
        return y.reshape(*x.shape[:-1], *out_shape)
