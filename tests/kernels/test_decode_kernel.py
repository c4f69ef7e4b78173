"""The paged decode kernel: lowered for Hopper, interpreted with race detection on CPUs, run on a GPU."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from kernels_pallas import (
    decode_config,
    decode_kernel,
    paged_decode,
    paged_decode_update,
    ragged_prefill,
)
from kernels_pallas.decode_config import DecodeConfig, default_config
from tests.kernels import oracle
from tests.kernels.interpreter import no_races
from tests.kernels.marks import gpu, hopper
from tests.kernels.update_inputs import Update, random_update

BFLOAT16, FLOAT8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
CASES = [
    ([100, 0, 130], (2, 1), 64, 16, DecodeConfig(64, 2, 1), {}),
    ([200], (3, 1), 64, 64, DecodeConfig(64, 2, 1), {"window": 70, "softcap": 4.0}),
    ([1, 129], (8, 2), 64, 128, DecodeConfig(64, 2, 2), {"with_sinks": True}),
    ([300, 64], (9, 1), 128, 8, DecodeConfig(128, 1, 1), {"window": 3}),
    ([10, 0, 140], (2, 1), 64, 16, DecodeConfig(64, 2, 1, longest_first=True), {"window": 70}),
    ([300, 1, 190], (4, 2), 64, 16, DecodeConfig(64, 2, 5), {"window": 180, "with_sinks": True}),
]


def inputs(lengths, num_heads, num_kv_heads, head_dim, page_size, seed=0):
    rng = np.random.default_rng(seed)
    kv = oracle.paged(rng, lengths, num_kv_heads, head_dim, page_size, dtype=BFLOAT16)
    return rng.normal(size=(len(lengths), num_heads, head_dim)).astype(BFLOAT16), kv


def attend(q, kv, config, *, window=None, softcap=None, sinks=None, interpret=None):
    num_lanes, _, head_dim = q.shape
    x = q.reshape(num_lanes, kv.k_pages.shape[1], -1, head_dim)
    operands = (x, kv.k_pages, kv.v_pages, kv.page_table, kv.lengths, sinks, None, None, None)
    o, _, _ = decode_kernel._decode(*operands, head_dim**-0.5, window, softcap, 0.0, config, interpret)
    return o.reshape(q.shape)


def attend_and_update(case: Update, config, *, window=None, softcap=None, sinks=None, interpret=None):
    head_dim = case.qkv.shape[-1]
    operands = (case.qkv, case.kv.k_pages, case.kv.v_pages, case.kv.page_table, case.kv.lengths, sinks)
    rope = case.cos, case.sin
    return decode_kernel._decode(
        *operands,
        rope,
        case.norms,
        case.scales,
        head_dim**-0.5,
        window,
        softcap,
        case.epsilon,
        config,
        interpret,
    )


def assert_same_pages(got, want):
    """Pages [P, K, S, H] in float32 against those wanted; a key's 16-bit rounding may tip the 8-bit one."""
    tolerance = 1e-2 if want.dtype == BFLOAT16 else 0.13
    np.testing.assert_allclose(got, want.astype(np.float32), rtol=tolerance, atol=1e-6)
    if want.dtype == FLOAT8:
        assert (got != want.astype(np.float32))[~np.isnan(got)].mean() < 1e-3


def take_sinks(options, num_heads):
    options = dict(options)
    sinks = np.linspace(-1, 2, num_heads).astype(np.float32) if options.pop("with_sinks", False) else None
    return options, sinks


def interpretation(config):
    """Blocks that merge splits speak through global memory, which the race detector takes for a race."""
    return plgpu.InterpretGPUParams(detect_races=config.num_splits == 1)


@pytest.mark.parametrize(("lengths", "heads", "head_dim", "page_size", "config", "options"), CASES[1::2])
def test_interpreted_kernel_is_softmax_attention_without_races(
    lengths, heads, head_dim, page_size, config, options
):
    q, kv = inputs(lengths, *heads, head_dim, page_size)
    options, sinks = take_sinks(options, heads[0])
    with no_races():
        got = attend(q, kv, config, sinks=sinks, interpret=interpretation(config), **options)
    assert oracle.relative_error(got, oracle.decode(q, kv, sinks=sinks, **options)) < 1e-2


