"""The jnp attention against float64 over drawn shapes, permuted pages and NaN where nothing may be read."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from kernels_pallas import copy_pages, paged_decode, ragged_prefill, write_kv
from tests.kernels import oracle

HEADS = st.sampled_from([(1, 1), (9, 3), (7, 1), (4, 4), (16, 1), (8, 2)])
OPTIONS = st.fixed_dictionaries(
    {
        "window": st.sampled_from([None, 1, 5, 40, 300]),
        "softcap": st.sampled_from([None, 3.0]),
        "sm_scale": st.sampled_from([None, 0.3]),
    }
)
DRAWS = settings(max_examples=15, deadline=None, derandomize=True)


@DRAWS
@given(
    heads=HEADS,
    head_dim=st.sampled_from([8, 64]),
    page_size=st.sampled_from([1, 8, 16, 48, 256]),
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=5),
    options=OPTIONS,
    with_sinks=st.booleans(),
    seed=st.integers(0, 100),
)
def test_decode_is_softmax_attention(heads, head_dim, page_size, lengths, options, with_sinks, seed):
    rng = np.random.default_rng(seed)
    kv = oracle.paged(rng, lengths, heads[1], head_dim, page_size)
    q = rng.normal(size=(len(lengths), heads[0], head_dim)).astype(np.float32)
    sinks = rng.normal(size=heads[0]).astype(np.float32) if with_sinks else None
    got = jax.jit(lambda *a: paged_decode(*a, sinks=sinks, **options))(
        q, kv.k_pages, kv.v_pages, kv.page_table, kv.lengths
    )
    want = oracle.decode(q, kv, sinks=sinks, **options)
    assert not np.isnan(got).any()
    assert oracle.relative_error(got, want) < 2e-5


@DRAWS
@given(
    heads=HEADS,
    head_dim=st.sampled_from([8, 64]),
    page_size=st.sampled_from([1, 8, 16, 256]),
    rows=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 200)), min_size=1, max_size=5),
    padding=st.integers(0, 70),
    options=OPTIONS,
    with_sinks=st.booleans(),
    with_spans=st.booleans(),
    seed=st.integers(0, 100),
)
def test_prefill_is_causal_attention_after_the_cached_prefix(
    heads, head_dim, page_size, rows, padding, options, with_sinks, with_spans, seed
):
    rng = np.random.default_rng(seed)
    counts = [n for n, _ in rows]
    kv = oracle.paged(rng, [n + (cached if n else 0) for n, cached in rows], heads[1], head_dim, page_size)
    cu_seqlens = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    num_tokens = max(int(cu_seqlens[-1]) + padding, 1)
    q = rng.normal(size=(num_tokens, heads[0], head_dim)).astype(np.float32)
    sinks = rng.normal(size=heads[0]).astype(np.float32) if with_sinks else None
    span_ends = rng.integers(0, 400, num_tokens).astype(np.int32) if with_spans else None
    got = jax.jit(lambda *a: ragged_prefill(*a, sinks=sinks, span_ends=span_ends, **options))(
        q, kv.k_pages, kv.v_pages, kv.page_table, cu_seqlens, kv.lengths
    )
    want = oracle.prefill(q, kv, cu_seqlens, sinks=sinks, span_ends=span_ends, **options)
    assert not np.isnan(got).any()
    assert oracle.relative_error(got, want) < 2e-5
    assert (np.asarray(got)[cu_seqlens[-1] :] == 0).all()


@DRAWS
@given(
    scales=st.tuples(st.sampled_from([None, 0.25, 3.0]), st.sampled_from([None, 0.5])),
    seed=st.integers(0, 99),
)
def test_prefill_of_8_bit_pages_applies_their_scales(scales, seed):
    rng = np.random.default_rng(seed)
    kv = oracle.paged(rng, [70, 9], 2, 16, 8, dtype=ml_dtypes.float8_e4m3fn)
    cu_seqlens = np.array([0, 20, 29], np.int32)
    q = rng.normal(size=(31, 6, 16)).astype(np.float32)
    k_scale, v_scale = scales
    got = jax.jit(lambda *a: ragged_prefill(*a, k_scale=k_scale, v_scale=v_scale))(
        q, kv.k_pages, kv.v_pages, kv.page_table, cu_seqlens, kv.lengths
    )
    want = oracle.prefill(q, oracle.scaled(kv, (k_scale or 1.0, v_scale or 1.0)), cu_seqlens)
    assert oracle.relative_error(got, want) < 2e-5


def test_a_lane_is_the_same_alone_and_in_a_batch():
    rng = np.random.default_rng(0)
    kv = oracle.paged(rng, [200, 7, 129], 2, 16, 16)
    q = rng.normal(size=(3, 6, 16)).astype(np.float32)
    together = paged_decode(q, kv.k_pages, kv.v_pages, kv.page_table, kv.lengths)
    for lane in range(3):
        one = slice(lane, lane + 1)
        alone = paged_decode(q[one], kv.k_pages, kv.v_pages, kv.page_table[one], kv.lengths[one])
        np.testing.assert_allclose(alone[0], together[lane], rtol=1e-6, atol=1e-6)


def test_attention_runs_inside_shard_map_over_the_kv_heads():
    rng = np.random.default_rng(1)
    kv = oracle.paged(rng, [20, 33], 2, 8, 8, poison=0.0)
    mesh = Mesh(np.array(jax.devices()[:1]), ("tensor",))
    pages, heads, whole = (PartitionSpec(None, "tensor"), PartitionSpec(None, "tensor"), PartitionSpec())

    def both(q, k_pages, v_pages, table, lengths, cu_seqlens):
        new = k_pages[0, :, :2].transpose(1, 0, 2)
        k_pages, v_pages = write_kv(k_pages, v_pages, new, new, jnp.array([-1, -1], jnp.int32))
        decoded = paged_decode(q, k_pages, v_pages, table, lengths)
        return decoded, ragged_prefill(q, k_pages, v_pages, table, cu_seqlens, lengths)

    q = rng.normal(size=(2, 6, 8)).astype(np.float32)
    specs = (heads, pages, pages, whole, whole, whole)
    sharded = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=specs, out_specs=(heads, heads)))
    args = (q, kv.k_pages, kv.v_pages, kv.page_table, kv.lengths, np.array([0, 1, 2], np.int32))
    decoded, prefilled = sharded(*args)
    assert oracle.relative_error(decoded, oracle.decode(q, kv)) < 2e-5
    assert oracle.relative_error(prefilled, oracle.decode(q, kv)) < 2e-5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_write_kv_stores_tokens_and_drops_padding_slots(dtype):
    rng = np.random.default_rng(2)
    before = jnp.asarray(rng.normal(size=(4, 2, 8, 4)), dtype)
    k, v = jnp.asarray(rng.normal(size=(2, 5, 2, 4)), jnp.float32)
    slots = np.array([9, -1, 31, 32, 0], np.int32)
    k_pages, v_pages = jax.jit(write_kv)(before, before, k, v, slots)
    for pages, new in ((k_pages, k), (v_pages, v)):
        want = np.array(before)
        for token, slot in ((0, 9), (2, 31), (4, 0)):
            want[slot // 8, :, slot % 8] = new[token].astype(dtype)
        np.testing.assert_array_equal(np.asarray(pages), want)


def test_donated_pages_are_updated_in_place():
    pages = jax.ShapeDtypeStruct((64, 2, 16, 8), jnp.float32)
    new, slots = jax.ShapeDtypeStruct((4, 2, 8), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32)
    compiled = jax.jit(write_kv, donate_argnums=(0, 1)).lower(pages, pages, new, new, slots).compile()
    pool_bytes = 64 * 2 * 16 * 8 * 4
    assert compiled.memory_analysis().alias_size_in_bytes == 2 * pool_bytes
    assert compiled.memory_analysis().temp_size_in_bytes < pool_bytes


def test_copy_pages_reads_before_it_writes_and_drops_padding():
    pages = np.arange(5 * 2, dtype=np.float32).reshape(5, 1, 1, 2)
    got = copy_pages(jnp.asarray(pages), np.array([0, 1, 4], np.int32), np.array([1, 0, 5], np.int32))
    np.testing.assert_array_equal(got, pages[[1, 0, 2, 3, 4]])


def test_misfitting_operands_are_named():
    rng = np.random.default_rng(3)
    kv = oracle.paged(rng, [5], 2, 8, 8)
    q = np.zeros((1, 4, 8), np.float32)
    with pytest.raises(ValueError, match="multiple of K=2"):
        paged_decode(q[:, :3], kv.k_pages, kv.v_pages, kv.page_table, kv.lengths)
    with pytest.raises(ValueError, match="window must be at least 1"):
        paged_decode(q, kv.k_pages, kv.v_pages, kv.page_table, kv.lengths, window=0)
    with pytest.raises(ValueError, match="cu_seqlens"):
        ragged_prefill(q, kv.k_pages, kv.v_pages, kv.page_table, np.zeros(1, np.int32), kv.lengths)
