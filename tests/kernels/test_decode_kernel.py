"""The paged decode kernel: lowered for Hopper, interpreted with race detection on CPUs, run on a GPU."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from kernels_pallas import decode_kernel, mosaic, paged_decode, ragged_prefill
from kernels_pallas.decode_kernel import DecodeConfig
from tests.kernels import oracle
from tests.kernels.interpreter import no_races


def inputs(lengths, num_heads, num_kv_heads, head_dim, page_size, seed=0):
    rng = np.random.default_rng(seed)
    kv = oracle.paged(rng, lengths, num_kv_heads, head_dim, page_size, dtype=ml_dtypes.bfloat16)
    return rng.normal(size=(len(lengths), num_heads, head_dim)).astype(ml_dtypes.bfloat16), kv


def attend(q, kv, config, *, window=None, softcap=None, sinks=None, interpret=None):
    operands = (q, kv.k_pages, kv.v_pages, kv.page_table, kv.lengths, sinks)
    return decode_kernel._decode(*operands, q.shape[2] ** -0.5, window, softcap, config, interpret)


@pytest.mark.parametrize(
    ("lengths", "heads", "head_dim", "page_size", "config", "options"),
    [
        ([100, 0, 130], (2, 1), 64, 16, DecodeConfig(64, 2, 2), {}),
        ([200], (3, 1), 64, 64, DecodeConfig(64, 2, 1), {"window": 70, "softcap": 4.0}),
        ([1, 129], (8, 2), 64, 128, DecodeConfig(64, 2, 2), {"with_sinks": True}),
        ([300, 64], (9, 1), 128, 8, DecodeConfig(128, 1, 1), {"window": 3}),
    ],
)
def test_interpreted_kernel_is_softmax_attention_without_races(
    lengths, heads, head_dim, page_size, config, options
):
    q, kv = inputs(lengths, *heads, head_dim, page_size)
    options = dict(options)
    sinks = np.linspace(-1, 2, heads[0]).astype(np.float32) if options.pop("with_sinks", False) else None
    with no_races():
        got = attend(
            q, kv, config, sinks=sinks, interpret=plgpu.InterpretGPUParams(detect_races=True), **options
        )
    assert oracle.relative_error(got, oracle.decode(q, kv, sinks=sinks, **options)) < 1e-2


@pytest.mark.parametrize("window", [None, 90])
def test_deterministic_lane_has_the_same_bits_alone_and_in_a_batch(window, monkeypatch):
    q, kv = inputs([300, 70, 129], 4, 1, 64, 16)
    kernel = functools.partial(decode_kernel._decode, interpret=plgpu.InterpretGPUParams())
    monkeypatch.setattr(decode_kernel, "_decode", lambda *args: kernel(*args[:-1]))

    def attend(lanes):
        operands = (q[lanes], kv.k_pages, kv.v_pages, kv.page_table[lanes], kv.lengths[lanes])
        return np.asarray(paged_decode(*operands, window=window, deterministic=True, implementation="mosaic"))

    together = attend(slice(0, 3))
    for lane in range(3):
        np.testing.assert_array_equal(attend(slice(lane, lane + 1))[0], together[lane])


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("page_size", [8, 16, 128])
@pytest.mark.parametrize(("heads", "num_lanes"), [((32, 8), 4), ((14, 2), 200), ((9, 3), 200), ((16, 1), 4)])
def test_default_configuration_lowers_for_hopper(head_dim, page_size, heads, num_lanes):
    pages = jax.ShapeDtypeStruct((50, heads[1], page_size, head_dim), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((num_lanes, heads[0], head_dim), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((num_lanes, 12), jnp.int32)
    lengths = jax.ShapeDtypeStruct((num_lanes,), jnp.int32)
    assert decode_kernel.unsupported(q, pages, pages) is None
    attend = jax.jit(lambda *a: paged_decode(*a, window=100, softcap=3.0, implementation="mosaic"))
    lowered = attend.trace(q, pages, pages, table, lengths).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


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


def test_operands_the_kernel_cannot_take_are_named():
    q, kv = inputs([5], 2, 1, 32, 8)
    with pytest.raises(ValueError, match="head_dim 32"):
        paged_decode(q, kv.k_pages, kv.v_pages, kv.page_table, kv.lengths, implementation="mosaic")


@pytest.mark.gpu
@pytest.mark.skipif(mosaic.device_without_kernels() is not None, reason="needs a Hopper GPU")
@pytest.mark.parametrize("heads", [(32, 8), (14, 2), (9, 3), (16, 1), (4, 4)])
@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 8), (64, 64), (128, 16), (128, 128), (256, 32)])
@pytest.mark.parametrize("options", [{}, {"window": 500, "softcap": 20.0}, {"with_sinks": True}])
def test_kernel_on_the_gpu_is_softmax_attention(heads, head_dim, page_size, options):
    options = dict(options)
    q, kv = inputs([1, 0, 64, 1000, 129, 2500], *heads, head_dim, page_size)
    sinks = np.linspace(-1, 2, heads[0]).astype(np.float32) if options.pop("with_sinks", False) else None
    want = oracle.decode(q, kv, sinks=sinks, **options)
    operands = [jnp.asarray(x) for x in (q, kv.k_pages, kv.v_pages, kv.page_table, kv.lengths)]
    for splits in (1, 5):
        config = DecodeConfig(64, 2, splits)
        got = decode_kernel._decode(
            *operands, sinks, head_dim**-0.5, options.get("window"), options.get("softcap"), config, None
        )
        assert oracle.relative_error(got, want) < 1e-2
    got = paged_decode(*operands, sinks=sinks, **options)
    assert oracle.relative_error(got, want) < 1e-2
