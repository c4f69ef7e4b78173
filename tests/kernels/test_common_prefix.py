"""Decode of lanes with a common prefix, which is read once for all: interpreted, lowered for Hopper, on a GPU."""

import contextlib
import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas import decode_kernel, paged_decode, paged_decode_update, prefix_kernel
from kernels_pallas.decode_config import DecodeConfig
from kernels_pallas.prefill_config import PrefillConfig
from tests.kernels import oracle
from tests.kernels.interpreter import no_races
from tests.kernels.marks import gpu, hopper
from tests.kernels.update_inputs import random_update

BFLOAT16, FLOAT8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn


@contextlib.contextmanager
def interpreted(config: DecodeConfig, prefix_config: PrefillConfig, parts: int, *, detect_races: bool):
    """Inside, the kernels are interpreted with these configurations."""
    interpret = plgpu.InterpretGPUParams(detect_races=detect_races)
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((decode_kernel, "_decode"), (prefix_kernel, "_attend")):
            kernel = functools.partial(getattr(module, name), interpret=interpret)
            patch.setattr(module, name, lambda *args, kernel=kernel, **kw: kernel(*args[:-1], **kw))
        patch.setattr(decode_kernel, "choose_config", lambda *_: config)
        patch.setattr(prefix_kernel, "choose_config", lambda *_: (prefix_config, parts))
        yield


def update(case, common_prefix, **options):
    """Output [B, N, H] and pages of `paged_decode_update` by the kernels, with what the case has."""
    if case.norms is not None:
        options |= {"q_norm": case.norms[0], "k_norm": case.norms[1]}
    if case.scales is not None:
        options |= {"k_scale": case.scales[0], "v_scale": case.scales[1]}
    kv, pages = case.kv, [jnp.asarray(x) for x in (case.kv.k_pages, case.kv.v_pages)]
    prefix = None if common_prefix is None else jnp.asarray([common_prefix], jnp.int32)
    operands = (case.qkv, *pages, kv.page_table, kv.lengths, case.cos, case.sin)
    options |= {"epsilon": case.epsilon, "common_prefix": prefix, "implementation": "mosaic"}
    return paged_decode_update(*operands, **options)


def assert_right(case, got, **options):
    q, kv = case.expected()
    o, *pages = got
    assert oracle.relative_error(o, oracle.decode(q, kv, **options)) < 1e-2
    tolerance = 1e-2 if case.scales is None else 0.13  # rounding before the rounding to 8 bits
    for page, want in zip(pages, (kv.k_pages, kv.v_pages), strict=True):
        want = want.astype(np.float32)
        np.testing.assert_allclose(np.asarray(page, np.float32), want, rtol=tolerance, atol=1e-6)


ONE_BY_ONE = PrefillConfig(64, 2, 1, turns=False, blocks=1)


@pytest.mark.parametrize(
    ("lengths", "common", "heads", "head_dim", "page_size", "config", "prefix", "case_options", "options"),
    [
        ([140, 0, 129], 128, (2, 2), 64, 16, DecodeConfig(64, 2, 1), (ONE_BY_ONE, 2), {}, {"softcap": 3.0}),
        ([0, 300, 400], 256, (6, 2), 64, 64, DecodeConfig(128, 1, 1, longest_first=True),
         (PrefillConfig(128, 2, 2, blocks=2), 1), {"norms": True}, {"sinks": True}),
        ([257] * 9, 256, (7, 1), 64, 128, DecodeConfig(64, 2, 1), (ONE_BY_ONE, 3), {}, {}),
        ([270, 512, 300], 256, (4, 1), 128, 8, DecodeConfig(64, 2, 3), (ONE_BY_ONE, 2), {}, {"sinks": True}),
        ([270, 0, 258], 256, (6, 2), 64, 32, DecodeConfig(64, 2, 1), (ONE_BY_ONE, 2),
         {"page_dtype": FLOAT8, "scales": (0.5, 4.0)}, {"softcap": 5.0}),
    ],
)  # fmt: skip
def test_interpreted_kernels_are_softmax_attention_without_races(
    lengths, common, heads, head_dim, page_size, config, prefix, case_options, options
):
    case = random_update(lengths, *heads, head_dim, page_size, common=common, dtype=BFLOAT16, **case_options)
    if "sinks" in options:
        options = options | {"sinks": np.linspace(-1, 2, heads[0]).astype(np.float32)}
    # Blocks that merge splits speak through global memory, which the race detector takes for a race.
    with interpreted(config, *prefix, detect_races=config.num_splits == 1), no_races():
        got = [np.asarray(x) for x in update(case, common, **options)]
    assert_right(case, got, **options)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    own=st.lists(st.sampled_from([0, 1, 15, 64, 100]), min_size=3, max_size=3),
    common=st.sampled_from([0, 112, 128, 272, 384]),
    said=st.floats(0, 1),
)
def test_whatever_prefix_is_said_to_be_common_lanes_see_all_of_their_own(own, common, said):
    lengths = [common + n if n else 0 for n in own]
    kv = oracle.paged(np.random.default_rng(0), lengths, 1, 64, 16, common=common, dtype=BFLOAT16)
    pages = [np.full((140, *x.shape[1:]), np.nan, BFLOAT16) for x in (kv.k_pages, kv.v_pages)]
    for padded, x in zip(pages, (kv.k_pages, kv.v_pages), strict=True):
        padded[: len(x)] = x
    table = np.pad(kv.page_table, ((0, 0), (0, 32 - kv.page_table.shape[1])))
    q = np.random.default_rng(1).normal(size=(3, 3, 64)).astype(BFLOAT16)
    with interpreted(DecodeConfig(64, 2, 2), ONE_BY_ONE, 2, detect_races=False):
        got = decode_interpreted(q, *pages, table, kv.lengths, common_prefix=np.int32([int(said * common)]))
    assert oracle.relative_error(got, oracle.decode(q, kv)) < 1e-2


