"""Log-probabilities against float64 NumPy: the reference, the kernel interpreted, lowered, and on a GPU."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import LogitSummary, log_probabilities, logprob_kernel
from kernels_pallas.row_parts import Cut
from tests.kernels.interpreter import no_races
from tests.kernels.marks import hopper


def rows(vocab_size, num_lanes=4, seed=0):
    """Logits, tokens and temperatures; rows with many ties, with few finite logits, and with late maxima."""
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(num_lanes, vocab_size)) * 3).astype(np.float32)
    logits[1::4] = np.round(logits[1::4])
    logits[2::4] = np.where(rng.random((len(logits[2::4]), vocab_size)) < 0.995, -np.inf, logits[2::4])
    logits[2::4, vocab_size // 3] = 1.0
    logits[3::4, -3:] = 400.0  # overflows if weighed against what came before
    tokens = rng.integers(0, vocab_size, num_lanes).astype(np.int32)
    temperature = np.resize(np.array([1.0, 0.7, 2.0, 0.0], np.float32), num_lanes)
    return jnp.asarray(logits), jnp.asarray(tokens), jnp.asarray(temperature)


def check(got, logits, tokens, temperature, top_n):
    logits, tokens = np.asarray(logits, np.float64), np.asarray(tokens)
    scaled = logits / np.where(np.asarray(temperature) > 0, temperature, 1.0)[:, None]
    shift = scaled.max(axis=1, keepdims=True)
    wanted = scaled - shift - np.log(np.exp(scaled - shift).sum(axis=1, keepdims=True))
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :top_n]
    np.testing.assert_array_equal(got.top_ids, ids)
    options = {"rtol": 2e-6, "atol": 1e-5}
    np.testing.assert_allclose(got.top_values, np.take_along_axis(wanted, ids, 1), **options)
    np.testing.assert_allclose(got.chosen, np.take_along_axis(wanted, tokens[:, None], 1)[:, 0], **options)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(vocab_size=st.integers(8, 300), top_n=st.integers(0, 8), seed=st.integers(0, 1000))
def test_reference_is_the_log_softmax_in_order(vocab_size, top_n, seed):
    operands = rows(vocab_size, seed=seed)
    check(log_probabilities(*operands, top_n, implementation="reference"), *operands, top_n)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(tiles=st.integers(1, 12), size=st.integers(4, 30), top_n=st.integers(0, 4), seed=st.integers(0, 1000))
def test_a_summary_of_the_logits_gives_the_log_softmax_in_order(tiles, size, top_n, seed):
    logits, tokens, temperature = rows(tiles * size, seed=seed)
    split = np.asarray(logits).reshape(4, tiles, size)
    maxima = np.maximum(split.max(axis=2), -3e38)
    divisor = np.where(np.asarray(temperature) > 0, temperature, 1.0)[:, None, None]
    sums = np.exp((split - maxima[:, :, None]) / divisor).sum(axis=2)
    summary = LogitSummary(jnp.asarray(maxima), jnp.asarray(sums))
    got = log_probabilities(logits, tokens, temperature, top_n, summary=summary)
    check(got, logits, tokens, temperature, top_n)


@pytest.mark.parametrize(("vocab_size", "top_n"), [(1160, 7), (512, 0)])
def test_interpreted_kernel_is_the_log_softmax_in_order(vocab_size, top_n):
    operands = rows(vocab_size)
    params = plgpu.InterpretGPUParams(detect_races=True)
    with no_races():
        got = logprob_kernel._log_probabilities(*operands, top_n, Cut(vocab_size, 256, 3), params)
        check(got, *operands, top_n)


@pytest.mark.parametrize(("vocab_size", "top_n"), [(1024, 1), (151936, 20), (262144, 64)])
def test_kernel_lowers_for_hopper(vocab_size, top_n):
    floats, integers = (jax.ShapeDtypeStruct((4,), dtype) for dtype in (jnp.float32, jnp.int32))
    operands = (jax.ShapeDtypeStruct((4, vocab_size), jnp.float32), integers, floats)
    compute = jax.jit(lambda *operands: log_probabilities(*operands, top_n, implementation="mosaic"))
    lowered = compute.trace(*operands).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_misfits_are_named():
    logits, tokens, temperature = rows(16)
    with pytest.raises(ValueError, match="top_n must be"):
        log_probabilities(logits, tokens, temperature, 17)
    with pytest.raises(ValueError, match="tokens must be"):
        log_probabilities(logits, tokens[1:], temperature, 1)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize(("vocab_size", "top_n"), [(1024, 5), (151936, 20), (262144, 5)])
def test_kernel_on_the_gpu_is_the_log_softmax_in_order(vocab_size, top_n):
    operands = rows(vocab_size, num_lanes=64)
    check(log_probabilities(*operands, top_n, implementation="mosaic"), *operands, top_n)
