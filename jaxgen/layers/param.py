"""The one place where parameters are made, so that every one of them says how it may be sharded."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

# Name of the mesh axis over which heads, ffn columns and vocabulary are split.
TENSOR_AXIS = "tensor"

LogicalAxes = tuple[str | None, ...]
Initializer = Callable[[tuple[int, ...], jnp.dtype], jax.Array]


def param(
    shape: tuple[int, ...], dtype: jnp.dtype, axes: LogicalAxes, init: Initializer = jnp.zeros
) -> nnx.Param:
    """A parameter that carries the names of its axes as metadata `logical_axes`.

    The names are plain metadata: no mesh has to exist when the model is built, and `jaxgen.sharding` turns
    them into placements later. Values come from a checkpoint, so `init(shape, dtype)` only has to give the
    neutral element (zeros, or ones for a norm); under `nnx.eval_shape` it allocates nothing.
    """
    if len(axes) != len(shape):
        raise ValueError(f"parameter of shape {shape} needs {len(shape)} axis names, got {axes}")
    return nnx.Param(init(shape, dtype), logical_axes=axes)
