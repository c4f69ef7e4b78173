"""What one warpgroup of the decode kernel does before and after it streams pages."""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import cluster_merge, mosaic, tile_rows
from kernels_pallas.mosaic import LOG2E, MASKED
from kernels_pallas.prefix_kernel import Prefix

# A few heads over four warps, [8 r, 32 c]: two rows a warp, so that sums over a head stay inside a warp.
HEADS = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 32), (2, 32), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
SCORES = plgpu.Layout.WGMMA.reduce(0)  # one value a query head, as the columns of a wgmma
PARTIAL = plgpu.Layout.WGMMA, SCORES, SCORES  # of a partial result: acc [H, G'], maximum and denominator [G']
EIGHT_BIT_MAXIMUM = 448.0  # of float8_e4m3fn; larger values saturate


def _load(ref, layout):
    return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)


def _across(vector, like, axis: int):
    return lax.broadcast_in_dim(vector, like.shape, [axis])


def rotate(x_smem, arrived, ref, lane, group: int, epsilon: float) -> None:
    """Normalise (where there are norms) and rotate the first G + 1 rows of x_smem [>= G + 2, H] in place.

    Waits for the rows to arrive. `ref` holds cos and sin [B, rotary_dim / 2], and q_norm and k_norm [H].
    """
    head_dim = x_smem.shape[1]
    half = ref["cos"].shape[1]
    parts = [(0, half), (half, half), (2 * half, head_dim - 2 * half)]
    spans = [pl.ds(start, size) for start, size in parts if size]
    cos, sin = (_load(ref[name].at[lane], HEADS.reduce(0)) for name in ("cos", "sin"))  # [half]
    norms = "q_norm" in ref
    if norms:
        weights = [[_load(ref[name].at[s], HEADS.reduce(0)) for name in ("q_norm", "k_norm")] for s in spans]
    plgpu.barrier_wait(arrived)
    loaded = [_load(x_smem.at[:, span], HEADS) for span in spans]
    x = list(loaded)
    row = [plgpu.broadcasted_iota(jnp.int32, part.shape, 0, layout=HEADS) for part in loaded]
    if norms:
        squares = sum((part * part).sum(axis=1) for part in x) / head_dim
        inverse = lax.rsqrt(squares + epsilon)  # [rows]
        for i, (q_weight, k_weight) in enumerate(weights):
            weight = jnp.where(row[i] < group, _across(q_weight, x[i], 1), _across(k_weight, x[i], 1))
            x[i] = (x[i] * _across(inverse, x[i], 0) * weight).astype(x_smem.dtype).astype(jnp.float32)
    cos, sin = _across(cos, x[0], 1), _across(sin, x[0], 1)
    x = [x[0] * cos - x[1] * sin, x[1] * cos + x[0] * sin, *x[2:]]
    for i, span in enumerate(spans):
        kept = jnp.where(row[i] <= group, x[i], loaded[i])
        mosaic.store(x_smem.at[:, span], kept.astype(x_smem.dtype))
    plgpu.commit_smem()


def quantise(x_smem, new, ref, group: int) -> None:
    """Divide key and value, rows G and G + 1 of x_smem, by their scales and round them to the dtype of `new`.

    They go to the same rows of `new` [rows, any, H], and rounded back to x_smem.
    """
    x = _load(x_smem, HEADS)
    row = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=HEADS)
    divided = x
    if "k_scale" in ref:
        k_inverse, v_inverse = 1.0 / ref["k_scale"][0], 1.0 / ref["v_scale"][0]
        divided = jnp.where(row == group, x * k_inverse, x * v_inverse)
    rounded = jnp.minimum(jnp.maximum(divided, -EIGHT_BIT_MAXIMUM), EIGHT_BIT_MAXIMUM).astype(new.dtype)
    mosaic.store(new.at[:, 0], rounded)
    mosaic.store(x_smem, jnp.where(row < group, x, rounded.astype(jnp.float32)).astype(x_smem.dtype))
    plgpu.commit_smem()


def dot_eight_bit_keys(keys, q_smem, interpret: bool):
    """Scores [block, G'] float32 of keys [block, H], widened in registers, and queries [G', H] float16."""
    if interpret:  # the interpreter has no wgmma with a register operand
        wide = keys[...].astype(q_smem.dtype)
        return jnp.dot(wide, q_smem[...].T, preferred_element_type=jnp.float32)
    narrow = plgpu.load(keys, layout=plgpu.Layout.WGMMA_UPCAST_2X, optimized=False)
    wide = plgpu.layout_cast(narrow, plgpu.Layout.WGMMA).astype(q_smem.dtype)

    def multiply(acc):
        plgpu.wgmma(acc, wide, q_smem.transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((keys.shape[0], q_smem.shape[0]), jnp.float32))


def widen(narrow, wide) -> None:
    """Copy an 8-bit tile [block, H] in shared memory to a 16-bit one; `commit_smem` is the caller's."""
    values = plgpu.load(narrow, layout=plgpu.Layout.WGMMA_UPCAST_2X, optimized=False)
    wide[...] = plgpu.layout_cast(values, plgpu.Layout.WGMMA).astype(wide.dtype)


def stage_queries(x_smem, q_smem) -> None:
    """Copy the query rows from x_smem [rows, H] to q_smem [G', H], tiled for wgmma."""
    queries = _load(x_smem.at[pl.ds(0, q_smem.shape[0])], HEADS)
    mosaic.store(q_smem, queries.astype(q_smem.dtype))
    plgpu.commit_smem()


