"""The head that keeps only the largest logits: interpreted, with `sample`, lowered for Hopper, run on a GPU."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import head_kernel, head_sample, mosaic, sample_kernel
from kernels_pallas.head_kernel import HeadConfig
from kernels_pallas.row_parts import Cut
from tests.kernels.interpreter import no_races


def operands(tokens, vocab_size, size, seed):
    """hidden and weight of small whole numbers, so that sums are exact and ties are many."""
    rng = np.random.default_rng(seed)
    hidden = rng.integers(-2, 3, (tokens, size)).astype(np.float32)
    weight = rng.integers(-1, 2, (vocab_size, size)).astype(np.float32)
    hidden[1] = 0  # all logits equal
    return jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16)


def expected(hidden, weight):
    """The first of the largest logits, and logits, in float64."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64).T
    return logits.argmax(axis=1), logits


CASES = [  # tokens are fewer than a tile, not every block has work
    (16, 384, 128, HeadConfig(columns=128, chunk=64, stages=2, blocks=2)),
    (72, 192, 128, HeadConfig(columns=64, warpgroups=2, chunk=128, stages=2, blocks=2)),
    (128, 192, 64, HeadConfig(columns=64, warpgroups=1, cluster=2, chunk=64, stages=3, blocks=8)),
]


@settings(max_examples=6, deadline=None)
@given(case=st.sampled_from(CASES), seed=st.integers(0, 100), row=st.integers(0, 15))
def test_interpreted_kernel_finds_the_first_of_the_largest_logits(case, seed, row):
    tokens, vocab_size, size, config = case
    hidden, weight = operands(tokens, vocab_size, size, seed)
    needed = jnp.arange(tokens) == row
    with no_races():
        params = plgpu.InterpretGPUParams(detect_races=True)
        got, logits = head_kernel._run(hidden, weight, needed, config, params)
    want, exact = expected(hidden, weight)
    assert np.asarray(got).tolist() == want.tolist()
    np.testing.assert_array_equal(np.asarray(logits)[row], exact[row])


def test_tiles_that_overlap_agree():
    """They look like a race to the interpreter: both write the same."""
    hidden, weight = operands(136, 160, 64, 0)
    config = HeadConfig(columns=64, cluster=2, chunk=64, stages=2, blocks=4)
    got, logits = head_kernel._run(
        hidden, weight, jnp.ones(136, bool), config, plgpu.InterpretGPUParams(detect_races=False)
    )
    want, exact = expected(hidden, weight)
    assert np.asarray(got).tolist() == want.tolist()
    np.testing.assert_array_equal(logits, exact)


def test_known_tokens_of_greedy_lanes_are_taken_and_the_others_drawn():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 600)).astype(np.float32)
    logits[1::2] = np.nan  # not to be looked at
    temperature = np.array([0.8, 0.0, 1.2, 0.0], np.float32)
    full = functools.partial(np.full, 4)
    options = (
        full(20, np.int32),
        full(0.9, np.float32),
        full(0.0, np.float32),
        full(3, np.int32),
        full(7, np.int32),
    )
    known, cut = jnp.array([5, 6, 7, 8], jnp.int32), Cut(600, 128, 2)
    params = plgpu.InterpretGPUParams()
    alone = sample_kernel._sample(
        logits[::2], temperature[::2], *(o[::2] for o in options), None, cut, params
    )
    with no_races():
        params = plgpu.InterpretGPUParams(detect_races=True)
        got = sample_kernel._sample(logits, temperature, *options, known, cut, params)
    assert np.asarray(got).tolist() == [int(alone[0]), 6, int(alone[1]), 8]


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("tokens", [8, 64, 72, 256, 384])
@pytest.mark.parametrize(("vocab_size", "size"), [(151936, 896), (128256, 4096), (49152, 576)])
def test_default_configuration_lowers_for_hopper(tokens, vocab_size, size):
    arrays = spec(tokens, size, dtype=jnp.bfloat16), spec(vocab_size, size, dtype=jnp.bfloat16)
    function = head_kernel.largest
    lowered = (
        jax.jit(function).trace(*arrays, spec(tokens, dtype=jnp.bool_)).lower(lowering_platforms=("cuda",))
    )
    assert "mosaic_gpu" in lowered.as_text()


def call(hidden, weight, temperature, **keywords):
    lanes = hidden.shape[0]
    full = functools.partial(jnp.full, (lanes,))
    positions = jnp.arange(lanes, dtype=jnp.int32)
    return head_sample(
        hidden, weight, temperature, full(50), full(0.95), full(0.0), full(1), positions, **keywords
    )


def test_without_the_kernel_it_is_the_product_and_its_sample():
    rng = np.random.default_rng(0)
    hidden, weight = rng.normal(size=(3, 32)).astype(np.float32), rng.normal(size=(40, 32)).astype(np.float32)
    tokens, logits = call(hidden, weight, jnp.array([0.0, 0.0, 1.0]))
    np.testing.assert_allclose(logits, hidden @ weight.T, rtol=1e-5, atol=1e-5)
    assert tokens[:2].tolist() == (hidden @ weight.T)[:2].argmax(axis=1).tolist()
    assert 0 <= tokens[2] < 40


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((8, 64), (1024, 65), (8,)), "want hidden"),
        (((8, 64), (1024, 64), (7,)), "temperature"),
    ],
)
def test_operands_that_do_not_fit_are_named(shapes, message):
    hidden, weight, temperature = (jnp.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        call(hidden, weight, temperature)


def test_operands_the_kernel_cannot_take_are_named():
    def run(tokens, dtype=jnp.bfloat16):
        call(
            jnp.zeros((tokens, 64), dtype),
            jnp.zeros((1024, 64), dtype),
            jnp.zeros(tokens),
            implementation="mosaic",
        )

    with pytest.raises(ValueError, match="12 tokens"):
        run(12)
    with pytest.raises(ValueError, match="not bfloat16"):
        run(8, jnp.float32)


@pytest.mark.gpu
@pytest.mark.skipif(mosaic.device_without_kernels() is not None, reason="needs a Hopper GPU")
@pytest.mark.parametrize("tokens", [8, 64, 72, 160, 256, 320])
@pytest.mark.parametrize(("vocab_size", "size"), [(151936, 896), (49152, 576)])
def test_kernel_on_the_gpu_finds_the_largest(tokens, vocab_size, size):
    hidden, weight = operands(tokens, vocab_size, size, tokens)
    weight = weight.at[vocab_size // 2, 0].set(jnp.inf)  # one NaN in a row; on CPUs a maximum may lose it
    logits = jnp.dot(hidden, weight.T, preferred_element_type=jnp.float32)  # exact
    want = jnp.where(jnp.isnan(logits).any(axis=1), -1, jnp.nanargmax(logits, axis=1))
    temperature = jnp.where(jnp.arange(tokens) == 5, 1.0, 0.0)
    got, written = jax.jit(call)(hidden, weight, temperature)
    greedy = np.asarray(temperature) == 0
    assert np.asarray(got)[greedy].tolist() == np.asarray(want)[greedy].tolist()
    np.testing.assert_array_equal(written[5], logits[5])
    _, written = jax.jit(call)(hidden, weight, temperature, wanted=jnp.ones(tokens, bool))
    np.testing.assert_array_equal(written, logits)
