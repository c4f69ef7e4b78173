"""What one warpgroup of the decode kernel does before and after it streams pages."""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import mosaic
from kernels_pallas.mosaic import LOG2E, MASKED

# A few heads over four warps, [8 r, 32 c]: two rows a warp, so that sums over a head stay inside a warp.
HEADS = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 32), (2, 32), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
SCORES = plgpu.Layout.WGMMA.reduce(0)  # one value a query head, as the columns of a wgmma
VALUES = plgpu.Layout.WGMMA.reduce(1)  # one value a head dim, as the rows of a wgmma
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

    They go to the same rows of `new`, and rounded back to x_smem.
    """
    x = _load(x_smem, HEADS)
    row = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=HEADS)
    divided = x
    if "k_scale" in ref:
        k_inverse, v_inverse = 1.0 / ref["k_scale"][0], 1.0 / ref["v_scale"][0]
        divided = jnp.where(row == group, x * k_inverse, x * v_inverse)
    rounded = jnp.minimum(jnp.maximum(divided, -EIGHT_BIT_MAXIMUM), EIGHT_BIT_MAXIMUM).astype(new.dtype)
    mosaic.store(new, rounded)
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


def new_scores(x_smem, s_smem, group: int, padded: int, bounded):
    """Scores [G'] of all query rows against the key in row G of x_smem."""
    x = _load(x_smem, HEADS)
    key = _load(x_smem.at[group], HEADS.reduce(0))
    mosaic.store(s_smem, (x * _across(key, x, 1)).sum(axis=1))
    plgpu.commit_smem()
    return bounded(_load(s_smem.at[pl.ds(0, padded)], SCORES))


def sink_logits(sinks, head, group: int, padded: int):
    """The logits [G'] of a kv head's group in the log2 domain, from sinks [N]; by scalars: N is not padded."""
    column = plgpu.broadcasted_iota(jnp.int32, (padded,), 0, layout=SCORES)
    logits = plgpu.layout_cast(jnp.full((padded,), MASKED, jnp.float32), SCORES)
    for i in range(group):
        logits = jnp.where(column == i, sinks[head * group + i] * LOG2E, logits)
    return logits


def seed(shape: tuple[int, int, int], scores, value, sink, counts):
    """State of the online softmax before any page: acc [H, G'], maximum [G'], denominator [block, G'].

    It has seen the new token (scores [G'], value [H] in shared memory) and the sink logits [G'], where they
    are given and the scalar `counts` is true.
    """
    block, head_dim, padded = shape
    layout = plgpu.Layout.WGMMA
    acc = plgpu.layout_cast(jnp.zeros((head_dim, padded), jnp.float32), layout)
    maximum = plgpu.layout_cast(jnp.full((padded,), MASKED, jnp.float32), SCORES)
    denominator = plgpu.layout_cast(jnp.zeros((block, padded), jnp.float32), layout)
    present = [logits for logits in (scores, sink) if logits is not None]
    if not present:
        return acc, maximum, denominator
    one = jnp.where(counts, jnp.float32(1.0), jnp.float32(0.0))
    offset = jnp.where(counts, jnp.float32(0.0), jnp.float32(MASKED))
    for logits in present:
        maximum = jnp.maximum(maximum, logits + offset)
    weights = [jnp.exp2(logits + offset - maximum) * one for logits in present]
    if scores is not None:
        acc = acc + _across(_load(value, VALUES), acc, 0) * _across(weights[0], acc, 1)
    # A denominator is kept as `block` summands.
    return acc, maximum, denominator + _across(sum(weights) * (1.0 / block), denominator, 1)


def merge(accs, maxima, denominators, count, at_once: int):
    """The first `count` partial results [splits, H, G'], [splits, G'] twice: (acc, denominator) of all.

    `at_once` are loaded together: each takes registers, and saves waiting.
    """
    _, head_dim, padded = accs.shape
    last = count - 1

    def step(i, state):
        acc, maximum, denominator = state
        # All loads before their first use.
        index = [i * at_once + j for j in range(at_once)]
        place = [lax.min(j, last) for j in index]
        their_maximum = [_load(maxima.at[j], SCORES) for j in place]
        their_denominator = [_load(denominators.at[j], SCORES) for j in place]
        their_acc = [_load(accs.at[j], plgpu.Layout.WGMMA) for j in place]
        new_maximum = maximum
        for theirs in their_maximum:
            new_maximum = jnp.maximum(new_maximum, theirs)
        decay = jnp.exp2(maximum - new_maximum)
        acc, denominator = acc * _across(decay, acc, 1), denominator * decay
        for j in range(at_once):
            counts = jnp.where(index[j] <= last, jnp.float32(1.0), jnp.float32(0.0))
            weight = jnp.exp2(their_maximum[j] - new_maximum) * counts
            acc = acc + their_acc[j] * _across(weight, acc, 1)
            denominator = denominator + their_denominator[j] * weight
        return acc, new_maximum, denominator

    acc = plgpu.layout_cast(jnp.zeros((head_dim, padded), jnp.float32), plgpu.Layout.WGMMA)
    maximum = plgpu.layout_cast(jnp.full((padded,), MASKED, jnp.float32), SCORES)
    denominator = plgpu.layout_cast(jnp.zeros((padded,), jnp.float32), SCORES)
    trips = mosaic.ceil_div(count, at_once)
    acc, _, denominator = lax.fori_loop(0, trips, step, (acc, maximum, denominator))
    return acc, denominator
