"""The sampling kernel draws what the reference draws: interpreted, lowered for Hopper, run on a GPU."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import gumbel_noise, reference, row_sampler, sample_kernel
from kernels_pallas.row_parts import Cut
from tests.kernels import oracle
from tests.kernels.interpreter import no_races
from tests.kernels.marks import hopper

ALL = 2**30


def rows(logits_scale, vocab_size, seed=0):
    """A batch that asks for every option: greedy, plain, top-k, top-p, min-p, all together, ties, a NaN."""
    rng = np.random.default_rng(seed)
    temperature = np.array([0.0, 1.0, 0.8, 1.0, 1.3, 0.7, 1.0, 1.0], np.float32)
    top_k = np.array([5, ALL, 20, ALL, ALL, 50, 3, ALL], np.int32)
    top_p = np.array([0.5, 1.0, 1.0, 0.9, 1.0, 0.5, 1.0, 0.9], np.float32)
    min_p = np.array([0.0, 0.0, 0.0, 0.0, 0.1, 0.02, 0.0, 0.0], np.float32)
    logits = (rng.normal(size=(8, vocab_size)) * logits_scale).astype(np.float32)
    logits[0, ::5] = -np.inf
    logits[0, vocab_size // 2 :: 7] = logits[0].max() + 1  # several largest: the lowest id counts
    logits[5, ::3] = -np.inf
    logits[6] = np.round(logits[6])  # many ties at the threshold
    logits[7, vocab_size - 1] = np.nan
    seeds, positions = rng.integers(0, 2**31, (2, 8)).astype(np.int32)
    return [jnp.asarray(x) for x in (logits, temperature, top_k, top_p, min_p, seeds, positions)]


def interpreted(logits, *options, known=None):
    *options, cut, params = options
    return sample_kernel._sample(logits, row_sampler.options_of(*options, cut), known, cut, params)


@pytest.mark.parametrize("lanes", [[0, 1, 2], [3, 4], [5, 6, 7]])
def test_interpreted_kernel_draws_what_the_reference_draws(lanes):
    operands = [x[np.array(lanes)] for x in rows(2.0, 1160)]
    params = plgpu.InterpretGPUParams(detect_races=True)
    with no_races():
        got = interpreted(*operands, Cut(1160, 256, 3), params)
    assert np.asarray(got).tolist() == np.asarray(reference.sample(*operands)).tolist()


def logits_of(kind, scale, rng, vocab_size, chunk):
    """A row of logits of one of the kinds that the kernel decides about in different ways."""
    x = rng.normal(size=vocab_size) * scale
    match kind:
        case "peaked":
            x[rng.integers(vocab_size)] += 20
        case "tied":
            x = np.round(x * 2)
        case "equal":
            x = np.zeros(vocab_size)
        case "masked":  # so few tokens that no place of a chunk has three
            x[rng.permutation(vocab_size)[8:]] = -np.inf
        case "late":  # nothing in the first chunks
            x[: 2 * chunk + rng.integers(chunk)] = -np.inf
        case "stacked":  # the largest of all chunks are at one place
            x[rng.integers(chunk) :: chunk] += 10
        case "bad":
            x[rng.integers(vocab_size)] = np.nan
    return x.astype(np.float32)


KINDS = ["normal", "normal", "peaked", "tied", "equal", "masked", "late", "late", "stacked", "bad"]
LANES = st.tuples(
    st.sampled_from(KINDS),
    st.sampled_from([0.1, 1.0, 4.0, 300.0]),  # of the logits
    st.sampled_from([0.5, 0.8, 2.0]),  # temperature
    st.sampled_from([1, 3, 5, 12, 32, 33, ALL]),  # top_k; up to 32 begin with the leaders
    st.sampled_from([0.13, 0.93, 1.0]),  # top_p
    st.sampled_from([0.0, 0.0, 0.07, 1.0]),  # min_p
)


@settings(max_examples=16, deadline=None, derandomize=True)
@given(lanes=st.lists(LANES, min_size=4, max_size=4), seed=st.integers(0, 1000))
def test_interpreted_kernel_draws_the_noisy_maximum_of_the_kept_tokens(lanes, seed):
    rng = np.random.default_rng(seed)
    logits = np.stack([logits_of(*lane[:2], rng, 600, 128) for lane in lanes])
    dtypes = {2: "f4", 3: "i4", 4: "f4", 5: "f4"}
    options = [np.asarray([lane[i] for lane in lanes], dtype) for i, dtype in dtypes.items()]
    seeds = np.arange(4, dtype=np.int32) + seed
    got = interpreted(logits, *options, seeds, seeds, Cut(600, 128, 1), plgpu.InterpretGPUParams())
    noise = np.asarray(gumbel_noise(seeds, seeds, 600), np.float64)
    for row, (kind, _, temperature, *truncation) in enumerate(lanes):
        if kind == "bad":
            assert got[row] == -1
            continue
        kept = oracle.kept_tokens(logits[row], temperature, *truncation)
        assert got[row] == np.where(kept, logits[row] / temperature + noise[row], -np.inf).argmax()


@pytest.mark.parametrize("vocab_size", [1024, 32000, 151936, 262144])
def test_default_configuration_lowers_for_hopper(vocab_size):
    vector = {dtype: jax.ShapeDtypeStruct((4,), dtype) for dtype in (jnp.float32, jnp.int32)}
    f, i = vector[jnp.float32], vector[jnp.int32]
    operands = (jax.ShapeDtypeStruct((4, vocab_size), jnp.float32), f, i, f, f, i, i)
    lowered = jax.jit(sample_kernel.sample).trace(*operands).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_candidates_of_the_tuner_lower_for_hopper():
    vocab_size = 262_144
    f, i = (jax.ShapeDtypeStruct((4,), dtype) for dtype in (jnp.float32, jnp.int32))
    operands = (jax.ShapeDtypeStruct((4, vocab_size), jnp.float32), f, i, f, f, i, i)
    for cut in sample_kernel.candidates(4, vocab_size):
        options = row_sampler.options_of(*(jnp.zeros(x.shape, x.dtype) for x in operands[1:]), cut)
        traced = sample_kernel._sample.trace(operands[0], options, None, cut, None)
        lowered = traced.lower(lowering_platforms=("cuda",))
        assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("vocab_size", [1024, 151936, 262144])
def test_kernel_on_the_gpu_draws_what_the_reference_draws(vocab_size):
    """Roundings differ by an ulp, so a draw in a thousand may fall on the other side of a threshold."""
    batches = [rows(scale, vocab_size, seed) for scale in (0.1, 0.5, 3.0) for seed in range(10)]
    operands = [jnp.concatenate(options) for options in zip(*batches, strict=True)]
    got = np.asarray(sample_kernel.sample(*operands)).reshape(-1, 8)
    same = got == np.asarray(jax.jit(reference.sample)(*operands)).reshape(-1, 8)
    assert same.mean() > 0.98
    assert same[:, [0, 2, 6, 7]].all()  # greedy rows, those that top-k alone cuts, those with a NaN


@pytest.mark.gpu
@hopper
def test_a_lane_on_the_gpu_draws_alone_what_it_draws_in_a_batch():
    """Many times over: the parts of a row agree on every decision, or the kernel does not end well."""
    operands = [jnp.tile(x, (32, 1)[: x.ndim]) for x in rows(3.0, 32000)]
    positions = jnp.arange(256, dtype=jnp.int32)
    together = [np.asarray(sample_kernel.sample(*operands[:6], positions)) for _ in range(200)]
    assert (np.asarray(together) == together[0]).all()
    alone = [sample_kernel.sample(*(x[i : i + 1] for x in (*operands[:6], positions)))[0] for i in range(16)]
    assert np.asarray(alone).tolist() == together[0][:16].tolist()
