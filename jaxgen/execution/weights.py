"""Weights onto the devices: read in the computing type, and quantised there one parameter at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxgen.checkpoint.types import Checkpoint
from jaxgen.layers.quantization import Scheme, quantize
from jaxgen.models.weights import WeightSource

WEIGHT, SCALE = ".weight", ".scale"  # how `QuantizedLinear` names its parameters

# Both sides of a matrix in the tensor cores' 8-bit products; XLA would pad a copy of it in every step.
MATRIX_UNIT = 16


class Weights:
    """What a model asks for (`params`: path -> shape, dtype and sharding) and what is read for it.

    Raises ValueError, naming the parameter, for a matrix that cannot be multiplied in 8 bits on a GPU.
    """

    def __init__(
        self,
        params: Mapping[str, jax.ShapeDtypeStruct],
        dtype: jnp.dtype,
        scheme: Scheme | None,
        platform: str,
    ):
        """`dtype`: of the activations, and of a weight before it is quantised."""
        self._params, self._scheme = params, scheme
        self._scales = {
            path: scale
            for path in params
            if path.endswith(WEIGHT) and (scale := path.removesuffix(WEIGHT) + SCALE) in params
        }
        if scheme is not None and scheme.activations and platform == "gpu":
            for path in self._scales:
                check_matrix(path, params[path], scheme)
        scales = set(self._scales.values())
        self.read = {
            path: _with_dtype(target, dtype) if path in self._scales else target
            for path, target in params.items()
            if path not in scales
        }
        """Parameter path -> shape, dtype and sharding in which a checkpoint gives it."""

    def load(
        self, checkpoint: Checkpoint, table: Mapping[str, WeightSource], progress: Callable[[int], None]
    ) -> tuple[jax.Array, ...]:
        """The parameters in the model's order; no more than a few are ever held unquantised."""
        loaded = checkpoint.load(self.read, table, progress, self._quantized)
        return tuple(loaded[path] for path in self._params)

    def _quantized(self, path: str, array: jax.Array) -> dict[str, jax.Array]:
        if path not in self._scales or self._scheme is None:
            return {path: array}
        scale = self._scales[path]
        placed = self._params[path].sharding, self._params[scale].sharding
        weight, scales = _quantizer(self._scheme, placed)(array)
        return {path: weight, scale: scales}


def check_matrix(path: str, weight: jax.ShapeDtypeStruct, scheme: Scheme) -> None:
    """Raises ValueError unless each device's part of a weight is a whole number of 8-bit matrix tiles."""
    *out_shape, in_size = weight.sharding.shard_shape(weight.shape)
    for size, side in ((math.prod(out_shape), "output"), (in_size, "input")):
        if size % MATRIX_UNIT:
            raise ValueError(
                f"{path} {weight.shape} cannot be multiplied as {scheme.name} on a GPU: its {side} size on one"
                f" device, {size}, is not a multiple of {MATRIX_UNIT}; use quantization='int8' or"
                " 'w8a16_fp8', which have no such limit, or another tp_size"
            )


@functools.cache
def _quantizer(scheme: Scheme, shardings: tuple) -> Callable:
    """The compiled rounding of a weight; a matrix split along its input shares one scale over the devices."""
    return jax.jit(lambda weight: quantize(weight, scheme.dtype), out_shardings=shardings)


def _with_dtype(target: jax.ShapeDtypeStruct, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(target.shape, dtype, sharding=target.sharding)
