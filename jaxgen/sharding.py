"""Where arrays live: the device mesh, and the one table from logical axes to mesh axes."""

from collections.abc import Mapping, Sequence
from functools import cache

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgen.layers.param import TENSOR_AXIS, LogicalAxes

MESH_AXES = ("data", TENSOR_AXIS)

# Logical axis -> mesh axis. Column-parallel into heads and ffn, row-parallel out of them: one all-reduce
# after the attention, one after the MLP and one after the embedding; the residual stream is replicated.
RULES: Mapping[str, str | None] = {
    "vocab": TENSOR_AXIS,
    "kv_heads": TENSOR_AXIS,
    "heads": TENSOR_AXIS,
    "mlp": TENSOR_AXIS,
    "embed": None,
}


def make_mesh(tp_size: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh of axes ("data", "tensor") and shape (1, tp_size) over the first `tp_size` of `devices`.

    `devices` defaults to `jax.devices()`. Raises ValueError when there are too few of them.
    """
    devices = jax.devices() if devices is None else devices
    if tp_size < 1:
        raise ValueError(f"tp_size must be at least 1, got {tp_size}")
    if tp_size > len(devices):
        raise ValueError(
            f"tp_size={tp_size} needs {tp_size} devices and {len(devices)} are visible: lower tp_size, or"
            " make more devices visible (CUDA_VISIBLE_DEVICES)"
        )
    grid = np.asarray(devices[:tp_size], dtype=object).reshape(1, tp_size)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def check_mesh(mesh: Mesh) -> None:
    """Raise ValueError unless a caller's mesh has the tensor axis and automatic axis types."""
    if TENSOR_AXIS not in mesh.axis_names:
        raise ValueError(f"mesh has axes {mesh.axis_names}; it needs one named {TENSOR_AXIS!r}")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(f"mesh axis types must all be AxisType.Auto, got {mesh.axis_types}")


@cache
def sharding_for(mesh: Mesh, logical_axes: LogicalAxes) -> NamedSharding:
    """Sharding of an array whose axes have these logical names (None: not split).

    The same object comes back for the same arguments: a fresh but equal sharding in a call makes JAX leave
    its fast dispatch path. Raises ValueError for a name that the table does not have.
    """
    return NamedSharding(mesh, PartitionSpec(*(_mesh_axis(mesh, axis) for axis in logical_axes)))


def _mesh_axis(mesh: Mesh, logical_axis: str | None) -> str | None:
    if logical_axis is None:
        return None
    if logical_axis not in RULES:
        raise ValueError(f"unknown logical axis {logical_axis!r}; known: {', '.join(RULES)}")
    axis = RULES[logical_axis]
    return axis if axis in mesh.axis_names else None


def check_divides(name: str, shape: tuple[int, ...], logical_axes: LogicalAxes, mesh: Mesh) -> None:
    """Raise ValueError, naming array, axis and sizes, if `shape` cannot be split evenly over the mesh."""
    for i, logical_axis in enumerate(logical_axes):
        axis = _mesh_axis(mesh, logical_axis)
        if axis is not None and shape[i] % mesh.shape[axis]:
            raise ValueError(
                f"{name} {shape}: axis {i} ({logical_axis}, size {shape[i]}) does not divide over the mesh"
                f" axis {axis!r} of size {mesh.shape[axis]}: choose a tp_size that divides {shape[i]}"
            )


def abstract_params(model: nnx.Module, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Parameter path ("layers.0.attention.qkv.weight") -> shape, dtype and sharding, in the state's order.

    `model` comes from `nnx.eval_shape`. The order is that of `nnx.split`'s state, so that loaded arrays in
    the same order are the leaves of that state. Raises ValueError for a parameter that does not divide.
    """
    params = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = ".".join(str(key) for key in path)
        axes = variable.get_metadata()["logical_axes"]
        value = variable.get_value()
        check_divides(name, value.shape, axes, mesh)
        params[name] = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding_for(mesh, axes))
    return params
