"""Every kernel lowers for Hopper when its operands carry a mesh, as they do in an engine.

An array constant inside a kernel, of zeros_like or full_like, is refused then, and only then.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import kernels_pallas

MESH = Mesh(np.array(jax.devices()[:1]), ("tensor",))
PAGES = (32, 2, 64, 64)


def spec(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(MESH, PartitionSpec()))


integers = functools.partial(spec, dtype=jnp.int32)
floats = functools.partial(spec, dtype=jnp.float32)
CALLS = {
    "paged_decode": (spec(4, 14, 64), spec(*PAGES), spec(*PAGES), integers(4, 8), integers(4)),
    "paged_decode_update": (
        spec(4, 2, 9, 64), spec(*PAGES), spec(*PAGES), integers(4, 8), integers(4), floats(4, 32), floats(4, 32),
    ),
    "ragged_prefill": (
        spec(64, 14, 64), spec(*PAGES), spec(*PAGES), integers(4, 8), integers(5), integers(4),
    ),
    "rope_and_write": (
        spec(64, 2, 9, 64), spec(*PAGES), spec(*PAGES), integers(64), floats(64, 32), floats(64, 32),
    ),
    "sample": (
        floats(4, 4096), floats(4), integers(4), floats(4), floats(4), integers(4), integers(4),
    ),
    "head_sample": (
        spec(136, 256), spec(4096, 256), floats(136), integers(136), floats(136), floats(136), integers(136),
        integers(136),
    ),
    "fused_linear": (spec(1, 256), spec(64, 256)),
    "fused_linear of many tokens": (spec(72, 256), spec(64, 256)),
}  # fmt: skip


@pytest.mark.parametrize("op", CALLS)
def test_kernels_lower_with_sharded_operands(op):
    function = functools.partial(getattr(kernels_pallas, op.split()[0]), implementation="mosaic")
    lowered = jax.jit(function).trace(*CALLS[op]).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
