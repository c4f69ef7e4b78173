"""The sampling kernel draws what the reference draws: interpreted, lowered for Hopper, run on a GPU."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import mosaic, reference, sample_kernel
from kernels_pallas.row_parts import Cut
from tests.kernels.interpreter import no_races

ALL = 2**30


def rows(logits_scale, vocab_size, seed=0):
    """A batch that asks for every option: greedy, plain, top-k, top-p, min-p, all together, ties, a NaN."""
    rng = np.random.default_rng(seed)
    temperature = np.array([0.0, 1.0, 0.8, 1.0, 1.3, 0.7, 1.0, 1.0], np.float32)
    top_k = np.array([5, ALL, 40, ALL, ALL, 50, 3, ALL], np.int32)
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


@pytest.mark.parametrize("lanes", [[0, 1, 2], [3, 4], [5, 6, 7]])
def test_interpreted_kernel_draws_what_the_reference_draws(lanes):
    operands = [x[np.array(lanes)] for x in rows(2.0, 1160)]
    params = plgpu.InterpretGPUParams(detect_races=True)
    with no_races():
        got = sample_kernel._sample(*operands, Cut(1160, 256, 3), params)
    assert np.asarray(got).tolist() == np.asarray(reference.sample(*operands)).tolist()


@pytest.mark.parametrize("vocab_size", [1024, 32000, 151936, 262144])
def test_default_configuration_lowers_for_hopper(vocab_size):
    vector = {dtype: jax.ShapeDtypeStruct((4,), dtype) for dtype in (jnp.float32, jnp.int32)}
    f, i = vector[jnp.float32], vector[jnp.int32]
    operands = (jax.ShapeDtypeStruct((4, vocab_size), jnp.float32), f, i, f, f, i, i)
    lowered = jax.jit(sample_kernel.sample).trace(*operands).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.gpu
@pytest.mark.skipif(mosaic.device_without_kernels() is not None, reason="needs a Hopper GPU")
@pytest.mark.parametrize("vocab_size", [1024, 151936, 262144])
def test_kernel_on_the_gpu_draws_what_the_reference_draws(vocab_size):
    """Roundings differ by an ulp, so a draw in a thousand may fall on the other side of a threshold."""
    batches = [rows(scale, vocab_size, seed) for scale in (0.5, 3.0) for seed in range(10)]
    operands = [jnp.concatenate(options) for options in zip(*batches, strict=True)]
    got = np.asarray(sample_kernel.sample(*operands)).reshape(-1, 8)
    same = got == np.asarray(jax.jit(reference.sample)(*operands)).reshape(-1, 8)
    assert same.mean() > 0.98
    assert same[:, [0, 7]].all()  # the greedy rows and the rows with a NaN


@pytest.mark.gpu
@pytest.mark.skipif(mosaic.device_without_kernels() is not None, reason="needs a Hopper GPU")
def test_a_lane_on_the_gpu_draws_alone_what_it_draws_in_a_batch():
    """Many times over: the parts of a row agree on every decision, or the kernel does not end well."""
    operands = [jnp.tile(x, (32, 1)[: x.ndim]) for x in rows(3.0, 32000)]
    positions = jnp.arange(256, dtype=jnp.int32)
    together = [np.asarray(sample_kernel.sample(*operands[:6], positions)) for _ in range(200)]
    assert (np.asarray(together) == together[0]).all()
    alone = [sample_kernel.sample(*(x[i : i + 1] for x in (*operands[:6], positions)))[0] for i in range(16)]
    assert np.asarray(alone).tolist() == together[0][:16].tolist()
