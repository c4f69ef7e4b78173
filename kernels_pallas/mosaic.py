"""What the Mosaic GPU kernels for Hopper share: when they can run, and the helpers they are built of."""

import functools
import logging
import math

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir.dialects import gpu, llvm  # jax.extend does not export them
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.utils import inline_ptx, memref_ptr
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref

LOG2E = math.log2(math.e)
MASKED = -1e30  # finite, so that the difference of two masked scores is not NaN
ROWS = 64  # rows of a wgmma tile, one warpgroup's share
THREADS = 128  # of a warpgroup
MULTIPROCESSORS = 132  # of an H100

_log = logging.getLogger(__name__)


def default_device() -> jax.Device:
    """The device that computations go to unless told otherwise."""
    device = jax.config.jax_default_device
    if device is None:
        return jax.devices()[0]
    return jax.devices(device)[0] if isinstance(device, str) else device


def device_without_kernels() -> str | None:
    """Why the default device cannot run the wgmma kernels (only capability 9.0 can); None if it can."""
    device = default_device()
    if device.platform != "gpu":
        return f"the device is a {device.platform}"
    capability = getattr(device, "compute_capability", "unknown")
    return None if capability == "9.0" else f"the device has compute capability {capability}, not 9.0"


def multiprocessors() -> int:
    """Blocks of threads, each as large as can be, that the default device runs at once."""
    return getattr(default_device(), "core_count", None) or MULTIPROCESSORS


def row_per_warp(size: int):
    """Register layout of [4, columns] with a row in each warp, and its columns; they divide `size`.

    `size` is a multiple of 64. A sum over the columns needs shuffles only, so that every warpgroup of a block may
    take one.
    """
    vector = next(n for n in (8, 4, 2) if size % (32 * n) == 0)
    return plgpu.Layout.TILED(plgpu.Tiling(((4, 32 * vector), (vector,))), (-3,), (-2,), -1), 32 * vector


def unsupported_paging(page_size: int, group: int) -> str | None:
    """Why the attention kernels cannot take pages or groups of query heads of these sizes; None if they can."""
    if page_size not in (8, 16, 32, 64, 128):
        return f"page_size {page_size} is not 8, 16, 32, 64 or 128"
    if group > 16:
        return f"{group} query heads per kv head are more than 16"
    return None


@functools.cache
def report_fallback(op: str, reason: str) -> None:
    """Log once per process and cause that a GPU runs the reference instead of a kernel."""
    _log.warning("kernels_pallas.%s runs its jax.numpy reference: %s", op, reason)


def out_like(shape: tuple[int, ...], dtype, *operands: jax.Array) -> jax.ShapeDtypeStruct:
    """Output type of a kernel; in `shard_map` it varies over the mesh axes that any operand does."""
    varying = frozenset().union(*(getattr(jax.typeof(x), "vma", frozenset()) for x in operands))
    return jax.ShapeDtypeStruct(shape, dtype, vma=varying) if varying else jax.ShapeDtypeStruct(shape, dtype)


def operand_buffer(shape: tuple[int, ...], dtype, like: int | None = None) -> plgpu.SMEM:
    """Shared memory for a wgmma operand [..., rows, columns], tiled and swizzled; saying so spares a search.

    The two operands of a wgmma share one swizzle: `like` is the number of columns that decides it.
    """
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle((like or shape[-1]) * bits)
    transforms = (plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def tiles_of(buffer: plgpu.SMEM) -> tuple[int, plgpu.SMEM]:
    """Columns of a swizzle tile of an `operand_buffer` [..., rows, columns], and its memory as these tiles.

    To be put in one `plgpu.RefUnion` with the buffer: [..., rows // 8, columns // c, 8, c].
    """
    tiling, swizzle = buffer.transforms
    *leading, rows, columns = buffer.shape
    height, width = tiling.tiling
    shape = (*leading, rows // height, columns // width, height, width)
    return width, plgpu.SMEM(shape, buffer.dtype, transforms=(swizzle,))


def dot(left, right, shape: tuple[int, int]):
    """Product float32 of two operands in shared memory."""

    def multiply(acc):
        plgpu.wgmma(acc, left, right)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def softmax_state(rows: int, head_dim: int):
    """Accumulator [rows, H], running maximum and denominator [rows] in registers, before any key."""
    layout = plgpu.Layout.WGMMA
    acc = plgpu.layout_cast(jnp.zeros((rows, head_dim), jnp.float32), layout)
    maximum = plgpu.layout_cast(jnp.full((rows,), MASKED, jnp.float32), layout.reduce(1))
    denominator = plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), layout.reduce(1))
    return acc, maximum, denominator


