"""Single rows of swizzled tiles in shared memory, whose places no Pallas index reaches.

A tile [rows, H] of a wgmma is kept as `mosaic.operand_buffer` has it: in squares of eight rows and as many
columns as a line of 64 or 128 bytes holds, the 16-byte chunks of a line permuted.
"""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.utils import bitcast, inline_ptx, memref_ptr
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith

from kernels_pallas import mosaic
from kernels_pallas.mosaic import THREADS

_SCALAR = plgpu.Layout.WG_SPLAT(())

_INSERT = """{{
    .reg .pred p;
    .reg .b32 thread, square, chunk, line, source, target;
    .reg .b32 word<4>;
    mov.u32 thread, %tid.x;
    and.b32 thread, thread, 127;
    setp.lt.u32 p, $2, {rows};
    setp.lt.and.u32 p, thread, {chunks}, p;
    div.u32 square, thread, {line_chunks};
    rem.u32 chunk, thread, {line_chunks};
    shr.u32 line, $2, 3;
    mad.lo.u32 square, line, {squares}, square;
    and.b32 line, $2, 7;
    mul.lo.u32 line, line, {line_bytes};
    shr.u32 target, line, 7;
    and.b32 target, target, {line_chunks} - 1;
    xor.b32 chunk, chunk, target;
    mad.lo.u32 target, square, 8 * {line_bytes}, $0;
    add.u32 target, target, line;
    mad.lo.u32 target, chunk, 16, target;
    mad.lo.u32 source, thread, 16, $1;
    @p ld.shared.v4.b32 {{word0, word1, word2, word3}}, [source];
    @p st.shared.v4.b32 [target], {{word0, word1, word2, word3}};
}}"""

_ZERO = """{{
    .reg .pred p;
    .reg .b32 chunk, row, square, target, none;
    mov.u32 chunk, %tid.x;
    and.b32 chunk, chunk, 127;
    add.u32 chunk, chunk, {start};
    div.u32 row, chunk, {row_chunks};
    rem.u32 chunk, chunk, {row_chunks};
    setp.lt.s32 p, row, $1;
    setp.ge.or.s32 p, row, $2, p;
    div.u32 square, chunk, {line_chunks};
    rem.u32 chunk, chunk, {line_chunks};
    shr.u32 target, row, 3;
    mad.lo.u32 square, target, {squares}, square;
    and.b32 row, row, 7;
    mad.lo.u32 target, square, 8 * {line_bytes}, $0;
    mad.lo.u32 target, row, {line_bytes}, target;
    mad.lo.u32 target, chunk, 16, target;
    mov.u32 none, 0;
    @p st.shared.v4.b32 [target], {{none, none, none, none}};
}}"""

_PUT = """{{
    .reg .pred p;
    .reg .b32 place;
    .reg .b64 address;
    setp.lt.u32 p, $3, {group};
    mad.lo.u32 place, $3, {head_dim}, $2;
    mul.wide.u32 address, place, 2;
    add.u64 address, address, $0;
    @p st.global.b16 [address], $1;
}}"""


_TAKE = """{{
    .reg .pred p;
    .reg .b32 place;
    .reg .b64 address;
    setp.lt.u32 p, $3, $4;
    mad.lo.u32 place, $3, {head_dim}, $2;
    mul.wide.u32 address, place, 2;
    add.u64 address, address, $1;
    mov.b16 $0, 0;
    @p ld.global.b16 $0, [address];
}}"""


def _geometry(tile) -> tuple[plgpu.RefType, dict[str, int]]:
    """The type of a tile [rows, H] for inline code, and the sizes that its addresses are made of."""
    rows, columns = tile.shape
    transforms = mosaic.operand_buffer(tile.shape, tile.dtype).transforms
    line_bytes = transforms[1].swizzle
    row_bytes = columns * jnp.dtype(tile.dtype).itemsize
    sizes = {
        "rows": rows,
        "line_bytes": line_bytes,
        "line_chunks": line_bytes // 16,
        "row_chunks": row_bytes // 16,
        "squares": row_bytes // line_bytes,
    }
    return plgpu.RefType(transforms), sizes


