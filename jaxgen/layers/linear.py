"""Linear layers over weights kept in the checkpoint's own orientation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxgen.layers.norm import RMSNorm
from jaxgen.layers.param import TENSOR_AXIS, LogicalAxes, param
from kernels_pallas import fused_linear


class Linear(nnx.Module):
    """`y[..., *out] = sum_i x[..., i] * weight[*out, i] + bias[*out]`, any number of output axes.

    Several output axes let one matrix product feed a split (q, k, v or gate, up) without reshuffling the
    weights when they are loaded, and let a mesh axis cut through the middle of the output. A gated layer has
    two rows in front and gives `silu(y[..., 0]) * y[..., 1]`.
    """

    def __init__(
        self,
        out_shape: tuple[int, ...],
        in_size: int,
        axes: LogicalAxes,
        dtype: jnp.dtype,
        *,
        bias: bool = False,
        gated: bool = False,
        mesh: Mesh | None = None,
    ):
        """`axes` names the axes of the weight `[*out_shape, in_size]`; the bias has all but the last.

        `mesh` is needed only where its tensor axis is wider than one.
        """
        self.gated = gated
        self.weight = param((*out_shape, in_size), dtype, axes)
        self.bias = param(out_shape, dtype, axes[:-1]) if bias else None
        self.is_sharded = mesh is not None and mesh.shape[TENSOR_AXIS] > 1
        # A mesh axis may cut an output axis behind the first; such a weight must keep its axes apart.
        self.is_cut = self.is_sharded and any(axes[1:-1])

    def __call__(
        self, x: jax.Array, *, norm: RMSNorm | None = None, residual: jax.Array | None = None
    ) -> jax.Array:
        """`residual` plus the layer's output for x [T, in_size], normalised first: [T, *out_shape] in x's dtype."""
        if x.shape[0] == 1 and not self.is_sharded:  # a kernel is opaque to the partitioner
            bias = None if self.bias is None else self.bias[...]
            scale, epsilon = (None, 0.0) if norm is None else (norm.weight[...], norm.epsilon)
            return fused_linear(
                x,
                self.weight[...],
                norm=scale,
                epsilon=epsilon,
                bias=bias,
                gated=self.gated,
                residual=residual,
            )
        y = self._product(x if norm is None else norm(x))
        if self.gated:
            y = jax.nn.silu(y[:, 0]) * y[:, 1]
        return y if residual is None else residual + y

    def _product(self, x: jax.Array) -> jax.Array:
        weight = self.weight[...]
        out_shape = weight.shape[:-1]
        if not self.is_cut:
            # As one matrix: with several output axes XLA transposes the weight in every step on a CPU.
            weight = weight.reshape(-1, weight.shape[-1])
        contracted = ((1,), (weight.ndim - 1,))
        y = jax.lax.dot_general(x, weight, (contracted, ((), ())), preferred_element_type=x.dtype)
        if self.bias is not None:
            # Before the reshape: XLA then adds it inside the product.
            y = y + self.bias[...].reshape(weight.shape[:-1]).astype(y.dtype)
        return y.reshape(x.shape[0], *out_shape)
