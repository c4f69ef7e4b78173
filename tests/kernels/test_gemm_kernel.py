"""A layer's products for tens of tokens: the interpreted kernel, its configurations, lowering, a GPU."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import (
    NormInput,
    fused_linear,
    fused_linear_to_norm,
    gemm_config,
    gemm_kernel,
)
from kernels_pallas.gemm_config import GemmConfig, Product
from tests.kernels import oracle
from tests.kernels.interpreter import no_races
from tests.kernels.linear_inputs import EPSILON, SHAPES, expected, flags, operands_of, products
from tests.kernels.marks import hopper


def interpreted(case, chosen, *, detect_races):
    """The kernel's result for (tokens, size, out, configuration) and what it should be, norms aside."""
    tokens, size, out, config = case
    x, weight, keywords = operands_of(tokens, size, out, **chosen | {"norm": False})
    parts = 2 if keywords["gated"] else 1
    arrays = (keywords.get(name) for name in ("bias", "residual"))
    bias, residual = (None if array is None else jnp.asarray(array) for array in arrays)
    bias = None if bias is None else bias.reshape(parts, out)
    weights = jnp.asarray(weight.reshape(parts, out, size))
    params = plgpu.InterpretGPUParams(detect_races=detect_races)
    with no_races():
        got, *_ = gemm_kernel._run(jnp.asarray(x), weights, None, bias, residual, None, 0.0, config, params)
    return got, expected(x, weight, **keywords)


@settings(max_examples=5, deadline=None)
@given(
    case=st.sampled_from(
        [
            (16, 256, 64, GemmConfig(columns=32, stages=2)),
            (64, 256, 48, GemmConfig(columns=24, chunk=128, stages=3)),
            (128, 128, 32, GemmConfig(columns=16, warpgroups=2, stages=2)),
            (64, 320, 32, GemmConfig(columns=16, stages=3, together=2)),  # the last chunk alone
        ]
    ),
    chosen=flags,
)
def test_interpreted_kernel_is_the_product_and_has_no_races(case, chosen):
    got, want = interpreted(case, chosen, detect_races=True)
    assert oracle.relative_error(got, want) < 1e-2


@settings(max_examples=5, deadline=None)
@given(
    case=st.sampled_from(
        [
            (72, 192, 40, GemmConfig(columns=16, warpgroups=1, stages=2)),  # tiles that overlap
            (24, 320, 32, GemmConfig(columns=32, splits=2, stages=2)),
            (128, 256, 32, GemmConfig(columns=16, warpgroups=2, splits=2, stages=2)),
        ]
    ),
    chosen=flags,
)
def test_blocks_that_meet_or_overlap_give_the_product(case, chosen):
    """They look like a race to the interpreter."""
    got, want = interpreted(case, chosen, detect_races=False)
    assert oracle.relative_error(got, want) < 1e-2


@settings(max_examples=6, deadline=None)
@given(
    case=st.sampled_from(
        [  # tokens, K of the first product, D, N of the second, and how both are cut
            (64, 128, 64, 32, GemmConfig(columns=16), GemmConfig(columns=32)),
            (72, 128, 64, 24, GemmConfig(columns=8, warpgroups=2), GemmConfig(columns=16)),
            (72, 128, 128, 24, GemmConfig(columns=40), GemmConfig(columns=24, warpgroups=2)),  # overlap
            (24, 256, 128, 32, GemmConfig(columns=64, splits=2), GemmConfig(columns=32, splits=2)),
        ]
    ),
    gated=st.booleans(),
)
def test_a_norm_between_two_products_takes_no_launch(case, gated):
    tokens, first_size, size, out, first, second = case
    x, weight, before = operands_of(tokens, first_size, size, norm=False)
    _, next_weight, after = operands_of(tokens, size, out, gated=gated, residual=False)
    params = plgpu.InterpretGPUParams(detect_races=False)
    parts = 2 if gated else 1
    with no_races():
        rows, *prepared = gemm_kernel._run(
            jnp.asarray(x),
            jnp.asarray(weight[None]),
            None,
            jnp.asarray(before["bias"][None]),
            jnp.asarray(before["residual"]),
            jnp.asarray(after["norm"]),
            0.0,
            first,
            params,
        )
        scaled, squares = prepared
        got, *_ = gemm_kernel._run(
            scaled,
            jnp.asarray(next_weight.reshape(parts, out, size)),
            squares,
            jnp.asarray(after["bias"].reshape(parts, out)),
            None,
            None,
            EPSILON,
            second,
            params,
        )
    want = expected(x, weight, **before)
    assert oracle.relative_error(rows, want) < 1e-2
    assert oracle.relative_error(got, expected(np.asarray(rows), next_weight, **after)) < 1e-2


