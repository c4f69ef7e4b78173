"""A matrix product of a decoder layer with what stands around it in one launch, for Hopper and up to 256 tokens.

Bias and a gated activation are applied to the float32 sums, a residual is added to the rounded result. Tokens are the
rows of a wgmma and the weight's rows its columns, which may be any multiple of 8: so the output is cut into as many
tiles as there are multiprocessors. One warpgroup streams tokens and weight through a ring of slots, the others
multiply 64 tokens each. Where a tile for every multiprocessor would be too narrow, and all tokens travel to each of
them, a cluster of blocks shares the sum over K instead: each sends its share of the columns to the others' shared
memory, and they add the shares up in a fixed order.

An RMS norm takes no launch of its own. The product whose result it reads also writes that result times the norm's
weight, and each row's sum of squares over its tile; the product behind the norm scales its sums by what these give.

How a product is cut, and the figures, are in `gemm_config`.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import gemm_config, mosaic, reference
from kernels_pallas.gemm_config import GemmConfig, Product
from kernels_pallas.lowering import lower_once
from kernels_pallas.mosaic import ROWS
from kernels_pallas.norm_input import NormInput

LAYOUT = plgpu.Layout.WGMMA
SQUARES_ROWS = 2 * ROWS  # their rows are a multiple of these, as many as any tile has
SQUARES_AT_ONCE = 128  # columns of them


def unsupported(x: jax.Array, weight: jax.Array, *, forced: bool) -> str | None:
    """Why the kernel cannot take x [M, K] and weight [P, N, K], or, unless `forced`, should not; None if it does."""
    if x.dtype != jnp.bfloat16 or weight.dtype != jnp.bfloat16:
        return f"input and weight are {x.dtype} and {weight.dtype}, not bfloat16"
    product = Product(x.shape[0], *weight.shape)
    return gemm_config.unsupported(product) or (None if forced else gemm_config.slower(product))


def run(x: NormInput, weight, norm, bias, residual, next_norm, epsilon: float) -> NormInput:
    """x [M, K], weight [P, N, K] (P = 2: gated), norm [K], bias [P, N], residual [M, N], next_norm [N] or None each.

    Returns rows [M, N], prepared for a next norm.
    """
    config = gemm_config.choose(Product(x.rows.shape[0], *weight.shape))
    rows, squares = x.rows, None
    if norm is not None and x.scaled is None:
        rows = reference.rms_norm(x.rows, norm, epsilon)
    elif norm is not None:
        rows, squares = x.scaled, x.squares
    outputs = _run(rows, weight, squares, bias, residual, next_norm, epsilon, config, None)
    return NormInput(*outputs)


@lower_once("epsilon", "config", "interpret")
def _run(x, weight, squares, bias, residual, next_norm, epsilon: float, config: GemmConfig, interpret):
    dtype = x.dtype
    tokens, size = x.shape
    parts, rows, _ = weight.shape
    columns, chunk, stages, splits = config.columns, config.chunk, config.stages, config.splits
    together = config.together
    workers = config.warpgroups
    tile = workers * ROWS
    held = min(tile, tokens)  # tokens of a tile
    chunks = size // chunk
    share = columns // splits  # of the output columns, that a block writes
    interpreted = interpret is not None
    grid = -(-rows // columns), -(-tokens // tile)
    operands = {"x": x, "weight": weight}
    optional = {"squares": squares, "bias": bias, "residual": residual, "next_norm": next_norm}
    operands |= {name: operand for name, operand in optional.items() if operand is not None}
    outputs = {"out": mosaic.out_like((tokens, rows), dtype, *operands.values())}
    sums_of_squares = grid[0] * splits  # of a row, that blocks write
    in_ring = parts == 2  # the results take the memory of the ring, once all has been multiplied
    if next_norm is not None:
        outputs["scaled"] = outputs["out"]
        shape = _round_up(tokens, SQUARES_ROWS), _round_up(sums_of_squares, 8)
        outputs["next_squares"] = mosaic.out_like(shape, jnp.float32, *operands.values())
    pieces = (splits, parts, tile, share)
    if splits > 1 and interpreted:
        outputs["sums"] = jax.ShapeDtypeStruct((*grid, splits, *pieces), jnp.float32)

    def kernel(
        *refs, x_smem, w_smem, full, free, writable, o_smem=None, scaled_smem=None, sums=None, met=None
    ):
        ref: dict[str, Any] = dict(zip((*operands, *outputs), refs, strict=True))
        if in_ring:
            x_smem, o_smem = x_smem
        thread = lax.axis_index("thread")
        place, split = (lax.axis_index("columns"), lax.axis_index("tokens")), lax.axis_index("split")
        # The last tiles end with the operands and may overlap those before: both write the same values.
        column = lax.min(place[0] * columns, jnp.int32(rows - columns))
        token = lax.min(place[1] * tile, jnp.int32(tokens - held))
        begin = lax.div(split * chunks, jnp.int32(splits))
        steps = lax.div((split + 1) * chunks, jnp.int32(splits)) - begin
        mine = pl.ds(column + split * share, share)
        my_tokens = pl.ds(token, held)

        def merge(ys):
            """Of the sums [64, columns] by part: this block's columns, summed over the blocks of the cluster."""
            mine = pl.ds(thread * ROWS, ROWS)
            for j in range(splits):
                for part, y in enumerate(ys):
                    piece = y[:, j * share : (j + 1) * share]
                    if interpreted:  # it knows no shared memory of clusters
                        ref["sums"].at[*place, j, split, part, mine][...] = piece
                    else:
                        mosaic.store_to_block(sums.at[split, part, mine], j, piece)
            mosaic.meet_cluster(met, interpret=interpreted)
            arrived = ref["sums"].at[*place, split] if interpreted else sums

            def total(part):
                pieces = [
                    plgpu.load(arrived.at[j, part, mine], layout=LAYOUT, optimized=False)
                    for j in range(splits)
                ]
                return functools.reduce(jnp.add, pieces)

            return [total(part) for part in range(parts)]

        def no_squares():
            return plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), LAYOUT.reduce(1))

        def inverse_rms():
            """[64] of this warpgroup's rows, from sums of squares that the product before left."""
            total = no_squares()
            for first in range(0, squares.shape[1], SQUARES_AT_ONCE):
                some = pl.ds(first, min(SQUARES_AT_ONCE, squares.shape[1] - first))
                source = ref["squares"].at[pl.ds(token + thread * ROWS, ROWS), some]
                total += plgpu.load(source, layout=LAYOUT, optimized=False).sum(axis=1)
            return lax.rsqrt(total * (1.0 / size) + epsilon)

        def prepare_norm(y, scale):
            """Writes y [64, share] times the next norm's weight, scale [share], and each row's sum of squares."""
            scale = lax.broadcast_in_dim(scale.astype(jnp.float32), y.shape, [1])
            mosaic.store(scaled_smem.at[pl.ds(thread * ROWS, ROWS)], (y * scale).astype(dtype))
            if rows % columns:  # columns that the tile before has, too
                index = plgpu.broadcasted_iota(jnp.int32, y.shape, 1, layout=LAYOUT) + column + split * share
                y = jnp.where(index >= place[0] * columns, y, 0.0)
            my_rows = ref["next_squares"].at[pl.ds(token + thread * ROWS, ROWS)]
            mosaic.store(my_rows.at[:, place[0] * splits + split], (y * y).sum(axis=1))
            if sums_of_squares % 8:

                @pl.when((place[0] == 0) & (split == 0))
                def _clear():
                    for index in range(sums_of_squares, _round_up(sums_of_squares, 8)):
                        mosaic.store(my_rows.at[:, index], no_squares())

        def fetch_residual():
            target = o_smem.at[pl.ds(0, held)]
            plgpu.copy_gmem_to_smem(ref["residual"].at[my_tokens, mine], target, writable)

        @pl.when(thread == workers)
        def _memory():
            if residual is not None and not in_ring:
                fetch_residual()

            def slot_and_place(i):
                return lax.rem(i, jnp.int32(stages)), pl.ds((begin + i) * chunk, chunk)

            def fetch_weight(i, part):
                slot, place = slot_and_place(i)
                source = ref["weight"].at[part, pl.ds(column, columns), place]
                target = w_smem.at[slot, pl.ds(part * columns, columns)]
                plgpu.copy_gmem_to_smem(source, target, full.at[slot])

            def fetch_tokens(i):
                slot, place = slot_and_place(i)
                source, target = ref["x"].at[my_tokens, place], x_smem.at[slot, pl.ds(0, held)]
                plgpu.copy_gmem_to_smem(source, target, full.at[slot])

            fetches = [functools.partial(fetch_weight, part=part) for part in range(parts)] + [fetch_tokens]

            @pl.loop(0, mosaic.ceil_div(steps, together))
            def _fetch(trip):
                first, *others = (trip * together + i for i in range(together))
                for i in (first, *others):
                    wait = functools.partial(plgpu.barrier_wait, free.at[slot_and_place(i)[0]])
                    pl.when((i >= stages) & (i < steps))(wait)
                for fetch in fetches:  # what lies side by side in memory, one right after the other
                    fetch(first)
                    for i in others:
                        pl.when(i < steps)(functools.partial(fetch, i))

            @pl.loop(lax.max(steps - stages, jnp.int32(0)), steps)
            def _drain(i):  # a barrier's every completion must be seen
                plgpu.barrier_wait(free.at[lax.rem(i, jnp.int32(stages))])

            if in_ring:
                plgpu.barrier_arrive(writable) if residual is None else fetch_residual()

        @pl.when(thread < workers)
        def _multiply():
            def accumulate(acc):
                @pl.loop(0, steps)
                def _step(i):
                    slot = lax.rem(i, jnp.int32(stages))
                    plgpu.barrier_wait(full.at[slot])
                    left = x_smem.at[slot, pl.ds(thread * ROWS, ROWS)]
                    plgpu.wgmma(acc, left, w_smem.at[slot].transpose((1, 0)))
                    plgpu.wgmma_wait(1)

                    @pl.when(i > 0)
                    def _release():
                        plgpu.barrier_arrive(free.at[lax.rem(i - 1, jnp.int32(stages))])

                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[lax.rem(steps - 1, jnp.int32(stages))])
                return acc[...]

            # Read while the first slots are on their way.
            inverse = None if squares is None else inverse_rms()
            if next_norm is not None:
                scale = plgpu.load(ref["next_norm"].at[mine], layout=LAYOUT.reduce(0), optimized=False)
            acc = pl.run_scoped(accumulate, plgpu.ACC((ROWS, parts * columns), jnp.float32))
            ys = [acc[:, part * columns : (part + 1) * columns] for part in range(parts)]
            if splits > 1:
                ys = merge(ys)
            if inverse is not None:
                ys = [y * lax.broadcast_in_dim(inverse, y.shape, [0]) for y in ys]
            if bias is not None:
                for part in range(parts):
                    row = plgpu.load(ref["bias"].at[part, mine], layout=LAYOUT.reduce(0), optimized=False)
                    ys[part] += lax.broadcast_in_dim(row.astype(jnp.float32), ys[part].shape, [1])
            y = ys[0] if parts == 1 else mosaic.gated(*ys)
            place = o_smem.at[pl.ds(thread * ROWS, ROWS)]
            if residual is not None or in_ring:
                plgpu.barrier_wait(writable)
            if residual is not None:
                y = y.astype(dtype).astype(jnp.float32) + plgpu.load(
                    place, layout=LAYOUT, optimized=False
                ).astype(jnp.float32)
            y = y.astype(dtype)
            mosaic.store(place, y)
            if next_norm is not None:
                prepare_norm(y.astype(jnp.float32), scale)
            plgpu.commit_smem()
            last = held % ROWS or ROWS

            def send(count):
                source, target = pl.ds(thread * ROWS, count), pl.ds(token + thread * ROWS, count)
                plgpu.copy_smem_to_gmem(o_smem.at[source], ref["out"].at[target, mine])
                if next_norm is not None:
                    plgpu.copy_smem_to_gmem(scaled_smem.at[source], ref["scaled"].at[target, mine])

            if last == ROWS:
                send(ROWS)
            else:
                pl.when(thread < workers - 1)(lambda: send(ROWS))
                pl.when(thread == workers - 1)(lambda: send(last))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    arrivals = {"num_arrivals": workers, "num_barriers": stages}
    scratch: dict[str, Any] = {
        "x_smem": mosaic.operand_buffer((stages, tile, chunk), dtype),
        "w_smem": mosaic.operand_buffer((stages, parts * columns, chunk), dtype),
        "o_smem": mosaic.operand_buffer((tile, share), dtype)
        if share % 16 == 0
        else plgpu.SMEM((tile, share), dtype),
        "full": plgpu.Barrier(num_arrivals=parts + 1, num_barriers=stages),
        "free": plgpu.Barrier(**arrivals),
        "writable": plgpu.Barrier(),
    }
    if next_norm is not None:
        scratch["scaled_smem"] = scratch["o_smem"]
    if in_ring:
        scratch["x_smem"] = plgpu.RefUnion(scratch["x_smem"], scratch.pop("o_smem"))
    if splits > 1 and not interpreted:
        scratch["sums"] = mosaic.exchange_buffer(pieces)
    if splits > 1 and interpreted:
        scratch["met"] = plgpu.ClusterBarrier(collective_axes=("split",), num_arrivals=workers)
    launch = plgpu.kernel(
        kernel,
        out_type=tuple(outputs.values()),
        grid=grid,
        grid_names=("columns", "tokens"),
        cluster=(splits,),
        cluster_names=("split",),
        num_threads=workers + 1,
        thread_name="thread",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    results = dict(zip(outputs, launch(*operands.values()), strict=True))
    return results["out"], results.get("scaled"), results.get("next_squares")


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
