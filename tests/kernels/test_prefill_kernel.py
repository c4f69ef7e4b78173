"""The ragged prefill kernel: lowered for Hopper, interpreted with race detection on CPUs, run on a GPU."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels_pallas import mosaic, prefill_kernel, ragged_prefill
from kernels_pallas.prefill_kernel import PrefillConfig
from tests.kernels import oracle
from tests.kernels.interpreter import no_races


def inputs(rows, num_heads, num_kv_heads, head_dim, page_size, padding=3, dtype=ml_dtypes.bfloat16):
    """Packed queries, KV and cu_seqlens for rows of (new tokens, cached tokens)."""
    rng = np.random.default_rng(0)
    counts = [new for new, _ in rows]
    lengths = [new + cached if new else 0 for new, cached in rows]
    kv = oracle.paged(rng, lengths, num_kv_heads, head_dim, page_size, dtype=dtype)
    cu_seqlens = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    q = rng.normal(size=(int(cu_seqlens[-1]) + padding, num_heads, head_dim)).astype(ml_dtypes.bfloat16)
    return q, kv, cu_seqlens


@pytest.mark.parametrize(
    ("rows", "heads", "page_size", "config", "options"),
    [
        ([(40, 0)], (4, 1), 64, PrefillConfig(64, 2, 2, blocks=2), {}),
        ([(20, 70), (0, 0), (3, 130)], (3, 1), 16, PrefillConfig(64, 2, 2, blocks=2), {}),
        ([(9, 200)], (7, 1), 64, PrefillConfig(64, 2, 2, blocks=2), {"window": 70, "softcap": 4.0}),
        ([(30, 100), (1, 129)], (4, 2), 128, PrefillConfig(64, 2, 1, False, blocks=2), {"with_sinks": True}),
        ([(20, 50), (30, 0)], (3, 1), 32, PrefillConfig(64, 2, 3, False, blocks=1), {"with_spans": True}),
        ([(20, 110)], (4, 1), 16, PrefillConfig(64, 2, 2, blocks=1), {"scales": (0.5, 2.0)}),
    ],
)
def test_interpreted_kernel_is_causal_attention_without_races(rows, heads, page_size, config, options):
    options = dict(options)
    scales = options.pop("scales", None)
    dtype = ml_dtypes.bfloat16 if scales is None else ml_dtypes.float8_e4m3fn
    q, kv, cu_seqlens = inputs(rows, *heads, 64, page_size, dtype=dtype)
    sinks = np.linspace(-1, 2, heads[0]).astype(np.float32) if options.pop("with_sinks", False) else None
    spans = np.random.default_rng(1).integers(0, 100, len(q)).astype(np.int32)
    spans = spans if options.pop("with_spans", False) else None
    operands = (q, kv.k_pages, kv.v_pages, kv.page_table, cu_seqlens, kv.lengths, sinks, spans)
    packed = None if scales is None else np.asarray(scales, np.float32)
    with no_races():
        got = prefill_kernel._prefill(
            *operands,
            packed,
            64**-0.5,
            options.get("window"),
            options.get("softcap"),
            config,
            plgpu.InterpretGPUParams(detect_races=True),
        )
    want = oracle.prefill(q, oracle.scaled(kv, scales), cu_seqlens, sinks=sinks, span_ends=spans, **options)
    assert oracle.relative_error(got, want) < 1e-2
    assert (np.asarray(got[cu_seqlens[-1] :], np.float32) == 0).all()


def lower(heads, head_dim, page_size, dtype=jnp.bfloat16, **options):
    """Text of the kernel's lowering for a Hopper GPU."""
    pages = jax.ShapeDtypeStruct((50, heads[1], page_size, head_dim), dtype)
    q = jax.ShapeDtypeStruct((100, heads[0], head_dim), jnp.bfloat16)
    table, rows = jax.ShapeDtypeStruct((4, 12), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32)
    ends = jax.ShapeDtypeStruct((5,), jnp.int32)
    attend = jax.jit(lambda *a: kernel(*a, **options))
    return attend.trace(q, pages, pages, table, ends, rows).lower(lowering_platforms=("cuda",)).as_text()


