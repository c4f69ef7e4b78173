"""Quantised products as the GPU's libraries compute them: one token, a few (Triton) and many (cuBLAS)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.execution.programs import most_triton_tokens
from jaxgen.layers.linear import linear_maker
from jaxgen.layers.quantization import SCHEMES, quantize

pytestmark = pytest.mark.gpu
OUT, IN = (2, 96), 512


@pytest.fixture(autouse=True)
def _needs_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("JAX finds no GPU")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("tokens", [1, 16, 320])
@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_products_of_the_rounded_operands(name, tokens, dtype):
    scheme = SCHEMES[name]
    rng = np.random.default_rng(tokens)
    layer = linear_maker(scheme)(OUT, IN, (None, None, None), dtype)
    weight, scale = quantize(jnp.asarray(rng.standard_normal((*OUT, IN)), dtype), scheme.dtype)
    layer.weight.set_value(weight)
    layer.scale.set_value(scale)
    x = jnp.asarray(rng.standard_normal((tokens, IN)), dtype)
    options = {"xla_gpu_enable_triton_gemm": tokens <= most_triton_tokens(scheme)}
    y = jax.jit(layer.__call__).lower(x).compile(compiler_options=options)(x)
    as_64 = lambda array: np.asarray(array.astype(jnp.float32), np.float64)  # noqa: E731
    w64, x64 = as_64(weight) * as_64(scale)[..., None], as_64(x)
    if scheme.activations:
        q, token_scale = quantize(x, scheme.dtype)
        x64 = as_64(q) * as_64(token_scale)[:, None]
    expected = np.einsum("ti,abi->tab", x64, w64)
    assert y.dtype == dtype
    # float32 products may be tf32, those of e4m3 are summed with 14 bits, and some sums are rounded to bfloat16.
    np.testing.assert_allclose(as_64(y), expected, atol=0.01 * np.abs(expected).max())
