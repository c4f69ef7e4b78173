"""Draws of a small top_k from the tiles of the largest maxima are those of the reference."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import head_sample, reference, row_sampler, tile_draw_kernel
from kernels_pallas.head_kernel import TILE
from kernels_pallas.reference import UNDRAWN
from kernels_pallas.row_parts import Cut
from tests.kernels.interpreter import no_races
from tests.kernels.marks import hopper

TILES = 96


def logits_of(kind, rng):
    x = rng.normal(size=TILES * TILE)
    match kind:
        case "flat":
            x *= 5e-6
        case "peaked":
            x[rng.integers(x.size)] += 30
        case "tied":
            x = np.round(x * 8) / 8
        case "equal":
            x[:] = 1.0
        case "together":  # the largest are in one tile
            x[700:760] += 6
        case "masked":
            x[rng.permutation(x.size)[2000:]] = -np.inf
    return x.astype(np.float32)


KINDS = ["normal", "flat", "peaked", "tied", "equal", "together", "masked"]
LANES = st.tuples(
    st.sampled_from(KINDS),
    st.sampled_from([0.5, 0.8, 2.0]),  # temperature
    st.sampled_from([1, 2, 20, 50, tile_draw_kernel.MOST_TOP_K, 57, 2**30]),
    st.sampled_from([0.13, 0.93, 1.0]),  # top_p
    st.sampled_from([0.0, 0.0, 0.07]),  # min_p
)


def summary_of(logits, temperature):
    split = logits.reshape(len(logits), -1, TILE)
    maxima = np.maximum(split.max(axis=2), -3e38)
    sums = np.exp((split - maxima[:, :, None]) / temperature[:, None, None]).sum(axis=2)
    padding = ((0, 2), (0, 128 - TILES))
    return [np.pad(part.astype(np.float32), padding, constant_values=np.nan) for part in (maxima, sums)]


@settings(max_examples=8, deadline=None, derandomize=True)
@given(lanes=st.lists(LANES, min_size=3, max_size=3), seed=st.integers(0, 1000))
def test_interpreted_kernel_draws_what_the_reference_draws(lanes, seed):
    rng = np.random.default_rng(seed)
    kinds, *columns = zip(*lanes, strict=True)
    logits = np.stack([logits_of(kind, rng) for kind in kinds])
    temperature, top_k, top_p, min_p = (
        np.array(column, dtype) for column, dtype in zip(columns, ("f4", "i4", "f4", "f4"), strict=True)
    )
    seeds = np.arange(3, dtype=np.int32) + seed
    options = temperature, top_k, top_p, min_p, seeds, seeds
    numbers = row_sampler.options_of(*map(jnp.asarray, options), Cut(logits.shape[1]))
    greedy = logits.argmax(axis=1).astype(np.int32)
    with no_races():
        params = plgpu.InterpretGPUParams(detect_races=True)
        got = tile_draw_kernel._run(logits, numbers, greedy, *summary_of(logits, temperature), params)
    want = np.asarray(reference.sample(logits, *options))
    for kind, k, token, right in zip(kinds, top_k, np.asarray(got), want, strict=True):
        if k > tile_draw_kernel.MOST_TOP_K or kind == "equal":
            assert token == UNDRAWN
        else:
            assert token == right or (token == UNDRAWN and kind in ("tied", "masked"))


def test_greedy_tokens_and_those_of_lanes_with_a_nan_are_passed_on():
    rng = np.random.default_rng(0)
    logits, temperature = np.stack([logits_of("normal", rng)] * 2), np.array([1, 0], np.float32)
    integers = jnp.ones(2, jnp.int32)
    numbers = row_sampler.options_of(
        temperature, integers, np.ones(2), np.zeros(2), integers, integers, Cut(logits.shape[1])
    )
    greedy = jnp.array([-1, 7], jnp.int32)
    params = plgpu.InterpretGPUParams()
    got = tile_draw_kernel._run(logits, numbers, greedy, *summary_of(logits, np.ones(2)), params)
    assert got.tolist() == [-1, 7]


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("scale", [1e-5, 1.0])
def test_head_sample_on_the_gpu_draws_what_the_reference_draws(scale):
    """Roundings differ by an ulp, so a draw in a thousand may fall on the other side of a threshold."""
    rng = np.random.default_rng(0)
    lanes = 256
    hidden = jnp.asarray(rng.normal(size=(lanes, 896)) * scale, jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=(151936, 896)) * 0.1, jnp.bfloat16)
    temperature = jnp.asarray(rng.choice([0.0, 0.8, 1.0], lanes), jnp.float32)
    top_k = jnp.asarray(rng.choice([1, 5, 50, 500, 2**30], lanes), jnp.int32)
    top_p = jnp.asarray(rng.choice([0.6, 0.95, 1.0], lanes), jnp.float32)
    positions = jnp.arange(lanes, dtype=jnp.int32)
    options = temperature, top_k, top_p, jnp.zeros(lanes), positions, positions
    got, logits, _ = jax.jit(head_sample)(hidden, weight, *options)
    exact = jnp.dot(hidden, weight.T, preferred_element_type=jnp.float32)
    drawn = np.asarray(temperature) > 0
    np.testing.assert_allclose(logits[drawn], exact[drawn], rtol=1e-4, atol=1e-6 * scale * 1e3)
    want = np.asarray(jax.jit(reference.sample)(exact, *options))
    assert (np.asarray(got) == want).mean() > 0.98
