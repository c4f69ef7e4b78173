"""Weights that the decode kernel fetches ahead of the products after it: asked for at one lane, never in a result."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from ml_dtypes import bfloat16

from kernels_pallas import decode_kernel, paged_decode_update, prefetch
from kernels_pallas.decode_config import DecodeConfig
from tests.kernels.marks import hopper
from tests.kernels.update_inputs import random_update

MIB = 1 << 20


def spec(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def lowered(lanes, ahead, heads=(14, 2), head_dim=64):
    group = heads[0] // heads[1]
    pages, rope = spec(50, heads[1], 64, head_dim), spec(lanes, head_dim // 2, dtype=jnp.float32)
    table, lengths = spec(lanes, 32, dtype=jnp.int32), spec(lanes, dtype=jnp.int32)
    update = functools.partial(paged_decode_update, implementation="mosaic")

    def step(qkv, k_pages, v_pages, table, lengths, cos, sin, ahead):
        return update(qkv, k_pages, v_pages, table, lengths, cos, sin, ahead=ahead)

    qkv = spec(lanes, heads[1], group + 2, head_dim)
    traced = jax.jit(step).trace(qkv, pages, pages, table, lengths, rope, rope, ahead)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


QWEN = (spec(896, 896), spec(2, 4864, 896))


@pytest.mark.parametrize(
    ("lanes", "ahead", "heads", "fetched"),
    [
        (1, QWEN, (14, 2), True),
        (1, (spec(2048, 2048),), (32, 8), True),
        (1, (spec(4096, 4096),), (32, 8), False),  # would be there in part
        (1, (), (14, 2), False),
        (1, (spec(8, 8),), (14, 2), False),  # less than is asked for at once
        (1, QWEN, (64, 64), False),  # no multiprocessor is idle
        (64, QWEN, (14, 2), False),
    ],
)
def test_only_a_lane_alone_asks_the_cache_for_weights(lanes, ahead, heads, fetched):
    assert ("cp.async.bulk.prefetch.L2.global" in lowered(lanes, ahead, heads)) == fetched


def test_weights_read_first_are_fetched_whole_and_the_last_in_part():
    assert prefetch.shares((spec(2 * MIB, 2), spec(MIB, 8))) == [0, 16 * MIB]  # rows of 4 bytes
    assert prefetch.shares((spec(2 * MIB, 8), spec(1024, 8))) == [0, 16 << 10]  # the first is too large
    assert prefetch.shares((spec(1024, 1024), spec(2, 8192, 1024), spec(64, 64))) == [2 * MIB, 14 * MIB, 0]


def test_weights_ahead_do_not_change_a_result():
    case = random_update([77], 4, 2, 64, 16, dtype=bfloat16)
    operands = [jnp.asarray(x) for x in (case.qkv, case.kv.k_pages, case.kv.v_pages, case.kv.page_table)]
    operands += [jnp.asarray(x) for x in (case.kv.lengths, case.cos, case.sin)]
    weights = (jnp.full((64, 128), jnp.nan, jnp.bfloat16), jnp.full((2, 64, 128), jnp.nan, jnp.bfloat16))
    want = paged_decode_update(*operands, implementation="reference")
    got = paged_decode_update(*operands, ahead=weights, implementation="reference")
    qkv, *pages, table, lengths, cos, sin = operands
    fixed = (None, (cos, sin), None, None, 0.125, None, None, 1e-6, DecodeConfig(64, 2, 2))
    kernel = decode_kernel._decode(
        qkv, *pages, table, lengths, *fixed, plgpu.InterpretGPUParams(), ahead=weights
    )
    for x, y, z in zip(want, got, kernel, strict=True):
        x, y, z = (np.asarray(a, np.float32) for a in (x, y, z))
        np.testing.assert_array_equal(x, y)
        np.testing.assert_allclose(z.reshape(x.shape), x, atol=0.05)


def test_weights_of_another_rank_are_named():
    case = random_update([5], 2, 1, 64, 16, dtype=bfloat16)
    arrays = (case.qkv, case.kv.k_pages, case.kv.v_pages, case.kv.page_table, case.kv.lengths)
    with pytest.raises(ValueError, match=r"ahead must be weights.*\(7,\)"):
        paged_decode_update(*map(jnp.asarray, (*arrays, case.cos, case.sin)), ahead=(jnp.ones(7),))


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize(("heads", "head_dim"), [((14, 2), 64), ((32, 8), 128)])
def test_on_the_gpu_results_are_the_same_bits_with_weights_ahead(heads, head_dim):
    update = jax.jit(functools.partial(paged_decode_update, implementation="mosaic"))
    weights = (jnp.ones((896, 896), jnp.bfloat16), jnp.ones((2, 4864, 896), jnp.bfloat16))
    for length in (1, 300, 5000):  # for the last, of wide heads, nothing is fetched
        case = random_update([length], *heads, head_dim, 64, dtype=bfloat16)
        table = np.pad(case.kv.page_table, ((0, 0), (0, 128 - case.kv.page_table.shape[1])))
        pages = [np.resize(x, (128, *x.shape[1:])) for x in (case.kv.k_pages, case.kv.v_pages)]
        operands = [jnp.asarray(x) for x in (case.qkv, *pages, table, case.kv.lengths, case.cos, case.sin)]
        for want, got in zip(update(*operands), update(*operands, ahead=weights), strict=True):
            np.testing.assert_array_equal(np.asarray(want, np.float32), np.asarray(got, np.float32))
