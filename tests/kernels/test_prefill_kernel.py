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


def inputs(rows, num_heads, num_kv_heads, head_dim, page_size, padding=3):
    """Packed queries, KV and cu_seqlens for rows of (new tokens, cached tokens)."""
    rng = np.random.default_rng(0)
    counts = [new for new, _ in rows]
    lengths = [new + cached if new else 0 for new, cached in rows]
    kv = oracle.paged(rng, lengths, num_kv_heads, head_dim, page_size, dtype=ml_dtypes.bfloat16)
    cu_seqlens = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    q = rng.normal(size=(int(cu_seqlens[-1]) + padding, num_heads, head_dim)).astype(ml_dtypes.bfloat16)
    return q, kv, cu_seqlens


@pytest.mark.parametrize(
    ("rows", "heads", "page_size", "config", "options"),
    [
        ([(40, 0)], (4, 1), 64, PrefillConfig(64, 2, 2), {}),
        ([(20, 70), (0, 0), (3, 130)], (3, 1), 16, PrefillConfig(64, 2, 2), {}),
        ([(9, 200)], (7, 1), 64, PrefillConfig(64, 2, 2), {"window": 70, "softcap": 4.0}),
        ([(30, 100), (1, 129)], (4, 2), 128, PrefillConfig(64, 2, 1), {"with_sinks": True}),
    ],
)
def test_interpreted_kernel_is_causal_attention_without_races(rows, heads, page_size, config, options):
    q, kv, cu_seqlens = inputs(rows, *heads, 64, page_size)
    options = dict(options)
    sinks = np.linspace(-1, 2, heads[0]).astype(np.float32) if options.pop("with_sinks", False) else None
    operands = (q, kv.k_pages, kv.v_pages, kv.page_table, cu_seqlens, kv.lengths, sinks)
    with no_races():
        got = prefill_kernel._prefill(
            *operands,
            64**-0.5,
            options.get("window"),
            options.get("softcap"),
            config,
            plgpu.InterpretGPUParams(detect_races=True),
        )
    want = oracle.prefill(q, kv, cu_seqlens, sinks=sinks, **options)
    assert oracle.relative_error(got, want) < 1e-2
    assert (np.asarray(got[cu_seqlens[-1] :], np.float32) == 0).all()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("heads", "page_size"), [((32, 8), 8), ((14, 2), 16), ((16, 1), 128)])
def test_default_configuration_lowers_for_hopper(head_dim, heads, page_size):
    pages = jax.ShapeDtypeStruct((50, heads[1], page_size, head_dim), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((100, heads[0], head_dim), jnp.bfloat16)
    table, rows = jax.ShapeDtypeStruct((4, 12), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32)
    ends = jax.ShapeDtypeStruct((5,), jnp.int32)
    attend = jax.jit(lambda *a: ragged_prefill(*a, window=100, implementation="mosaic"))
    lowered = attend.trace(q, pages, pages, table, ends, rows).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.gpu
@pytest.mark.skipif(mosaic.device_without_kernels() is not None, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    (
        "heads",
        "head_dim",
        "page_size",
        "options",
    ),  # every value meets most others; each case is a compilation
    [
        ((32, 8), 128, 128, {}),
        ((14, 2), 64, 8, {"window": 300, "softcap": 20.0}),
        ((9, 3), 64, 64, {"with_sinks": True}),
        ((16, 1), 128, 16, {"window": 300, "softcap": 20.0}),
        ((4, 4), 128, 16, {"with_sinks": True}),
        ((16, 8), 256, 32, {}),
        ((4, 1), 256, 64, {"window": 300, "softcap": 20.0}),
    ],
)
def test_kernel_on_the_gpu_is_causal_attention(heads, head_dim, page_size, options):
    options = dict(options)
    rows = [(1, 0), (0, 0), (700, 0), (130, 900), (1, 500), (64, 64), (5, 63)]
    q, kv, cu_seqlens = inputs(rows, *heads, head_dim, page_size, padding=100)
    sinks = np.linspace(-1, 2, heads[0]).astype(np.float32) if options.pop("with_sinks", False) else None
    operands = (q, kv.k_pages, kv.v_pages, kv.page_table, cu_seqlens, kv.lengths)
    got = ragged_prefill(*map(jnp.asarray, operands), sinks=sinks, **options)
    want = oracle.prefill(q, kv, cu_seqlens, sinks=sinks, **options)
    assert oracle.relative_error(got, want) < 1e-2
    assert (np.asarray(got[cu_seqlens[-1] :], np.float32) == 0).all()
