"""The gated product of many tokens: interpreted kernel, lowering, a GPU."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels_pallas import glu_kernel
from kernels_pallas.glu_kernel import GluConfig
from tests.kernels import oracle
from tests.kernels.interpreter import no_races
from tests.kernels.marks import hopper


def operands_of(tokens, size, out):
    rng = np.random.default_rng(size + out)
    x = rng.normal(size=(tokens, size)).astype(ml_dtypes.bfloat16)
    return x, (rng.normal(size=(2, out, size)) * size**-0.5).astype(ml_dtypes.bfloat16)


def expected(x, weight):
    """In float64."""
    y = np.einsum("td,pnd->ptn", x.astype(np.float64), weight.astype(np.float64))
    return y[0] / (1 + np.exp(-y[0])) * y[1]


@pytest.mark.parametrize(
    ("tokens", "size", "out", "blocks"),
    [(128, 64, 64, 1), (256, 192, 192, 4), (384, 128, 128, 5)],
    ids=["one tile", "ragged trips", "trips and idle blocks"],
)
def test_interpreted_kernel_is_the_product_and_has_no_races(tokens, size, out, blocks):
    x, weight = operands_of(tokens, size, out)
    config = GluConfig(columns=64, stages=2, cluster=1, group=2, blocks=blocks)
    with no_races():
        got = glu_kernel._run(
            jnp.asarray(x), jnp.asarray(weight), config, plgpu.InterpretGPUParams(detect_races=True)
        )
    assert oracle.relative_error(got, expected(x, weight)) < 1e-2


@pytest.mark.parametrize(("size", "out"), [(896, 4864), (4096, 14336)], ids=["Qwen2.5-0.5B", "Llama-3-8B"])
def test_default_configuration_lowers_for_hopper(size, out):
    operands = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1024, size), (2, out, size)))
    lowered = jax.jit(glu_kernel.run).trace(*operands).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize(
    ("tokens", "shape", "dtype"),
    [
        (256, (2, 4864, 896), jnp.bfloat16),
        (600, (2, 4864, 896), jnp.bfloat16),
        (1024, (1, 4864, 896), jnp.bfloat16),
        (1024, (2, 4860, 896), jnp.bfloat16),
        (1024, (2, 4864, 880), jnp.bfloat16),
        (1024, (2, 4864, 896), jnp.float32),
    ],
)
def test_what_the_kernel_cannot_take(tokens, shape, dtype):
    x, weight = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((tokens, shape[-1]), shape))
    assert glu_kernel.unsupported(x, weight)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("tokens", [512, 768, 8192])
@pytest.mark.parametrize(("size", "out"), [(896, 4864), (4096, 14336)], ids=["Qwen2.5-0.5B", "Llama-3-8B"])
def test_on_the_gpu(tokens, size, out):
    keys = jax.random.split(jax.random.key(tokens), 2)
    x = jax.random.normal(keys[0], (tokens, size), jnp.bfloat16)
    weight = jax.random.normal(keys[1], (2, out, size), jnp.bfloat16) * size**-0.5
    got = jax.jit(glu_kernel.run)(x, weight)
    wanted = expected(np.asarray(x[:: tokens // 64]), np.asarray(weight[:, ::37]))
    assert oracle.relative_error(np.asarray(got)[:: tokens // 64, ::37], wanted) < 1e-2
