"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgen.layers.param import param
from kernels_pallas.reference import rms_norm


class RMSNorm(nnx.Module):
    """RMS norm over a last axis of `size` elements (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, epsilon: float, dtype: jnp.dtype, axis: str | None = "embed"):
        self.weight = param((size,), dtype, (axis,), jnp.ones)
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` [..., size] -> the same shape and dtype."""
        return rms_norm(x, self.weight[...], self.epsilon)
