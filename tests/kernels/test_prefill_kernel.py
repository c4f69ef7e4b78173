"""The ragged prefill kernel: lowered for Hopper, interpreted with race detection on CPUs, run on a GPU."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels_pallas import mosaic, paged_decode, prefill_config, prefill_kernel, ragged_prefill, tuning
from kernels_pallas.prefill_config import PrefillConfig
from tests.kernels import oracle
from tests.kernels.interpreter import no_races
from tests.kernels.marks import gpu, hopper


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
        ([(40, 0), (33, 100)], (2, 1), 64, PrefillConfig(128, 2, 2, blocks=1), {}),
        ([(9, 200)], (7, 1), 64, PrefillConfig(64, 2, 2, blocks=2), {"window": 70, "softcap": 4.0}),
        ([(30, 100), (1, 129)], (4, 2), 128, PrefillConfig(64, 2, 1, False, blocks=2), {"with_sinks": True}),
        ([(20, 50), (30, 0)], (3, 1), 32, PrefillConfig(64, 2, 3, False, blocks=1), {"with_spans": True}),
        ([(20, 110)], (4, 1), 16, PrefillConfig(64, 2, 2, blocks=1), {"scales": (0.5, 2.0)}),
        ([(19, 70), (1, 9)], (2, 2), 32, PrefillConfig(64, 2, 2, blocks=1), {"head_dim": 96}),
    ],
)
def test_interpreted_kernel_is_causal_attention_without_races(rows, heads, page_size, config, options):
    options = dict(options)
    scales = options.pop("scales", None)
    dtype = ml_dtypes.bfloat16 if scales is None else ml_dtypes.float8_e4m3fn
    head_dim = options.pop("head_dim", 64)
    q, kv, cu_seqlens = inputs(rows, *heads, head_dim, page_size, dtype=dtype)
    sinks = np.linspace(-1, 2, heads[0]).astype(np.float32) if options.pop("with_sinks", False) else None
    spans = np.random.default_rng(1).integers(0, 100, len(q)).astype(np.int32)
    spans = spans if options.pop("with_spans", False) else None
    operands = (q, kv.k_pages, kv.v_pages, kv.page_table, cu_seqlens, kv.lengths, sinks, spans)
    packed = None if scales is None else np.asarray(scales, np.float32)
    with no_races():
        got = prefill_kernel._prefill(
            *operands,
            packed,
            head_dim**-0.5,
            options.get("window"),
            options.get("softcap"),
            config,
            plgpu.InterpretGPUParams(detect_races=True),
        )
    want = oracle.prefill(q, oracle.scaled(kv, scales), cu_seqlens, sinks=sinks, span_ends=spans, **options)
    assert oracle.relative_error(got, want) < 1e-2
    assert (np.asarray(got[cu_seqlens[-1] :], np.float32) == 0).all()


def test_decode_of_a_head_dim_of_96_is_rows_of_one_token(monkeypatch):
    lengths, options = [70, 0, 1], {"window": 30, "softcap": 5.0, "sinks": np.float32([1, -1, 0.5])}
    q, kv, _ = inputs([(1, 0)] * 3, 3, 1, 96, 16, padding=0)
    kv = oracle.paged(np.random.default_rng(1), lengths, 1, 96, 16, dtype=ml_dtypes.bfloat16)
    kernel = functools.partial(prefill_kernel._prefill, interpret=plgpu.InterpretGPUParams(detect_races=True))
    monkeypatch.setattr(prefill_kernel, "_prefill", lambda *args: kernel(*args[:-1]))
    monkeypatch.setattr(prefill_config, "DECODE_CONFIG", PrefillConfig(64, 2, 1, turns=False, blocks=2))
    operands = (q, kv.k_pages, kv.v_pages, kv.page_table, kv.lengths)
    with no_races():
        got = paged_decode(*operands, **options, implementation="mosaic")
    assert oracle.relative_error(got, oracle.decode(q, kv, **options)) < 1e-2


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


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("heads", "page_size"), [((32, 8), 8), ((14, 2), 16), ((16, 1), 128)])
def test_default_configuration_lowers_for_hopper(head_dim, heads, page_size):
    assert "mosaic_gpu" in lower(heads, head_dim, page_size, window=100)


def test_candidates_of_the_tuner_lower_for_hopper():
    """Their shared memory fits, that is; those of the widest heads that two warpgroups take."""
    shape = {"num_tokens": 100, "num_kv_heads": 2, "group": 4, "head_dim": 128, "page_size": 16}
    for kv_bits, dtype in ((16, jnp.bfloat16), (8, jnp.float8_e4m3fn)):
        for config in prefill_config.candidates(**shape, kv_bits=kv_bits):
            assert "mosaic_gpu" in lower((8, 2), 128, 16, dtype, config=config)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_options_lower_for_hopper(head_dim):
    fp8 = {"dtype": jnp.float8_e4m3fn, "k_scale": 0.5, "v_scale": jnp.float32(2.0)}
    assert "mosaic_gpu" in lower((8, 2), head_dim, 16, **fp8)
    spans = {"span_ends": np.zeros(100, np.int32), "softcap": 5.0, "sinks": np.zeros(8, np.float32)}
    assert "mosaic_gpu" in lower((8, 2), head_dim, 16, **spans)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "reason"),
    [(80, jnp.bfloat16, "head_dim 80"), (96, jnp.float8_e4m3fn, "head_dim 96 of float8_e4m3fn")],
)
def test_what_the_kernel_cannot_take_is_refused(head_dim, dtype, reason):
    pages = jnp.zeros((2, 2, 16, head_dim), dtype)
    q = jnp.zeros((3, 4, head_dim), jnp.bfloat16)
    table, ends, lengths = (jnp.asarray(x, jnp.int32) for x in ([[0]], [0, 3], [3]))
    with pytest.raises(ValueError, match=reason):
        ragged_prefill(q, pages, pages, table, ends, lengths, implementation="mosaic")


ROWS = [(1, 0), (0, 0), (700, 0), (130, 900), (1, 500), (64, 64), (5, 63)]  # new tokens, cached ones
MIXED = [(1, 700 + 37 * i) for i in range(24)] + [(512, 0), (1, 0), (300, 1000)]
VERIFIED = [(4 + i % 5, 61 * i) for i in range(32)]  # a few speculative tokens a row
PROMPTS = [(512, 0)] * 16


@gpu
@hopper
@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size", "rows", "options"),
    [
        ((9, 3), 64, 8, ROWS, {"with_sinks": True}),
        ((32, 32), 96, 64, ROWS, {}),
        ((6, 2), 96, 16, VERIFIED, {"window": 100, "with_sinks": True}),
        ((32, 8), 128, 64, ROWS, {"with_sinks": True, "window": 128}),
        ((8, 4), 256, 64, ROWS, {"with_sinks": True}),
        ((32, 8), 128, 64, MIXED, {}),
        ((32, 8), 128, 64, VERIFIED, {}),
        ((32, 8), 128, 16, PROMPTS, {}),
        ((14, 2), 64, 16, ROWS, {"window": 300, "softcap": 20.0}),
        ((16, 1), 64, 32, VERIFIED, {"with_sinks": True}),
        ((32, 8), 128, 64, ROWS, {"scales": (0.5, 2.0)}),
        ((32, 8), 128, 64, ROWS, {"with_spans": True}),
        ((8, 4), 256, 64, ROWS, {}),
        ((14, 2), 64, 16, ROWS, {"scales": (0.5, 2.0)}),
        ((8, 4), 256, 16, ROWS, {"scales": (0.5, 2.0)}),
    ],
)
def test_kernel_on_the_gpu_is_causal_attention(heads, head_dim, page_size, rows, options):
    options = dict(options)
    scales = options.pop("scales", None)
    dtype = ml_dtypes.bfloat16 if scales is None else ml_dtypes.float8_e4m3fn
    q, kv, cu_seqlens = inputs(rows, *heads, head_dim, page_size, padding=100, dtype=dtype)
    if options.pop("with_sinks", False):
        options["sinks"] = np.linspace(-1, 6, heads[0]).astype(np.float32)
    if options.pop("with_spans", False):
        options["span_ends"] = np.random.default_rng(1).integers(0, 1200, len(q)).astype(np.int32)
    k_scale, v_scale = scales or (None, None)
    operands = (q, kv.k_pages, kv.v_pages, kv.page_table, cu_seqlens, kv.lengths)
    attend = jax.jit(lambda *a: kernel(*a, k_scale=k_scale, v_scale=v_scale, **options))
    got = attend(*map(jnp.asarray, operands))
    want = oracle.prefill(q, oracle.scaled(kv, scales), cu_seqlens, **options)
    assert oracle.relative_error(got, want) < 1e-2
    assert (np.asarray(got[cu_seqlens[-1] :], np.float32) == 0).all()


@gpu
@hopper
@pytest.mark.parametrize(("heads", "head_dim", "window"), [((32, 8), 128, None), ((14, 2), 64, 100)])
def test_row_on_the_gpu_has_the_same_bits_alone_and_in_any_batch(heads, head_dim, window):
    q, kv, cu_seqlens = inputs(ROWS, *heads, head_dim, 64)

    pages = [jnp.asarray(x) for x in (kv.k_pages, kv.v_pages)]
    attend = jax.jit(functools.partial(kernel, window=window))

    def run(rows):
        """Output per row of a step of these rows, packed anew."""
        counts = [ROWS[row][0] for row in rows]
        ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        packed = np.concatenate([q[cu_seqlens[row] : cu_seqlens[row + 1]] for row in rows])
        out = np.asarray(attend(packed, *pages, kv.page_table[rows], ends, kv.lengths[rows]), np.float32)
        return np.split(out, ends[1:-1])

    together = run(list(range(len(ROWS))))
    for rows in ([6, 3, 5, 2, 0, 4], [4, 3], [3], [6]):
        for row, got in zip(rows, run(rows), strict=True):
            np.testing.assert_array_equal(got, together[row])


@gpu
@hopper
@pytest.mark.parametrize(("heads", "page_size"), [((32, 32), 64), ((9, 3), 16)])
def test_decode_on_the_gpu_of_a_head_dim_of_96(heads, page_size):
    lengths = [1, 0, 64, 1000, 129, 2500]
    kv = oracle.paged(np.random.default_rng(0), lengths, heads[1], 96, page_size, dtype=ml_dtypes.bfloat16)
    q = inputs([(1, 0)] * len(lengths), *heads, 96, page_size, padding=0)[0]
    got = paged_decode(q, kv.k_pages, kv.v_pages, kv.page_table, kv.lengths, implementation="mosaic")
    assert oracle.relative_error(got, oracle.decode(q, kv)) < 1e-2


@gpu
@hopper
def test_shipped_configurations_on_the_gpu_give_what_the_defaults_give():
    device = mosaic.default_device()
    for entry in tuning.read_ops(tuning.table_path(device.device_kind)).get("ragged_prefill", []):
        shape = entry["shape"]
        heads = shape["group"] * shape["num_kv_heads"], shape["num_kv_heads"]
        rows = [(shape["num_tokens"] // 2, 0), (shape["num_tokens"] // 4, 100)]
        sizes = shape["head_dim"], shape["page_size"]
        q, kv, ends = inputs(rows, *heads, *sizes, padding=shape["num_tokens"] // 4)
        operands = [jnp.asarray(x) for x in (q, kv.k_pages, kv.v_pages, kv.page_table, ends, kv.lengths)]
        default = prefill_config.default_config(shape["head_dim"])
        config = PrefillConfig(**entry["config"])
        assert prefill_config.choose_config(*operands[:2]) == config != default
        want = kernel(*operands, config=default)
        assert oracle.relative_error(kernel(*operands, config=config), want) < 1e-2
