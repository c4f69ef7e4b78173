"""Norm, rope and KV write of packed tokens: the op against float64, its kernel interpreted, lowered and on a GPU."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import rope_and_write, rope_kernel
from tests.kernels import oracle
from tests.kernels.interpreter import no_races
from tests.kernels.marks import hopper
from tests.kernels.update_inputs import saturated

FP8 = ml_dtypes.float8_e4m3fn


def operands_of(tokens, kv_heads, group, head_dim, rotary_dim, page_size, dtype, page_dtype):
    """qkv, pages of sevens, slots (distinct; every third is padding), cos, sin and the two norms."""
    rng = np.random.default_rng(tokens + head_dim)
    qkv = rng.normal(size=(tokens, kv_heads, group + 2, head_dim)).astype(dtype)
    pages = np.full((2 * tokens // page_size + 1, kv_heads, page_size, head_dim), 7, page_dtype)
    num_slots = pages.shape[0] * page_size
    slots = rng.permutation(num_slots)[:tokens].astype(np.int32)
    slots[::3] = np.resize([-1, num_slots, -(2**31), 2**31 - 1], len(slots[::3]))
    angles = rng.uniform(0, 6, size=(tokens, rotary_dim // 2))
    norms = (1 + 0.3 * rng.normal(size=(2, head_dim))).astype(dtype)
    return qkv, pages, slots, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), norms


def expected(qkv, pages, slots, cos, sin, norms, scales, epsilon):
    """Queries and pages in float64, rounded where the op rounds."""
    dtype, group, half = qkv.dtype, qkv.shape[2] - 2, cos.shape[1]
    x = qkv[:, :, :-1].astype(np.float64)
    if norms is not None:
        weight = np.stack([norms[0]] * group + [norms[1]]).astype(np.float64)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight
        x = x.astype(dtype).astype(np.float64)
    cos, sin = cos[:, None, None].astype(np.float64), sin[:, None, None].astype(np.float64)
    first, second = x[..., :half], x[..., half : 2 * half]
    x = np.concatenate([first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :]], -1)
    x = x.astype(dtype)
    stored = []
    for values, scale in zip((x[:, :, -1], qkv[:, :, -1]), scales or (1.0, 1.0), strict=True):
        page = pages.copy()
        for token, slot in enumerate(slots):
            if 0 <= slot < pages.shape[0] * pages.shape[2]:
                row = saturated(values[token].astype(np.float32) / np.float32(scale), pages.dtype)
                page[slot // pages.shape[2], :, slot % pages.shape[2]] = row
        stored.append(page)
    return x[:, :, :-1].reshape(len(qkv), -1, qkv.shape[3]), *stored


def check(got, want, dtype):
    tolerance = 1e-5 if dtype == np.float32 else 1e-2
    for ours, theirs in zip(got, want, strict=True):
        limit = (
            5e-2 if theirs.dtype == FP8 else tolerance
        )  # the last bit before it may tip a rounding to 8 bits
        assert oracle.relative_error(ours, theirs) < limit
        assert (np.asarray(ours == 7) | (theirs != 7)).all()  # what no token took is as it was


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 40),
    heads=st.sampled_from([(1, 1), (3, 2), (2, 7)]),
    rotary_dim=st.sampled_from([8, 10, 16]),
    page_size=st.sampled_from([1, 8]),
    with_norms=st.booleans(),
    scales=st.sampled_from([None, (0.25, 3.0)]),
)
def test_op_rotates_and_stores(tokens, heads, rotary_dim, page_size, with_norms, scales):
    page_dtype = np.float32 if scales is None else FP8
    *operands, norms = operands_of(tokens, *heads, 16, rotary_dim, page_size, np.float32, page_dtype)
    qkv, pages, slots, cos, sin = operands
    weights = {"q_norm": norms[0], "k_norm": norms[1]} if with_norms else {}
    k_scale, v_scale = scales or (None, None)
    op = functools.partial(rope_and_write, **weights, epsilon=1e-3, k_scale=k_scale, v_scale=v_scale)
    got = jax.jit(op)(qkv, pages, pages, slots, cos, sin)
    check(got, expected(*operands, norms if with_norms else None, scales, 1e-3), np.float32)


CASES = {
    "64, odd group": (64, 2, 3, 64, 64, 8, None),
    "128, norms": (16, 1, 2, 128, 128, 16, "norms"),
    "128, half of it rotates": (32, 1, 1, 128, 64, 8, None),
    "8-bit pages": (32, 2, 1, 64, 64, 8, "scales"),
    "96": (64, 1, 1, 96, 96, 8, None),
    "more rows than fit at once": (16, 1, 12, 128, 128, 8, "norms"),
}


def run_kernel(case, dtype, interpret):
    *sizes, option = case
    scales = (0.25, 3.0) if option == "scales" else None
    operands = operands_of(*sizes, dtype, FP8 if scales else dtype)
    qkv, pages, slots, cos, sin, norms = operands
    norms = tuple(norms) if option == "norms" else None
    arrays = None if scales is None else tuple(jnp.full((1,), scale, jnp.float32) for scale in scales)
    run = jax.jit(functools.partial(rope_kernel._run, epsilon=1e-3, interpret=interpret))
    got = run(*map(jnp.asarray, (qkv, pages, pages, slots, cos, sin)), norms, arrays)
    check(got, expected(*operands[:-1], norms, scales, 1e-3), dtype)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_interpreted_kernel_agrees_and_has_no_races(case):
    with no_races():
        run_kernel(case, ml_dtypes.bfloat16, plgpu.InterpretGPUParams(detect_races=True))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel_lowers_for_hopper(case):
    *sizes, option = case
    dtype = jnp.bfloat16
    qkv, pages, slots, cos, sin, norms = operands_of(*sizes, dtype, FP8 if option == "scales" else dtype)
    weights = {"q_norm": norms[0], "k_norm": norms[1]} if option == "norms" else {}
    scales = {"k_scale": 0.25} if option == "scales" else {}
    op = functools.partial(rope_and_write, **weights, **scales, implementation="mosaic")
    lowered = jax.jit(op).trace(qkv, pages, pages, slots, cos, sin).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_operands_beyond_the_kernel_are_refused_by_name():
    qkv, pages, slots, cos, sin, _ = operands_of(17, 1, 1, 64, 64, 8, jnp.bfloat16, jnp.bfloat16)
    with pytest.raises(ValueError, match="17 tokens"):
        rope_and_write(qkv, pages, pages, slots, cos, sin, implementation="mosaic")
    with pytest.raises(ValueError, match="slots"):
        rope_and_write(qkv, pages, pages, slots[:-1], cos, sin)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel_agrees_on_a_gpu(case, dtype):
    run_kernel(case, dtype, None)