@pytest.mark.parametrize(("lengths", "heads", "head_dim", "page_size", "config", "options"), CASES)
def test_interpreted_kernel_stores_the_token_and_attends_without_races(
    lengths, heads, head_dim, page_size, config, options
):
    norms = config.num_splits == 1
    case = random_update(lengths, *heads, head_dim, page_size, norms=norms, dtype=BFLOAT16)
    options, sinks = take_sinks(options, heads[0])
    with no_races():
        o, *pages = attend_and_update(case, config, sinks=sinks, interpret=interpretation(config), **options)
        o, pages = np.asarray(o), [np.asarray(x, np.float32) for x in pages]
    q, kv = case.expected()
    want = oracle.decode(q, kv, sinks=sinks, **options)
    assert oracle.relative_error(o.reshape(want.shape), want) < 1e-2
    for got, expected in zip(pages, (kv.k_pages, kv.v_pages), strict=True):
        assert_same_pages(got, expected)


@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size", "config", "window", "scales"),
    [
        ((2, 1), 128, 16, DecodeConfig(64, 2, 1), None, None),
        ((6, 2), 64, 16, DecodeConfig(64, 2, 1), None, (0.5, 4.0)),
        ((4, 2), 128, 64, DecodeConfig(64, 2, 3), 180, (0.25, 2.0)),
    ],
)
def test_interpreted_kernel_keeps_eight_bit_pages_without_races(
    heads, head_dim, page_size, config, window, scales
):
    case = random_update(
        [130, 0, 1, 300],
        *heads,
        head_dim,
        page_size,
        dtype=BFLOAT16,
        page_dtype=FLOAT8,
        scales=scales,
    )
    case.qkv[0, 0, -1, :4] = [9000, -9000, 700, -700]  # beyond the 8-bit range: saturate
    with no_races():
        o, *pages = attend_and_update(case, config, window=window, interpret=interpretation(config))
        o, pages = np.asarray(o), [np.asarray(x, np.float32) for x in pages]
    q, kv = case.expected()
    want = oracle.decode(q, kv, window=window)
    assert oracle.relative_error(o.reshape(want.shape), want) < 1e-2
    for got, expected in zip(pages, (kv.k_pages, kv.v_pages), strict=True):
        assert_same_pages(got, expected)


def test_rotates_only_the_first_dimensions():
    case = random_update([70], 2, 1, 128, 64, rotary_dim=64, norms=True, dtype=BFLOAT16)
    config = DecodeConfig(64, 2, 1)
    o, k_pages, _ = attend_and_update(case, config, interpret=interpretation(config))
    q, kv = case.expected()
    assert oracle.relative_error(np.asarray(o).reshape(q.shape), oracle.decode(q, kv)) < 1e-2
    np.testing.assert_allclose(
        np.asarray(k_pages, np.float32), kv.k_pages.astype(np.float32), rtol=1e-2, atol=1e-6
    )


@pytest.mark.parametrize(("update", "window"), [(True, None), (False, 90)])
def test_deterministic_lane_has_the_same_bits_alone_and_in_a_batch(window, update, monkeypatch):
    case = random_update([300, 70, 129], 4, 1, 64, 16, norms=True, dtype=BFLOAT16)
    kernel = functools.partial(decode_kernel._decode, interpret=plgpu.InterpretGPUParams())
    monkeypatch.setattr(decode_kernel, "_decode", lambda *args, **options: kernel(*args[:-1], **options))
    stored = case.expected()[1]
    options = {"window": window, "deterministic": True, "implementation": "mosaic"}

    def attend(lanes):
        kv = case.kv if update else stored
        operands = (kv.k_pages, kv.v_pages, kv.page_table[lanes], kv.lengths[lanes])
        if not update:
            return np.asarray(paged_decode(case.qkv[lanes, 0, :4], *operands, **options))
        rope = case.cos[lanes], case.sin[lanes]
        return np.asarray(paged_decode_update(case.qkv[lanes], *operands, *rope, **options)[0])

    together = attend(slice(0, 3))
    for lane in range(3):
        np.testing.assert_array_equal(attend(slice(lane, lane + 1))[0], together[lane])


