"""A kernel is lowered once, however many programs it stands in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import Mesh, PartitionSpec

import kernels_pallas

LANES, VOCABULARY = 3, 2560  # of no other test, since what was lowered stays


def spec(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def operands(lanes=LANES):
    floats, integers = spec(jnp.float32, lanes), spec(jnp.int32, lanes)
    return spec(jnp.float32, lanes, VOCABULARY), floats, integers, floats, floats, integers, integers


def sample(*operands):
    return kernels_pallas.sample(*operands, implementation="mosaic")


def lower(function, *operands):
    return jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture
def lowerings(monkeypatch):
    """The functions lowered on their own, growing as they are."""
    found = []
    original = export.export

    def counted(function, **options):
        found.append(function)
        return original(function, **options)

    monkeypatch.setattr(export, "export", counted)
    return found


def test_programs_share_a_lowered_kernel(lowerings):
    first = lower(sample, *operands())
    second = lower(lambda *given: sample(*given) + 1, *operands())
    assert "mosaic_gpu" in first and "mosaic_gpu" in second
    assert len(lowerings) == 1
    assert "mosaic_gpu" in lower(sample, *operands(LANES + 1))
    assert len(lowerings) == 2


def test_calls_in_one_program_share_its_code():
    def twice(*given):
        return sample(*given) + sample(*given)

    assert lower(twice, *operands()).count("custom_call @mosaic_gpu") == 1


def test_a_kernel_inside_shard_map_is_lowered_in_place(lowerings):
    mesh = Mesh(np.array(jax.devices()[:1]), ("lanes",))
    lanes = PartitionSpec("lanes")
    mapped = jax.shard_map(sample, mesh=mesh, in_specs=lanes, out_specs=lanes)
    assert "mosaic_gpu" in lower(mapped, *operands(LANES + 2))
    assert not lowerings
