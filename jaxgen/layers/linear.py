"""Linear layers over weights kept in the checkpoint's own orientation, plain or quantised."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxgen.layers.norm import RMSNorm
from jaxgen.layers.param import TENSOR_AXIS, LogicalAxes, param
from jaxgen.layers.quantization import Scheme, quantize
from kernels_pallas import NormInput, fused_linear, fused_linear_to_norm


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
        is_sharded = mesh is not None and mesh.shape[TENSOR_AXIS] > 1
        # A mesh axis may cut an output axis behind the first; such a weight must keep its axes apart.
        self.is_cut = is_sharded and any(axes[1:-1])
        self.is_plain = not is_sharded  # a kernel is opaque to the partitioner

    @property
    def ahead(self) -> tuple[jax.Array, ...]:
        """What a kernel before this layer may fetch for it: the weight, where a kernel reads it."""
        return (self.weight[...],) if self.is_plain else ()

    def __call__(
        self, x: jax.Array | NormInput, *, norm: RMSNorm | None = None, residual: jax.Array | None = None
    ) -> jax.Array:
        """`residual` plus the layer's output for x [T, in_size], normalised first: [T, *out_shape] in x's dtype."""
        if self.is_plain:
            scale, epsilon = (None, 0.0) if norm is None else (norm.weight[...], norm.epsilon)
            return fused_linear(
                x,
                self.weight[...],
                norm=scale,
                epsilon=epsilon,
                bias=None if self.bias is None else self.bias[...],
                gated=self.gated,
                residual=residual,
            )
        rows = x.rows if isinstance(x, NormInput) else x
        y = self._product(rows if norm is None else norm(rows))
        if self.gated:
            y = jax.nn.silu(y[:, 0]) * y[:, 1]
        return y if residual is None else residual + y

    def to_norm(self, x: jax.Array, next_norm: RMSNorm, residual: jax.Array) -> NormInput:
        """`residual` plus the output for x [T, in_size], [T, out_size], for `next_norm` to read."""
        if not self.is_plain:
            return NormInput(self(x, residual=residual))
        bias = None if self.bias is None else self.bias[...]
        return fused_linear_to_norm(x, self.weight[...], next_norm.weight[...], bias=bias, residual=residual)

    def _product(self, x: jax.Array) -> jax.Array:
        weight = self.weight[...]
        out_shape = weight.shape[:-1]
        if not self.is_cut:
            # As one matrix: with several output axes XLA transposes the weight in every step on a CPU.
            weight = weight.reshape(-1, weight.shape[-1])
        y = self._multiply(x, weight)
        if self.bias is not None:
            # Before the reshape: XLA then adds it inside the product.
            y = y + self.bias[...].reshape(weight.shape[:-1]).astype(y.dtype)
        return y.reshape(x.shape[0], *out_shape)

    def _multiply(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """x [T, in_size] times the weight [..., in_size], flattened or not, in x's dtype."""
        return _dot(x, weight, x.dtype)


class QuantizedLinear(Linear):
    """A linear layer with 8-bit weights and `scale`, one float32 for each output channel.

    The scales are applied to the product: XLA fuses that with whatever follows, and the matrix product itself
    sees plain 8-bit operands (or weights that it widens as it reads them).
    """

    def __init__(
        self,
        scheme: Scheme,
        out_shape: tuple[int, ...],
        in_size: int,
        axes: LogicalAxes,
        dtype: jnp.dtype,
        **options: Any,
    ):
        """`scheme` and, for the rest, what `Linear` takes; `dtype` is that of the bias."""
        super().__init__(out_shape, in_size, axes, dtype, **options)
        self.weight = param((*out_shape, in_size), scheme.dtype, axes)
        self.scale = param(out_shape, jnp.dtype(jnp.float32), axes[:-1])
        self.scheme = scheme
        self.is_plain = False

    def _multiply(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        out_dtype, sum_dtype = x.dtype, self.scheme.sum_dtype(x.dtype)
        scale = self.scale[...].reshape(weight.shape[:-1])
        if self.scheme.activations:
            x, token_scale = quantize(x, self.scheme.dtype)
            scale = jnp.expand_dims(token_scale, range(1, weight.ndim)) * scale
        else:
            weight = weight.astype(x.dtype)
        if x.shape[0] == 1:
            y = jax.lax.platform_dependent(
                x,
                weight,
                cuda=partial(_reduce, sum_dtype=sum_dtype),
                default=partial(_dot, sum_dtype=sum_dtype),
            )
        else:
            y = _dot(x, weight, sum_dtype)
        return (y.astype(jnp.float32) * scale).astype(out_dtype)


def _dot(x: jax.Array, weight: jax.Array, sum_dtype: jnp.dtype) -> jax.Array:
    contracted = ((1,), (weight.ndim - 1,))
    return jax.lax.dot_general(x, weight, (contracted, ((), ())), preferred_element_type=sum_dtype)


def _reduce(x: jax.Array, weight: jax.Array, sum_dtype: jnp.dtype) -> jax.Array:
    """The product of a single token as a reduction over the weight, which is widened on the way.

    The products of an 8B layer on an H100 take 98 us in this way, and 115 as Triton's (int8 weights).
    """
    wide = jnp.int32 if sum_dtype == jnp.int32 else jnp.float32
    y = jnp.sum(weight.astype(wide) * x[0].astype(wide), axis=-1)
    return y.astype(sum_dtype)[None]


LinearMaker = Callable[..., Linear]


def linear_maker(scheme: Scheme | None) -> LinearMaker:
    """What makes a model's large linear layers: called like `Linear`."""
    return Linear if scheme is None else partial(QuantizedLinear, scheme)
