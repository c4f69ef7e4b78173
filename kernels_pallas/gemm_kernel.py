"""A matrix product of a decode layer with what stands around it in one launch, for Hopper and tens of tokens."""

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

LAYOUT = plgpu.Layout.WGMMA


def unsupported(x: jax.Array, weight: jax.Array, *, forced: bool) -> str | None:
    """Why the kernel cannot take x [M, K] and weight [P, N, K], or, unless `forced`, should not; None if it does."""
    if x.dtype != jnp.bfloat16 or weight.dtype != jnp.bfloat16:
        return f"input and weight are {x.dtype} and {weight.dtype}, not bfloat16"
    product = Product(x.shape[0], *weight.shape)
    return gemm_config.unsupported(product) or (None if forced else gemm_config.slower(product))


def run(x, weight, norm, bias, residual, epsilon: float):
    """x [M, K], weight [P, N, K] (P = 2: gated), norm [K], bias [P, N], residual [M, N] or None each -> [M, N]."""
    config = gemm_config.choose(Product(x.shape[0], *weight.shape))
    if norm is not None:  # not yet inside: it has not run on a GPU
        x, norm = reference.rms_norm(x, norm, epsilon), None
    return _run(x, weight, norm, bias, residual, epsilon, config, None)


@lower_once("epsilon", "config", "interpret")
def _run(x, weight, norm, bias, residual, epsilon: float, config: GemmConfig, interpret):
    dtype = x.dtype
    tokens, size = x.shape
    parts, rows, _ = weight.shape
    columns, chunk, stages, splits = config.columns, config.chunk, config.stages, config.splits
    column_peers, token_peers = config.column_peers, config.token_peers
    workers = config.warpgroups
    tile = workers * ROWS
    held = min(tile, tokens)  # tokens of a tile
    chunks = size // chunk
    share = columns // splits  # of the output columns, that a block writes
    interpreted = interpret is not None
    grid = -(-rows // (columns * column_peers)), -(-tokens // (tile * token_peers))
    peers = {"column_peer": column_peers, "token_peer": token_peers}
    sharing = tuple(axis for axis, blocks in peers.items() if blocks > 1)
    # The interpreter has no shared copies.
    same_tokens, same_weights = (axis if axis in sharing and not interpreted else None for axis in peers)
    operands = {"x": x, "weight": weight}
    optional = {"norm": norm, "bias": bias, "residual": residual}
    operands |= {name: operand for name, operand in optional.items() if operand is not None}
    outputs = {"out": mosaic.out_like((tokens, rows), dtype, *operands.values())}
    pieces = (splits, parts, tile, share)
    if splits > 1 and interpreted:
        outputs["sums"] = jax.ShapeDtypeStruct(
            (*grid, column_peers, token_peers, splits, *pieces), jnp.float32
        )

    def kernel(*refs, x_smem, w_smem, o_smem, full, free, early, norm_smem=None, sums=None, met=None):
        ref: dict[str, Any] = dict(zip((*operands, *outputs), refs, strict=True))
        thread = lax.axis_index("thread")
        places = [lax.axis_index(name) for name in ("columns", "tokens", "column_peer", "token_peer")]
        split = lax.axis_index("split")
        # The last tiles end with the operands and may overlap those before: both write the same values.
        column = lax.min((places[0] * column_peers + places[2]) * columns, jnp.int32(rows - columns))
        token = lax.min((places[1] * token_peers + places[3]) * tile, jnp.int32(tokens - held))
        begin = lax.div(split * chunks, jnp.int32(splits))
        steps = lax.div((split + 1) * chunks, jnp.int32(splits)) - begin
        mine = pl.ds(column + split * share, share)
        my_tokens = pl.ds(token, held)

        def merge(ys):
            """Of the sums [64, columns] by part: this block's columns, summed over the blocks of the cluster."""
            own = sums
            if interpreted:  # it knows no shared memory of clusters
                place = ref["sums"].at[*places]
                own = place.at[split]
            my_rows = pl.ds(thread * ROWS, ROWS)
            for j in range(splits):
                for part, y in enumerate(ys):
                    piece = own.at[j, part, my_rows]
                    mosaic.store(piece, y[:, j * share : (j + 1) * share])
            mosaic.meet_cluster(met, interpret=interpreted)
            ys = []
            for part in range(parts):
                mine = split, part, my_rows
                if interpreted:
                    pieces = [plgpu.load(place.at[j, *mine], layout=LAYOUT) for j in range(splits)]
                else:
                    pieces = [mosaic.load_from_block(own.at[mine], j, (ROWS, share)) for j in range(splits)]
                ys.append(functools.reduce(jnp.add, pieces))
            mosaic.meet_cluster(met, interpret=interpreted)  # none leaves before all have read
            return ys

        @pl.when(thread == workers)
        def _memory():
            if norm is not None:
                in_bounds = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # and so contiguous, of any length
                plgpu.copy_gmem_to_smem(ref["norm"], norm_smem, early.at[0], oob_mode=in_bounds)
            if residual is not None:
                target = o_smem.at[pl.ds(0, held)]
                plgpu.copy_gmem_to_smem(ref["residual"].at[my_tokens, mine], target, early.at[1])

            @pl.loop(0, steps)
            def _fetch(i):
                slot = lax.rem(i, jnp.int32(stages))
                place = pl.ds((begin + i) * chunk, chunk)

                @pl.when(i >= stages)
                def _wait():
                    plgpu.barrier_wait(free.at[slot])

                for part in range(parts):
                    source = ref["weight"].at[part, pl.ds(column, columns), place]
                    target = w_smem.at[slot, pl.ds(part * columns, columns)]
                    plgpu.copy_gmem_to_smem(source, target, full.at[slot], collective_axes=same_weights)
                source, target = ref["x"].at[my_tokens, place], x_smem.at[slot, pl.ds(0, held)]
                plgpu.copy_gmem_to_smem(source, target, full.at[slot], collective_axes=same_tokens)

            @pl.loop(lax.max(steps - stages, jnp.int32(0)), steps)
            def _drain(i):  # a barrier's every completion must be seen
                plgpu.barrier_wait(free.at[lax.rem(i, jnp.int32(stages))])

        @pl.when(thread < workers)
        def _multiply():
            def scale(left, i, squares):
                """Rows [64, chunk] times the norm's weight, and `squares` [64] with their sums of squares added."""
                row = plgpu.load(left, layout=LAYOUT, optimized=False).astype(jnp.float32)
                place = norm_smem.at[pl.ds(i * chunk, chunk)]
                scales = plgpu.load(place, layout=LAYOUT.reduce(0), optimized=False).astype(jnp.float32)
                scaled = (row * lax.broadcast_in_dim(scales, row.shape, [1])).astype(dtype)
                squares += (row * row).sum(axis=1)
                if not interpreted:
                    return scaled, squares
                left[...] = scaled  # the interpreter has no wgmma with a register operand
                plgpu.commit_smem()
                return left, squares

            def accumulate(acc):
                def step(i, squares):
                    slot = lax.rem(i, jnp.int32(stages))
                    plgpu.barrier_wait(full.at[slot])
                    left = x_smem.at[slot, pl.ds(thread * ROWS, ROWS)]
                    if norm is not None:
                        left, squares = scale(left, i, squares)
                    plgpu.wgmma(acc, left, w_smem.at[slot].transpose((1, 0)))
                    if norm is not None:
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(free.at[slot])
                        return squares
                    plgpu.wgmma_wait(1)

                    @pl.when(i > 0)
                    def _release():
                        plgpu.barrier_arrive(free.at[lax.rem(i - 1, jnp.int32(stages))])

                    return squares

                squares = ()
                if norm is not None:
                    plgpu.barrier_wait(early.at[0])
                    squares = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), LAYOUT.reduce(1))
                squares = lax.fori_loop(0, steps, step, squares)
                if norm is None:
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free.at[lax.rem(steps - 1, jnp.int32(stages))])
                return acc[...], squares

            acc, squares = pl.run_scoped(accumulate, plgpu.ACC((ROWS, parts * columns), jnp.float32))
            if norm is not None:
                inverse = lax.rsqrt(squares * (1.0 / size) + epsilon)
                acc = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
            ys = [acc[:, part * columns : (part + 1) * columns] for part in range(parts)]
            if splits > 1:
                ys = merge(ys)
            if bias is not None:
                for part in range(parts):
                    row = plgpu.load(ref["bias"].at[part, mine], layout=LAYOUT.reduce(0), optimized=False)
                    ys[part] += lax.broadcast_in_dim(row.astype(jnp.float32), ys[part].shape, [1])
            y = ys[0] if parts == 1 else ys[0] / (1.0 + jnp.exp(-ys[0])) * ys[1]
            place = o_smem.at[pl.ds(thread * ROWS, ROWS)]
            if residual is not None:
                plgpu.barrier_wait(early.at[1])
                y = y.astype(dtype).astype(jnp.float32) + plgpu.load(
                    place, layout=LAYOUT, optimized=False
                ).astype(jnp.float32)
            mosaic.store(place, y.astype(dtype))
            plgpu.commit_smem()
            last = held % ROWS or ROWS

            def send(count):
                source = o_smem.at[pl.ds(thread * ROWS, count)]
                plgpu.copy_smem_to_gmem(source, ref["out"].at[pl.ds(token + thread * ROWS, count), mine])

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
        "early": plgpu.Barrier(num_barriers=2),
    }
    if norm is not None:
        scratch["norm_smem"] = plgpu.SMEM((size,), norm.dtype)
    if sharing:
        scratch["free"] = plgpu.ClusterBarrier(collective_axes=sharing, **arrivals)
    if splits > 1 and not interpreted:
        scratch["sums"] = mosaic.exchange_buffer(pieces)
    if splits > 1 and interpreted:
        scratch["met"] = plgpu.ClusterBarrier(collective_axes=("split",), num_arrivals=workers)
    launch = plgpu.kernel(
        kernel,
        out_type=tuple(outputs.values()),
        grid=grid,
        grid_names=("columns", "tokens"),
        cluster=(column_peers, token_peers, splits),
        cluster_names=("column_peer", "token_peer", "split"),
        num_threads=workers + 1,
        thread_name="thread",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return launch(*operands.values())[0]