@pytest.mark.parametrize("said", [-5, 128, 5000])
def test_a_prefix_that_a_lane_ends_with_is_read_as_far_as_before_its_last_token(said):
    kv = oracle.paged(np.random.default_rng(0), [300, 129, 0, 128], 1, 64, 16, common=128, dtype=BFLOAT16)
    q = np.random.default_rng(1).normal(size=(4, 3, 64)).astype(BFLOAT16)
    pages = kv.k_pages, kv.v_pages
    with interpreted(DecodeConfig(64, 2, 1), ONE_BY_ONE, 1, detect_races=False):
        got = paged_decode(
            q, *pages, kv.page_table, kv.lengths, common_prefix=np.int32([said]), implementation="mosaic"
        )
    assert oracle.relative_error(got, oracle.decode(q, kv)) < 1e-2


# One program: only the first example pays for it.
decode_interpreted = jax.jit(functools.partial(paged_decode, implementation="mosaic"))


def lowered(*, heads=(8, 2), head_dim=64, lanes=4, dtype=jnp.bfloat16, sharding=None, **options) -> str:
    """Text of `paged_decode_update` with a common prefix, lowered for Hopper."""
    spec = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    pages = spec((50, heads[1], 16, head_dim), dtype)
    qkv = spec((lanes, heads[1], heads[0] // heads[1] + 2, head_dim), jnp.bfloat16)
    cos = spec((lanes, head_dim // 2), jnp.float32)
    table, lengths = spec((lanes, 40), jnp.int32), spec((lanes,), jnp.int32)

    def call(*operands):
        *operands, prefix = operands
        return paged_decode_update(*operands, common_prefix=prefix, implementation="mosaic", **options)

    operands = (qkv, pages, pages, table, lengths, cos, cos, spec((1,), jnp.int32))
    return jax.jit(call).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("heads", "lanes", "head_dim", "dtype"),
    [
        ((32, 8), 256, 128, jnp.bfloat16),
        ((14, 2), 64, 64, jnp.float8_e4m3fn),
        ((16, 1), 3, 128, jnp.bfloat16),
        ((8, 4), 16, 256, jnp.bfloat16),
    ],
)
def test_default_configurations_lower_for_hopper(heads, lanes, head_dim, dtype):
    text = lowered(heads=heads, lanes=lanes, head_dim=head_dim, dtype=dtype, softcap=5.0, k_scale=0.5)
    assert text.count("custom_call @mosaic_gpu_v2") == 2


@pytest.mark.parametrize("options", [{"window": 100}, {"deterministic": True}])
def test_with_a_window_or_deterministic_the_prefix_is_ignored(options):
    assert lowered(**options).count("custom_call @mosaic_gpu_v2") == 1


def test_kernels_lower_with_sharded_operands_and_inside_shard_map():
    mesh = Mesh(np.array(jax.devices()[:1]), ("tensor",))
    sharding = NamedSharding(mesh, PartitionSpec())
    assert lowered(sharding=sharding).count("custom_call @mosaic_gpu_v2") == 2

    def decode(q, pages, table, lengths, prefix):
        return paged_decode(q, pages, pages, table, lengths, common_prefix=prefix, implementation="mosaic")

    heads, whole = PartitionSpec(None, "tensor"), PartitionSpec()
    mapped = jax.shard_map(decode, mesh=mesh, in_specs=(heads, heads, whole, whole, whole), out_specs=heads)
    shapes = ((4, 8, 64), (50, 2, 16, 64)), ((4, 40), (4,), (1,))
    floats, integers = (
        [jax.ShapeDtypeStruct(shape, dtype) for shape in some]
        for some, dtype in zip(shapes, (jnp.bfloat16, jnp.int32), strict=True)
    )
    text = jax.jit(mapped).trace(*floats, *integers).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu_v2") == 2


@pytest.mark.parametrize("prefix", [np.int32(3), np.zeros(2, np.int32), np.zeros(1, np.float32)])
def test_a_prefix_that_is_not_one_integer_is_refused(prefix):
    case = random_update([5], 2, 1, 64, 16, dtype=BFLOAT16)
    kv, step = case.kv, (case.cos, case.sin)
    operands = (kv.k_pages, kv.v_pages, kv.page_table, kv.lengths)
    with pytest.raises(ValueError, match=r"common_prefix must be \[1\] int32"):
        paged_decode(case.qkv[:, 0, :2], *operands, common_prefix=prefix)
    with pytest.raises(ValueError, match=r"common_prefix must be \[1\] int32"):
        paged_decode_update(case.qkv, *operands, *step, common_prefix=prefix)


OWN = [1, 0, 64, 360, 129, 2, 700]  # tokens behind the common ones


@gpu
@hopper
@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size", "lanes", "scales", "options"),
    [
        ((32, 8), 128, 64, 7, None, {"softcap": 20.0, "sinks": True}),
        ((14, 2), 64, 16, 70, None, {}),
        ((16, 1), 128, 128, 5, None, {"sinks": True}),  # merged in a cluster
        ((4, 4), 256, 32, 14, None, {"sinks": True}),
        ((9, 3), 64, 8, 42, None, {}),
        ((32, 8), 128, 64, 35, (0.5, 2.0), {"sinks": True}),  # longest first
        ((8, 4), 256, 32, 7, (0.5, 2.0), {}),
    ],
)
def test_common_prefix_on_the_gpu_is_seen_by_every_lane(heads, head_dim, page_size, lanes, scales, options):
    lengths = [640 + n if n else 0 for n in (OWN * (lanes // len(OWN) + 1))[:lanes]]
    page_dtype = BFLOAT16 if scales is None else FLOAT8
    case = random_update(
        lengths, *heads, head_dim, page_size, norms=bool(options), dtype=BFLOAT16, page_dtype=page_dtype,
        scales=scales, common=640,
    )  # fmt: skip
    if "sinks" in options:
        options = options | {"sinks": np.linspace(-1, 2, heads[0]).astype(np.float32)}
    for prefix in (640, 200, 127):
        assert_right(case, update(case, prefix, **options), **options)


@gpu
@hopper
@pytest.mark.parametrize(("heads", "head_dim"), [((32, 8), 128), ((14, 2), 64)])
@pytest.mark.parametrize("page_dtype", [BFLOAT16, FLOAT8])
def test_with_and_without_common_prefix_on_the_gpu_256_lanes_agree(heads, head_dim, page_dtype):
    common, lanes, page = 2048, 256, 64
    rng = np.random.default_rng(0)
    pages = 2 * lanes + common // page
    shape = (pages, heads[1], page, head_dim)
    k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    k, v = k.astype(page_dtype), v.astype(page_dtype)
    order = rng.permutation(pages).astype(np.int32)
    shared, own = order[: common // page], order[common // page :].reshape(lanes, 2)
    table = np.concatenate([np.broadcast_to(shared, (lanes, len(shared))), own], axis=1)
    lengths = (common + rng.integers(1, 129, lanes)).astype(np.int32)
    lengths[[0, 17]] = 0
    q = jnp.asarray(rng.normal(size=(lanes, heads[0], head_dim)), jnp.bfloat16)
    operands = (q, k, v, table, lengths)
    want = paged_decode(*operands, implementation="reference")
    decode = jax.jit(functools.partial(paged_decode, implementation="mosaic"))
    plain, *got = (
        decode(*operands, common_prefix=None if n is None else np.int32([n])) for n in (None, 0, 600, 2048)
    )
    assert oracle.relative_error(plain, want) < 1e-2
    np.testing.assert_array_equal(got[0], plain)  # nothing in common
    for o in got[1:]:
        assert oracle.relative_error(o, want) < 1e-2
        assert oracle.relative_error(o, plain) < 1e-2