def test_deterministic_configuration_leaves_nothing_to_the_size_of_the_batch():
    pages = jax.ShapeDtypeStruct((50, 8, 64, 128), jnp.bfloat16)
    tables = [jax.ShapeDtypeStruct((num_lanes, 12), jnp.int32) for num_lanes in (1, 256)]
    configs = {decode_config.choose_config(4, pages, table, deterministic=True) for table in tables}
    assert len(configs) == 1
    assert configs.pop().merged_at_once > 0


def shapes(num_lanes, heads, head_dim, page_size, max_pages=12):
    """Abstract (qkv, pages, page_table, lengths, cos) of a decode step."""
    num_heads, num_kv_heads = heads
    qkv = (num_lanes, num_kv_heads, num_heads // num_kv_heads + 2, head_dim)
    return (
        jax.ShapeDtypeStruct(qkv, jnp.bfloat16),
        jax.ShapeDtypeStruct((50, num_kv_heads, page_size, head_dim), jnp.bfloat16),
        jax.ShapeDtypeStruct((num_lanes, max_pages), jnp.int32),
        jax.ShapeDtypeStruct((num_lanes,), jnp.int32),
        jax.ShapeDtypeStruct((num_lanes, head_dim // 2), jnp.float32),
    )


@pytest.mark.parametrize(
    ("heads", "num_lanes", "head_dim", "page_size"),
    [
        ((32, 8), 4, 128, 16),
        ((32, 8), 256, 128, 64),
        ((14, 2), 200, 64, 128),
        ((9, 3), 1, 64, 8),
        ((16, 1), 4, 256, 128),
        ((16, 1), 200, 128, 8),
        ((4, 4), 4, 256, 16),
    ],
)
def test_default_configuration_lowers_for_hopper(heads, num_lanes, head_dim, page_size):
    qkv, pages, table, lengths, cos = shapes(num_lanes, heads, head_dim, page_size)
    norm = jax.ShapeDtypeStruct((head_dim,), jnp.bfloat16)

    def attend(qkv, k, v, table, lengths, cos, sin, q_norm, k_norm):
        q = qkv[:, :, :-2].reshape(num_lanes, heads[0], head_dim)
        plain = paged_decode(q, k, v, table, lengths, window=100, softcap=3.0, implementation="mosaic")
        norms = {"q_norm": q_norm, "k_norm": k_norm}
        return plain, paged_decode_update(
            qkv, k, v, table, lengths, cos, sin, **norms, implementation="mosaic"
        )

    traced = jax.jit(attend).trace(qkv, pages, pages, table, lengths, cos, cos, norm, norm)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 2
    assert text.count("output_operand_alias<") == 2  # the pages of the update, in place


def test_kernels_lower_inside_shard_map_over_the_kv_heads():
    mesh = Mesh(np.array(jax.devices()[:1]), ("tensor",))
    heads, whole = PartitionSpec(None, "tensor"), PartitionSpec()

    def both(q, k_pages, v_pages, table, lengths, cu_seqlens):
        decoded = paged_decode(q, k_pages, v_pages, table, lengths, implementation="mosaic")
        prefilled = ragged_prefill(q, k_pages, v_pages, table, cu_seqlens, lengths, implementation="mosaic")
        return decoded + prefilled

    specs = (heads, heads, heads, whole, whole, whole)
    sharded = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=specs, out_specs=heads))
    pages = jax.ShapeDtypeStruct((50, 2, 16, 64), jnp.bfloat16)
    integers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4, 8), (4,), (5,))]
    lowered = sharded.trace(jax.ShapeDtypeStruct((4, 8, 64), jnp.bfloat16), pages, pages, *integers)
    assert lowered.lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu") >= 2


