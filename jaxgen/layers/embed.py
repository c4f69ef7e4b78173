"""Token embedding."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgen.layers.param import param


class Embed(nnx.Module):
    """Token ids to vectors, and (for tied models) vectors to logits with the same matrix."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: jnp.dtype):
        self.weight = param((vocab_size, hidden_size), dtype, ("vocab", "embed"))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """`tokens` [T] int32 -> [T, D]. Ids outside the vocabulary (padding is -1) read the nearest row."""
        weight = self.weight[...]
        return jnp.take(weight, jnp.clip(tokens, 0, weight.shape[0] - 1), axis=0, mode="clip")

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`hidden` [R, D] -> [R, V] float32."""
        return jnp.einsum("rd,vd->rv", hidden, self.weight[...], preferred_element_type=jnp.float32)
