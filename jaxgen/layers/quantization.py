"""Weights and activations in 8 bits: the known schemes, and the rounding that they share."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

UNQUANTIZED = "unquant"
INT8, FLOAT8 = jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn)

# Rows without a value above this become zeros: a scale must not vanish as a float32.
SMALLEST_ROW = 1e-30


@dataclass(frozen=True)
class Scheme:
    """How a linear layer keeps and multiplies its weights.

    dtype: of the weights, which have one float32 scale for each output channel. activations: they are rounded
    to the same type too, with a scale for each token, so that the product itself runs in 8 bits; otherwise the
    weights are widened to the activations' type inside the product.
    """

    name: str
    dtype: jnp.dtype
    activations: bool

    def sum_dtype(self, activations: jnp.dtype) -> jnp.dtype:
        """Type in which a product hands over its sums, before the scales, for activations of this type.

        It adds up in int32 or float32 whatever this is. Unscaled sums of e4m3 values overflow float16.
        """
        if self.activations and jnp.issubdtype(self.dtype, jnp.integer):
            return jnp.dtype(jnp.int32)
        narrow = self.activations and activations == jnp.bfloat16
        return jnp.dtype(jnp.bfloat16 if narrow else jnp.float32)


SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp8", FLOAT8, activations=True),
        Scheme("w8a8_int8", INT8, activations=True),
        Scheme("int8", INT8, activations=False),
        Scheme("w8a16_fp8", FLOAT8, activations=False),
    )
}


def scheme_named(name: str | None) -> Scheme | None:
    """The scheme of this name; None for None and "unquant". ValueError, listing the known ones, for any other."""
    if name is None or name == UNQUANTIZED:
        return None
    if name not in SCHEMES:
        raise ValueError(f"unknown quantization {name!r}; known: {', '.join(SCHEMES)}")
    return SCHEMES[name]


def quantize(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Round `x` [..., n] to `dtype`, each row [n] scaled so that its largest magnitude is the type's largest.

    Returns q [..., n] in `dtype` (int8 or a float8) and the float32 scales [...]: `x ~ q * scale[..., None]`.
    A row with a NaN or an infinity gets such a scale, and so stays visible in every product.
    """
    largest = jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).max
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), SMALLEST_ROW) / float(largest)
    scaled = x / scale[..., None]
    if jnp.issubdtype(dtype, jnp.integer):
        scaled = jnp.round(scaled)
    return scaled.astype(dtype), scale