def test_update_lowers_inside_shard_map_over_the_kv_heads():
    mesh = Mesh(np.array(jax.devices()[:1]), ("tensor",))
    heads, whole = PartitionSpec(None, "tensor"), PartitionSpec()
    update = functools.partial(paged_decode_update, implementation="mosaic")
    specs = (heads, heads, heads, whole, whole, whole, whole)
    # The kernel takes references to the pages, which shard_map's check of varying axes cannot follow.
    sharded = jax.shard_map(update, mesh=mesh, in_specs=specs, out_specs=(heads,) * 3, check_vma=False)
    qkv, pages, table, lengths, cos = shapes(4, (8, 2), 64, 16)
    traced = jax.jit(sharded).trace(qkv, pages, pages, table, lengths, cos, cos)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_operands_the_kernel_cannot_take_are_named():
    q, kv = inputs([5], 2, 1, 32, 8)
    with pytest.raises(ValueError, match="head_dim 32"):
        paged_decode(q, kv.k_pages, kv.v_pages, kv.page_table, kv.lengths, implementation="mosaic")


GPU_LENGTHS = [1, 0, 64, 1000, 129, 2500]
FEATURES = {"window": 500, "softcap": 20.0, "with_sinks": True}


# On a GPU nearly all of the time is compiling: every group, head dim, page size and feature comes up, not all
# of their combinations.
@gpu
@hopper
@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size", "scales", "options"),
    [
        ((32, 8), 128, 64, None, {}),
        ((14, 2), 64, 64, None, FEATURES),
        ((16, 1), 128, 128, None, FEATURES),
        ((4, 4), 256, 32, None, {}),
        ((9, 3), 64, 8, None, {"window": 3}),
        ((32, 8), 128, 64, (0.5, 2.0), FEATURES),
        ((14, 2), 64, 16, (0.5, 2.0), {}),
        ((8, 4), 256, 32, (0.5, 2.0), {}),
        ((9, 3), 64, 64, (0.5, 2.0), {}),
    ],
)
def test_kernel_on_the_gpu_is_softmax_attention(heads, head_dim, page_size, scales, options):
    options, sinks = take_sinks(options, heads[0])
    page_dtype = BFLOAT16 if scales is None else FLOAT8
    case = random_update(
        GPU_LENGTHS, *heads, head_dim, page_size, norms=bool(options), dtype=BFLOAT16, page_dtype=page_dtype,
        scales=scales,
    )  # fmt: skip
    pages = [jnp.asarray(x) for x in (case.kv.k_pages, case.kv.v_pages)]
    q, kv = case.expected()
    want = oracle.decode(q, kv, sinks=sinks, **options)
    norms = {} if case.norms is None else {"q_norm": case.norms[0], "k_norm": case.norms[1]}
    options |= {"sinks": sinks, "k_scale": scales and scales[0], "v_scale": scales and scales[1]}
    options["implementation"] = "mosaic"
    o, *pages = paged_decode_update(
        case.qkv,
        *pages,
        kv.page_table,
        kv.lengths,
        case.cos,
        case.sin,
        **norms,
        epsilon=case.epsilon,
        **options,
    )
    assert oracle.relative_error(o, want) < 1e-2
    for got, expected in zip(pages, (kv.k_pages, kv.v_pages), strict=True):
        assert_same_pages(np.asarray(got, np.float32), expected)
    if head_dim != 64:  # by itself, attention is a part of the above
        return
    got = paged_decode(q, *pages, kv.page_table, kv.lengths, **options)
    assert oracle.relative_error(got, want) < 1e-2