def sink_logits(sinks, head, group: int, padded: int):
    """The logits [G'] of a kv head's group in the log2 domain, from sinks [N]; by scalars: N is not padded."""
    column = plgpu.broadcasted_iota(jnp.int32, (padded,), 0, layout=SCORES)
    logits = plgpu.layout_cast(jnp.full((padded,), MASKED, jnp.float32), SCORES)
    for i in range(group):
        logits = jnp.where(column == i, sinks[head * group + i] * LOG2E, logits)
    return logits


def seed(shape: tuple[int, int, int], sink, counts):
    """State of the online softmax before any page: acc [H, G'], maximum [G'], denominator [block, G'].

    It has seen the sink logits [G'], where they are given and the scalar `counts` is true.
    """
    block, head_dim, padded = shape
    layout = plgpu.Layout.WGMMA
    acc = plgpu.layout_cast(jnp.zeros((head_dim, padded), jnp.float32), layout)
    maximum = plgpu.layout_cast(jnp.full((padded,), MASKED, jnp.float32), SCORES)
    denominator = plgpu.layout_cast(jnp.zeros((block, padded), jnp.float32), layout)
    if sink is None:
        return acc, maximum, denominator
    one = jnp.where(counts, jnp.float32(1.0), jnp.float32(0.0))
    logits = sink + jnp.where(counts, jnp.float32(0.0), jnp.float32(MASKED))
    maximum = jnp.maximum(maximum, logits)
    weight = jnp.exp2(logits - maximum) * one
    # A denominator is kept as `block` summands.
    return acc, maximum, denominator + _across(weight * (1.0 / block), denominator, 1)


def seen_before(o, sums, lane, head, padded: int, active, *, interpret: bool) -> list[tuple]:
    """What a kv head of a lane has seen of a common prefix, by parts: acc [H, G'], maximum and denominator [G'].

    `o` and `sums` are those of a `Prefix`; nothing has been seen of parts from the number `active` on.
    """
    parts, _, _, group, _ = o.shape
    column = plgpu.broadcasted_iota(jnp.int32, (padded,), 0, layout=SCORES)
    found = []
    for part in range(parts):
        columns = jnp.where(part < active, jnp.int32(group), jnp.int32(0))
        maximum = plgpu.layout_cast(jnp.full((padded,), MASKED, jnp.float32), SCORES)
        for i in range(group):
            value = sums[part, head, Prefix.row_of(lane, i, group)]
            maximum = jnp.where((column == i) & (column < columns), value, maximum)
        acc = tile_rows.load_columns(o.at[part, lane, head], columns, padded, interpret=interpret)
        found.append((acc, maximum, jnp.where(column < columns, 1.0, 0.0)))
    return found


def resume(state, found):
    """The state `seed` of an online softmax, having seen the partial results `found`, too."""
    acc, maximum, denominator = state
    new_maximum = maximum
    for _, theirs, _ in found:
        new_maximum = jnp.maximum(new_maximum, theirs)
    denominator = denominator * _across(jnp.exp2(maximum - new_maximum), denominator, 1)
    for their_acc, their_maximum, their_denominator in found:
        weight = jnp.exp2(their_maximum - new_maximum) * their_denominator
        acc = acc + their_acc * _across(weight, acc, 1)  # the seed's is 0
        denominator = denominator + _across(weight * (1.0 / denominator.shape[0]), denominator, 1)
    return acc, new_maximum, denominator


def _fold(state, partials, counts):
    """Merge partial results (acc [H, G'], maximum [G'], denominator [G']) into another; `counts` weighs each."""
    acc, maximum, denominator = state
    new_maximum = maximum
    for _, theirs, _ in partials:
        new_maximum = jnp.maximum(new_maximum, theirs)
    decay = jnp.exp2(maximum - new_maximum)
    acc, denominator = acc * _across(decay, acc, 1), denominator * decay
    for (their_acc, their_maximum, their_denominator), count in zip(partials, counts, strict=True):
        weight = jnp.exp2(their_maximum - new_maximum) * count
        acc = acc + their_acc * _across(weight, acc, 1)
        denominator = denominator + their_denominator * weight
    return acc, new_maximum, denominator


def merge_stored(stored, count, at_once: int):
    """The first `count` partial results in global memory [splits, H, G'], [splits, G'] twice: merged into one.

    `at_once` are loaded together: each takes registers, and saves waiting.
    """
    _, head_dim, padded = stored[0].shape
    last = count - 1

    def step(i, state):
        index = [i * at_once + j for j in range(at_once)]
        places = [lax.min(j, last) for j in index]
        # All loads before their first use.
        columns = [
            [_load(ref.at[j], layout) for j in places] for ref, layout in zip(stored, PARTIAL, strict=True)
        ]
        counts = [jnp.where(j <= last, jnp.float32(1.0), jnp.float32(0.0)) for j in index]
        return _fold(state, list(zip(*columns, strict=True)), counts)

    acc = plgpu.layout_cast(jnp.zeros((head_dim, padded), jnp.float32), plgpu.Layout.WGMMA)
    maximum = plgpu.layout_cast(jnp.full((padded,), MASKED, jnp.float32), SCORES)
    denominator = plgpu.layout_cast(jnp.zeros((padded,), jnp.float32), SCORES)
    trips = mosaic.ceil_div(count, at_once)
    return lax.fori_loop(0, trips, step, (acc, maximum, denominator))


def merge_received(own, mailbox, count):
    """A partial result merged with the `count` that other blocks of the cluster sent to the mailbox."""
    shapes = [x.shape for x in own]

    def step(i, state):
        return _fold(state, [cluster_merge.receive(mailbox.at[i], shapes, PARTIAL)], [1.0])

    return lax.fori_loop(0, count, step, own)