def kernel(*operands, **options):
    defaults = {"sm_scale": None, "window": None, "softcap": None, "sinks": None}
    return prefill_kernel.ragged_prefill(*operands, **(defaults | options))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("heads", "page_size"), [((32, 8), 8), ((14, 2), 16), ((16, 1), 128)])
def test_default_configuration_lowers_for_hopper(head_dim, heads, page_size):
    assert "mosaic_gpu" in lower(heads, head_dim, page_size, window=100)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_options_lower_for_hopper(head_dim):
    fp8 = {"dtype": jnp.float8_e4m3fn, "k_scale": 0.5, "v_scale": jnp.float32(2.0)}
    assert "mosaic_gpu" in lower((8, 2), head_dim, 16, **fp8)
    spans = {"span_ends": np.zeros(100, np.int32), "softcap": 5.0, "sinks": np.zeros(8, np.float32)}
    assert "mosaic_gpu" in lower((8, 2), head_dim, 16, **spans)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "sinks", "reason"),
    [
        (96, jnp.bfloat16, None, "head_dim 96"),
        (64, jnp.float8_e4m3fn, None, "head_dim 64 of float8_e4m3fn"),
        (128, jnp.bfloat16, jnp.zeros(4), "sinks"),
    ],
)
def test_what_no_gpu_has_shown_is_refused(head_dim, dtype, sinks, reason):
    pages = jnp.zeros((2, 2, 16, head_dim), dtype)
    q = jnp.zeros((3, 4, head_dim), jnp.bfloat16)
    table, ends, lengths = (jnp.asarray(x, jnp.int32) for x in ([[0]], [0, 3], [3]))
    with pytest.raises(ValueError, match=reason):
        ragged_prefill(q, pages, pages, table, ends, lengths, sinks=sinks, implementation="mosaic")


@pytest.mark.gpu
@pytest.mark.skipif(mosaic.device_without_kernels() is not None, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size", "options"),
    [
        ((32, 8), 128, 64, {}),
        ((14, 2), 64, 16, {"window": 300, "softcap": 20.0}),
        ((32, 8), 128, 64, {"scales": (0.5, 2.0)}),
        ((32, 8), 128, 64, {"with_spans": True}),
        ((8, 4), 256, 64, {}),
        ((9, 3), 64, 8, {"with_sinks": True}),
    ],
)
def test_kernel_on_the_gpu_is_causal_attention(heads, head_dim, page_size, options):
    options = dict(options)
    rows = [(1, 0), (0, 0), (700, 0), (130, 900), (1, 500), (64, 64), (5, 63)]
    scales = options.pop("scales", None)
    dtype = ml_dtypes.bfloat16 if scales is None else ml_dtypes.float8_e4m3fn
    q, kv, cu_seqlens = inputs(rows, *heads, head_dim, page_size, padding=100, dtype=dtype)
    if options.pop("with_sinks", False):
        options["sinks"] = np.linspace(-1, 2, heads[0]).astype(np.float32)
    if options.pop("with_spans", False):
        options["span_ends"] = np.random.default_rng(1).integers(0, 1200, len(q)).astype(np.int32)
    k_scale, v_scale = scales or (None, None)
    operands = (q, kv.k_pages, kv.v_pages, kv.page_table, cu_seqlens, kv.lengths)
    attend = jax.jit(lambda *a: kernel(*a, k_scale=k_scale, v_scale=v_scale, **options))
    got = attend(*map(jnp.asarray, operands))
    want = oracle.prefill(q, oracle.scaled(kv, scales), cu_seqlens, **options)
    assert oracle.relative_error(got, want) < 1e-2
    assert (np.asarray(got[cu_seqlens[-1] :], np.float32) == 0).all()
