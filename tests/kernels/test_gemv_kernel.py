"""A decoder layer's products with what stands around them: reference, interpreted kernel, lowering, a GPU."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import fused_linear, gemv_kernel
from kernels_pallas.gemv_kernel import Ring
from tests.kernels import oracle
from tests.kernels.interpreter import no_races
from tests.kernels.linear_inputs import EPSILON, SHAPES, expected, flags, operands_of, products
from tests.kernels.marks import hopper


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 3), size=st.integers(2, 40), out=st.integers(2, 40), flags=flags)
def test_reference_is_the_float64_product(tokens, size, out, flags):
    x, weight, keywords = operands_of(tokens, size, out, dtype=np.float32, **flags)
    got = fused_linear(x, weight, **keywords, implementation="reference")
    assert oracle.relative_error(got, expected(x, weight, **keywords)) < 1e-5


@settings(max_examples=6, deadline=None)
@given(
    case=st.sampled_from(
        [(256, 24, Ring(128, 1), 2), (256, 24, Ring(256, 2), 1), (384, 16, Ring(384, 1), 2)]
    ),
    flags=flags,
)
def test_interpreted_kernel_is_the_product_and_has_no_races(case, flags):
    size, out, ring, blocks = case
    x, weight, keywords = operands_of(1, size, out, **flags)
    parts = 2 if keywords["gated"] else 1
    bias = keywords.get("bias")
    bias = None if bias is None else jnp.asarray(bias.reshape(parts, out))
    norm, residual = (
        None if keywords.get(name) is None else jnp.asarray(keywords[name]) for name in ("norm", "residual")
    )
    weights = jnp.asarray(weight.reshape(parts, out, size))
    params = plgpu.InterpretGPUParams(detect_races=True)
    with no_races():
        got = gemv_kernel._run(jnp.asarray(x), weights, norm, bias, residual, EPSILON, ring, blocks, params)
    assert oracle.relative_error(got, expected(x, weight, **keywords)) < 1e-2


@pytest.mark.parametrize(
    "shape", [(1, 896, 4864), (1, 3584, 18944), (2, 18944, 3584), (1, 4096, 14336), (2, 1536, 576)]
)
def test_a_slot_arrives_while_another_is_multiplied(shape):
    parts, _, columns = shape
    ring = gemv_kernel._ring(shape, 132)
    assert ring.stages >= 2 and columns % ring.chunk == 0 and ring.chunk % 64 == 0
    held = ring.stages * parts * gemv_kernel.GROUP * ring.chunk * 2 + columns * 2
    assert held <= gemv_kernel.SHARED_BYTES


@pytest.mark.parametrize("name", SHAPES)
def test_default_configuration_lowers_for_hopper(name):
    for size, out, chosen in products(name):
        x, weight, keywords = operands_of(1, size, out, **chosen)
        arrays = {key: value for key, value in keywords.items() if isinstance(value, np.ndarray)}
        gated = keywords["gated"]

        def run(x, weight, arrays, gated=gated):
            return fused_linear(x, weight, **arrays, gated=gated, epsilon=EPSILON, implementation="mosaic")

        lowered = jax.jit(run).trace(x, weight, arrays).lower(lowering_platforms=("cuda",))
        assert "mosaic_gpu" in lowered.as_text()


def test_operands_the_kernel_cannot_take_are_named():
    def run(*args, **keywords):
        return fused_linear(*args, **keywords, implementation="mosaic")

    x, weight, keywords = operands_of(2, 128, 128)
    with pytest.raises(ValueError, match="2 tokens"):
        run(x, weight, **keywords)
    with pytest.raises(ValueError, match="columns by 128"):
        run(x[:1, :64], weight[:, :64])
    with pytest.raises(ValueError, match="not bfloat16"):
        run(x[:1].astype(np.float32), weight)
    with pytest.raises(ValueError, match=r"weight \[\*out, D\]"):
        run(x[:, 1:], weight)
    with pytest.raises(ValueError, match=r"gated weight must be \[2, N, D\]"):
        run(x, weight, gated=True)
    for name in ("norm", "bias", "residual"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            run(x, weight, **{name: keywords[name][..., 1:]})


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_on_the_gpu_is_the_product(name):
    for size, out, chosen in products(name):
        x, weight, keywords = operands_of(1, size, out, **chosen)
        device = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in keywords.items()}
        got = fused_linear(jnp.asarray(x), jnp.asarray(weight), **device, implementation="mosaic")
        assert oracle.relative_error(got, expected(x, weight, **keywords)) < 1e-2
