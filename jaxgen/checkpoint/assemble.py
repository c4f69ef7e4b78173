"""Put checkpoint tensors together into parameters, straight on the devices.

One parameter at a time and one device shard at a time: the host never holds more than two parameters beyond
the memory-mapped file, and no device holds more than its own shards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import numpy as np

from jaxgen.checkpoint.errors import CheckpointError
from jaxgen.models.weights import WeightSource

Progress = Callable[[int], None]
Params = Mapping[str, jax.ShapeDtypeStruct]
Convert = Callable[[str, jax.Array], dict[str, jax.Array]]
"""Parameter path and array, as a checkpoint gives it -> the arrays kept of it, by path."""


def unchanged(path: str, array: jax.Array) -> dict[str, jax.Array]:
    """The `Convert` that keeps every parameter as it is."""
    return {path: array}


class TensorReader(Protocol):
    """Named tensors of one checkpoint, under their Hugging Face names."""

    def where(self, name: str) -> str:
        """File that holds (or should hold) the tensor, for messages."""
        ...

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of the tensor, or None when the checkpoint has no such tensor."""
        ...

    def read(self, name: str, dtype: np.dtype) -> np.ndarray:
        """The tensor, as a view of the file where possible. ``dtype`` is only a hint: the caller casts."""
        ...


def assemble(
    params: Params,
    table: Mapping[str, WeightSource],
    reader: TensorReader,
    progress: Progress,
    convert: Convert = unchanged,
) -> dict[str, jax.Array]:
    """Load every parameter in ``params`` with the dtype and sharding it asks for.

    Args:
        params: Parameter path -> shape, dtype and (optionally) sharding.
        table: Parameter path -> the tensors it consists of.
        reader: The checkpoint.
        progress: Called after each parameter with its size in bytes.
        convert: What is kept of a parameter, called as soon as it is on its devices.

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape. All are checked before any is read.
    """
    for path, target in params.items():
        _check(path, target, table, reader)
    arrays: dict[str, jax.Array] = {}
    in_flight: dict[str, jax.Array] = {}
    for path, target in params.items():
        array = _load(target, table[path], reader)
        jax.block_until_ready(
            in_flight
        )  # bounds what is still on its way to the devices, or unconverted there
        in_flight = convert(path, array)
        arrays |= in_flight
        progress(array.nbytes)
    jax.block_until_ready(in_flight)
    return arrays


def sharding_of(target: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    """The sharding a parameter asks for; the first device when it asks for none."""
    return target.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def can_view(found: tuple[int, ...], view: tuple[int, ...]) -> bool:
    """Whether ``view`` only splits axes of ``found``. A transposed tensor has as many elements but cannot."""
    sizes = [size for size in view if size != 1]
    for size in (size for size in found if size != 1):
        product = 1
        while product < size and sizes:
            product *= sizes.pop(0)
        if product != size:
            return False
    return not sizes


def _check(
    path: str, target: jax.ShapeDtypeStruct, table: Mapping[str, WeightSource], reader: TensorReader
) -> None:
    if path not in table:
        raise CheckpointError(f"the model's weight table has no entry for parameter {path!r}")
    source = table[path]
    if source.shape != tuple(target.shape):
        raise CheckpointError(
            f"parameter {path!r} has shape {tuple(target.shape)}, but its weight table gives {source.shape}"
        )
    for part in source.parts:
        found = reader.shape(part.name)
        if found is None:
            raise CheckpointError(
                f"{reader.where(part.name)}: tensor {part.name!r} is missing "
                f"(needed for parameter {path!r}, expected shape {part.shape}); "
                "is the checkpoint complete, and of the architecture its configuration names?"
            )
        if not can_view(found, part.shape):
            raise CheckpointError(
                f"{reader.where(part.name)}: tensor {part.name!r} has shape {found}, "
                f"expected one viewable as {part.shape} (parameter {path!r})"
            )


def _load(target: jax.ShapeDtypeStruct, source: WeightSource, reader: TensorReader) -> jax.Array:
    dtype = np.dtype(target.dtype)
    sharding = sharding_of(target)
    views = [reader.read(part.name, dtype).reshape(part.shape) for part in source.parts]
    # A CPU array may alias the numpy buffer it is made from; it must not alias a file that can be replaced.
    may_alias = any(device.platform == "cpu" for device in sharding.device_set)
    shards: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple(span.indices(size)[:2] for span, size in zip(index, target.shape))
        if key not in shards:  # replicas share one host buffer
            shards[key] = _shard(views, source.axis, key, dtype, copy=may_alias)
        return shards[key]

    return jax.make_array_from_callback(tuple(target.shape), sharding, shard, dtype=dtype)


def _shard(
    views: list[np.ndarray], axis: int, spans: tuple[tuple[int, int], ...], dtype: np.dtype, *, copy: bool
) -> np.ndarray:
    """The part of the concatenated views inside ``spans`` (start, stop per axis), in ``dtype``."""
    slices = tuple(slice(start, stop) for start, stop in spans)
    if len(views) == 1:
        window = views[0][slices]
        if not copy and window.dtype == dtype and window.flags.c_contiguous:
            return window
        return np.array(window, dtype=dtype, order="C", copy=True)
    out = np.empty([stop - start for start, stop in spans], dtype)
    wanted_start, wanted_stop = spans[axis]
    offset = 0
    for view in views:
        size = view.shape[axis]
        start, stop = max(wanted_start, offset), min(wanted_stop, offset + size)
        if start < stop:
            into = [slice(None)] * out.ndim
            into[axis] = slice(start - wanted_start, stop - wanted_start)
            source = list(slices)
            source[axis] = slice(start - offset, stop - offset)
            np.copyto(out[tuple(into)], view[tuple(source)], casting="unsafe")
        offset += size
    return out
