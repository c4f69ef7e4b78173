"""Quantised linear layers against float64 NumPy, within what rounding to 8 bits explains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgen.layers import linear
from jaxgen.layers.linear import Linear, linear_maker
from jaxgen.layers.quantization import SCHEMES, quantize, scheme_named
from jaxgen.server_args_checks import QUANTIZATIONS

DTYPES = sorted({scheme.dtype for scheme in SCHEMES.values()}, key=str)
EPSILON = {jnp.float32: 2.0**-22, jnp.bfloat16: 2.0**-7}  # of sums, and of the result's type


def rounding_error(x: np.ndarray, scale: np.ndarray, dtype) -> np.ndarray:
    """Bound of |x - q * scale|: half a step of int8; of e4m3, half of its last place or least subnormal."""
    if dtype == jnp.int8:
        return np.broadcast_to(scale[..., None] * 0.5001, x.shape)
    return np.abs(x) * 2.0**-4 + scale[..., None] * 2.0**-10


def quantized_layer(scheme, weight: np.ndarray, bias: np.ndarray | None, dtype):
    *out_shape, in_size = weight.shape
    axes = (*(None for _ in out_shape), "embed")
    layer = linear_maker(scheme)(tuple(out_shape), in_size, axes, dtype, bias=bias is not None)
    q, scale = quantize(jnp.asarray(weight, dtype), scheme.dtype)
    layer.weight.set_value(q)
    layer.scale.set_value(scale)
    if bias is not None:
        layer.bias.set_value(jnp.asarray(bias, dtype))
    return layer


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEMES)),
    dtype=st.sampled_from(sorted(EPSILON, key=str)),
    tokens=st.integers(1, 5),
    out_shape=st.sampled_from([(7,), (2, 5), (2, 3, 4)]),
    in_size=st.integers(1, 80),
    spread=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 2**31),
)
def test_products_are_those_of_float64_within_the_rounding(
    name, dtype, tokens, out_shape, in_size, spread, seed
):
    """Rows of very different magnitude (`spread` in powers of e) keep their own relative accuracy."""
    rng = np.random.default_rng(seed)
    scheme = SCHEMES[name]
    as_held = lambda values: np.asarray(jnp.asarray(values, dtype), np.float64)  # noqa: E731
    w = rng.standard_normal((*out_shape, in_size)) * np.exp(spread * rng.standard_normal((*out_shape, 1)))
    x = rng.standard_normal((tokens, in_size)) * np.exp(spread * rng.standard_normal((tokens, 1)))
    w, x, bias = as_held(w), as_held(x), as_held(rng.standard_normal(out_shape))
    layer = quantized_layer(scheme, w, bias, dtype)
    y = layer(jnp.asarray(x, dtype))
    assert y.dtype == dtype and y.shape == (tokens, *out_shape)
    w_error = rounding_error(w, np.asarray(layer.scale[...], np.float64), scheme.dtype)
    x_error = np.zeros_like(x)
    if scheme.activations:
        _, x_scale = quantize(jnp.asarray(x, dtype), scheme.dtype)
        x_error = rounding_error(x, np.asarray(x_scale, np.float64), scheme.dtype)

    def product(a, b):
        return np.einsum("ti,...i->t...", a, b)

    magnitude = product(np.abs(x) + x_error, np.abs(w) + w_error)
    bound = magnitude - product(np.abs(x), np.abs(w)) + EPSILON[dtype] * (magnitude + np.abs(bias))
    assert np.all(np.abs(np.asarray(y, np.float64) - product(x, w) - bias) <= bound)


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.activations])
def test_only_the_operands_are_rounded(name):
    """The product of the rounded operands is exact but for float32: no 8-bit sums, no narrow accumulator."""
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((48, 640)), rng.standard_normal((3, 640))
    layer = quantized_layer(SCHEMES[name], w, None, jnp.float32)
    xq, x_scale = (
        np.asarray(a, np.float64) for a in quantize(jnp.asarray(x, jnp.float32), layer.scheme.dtype)
    )
    wq, w_scale = (np.asarray(a[...], np.float64) for a in (layer.weight, layer.scale))
    expected = xq @ wq.T * x_scale[:, None] * w_scale
    np.testing.assert_allclose(layer(jnp.asarray(x, jnp.float32)), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [1e-20, 1.0, 1e30])
def test_the_largest_of_a_row_is_kept_and_nothing_overflows(dtype, magnitude):
    x = np.array([[1.0, -0.5, 0.01], [-3.0, 3.0, 0.0]], np.float32) * np.float32(magnitude)
    q, scale = quantize(jnp.asarray(x), dtype)
    assert q.dtype == dtype and scale.shape == (2,)
    back = np.asarray(q, np.float64) * np.asarray(scale, np.float64)[:, None]
    np.testing.assert_allclose(np.abs(back).max(-1), np.abs(x).max(-1), rtol=1e-6)
    np.testing.assert_allclose(back, x, atol=0.07 * np.abs(x).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_stay_zeros(dtype):
    q, scale = quantize(jnp.zeros((2, 4)), dtype)
    assert not np.asarray(q, np.float32).any() and np.isfinite(scale).all()


@pytest.mark.parametrize("name", sorted(SCHEMES))
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_activation_breaks_its_own_token_and_no_other(name, bad):
    layer = quantized_layer(SCHEMES[name], np.ones((4, 8)), None, jnp.float32)
    y = np.asarray(layer(jnp.ones((3, 8)).at[1, 2].set(bad)))
    assert not np.isfinite(y[1]).any()
    np.testing.assert_allclose(y[[0, 2]], 8.0, rtol=1e-2)


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_a_layer_holds_one_byte_a_weight_and_four_a_channel(name):
    layer = nnx.eval_shape(
        lambda: linear_maker(SCHEMES[name])((6, 4), 32, (None, "mlp", "embed"), jnp.float32)
    )
    state = {path[0]: leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(layer))}
    assert {name: leaf.size * leaf.dtype.itemsize for name, leaf in state.items()} == {
        "weight": 6 * 4 * 32,
        "scale": 6 * 4 * 4,
    }
    assert layer.scale.get_metadata()["logical_axes"] == (None, "mlp")
    assert layer.ahead == ()  # no kernel reads it


def test_without_a_scheme_a_layer_is_plain():
    assert linear_maker(None) is Linear


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_the_product_of_one_token_on_a_gpu_is_that_of_many(name):
    """Written as a reduction there; here in the open, against the matrix product."""
    rng = np.random.default_rng(1)
    scheme = SCHEMES[name]
    weight, _ = quantize(jnp.asarray(rng.standard_normal((2, 7, 96)), jnp.float32), scheme.dtype)
    x = jnp.asarray(rng.standard_normal((1, 96)), jnp.float32)
    if scheme.activations:
        x, _ = quantize(x, scheme.dtype)
    sum_dtype = scheme.sum_dtype(jnp.dtype(jnp.float32))
    one, many = linear._reduce(x, weight, sum_dtype), linear._dot(x, weight.astype(x.dtype), sum_dtype)
    assert (one.shape, one.dtype) == ((1, 2, 7), sum_dtype) == (many.shape, many.dtype)
    np.testing.assert_allclose(one, many, rtol=1e-5, atol=1e-3)


def test_int8_products_are_integer_products():
    """What makes them fast: both operands of the product are 8 bits wide, and its sums int32."""
    layer = quantized_layer(SCHEMES["w8a8_int8"], np.ones((4, 8)), None, jnp.float32)
    jaxpr = str(jax.make_jaxpr(lambda x: layer(x))(jnp.ones((2, 8))))
    assert "preferred_element_type=int32" in jaxpr


def test_the_options_name_the_schemes_and_an_unknown_name_lists_them():
    assert set(QUANTIZATIONS) == {*SCHEMES, "unquant"}
    with pytest.raises(ValueError) as caught:
        scheme_named("fp9")
    assert all(name in str(caught.value) for name in ("fp9", *SCHEMES))