def add_values(acc, weights, values, *, interpret: bool):
    """acc [rows, H] float32 plus weights [rows, block] in registers times values [block, H] in SMEM."""
    if interpret:  # the interpreter has no wgmma with a register operand
        acc = acc + jnp.dot(weights, values[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # an ordinary read before the copy engine overwrites the slot
        return acc
    return pl.run_state(lambda ref: plgpu.wgmma(ref, weights, values))(plgpu.ACC.init(acc))


def widen(source, target, rows: int, dtype) -> None:
    """Copy 8-bit floats [rows, H] to 16-bit ones, both in shared memory as `operand_buffer` lays them out."""
    for first in range(0, rows, ROWS):
        part = pl.ds(first, ROWS)
        values = plgpu.load(source.at[part], layout=plgpu.Layout.WGMMA_UPCAST_2X, optimized=False)
        store(target.at[part], values.astype(jnp.float32).astype(dtype))
    plgpu.commit_smem()


def store(ref, values) -> None:
    """Store values to shared memory that no wgmma reads, in whatever way its layout allows."""
    if hasattr(plgpu, "store"):  # from JAX 0.12, where plain assignment insists on a fast store
        plgpu.store(ref, values, optimized=False)
    else:
        ref[...] = values


_SEND_WORD = """{{
    .reg .pred p;
    .reg .b32 i, word, block, rank, source, target, value;
    mov.u32 i, %tid.x;
    add.u32 i, i, {first};
    setp.lt.u32 p, i, {total};
    rem.u32 word, i, {words};
    div.u32 block, i, {words};
    mov.u32 rank, %cluster_ctarank;
    mad.lo.u32 source, word, 4, $0;
    mad.lo.u32 target, rank, {words}, word;
    mad.lo.u32 target, target, 4, $1;
    @p ld.shared.b32 value, [source];
    @p mapa.shared::cluster.u32 target, target, block;
    @p st.shared::cluster.b32 [target], value;
}}"""


def gather_cluster(mine, theirs, blocks: int, words: int) -> None:
    """Copy the 32-bit `mine` [words] of each block of the cluster to `theirs` [blocks, words] of all of them.

    Both are shared memory. Every block of one warpgroup comes here; the interpreter cannot.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def send(_, source, target):
        pointers = memref_ptr(source), memref_ptr(target)
        for first in range(0, blocks * words, THREADS):
            code = _SEND_WORD.format(first=first, total=blocks * words, words=words)
            inline_ptx(code, *pointers, has_side_effects=True)
        _meet()

    send(mine, theirs)


def meet_cluster(barrier, *, interpret: bool) -> None:
    """Wait for all blocks of the cluster; what they wrote before to their shared memory is seen after.

    Every warpgroup that has not ended comes here. `barrier`, a `ClusterBarrier`, is the interpreter's.
    """
    if interpret:
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)
        return

    plgpu.inline_mgpu()(lambda _: _meet())()


def _meet() -> None:
    """Code that waits for all blocks of the cluster."""
    wait = "barrier.cluster.arrive.release; barrier.cluster.wait.acquire;"
    inline_ptx(wait, has_side_effects=True, convergent=True)


_EXCHANGED = (plgpu.TilingTransform((8, 8)),)  # what a warp touches at once lies together


def exchange_buffer(shape: tuple[int, ...]) -> plgpu.SMEM:
    """Shared memory for float32 [..., rows, columns] that the blocks of a cluster write to each other."""
    return plgpu.SMEM(shape, jnp.float32, transforms=_EXCHANGED)


def store_to_block(ref, block: int, values) -> None:
    """Store values [rows, columns] to an `exchange_buffer` as it is in a block of the cluster's last axis."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(_EXCHANGED), plgpu.Layout.WGMMA))
    def send(_, ref, values):
        index = arith.constant(ir.IndexType.get(), block)
        theirs = mgpu.utils.get_cluster_ref(ref, gpu.Dimension.x, index, generic=False)
        values.store_tiled(theirs, swizzle=16, optimized=False)

    send(ref, values)


def zero_rows_outside(values, block: int, head_dim: int, first, stop) -> None:
    """Zero rows of values [block, H] in shared memory outside [first, stop): 0 times garbage may be NaN."""
    row = plgpu.broadcasted_iota(jnp.int32, (block, head_dim), 0, layout=plgpu.Layout.WGMMA)
    loaded = plgpu.load(values, layout=plgpu.Layout.WGMMA, optimized=False)
    values[...] = jnp.where((row >= first) & (row < stop), loaded, jnp.zeros_like(loaded))
    plgpu.commit_smem()


def gated(gate, up):
    """silu of the gate times up, float32."""
    return gate / (1.0 + jnp.exp(-gate)) * up


def ceil_div(x, y: int):
    """Ceiling of x / y for a traced x >= 0."""
    return lax.div(x + (y - 1), jnp.int32(y))


def arrive(counter, ticket, last, *, interpret: bool) -> None:
    """Count this block of threads into a cell of global memory and leave its number, from 0, in `ticket` [1].

    What the warpgroup wrote to global memory before, whoever draws a higher number sees after. The number
    `last` sets the cell back to 0, so that one cleared cell serves any number of launches.
    """
    if interpret:  # blocks of threads are interpreted one after the other
        ticket[0] = counter[0]
        counter[0] = jnp.where(ticket[0] == last, jnp.int32(0), ticket[0] + 1)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT(())))
    def count(_, counter, ticket, last):
        fence = functools.partial(llvm.inline_asm, None, [], "fence.acq_rel.gpu;", "", has_side_effects=True)
        fence()
        mgpu.utils.warpgroup_barrier()
        with mgpu.utils.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
            number = llvm.inline_asm(
                ir.IntegerType.get_signless(32),
                [mgpu.utils.memref_ptr(counter), last.registers.item()],
                "atom.acq_rel.gpu.global.inc.u32 $0, [$1], $2;",
                "=r,l,r",
                has_side_effects=True,
            )
            memref.store(number, ticket, [arith.constant(ir.IndexType.get(), 0)])
        mgpu.utils.warpgroup_barrier()
        fence()

    count(counter, ticket, last)
