"""The jnp decode step (norm, rope, KV write, attention) against float64 over drawn shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import paged_decode_update
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
    seed=st.integers(0, 100),
)
def test_stores_the_token_and_attends(
    heads, rotary_dim, page_size, lengths, window, softcap, norms, with_sinks, seed
):
    case = random_update(
        lengths, *heads, 16, page_size, rotary_dim=rotary_dim, norms=norms, dtype=np.float32, seed=seed
    )
    sinks = np.linspace(-1, 2, heads[0]).astype(np.float32) if with_sinks else None
    options = {"window": window, "softcap": softcap, "sinks": sinks}
    weights = {} if case.norms is None else {"q_norm": case.norms[0], "k_norm": case.norms[1]}
    kv = case.kv
    o, k_pages, v_pages = jax.jit(
        lambda *a: paged_decode_update(*a, **weights, epsilon=case.epsilon, **options)
    )(case.qkv, kv.k_pages, kv.v_pages, kv.page_table, kv.lengths, case.cos, case.sin)
    q, expected = case.expected()
    assert not np.isnan(o).any()
    assert oracle.relative_error(o, oracle.decode(q, expected, **options)) < 2e-5
    np.testing.assert_allclose(k_pages, expected.k_pages, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(v_pages, expected.v_pages)


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
        ({"q_norm": np.ones(8, np.float32), "k_norm": np.ones(8, np.float32)}, "must be \\[16\\]"),
    ],
)
def test_operands_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        paged_decode_update(**{name: jnp.asarray(x) for name, x in arguments(**changes).items()})
