"""The head that keeps only the largest logits: interpreted, with `sample`, lowered for Hopper, run on a GPU."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import head_kernel, head_sample, log_probabilities, row_sampler, sample_kernel
from kernels_pallas.head_kernel import HeadConfig
from kernels_pallas.row_parts import Cut
from tests.kernels.interpreter import no_races
from tests.kernels.marks import hopper


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
        got, logits = head_kernel._run(hidden, weight, needed, None, config, params)
    want, exact = expected(hidden, weight)
    assert np.asarray(got).tolist() == want.tolist()
    np.testing.assert_array_equal(np.asarray(logits)[row], exact[row])


def test_tiles_that_overlap_agree():
    """They look like a race to the interpreter: both write the same."""
    hidden, weight = operands(136, 160, 64, 0)
    config = HeadConfig(columns=64, cluster=2, chunk=64, stages=2, blocks=4)
    got, logits = head_kernel._run(
        hidden, weight, jnp.ones(136, bool), None, config, plgpu.InterpretGPUParams(detect_races=False)
    )
    want, exact = expected(hidden, weight)
    assert np.asarray(got).tolist() == want.tolist()
    np.testing.assert_array_equal(logits, exact)


@settings(max_examples=4, deadline=None)
@given(case=st.sampled_from(CASES[:1]), seed=st.integers(0, 100))
def test_interpreted_kernel_summarises_tiles_of_logits(case, seed):
    tokens, vocab_size, size, config = case
    hidden, weight = operands(tokens, vocab_size, size, seed)
    factor = jnp.linspace(0.1, 1.5, tokens)
    with no_races():
        params = plgpu.InterpretGPUParams(detect_races=True)
        got, _, *summary = head_kernel._run(hidden, weight, jnp.ones(tokens, bool), factor, config, params)
    want, logits = expected(hidden, weight)
    assert np.asarray(got).tolist() == want.tolist()
    split = logits.reshape(tokens, -1, head_kernel.TILE)
    maxima = split.max(axis=2)
    np.testing.assert_array_equal(summary[0][:tokens, : maxima.shape[1]], maxima)
    sums = np.exp((split - maxima[:, :, None]) * np.asarray(factor, np.float64)[:, None, None]).sum(axis=2)
    np.testing.assert_allclose(summary[1][:tokens, : maxima.shape[1]], sums, rtol=1e-5)


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
    known, cut = jnp.array([-2, 6, -2, 8], jnp.int32), Cut(600, 128, 2)
    numbers = row_sampler.options_of(temperature, *options, cut)
    params = plgpu.InterpretGPUParams(detect_races=True)
    with no_races():
        alone = sample_kernel._sample(logits[::2], numbers[:, ::2], None, cut, params)
    with no_races():
        got = sample_kernel._sample(logits, numbers, known, cut, params)
    assert np.asarray(got).tolist() == [int(alone[0]), 6, int(alone[1]), 8]


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("tokens", [8, 64, 72, 256, 384])
@pytest.mark.parametrize(("vocab_size", "size"), [(151936, 896), (128256, 4096), (49152, 576)])
def test_default_configuration_lowers_for_hopper(tokens, vocab_size, size):
    hidden, weight = spec(tokens, size, dtype=jnp.bfloat16), spec(vocab_size, size, dtype=jnp.bfloat16)

    def function(hidden, weight, temperature):
        return call(hidden, weight, temperature, summary_temperature=temperature, implementation="mosaic")

    lowered = jax.jit(function).trace(hidden, weight, spec(tokens)).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu") >= 2


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
    tokens, logits, summary = call(hidden, weight, jnp.array([0.0, 0.0, 1.0]))
    assert summary is None
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


def test_options_of_another_number_of_lanes_are_named():
    hidden, weight = jnp.zeros((8, 64), jnp.bfloat16), jnp.zeros((256, 64), jnp.bfloat16)
    floats, integers = jnp.ones(8), jnp.ones(8, jnp.int32)
    with pytest.raises(ValueError, match="top_k must be"):
        head_sample(
            hidden, weight, floats, integers[1:], floats, floats, integers, integers, implementation="mosaic"
        )


def test_operands_the_kernel_cannot_take_are_named():
    def run(tokens, size=64, dtype=jnp.bfloat16):
        arrays = jnp.zeros((tokens, size), dtype), jnp.zeros((1024, size), dtype)
        call(*arrays, jnp.zeros(tokens), implementation="mosaic")

    with pytest.raises(ValueError, match="12 tokens"):
        run(12)
    with pytest.raises(ValueError, match="multiple of 64"):
        run(8, size=96)
    with pytest.raises(ValueError, match="not bfloat16"):
        run(8, dtype=jnp.float32)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize(
    ("tokens", "vocab_size", "size"),
    [(8, 151936, 896), (72, 151936, 896), (256, 151936, 896), (320, 49152, 576), (64, 49152, 576)],
)
def test_kernel_on_the_gpu_finds_the_largest(tokens, vocab_size, size):
    hidden, weight = operands(tokens, vocab_size, size, tokens)
    weight = weight.at[vocab_size // 2, 0].set(jnp.inf)  # one NaN in a row; on CPUs a maximum may lose it
    logits = jnp.dot(hidden, weight.T, preferred_element_type=jnp.float32)  # exact
    want = np.where(np.isnan(logits).any(axis=1), -1, np.nanargmax(logits, axis=1))
    drawn = tokens // 2
    temperature = jnp.zeros(tokens).at[drawn].set(1.0)
    got, written, _ = jax.jit(call)(hidden, weight, temperature)
    greedy = np.asarray(temperature) == 0
    assert np.asarray(got)[greedy].tolist() == want[greedy].tolist()
    np.testing.assert_array_equal(written[drawn], logits[drawn])
    _, written, _ = jax.jit(functools.partial(call, wanted=jnp.ones(tokens, bool)))(
        hidden, weight, temperature
    )
    np.testing.assert_array_equal(written, logits)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("tokens", [64, 160, 256])
def test_summary_on_the_gpu_gives_the_log_probabilities(tokens):
    hidden, weight = operands(tokens, 151936, 896, tokens)
    logits = jnp.dot(hidden, weight.T, preferred_element_type=jnp.float32)  # exact
    chosen, temperature = jnp.arange(tokens, dtype=jnp.int32), jnp.full(tokens, 0.7)

    @jax.jit
    def run(hidden, weight):
        wanted = jnp.ones(tokens, bool)
        _, written, summary = call(
            hidden, weight, 0 * temperature, wanted=wanted, summary_temperature=temperature
        )
        return log_probabilities(written, chosen, temperature, 5, summary=summary)

    got = run(hidden, weight)
    wanted = log_probabilities(logits, chosen, temperature, 5, implementation="reference")
    np.testing.assert_array_equal(got.top_ids, wanted.top_ids)
    for name in ("top_values", "chosen", "normaliser"):
        np.testing.assert_allclose(getattr(got, name), getattr(wanted, name), rtol=1e-5, atol=1e-4)
