"""The sampler against a sort-based NumPy model, its distribution, and its independence of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import gumbel_noise, sample
from tests.kernels import oracle

ALL = 2**30
sample = jax.jit(sample)


def options(num_lanes, *, temperature=1.0, top_k=ALL, top_p=1.0, min_p=0.0, seed=0, position=0):
    """Per-lane option arrays in the order of `sample`, each value broadcast to the lanes."""
    dtypes = (np.float32, np.int32, np.float32, np.float32, np.int32, np.int32)
    values = (temperature, top_k, top_p, min_p, seed, position)
    return [np.broadcast_to(np.asarray(v, d), (num_lanes,)) for v, d in zip(values, dtypes, strict=True)]


def drawn_set(logits, draws=400, **kwargs):
    """Ids that ever come up for one row over many positions."""
    rows = np.tile(logits.astype(np.float32), (draws, 1))
    return set(np.asarray(sample(rows, *options(draws, position=np.arange(draws), **kwargs))).tolist())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    top_k=st.sampled_from([1, 2, 7, 40, ALL]),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.4]),
    levels=st.sampled_from([3, 8, 10**6]),
    seed=st.integers(0, 1000),
)
def test_a_draw_is_the_noisy_maximum_of_the_kept_tokens(temperature, top_k, top_p, min_p, levels, seed):
    rng = np.random.default_rng(seed)
    # Few levels give many ties; the offset keeps cumulative masses away from top_p itself.
    logits = (np.round(rng.normal(size=(8, 48)) * levels) / levels + rng.normal() * 0.01).astype(np.float32)
    args = options(
        8, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=np.arange(8) + seed
    )
    noise = np.asarray(gumbel_noise(args[4], args[5], 48), np.float64)
    got = np.asarray(sample(logits, *args))
    for row in range(8):
        kept = oracle.kept_tokens(logits[row], temperature, top_k, top_p, min_p)
        noisy = np.where(kept, logits[row] / temperature + noise[row], -np.inf)
        assert got[row] == noisy.argmax()


def test_ties_at_the_threshold_are_kept_in_the_order_of_their_ids():
    logits = np.array([0.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    assert drawn_set(logits, top_k=3) == {1, 2, 3}
    assert drawn_set(np.zeros(10), top_p=0.25) == {0, 1, 2}
    assert drawn_set(np.zeros(10), top_k=1) == {0}


def test_draws_follow_the_softmax():
    """Chi-square over 20,000 draws of 10 tokens; 27.9 is the 0.999 quantile at 9 degrees of freedom."""
    logits = np.linspace(-2.0, 1.0, 10).astype(np.float32)
    draws = 20_000
    rows = np.tile(logits, (draws, 1))
    args = options(draws, temperature=0.8, seed=np.arange(draws) % 7, position=np.arange(draws) // 7)
    counts = np.bincount(np.asarray(sample(rows, *args)), minlength=10)
    probabilities = np.exp(logits / 0.8) / np.exp(logits / 0.8).sum()
    assert ((counts - draws * probabilities) ** 2 / (draws * probabilities)).sum() < 27.9


def test_noise_of_neighbouring_seeds_positions_and_tokens_is_unrelated():
    seeds, positions = np.meshgrid(np.arange(20, dtype=np.int32), np.arange(20, dtype=np.int32))
    noise = np.asarray(gumbel_noise(seeds.ravel(), positions.ravel(), 1000), np.float64)
    assert abs(noise.mean() - 0.5772) < 0.01
    assert abs(noise.var() - np.pi**2 / 6) < 0.02
    rows = np.corrcoef(noise) - np.eye(400)
    assert np.abs(rows).max() < 0.2  # 6 sigma at 1000 tokens
    assert abs(np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1]) < 0.01


def test_a_lane_does_not_depend_on_its_neighbours():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 500)).astype(np.float32) * 2
    args = options(
        6,
        temperature=[0.0, 0.7, 1.0, 1.5, 0.7, 1.0],
        top_k=[1, 50, ALL, 3, ALL, ALL],
        top_p=[0.1, 0.9, 1.0, 0.5, 0.95, 1.0],
        min_p=[0, 0, 0.1, 0, 0, 0],
        seed=[1, 2, 3, 4, 5, 6],
        position=[9, 8, 7, 6, 5, 4],
    )
    together = np.asarray(sample(logits, *args))
    order = rng.permutation(6)
    np.testing.assert_array_equal(sample(logits[order], *[a[order] for a in args]), together[order])
    alone = [int(sample(logits[i : i + 1], *[a[i : i + 1] for a in args])[0]) for i in range(6)]
    assert alone == together.tolist()


def test_greedy_takes_the_lowest_id_of_the_largest_whatever_the_rest_says():
    logits = np.array([[0.0, 3.0, 3.0, 1.0], [5.0, 3.0, 5.0, -np.inf]], np.float32)
    got = sample(logits, *options(2, temperature=0.0, top_k=[1, 3], top_p=[0.1, 1.0], seed=[7, 8]))
    assert np.asarray(got).tolist() == [1, 0]


def test_a_row_with_nan_gives_minus_one_and_leaves_the_others_alone():
    logits = np.array([[0.0, np.nan, 1.0], [0.0, 9.0, 1.0], [np.nan, 0.0, 0.0]], np.float32)
    for temperature in ([0.0, 0.0, 0.0], [0.5, 0.0, 1.0], [0.1, 0.1, 0.1]):
        got = np.asarray(sample(logits, *options(3, temperature=temperature, top_p=0.9)))
        assert got.tolist() == [-1, 1, -1]


def test_a_nan_anywhere_in_a_wide_row_is_found():
    logits = np.zeros((8, 2048), np.float32)
    logits[range(8), np.arange(8) * 290] = np.nan
    assert (np.asarray(sample(logits, *options(8, top_k=5))) == -1).all()


def test_masked_tokens_and_tiny_temperatures_are_safe():
    logits = np.array([-np.inf, 1e4, -np.inf, 9.9e3, -np.inf], np.float32)
    assert drawn_set(logits, temperature=1e-5) == {1}
    assert drawn_set(logits, temperature=1e3, top_k=4) == {1, 3}
    assert drawn_set(logits, temperature=1e3) == {1, 3}


def test_misshapen_options_are_named():
    with pytest.raises(ValueError, match="top_p must be"):
        args = options(2)
        args[2] = jnp.ones(3)
        sample(jnp.zeros((2, 4)), *args)