def row_major(ref, *, interpret: bool) -> None:
    """Have `ref` [rows, H] in shared memory laid out row by row.

    Otherwise layout inference may cut it into tiles of only as many rows as a copy and eight have in common, and
    swizzle them: a slice of columns then begins within the swizzle's period, which stores to it do not know.
    """
    if interpret:
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def nothing(_, ref):
        del ref

    nothing(ref)


def insert(tile, source, place, *, interpret: bool) -> None:
    """Copy `source` [H] to row `place` of the tile [rows, H]; nothing if it has no such row.

    One warpgroup comes here; `commit_smem` is the caller's.
    """
    if interpret:  # it has no inline code
        row = plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=plgpu.Layout.WGMMA)
        tile[...] = jnp.where(row == place, source[...][None], tile[...])
        return
    tile_type, sizes = _geometry(tile)

    @plgpu.inline_mgpu(arg_types=(tile_type, plgpu.RefType(), _SCALAR))
    def copy(_, tile, source, place):
        code = _INSERT.format(chunks=sizes["row_chunks"], **sizes)
        inline_ptx(code, memref_ptr(tile), memref_ptr(source), place.registers.item(), has_side_effects=True)

    copy(tile, source, place)


def zero_outside(tile, first, stop, *, interpret: bool) -> None:
    """Zero the rows of the tile [rows, H] outside [first, stop): 0 times what they hold may be NaN.

    One warpgroup comes here; `commit_smem` is the caller's.
    """
    if interpret:
        row = plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=plgpu.Layout.WGMMA)
        loaded = tile[...]
        tile[...] = jnp.where((row >= first) & (row < stop), loaded, jnp.zeros_like(loaded))
        return
    tile_type, sizes = _geometry(tile)

    @plgpu.inline_mgpu(arg_types=(tile_type, _SCALAR, _SCALAR))
    def zero(_, tile, first, stop):
        operands = memref_ptr(tile), first.registers.item(), stop.registers.item()
        for start in range(0, sizes["rows"] * sizes["row_chunks"], THREADS):
            inline_ptx(_ZERO.format(start=start, **sizes), *operands, has_side_effects=True)

    zero(tile, first, stop)


def store_columns(target, values, *, interpret: bool) -> None:
    """Write the first G columns of a wgmma's values [H, G'], of 16 bits, to target [G, H] in global memory."""
    if interpret:
        target[...] = values.T[: target.shape[0]]
        return
    group, head_dim = target.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def store(_, target, values):
        i16, i32 = ir.IntegerType.get_signless(16), ir.IntegerType.get_signless(32)

        def put(value, index):
            row, column = (arith.index_cast(i32, i) for i in index)
            code = _PUT.format(group=group, head_dim=head_dim)
            inline_ptx(code, memref_ptr(target), bitcast(value, i16), row, column, has_side_effects=True)

        values.foreach(put)

    store(target, values)


def load_columns(source, columns, padded: int, *, interpret: bool):
    """A wgmma's values [H, padded] float32 whose first `columns` come from source [G, H] of 16 bits in global memory.

    The others are zeros, whatever the source holds; `columns` is a scalar from 0 to G.
    """
    group, head_dim = source.shape
    shape, layout = (head_dim, padded), plgpu.Layout.WGMMA
    if interpret:
        loaded = jnp.pad(source[...].T, ((0, 0), (0, padded - group)))
        index = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
        return jnp.where(index < columns, loaded.astype(jnp.float32), 0.0)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), _SCALAR),
        return_type=plgpu.ShapeDtypeStruct(shape, source.dtype, layout=layout),
    )
    def load(_, source, columns):
        i16, i32 = ir.IntegerType.get_signless(16), ir.IntegerType.get_signless(32)
        element = ir.MemRefType(source.type).element_type
        code, pointer = _TAKE.format(head_dim=head_dim), memref_ptr(source)
        zero = arith.constant(i32, 0)

        def take(_, index):
            row, column = (arith.index_cast(i32, i) for i in index)
            operands = pointer, row, column, columns.registers.item()
            return bitcast(inline_ptx(code, *operands, result_types=i16, has_side_effects=True), element)

        like = mgpu.FragmentedArray.splat(zero, shape, layout.to_mgpu(), is_signed=True)
        return like.foreach(take, create_array=True)

    return load(source, columns).astype(jnp.float32)
