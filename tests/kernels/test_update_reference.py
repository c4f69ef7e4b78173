"""The jnp decode step (norm, rope, KV write, attention) against float64 over drawn shapes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import paged_decode_update, write_kv
from tests.kernels import oracle
from tests.kernels.update_inputs import random_update


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    heads=st.sampled_from([(1, 1), (9, 3), (7, 1), (4, 4), (8, 2)]),
    rotary_dim=st.sampled_from([8, 10, 16]),
    page_size=st.sampled_from([1, 8, 48]),
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=5),
    window=st.sampled_from([None, 1, 40]),
    softcap=st.sampled_from([None, 3.0]),
    norms=st.booleans(),
    with_sinks=st.booleans(),
    scales=st.sampled_from([None, (1.0, 1.0), (0.25, 3.0)]),
    seed=st.integers(0, 100),
)
def test_stores_the_token_and_attends(
    heads, rotary_dim, page_size, lengths, window, softcap, norms, with_sinks, scales, seed
):
    """With scales the pages are 8-bit ones."""
    page_dtype = np.float32 if scales is None else ml_dtypes.float8_e4m3fn
    case = random_update(
        lengths,
        *heads,
        16,
        page_size,
        rotary_dim=rotary_dim,
        norms=norms,
        dtype=np.float32,
        page_dtype=page_dtype,
        scales=scales,
        seed=seed,
    )
    sinks = np.linspace(-1, 2, heads[0]).astype(np.float32) if with_sinks else None
    options = {"window": window, "softcap": softcap, "sinks": sinks}
    k_scale, v_scale = scales or (None, None)
    weights = {} if case.norms is None else {"q_norm": case.norms[0], "k_norm": case.norms[1]}
    kv = case.kv
    o, k_pages, v_pages = jax.jit(
        lambda *a: paged_decode_update(
            *a, **weights, epsilon=case.epsilon, k_scale=k_scale, v_scale=v_scale, **options
        )
    )(case.qkv, kv.k_pages, kv.v_pages, kv.page_table, kv.lengths, case.cos, case.sin)
    q, expected = case.expected()
    assert not np.isnan(o).any()
    # The last bit of a float32 may tip the rounding of a key to 8 bits.
    assert oracle.relative_error(o, oracle.decode(q, expected, **options)) < (
        2e-5 if scales is None else 2e-2
    )
    tolerance = 1e-5 if scales is None else 0.13
    wanted = [pages.astype(np.float32) for pages in (expected.k_pages, expected.v_pages)]
    np.testing.assert_allclose(np.asarray(k_pages, np.float32), wanted[0], rtol=tolerance, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(v_pages, np.float32), wanted[1])


def test_eight_bit_pages_saturate_and_keep_what_has_gone_wrong():
    pages = jnp.zeros((2, 1, 4, 4), jnp.float8_e4m3fn)
    k = jnp.asarray([[[1e6, -1e6, 3.3, np.nan]]], jnp.float32)
    k_pages, v_pages = write_kv(pages, pages, k, k, jnp.array([5], jnp.int32), k_scale=2.0, v_scale=1e4)
    np.testing.assert_array_equal(np.asarray(k_pages, np.float32)[1, 0, 1], [448, -448, 1.625, np.nan])
    np.testing.assert_array_equal(np.asarray(v_pages, np.float32)[1, 0, 1, :2], [96, -96])


def arguments(**changes):
    case = random_update([5, 9], 4, 2, 16, 8, dtype=np.float32)
    kv = case.kv
    operands = {"qkv": case.qkv, "k_pages": kv.k_pages, "v_pages": kv.v_pages, "page_table": kv.page_table}
    return operands | {"lengths": kv.lengths, "cos": case.cos, "sin": case.sin} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": np.zeros((2, 2, 2, 16), np.float32)}, "qkv must be"),
        ({"qkv": np.zeros((2, 1, 4, 16), np.float32)}, "1 kv heads"),
        ({"cos": np.zeros((2, 9), np.float32)}, "cos and sin"),
        ({"q_norm": np.ones(16, np.float32)}, "both"),
        ({"k_scale": np.ones(2, np.float32)}, "k_scale must be a scalar"),
        ({"q_norm": np.ones(8, np.float32), "k_norm": np.ones(8, np.float32)}, "must be \\[16\\]"),
    ],
)
def test_operands_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        paged_decode_update(**{name: jnp.asarray(x) for name, x in arguments(**changes).items()})
