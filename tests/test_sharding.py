"""The mesh and the axis table: what a user is told when a model does not fit the devices."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jaxgen.sharding import check_divides, check_mesh, make_mesh, sharding_for


def test_mesh_takes_the_first_devices():
    mesh = make_mesh(2, jax.devices()[1:])
    assert dict(mesh.shape) == {"data": 1, "tensor": 2}
    assert list(mesh.devices.flat) == jax.devices()[1:3]


@pytest.mark.parametrize("tp_size", [0, 64])
def test_impossible_sizes_are_refused(tp_size):
    with pytest.raises(ValueError, match="tp_size"):
        make_mesh(tp_size)


def test_shardings_are_built_once_per_mesh():
    axes = ("kv_heads", None, None, "embed")
    sharding = sharding_for(make_mesh(2), axes)
    assert sharding.spec == P("tensor", None, None, None)
    assert sharding_for(make_mesh(2), axes) is sharding
    assert sharding_for(make_mesh(4), axes) is not sharding


def test_unknown_axis_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"kvheads.*kv_heads"):
        sharding_for(make_mesh(1), ("kvheads",))


def test_uneven_split_names_parameter_axis_and_sizes():
    with pytest.raises(ValueError) as caught:
        check_divides(
            "layers.0.attention.qkv.weight", (3, 5, 8, 36), ("kv_heads", None, None, "embed"), make_mesh(2)
        )
    for word in ("layers.0.attention.qkv.weight", "kv_heads", "size 3", "size 2", "tp_size"):
        assert word in str(caught.value)


def test_a_callers_mesh_needs_the_tensor_axis():
    devices = np.array(jax.devices()[:2])
    check_mesh(make_mesh(2))
    with pytest.raises(ValueError, match="tensor"):
        check_mesh(Mesh(devices, ("model",)))
    with pytest.raises(ValueError, match="Auto"):
        check_mesh(Mesh(devices, ("tensor",), axis_types=(AxisType.Explicit,)))