@gpu
@hopper
@pytest.mark.parametrize(
    ("lanes", "heads", "head_dim", "config"),
    [
        (60, (14, 2), 64, DecodeConfig(128, 3, 1)),
        (36, (32, 8), 128, DecodeConfig(64, 3, 1, longest_first=True)),
        (12, (20, 5), 128, DecodeConfig(128, 2, 2, clustered=True)),
        (12, (32, 8), 128, DecodeConfig(64, 2, 2, clustered=True)),
    ],
)
@pytest.mark.parametrize("page_dtype", [BFLOAT16, FLOAT8])
def test_default_configurations_of_many_lanes_on_the_gpu(lanes, heads, head_dim, config, page_dtype):
    assert default_config(lanes, heads[1], heads[0] // heads[1], head_dim, 4096) == config
    lengths = GPU_LENGTHS * (lanes // len(GPU_LENGTHS))
    case = random_update(lengths, *heads, head_dim, 64, dtype=BFLOAT16, page_dtype=page_dtype)
    o, *pages = paged_decode_update(
        case.qkv,
        *(jnp.asarray(x) for x in (case.kv.k_pages, case.kv.v_pages)),
        case.kv.page_table,
        case.kv.lengths,
        case.cos,
        case.sin,
        implementation="mosaic",
    )
    q, kv = case.expected()
    assert oracle.relative_error(o, oracle.decode(q, kv)) < 1e-2
    for got, expected in zip(pages, (kv.k_pages, kv.v_pages), strict=True):
        assert_same_pages(np.asarray(got, np.float32), expected)


@gpu
@hopper
@pytest.mark.parametrize(("heads", "head_dim"), [((32, 8), 128), ((16, 8), 256)])
def test_lane_alone_on_the_gpu_is_merged_in_a_cluster(heads, head_dim):
    update = jax.jit(functools.partial(paged_decode_update, implementation="mosaic"))
    for length in (1, 64, 65, 300, 1500):  # one, two, some and all splits have work
        case = random_update([length], *heads, head_dim, 64, dtype=BFLOAT16)
        table = np.pad(case.kv.page_table, ((0, 0), (0, 32 - case.kv.page_table.shape[1])))
        assert default_config(1, heads[1], heads[0] // heads[1], head_dim, 32 * 64).clustered
        pages = [np.resize(x, (40, *x.shape[1:])) for x in (case.kv.k_pages, case.kv.v_pages)]
        o, *got = update(case.qkv, *pages, table, case.kv.lengths, case.cos, case.sin)
        q, kv = case.expected()
        assert oracle.relative_error(np.asarray(o), oracle.decode(q, kv)) < 1e-2
        for page, expected in zip(got, (kv.k_pages, kv.v_pages), strict=True):
            assert_same_pages(np.asarray(page[: len(expected)], np.float32), expected)


@gpu
@hopper
def test_kernels_on_the_gpu_reach_back_over_131072_tokens():
    rng = np.random.default_rng(0)
    lengths = [131_072, 1, 70_001]
    kv = oracle.paged(rng, lengths, 1, 128, 128, dtype=BFLOAT16)
    q = rng.normal(size=(len(lengths), 4, 128)).astype(BFLOAT16)
    operands = [jnp.asarray(x) for x in (q, kv.k_pages, kv.v_pages, kv.page_table)]
    want = oracle.decode(q, kv)
    got = paged_decode(*operands, kv.lengths, implementation="mosaic")
    ends = jnp.arange(len(lengths) + 1, dtype=jnp.int32)
    also = ragged_prefill(*operands, ends, kv.lengths, implementation="mosaic")
    for lane in range(len(lengths)):
        assert oracle.relative_error(got[lane], want[lane]) < 1e-2
        assert oracle.relative_error(also[lane], want[lane]) < 1e-2


@gpu
@hopper
@pytest.mark.parametrize(
    ("heads", "head_dim", "page_dtype", "options"),
    [((32, 8), 128, BFLOAT16, {}), ((14, 2), 64, BFLOAT16, {"window": 700}), ((32, 8), 128, FLOAT8, {})],
)
def test_deterministic_lane_on_the_gpu_has_the_same_bits_alone_and_in_any_batch(
    heads, head_dim, page_dtype, options
):
    case = random_update(GPU_LENGTHS * 20, *heads, head_dim, 64, dtype=BFLOAT16, page_dtype=page_dtype)
    options = options | {"deterministic": True, "implementation": "mosaic"}
    pages = [jnp.asarray(x) for x in (case.kv.k_pages, case.kv.v_pages)]

    @jax.jit
    def attend(pages, qkv, table, lengths, cos, sin):
        o, *stored = paged_decode_update(qkv, *pages, table, lengths, cos, sin, **options)
        return o, paged_decode(qkv[:, :, 0], *stored, table, lengths, **options)

    def run(lanes):
        arrays = (case.qkv, case.kv.page_table, case.kv.lengths, case.cos, case.sin)
        return [np.asarray(x, np.float32) for x in attend(pages, *(x[lanes] for x in arrays))]

    everything = np.arange(len(case.qkv))
    together = run(everything)
    mixed = np.random.default_rng(0).permutation(everything)
    for lanes in (everything, mixed, *everything[:6, None]):
        for got, want in zip(run(lanes), together, strict=True):
            np.testing.assert_array_equal(got, want[lanes])