@pytest.mark.parametrize("tokens", [16, 64, 256])
@pytest.mark.parametrize("name", SHAPES)
def test_default_configuration_lowers_for_hopper(name, tokens):
    for size, out, chosen in products(name):
        gated = chosen.get("gated", False)

        def spec(*shape):
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

        weight = spec(2, out, size) if gated else spec(out, size)
        shapes = {"norm": spec(size), "bias": spec(*weight.shape[:-1]), "residual": spec(tokens, out)}
        arrays = {operand: shape for operand, shape in shapes.items() if chosen.get(operand, True)}

        def run(x, weight, arrays, gated=gated):
            return fused_linear(x, weight, **arrays, gated=gated, epsilon=EPSILON, implementation="mosaic")

        lowered = jax.jit(run).trace(spec(tokens, size), weight, arrays).lower(lowering_platforms=("cuda",))
        assert "mosaic_gpu" in lowered.as_text()


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 32).map(lambda n: 8 * n),
    parts=st.sampled_from((1, 2)),
    rows=st.integers(1, 2000).map(lambda n: 8 * n),
    size=st.integers(1, 240).map(lambda n: 64 * n),
)
def test_every_product_has_a_configuration_that_covers_it(tokens, parts, rows, size):
    product = Product(tokens, parts, rows, size)
    assert gemm_config.unsupported(product) is None
    config = gemm_config.choose(product)
    assert config.columns <= rows and config.columns % (8 * config.splits) == 0
    assert parts * config.columns <= gemm_config.MAX_COLUMNS
    assert size % config.chunk == 0 and size // config.chunk >= config.splits
    assert config.stages >= 2
    assert config in gemm_config.candidates(tokens, parts, rows, size)


def test_operands_the_kernel_cannot_take_are_named():
    def run(tokens, size, out, dtype=jnp.bfloat16):
        x, weight = jnp.ones((tokens, size), dtype), jnp.ones((out, size), jnp.bfloat16)
        return fused_linear(x, weight, implementation="mosaic")

    for case, message in (
        ((2, 128, 64), "2 tokens"),
        ((68, 128, 64), "68 tokens"),
        ((16, 96, 64), "of 96"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*case)
    with pytest.raises(ValueError, match="not bfloat16"):
        run(16, 128, 64, jnp.float32)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("tokens", [16, 64, 72, 256])
@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Llama-3.2-1B"])
def test_kernel_on_the_gpu_is_the_product(name, tokens):
    for size, out, chosen in products(name):
        x, weight, keywords = operands_of(tokens, size, out, **chosen)
        device = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in keywords.items()}
        got = fused_linear(jnp.asarray(x), jnp.asarray(weight), **device, implementation="mosaic")
        assert oracle.relative_error(got, expected(x, weight, **keywords)) < 1e-2


def products_around_a_norm(name, tokens, implementation):
    """out, norm, gate and up of a layer: what the ops give, and what they should, the second from the first's rows."""
    size, inner, heads, _ = SHAPES[name]
    x, weight, before = operands_of(tokens, heads, size, norm=False)
    _, gate_up, after = operands_of(tokens, size, inner, gated=True, bias=False, residual=False)
    around = {key: jnp.asarray(before[key]) for key in ("bias", "residual")}
    norm, wanted = jnp.asarray(after["norm"]), {"implementation": implementation}
    y = fused_linear_to_norm(jnp.asarray(x), jnp.asarray(weight), norm, **around, **wanted)
    z = fused_linear(y, jnp.asarray(gate_up), norm=norm, gated=True, epsilon=EPSILON, **wanted)
    return y, z, expected(x, weight, **before), expected(np.asarray(y.rows), gate_up, **after)


@pytest.mark.parametrize("tokens", [1, 3, 24])
def test_reference_prepares_nothing_for_the_norm(tokens):
    y, z, *want = products_around_a_norm("Qwen2.5-0.5B", tokens, "reference")
    assert y.scaled is None and y.squares is None
    assert oracle.relative_error(y.rows, want[0]) < 1e-2
    assert oracle.relative_error(z, want[1]) < 1e-2


def test_rows_for_another_norm_are_refused():
    x, weight = jnp.ones((16, 64), jnp.bfloat16), jnp.ones((64, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="next_norm"):
        fused_linear_to_norm(x, weight, jnp.ones(32, jnp.bfloat16))
    prepared = NormInput(x, x, jnp.ones((128, 8)))
    with pytest.raises(ValueError, match="norm must be given"):
        fused_linear(prepared, weight)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("tokens", [8, 64, 72, 256])
@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Llama-3.2-1B"])
def test_norm_on_the_gpu_takes_no_launch(name, tokens):
    y, z, *want = products_around_a_norm(name, tokens, "mosaic")
    assert y.scaled is not None
    assert oracle.relative_error(y.rows, want[0]) < 1e-2
    assert oracle.relative_error(z, want[1]) < 1e-2
