"""Rope and KV write of packed prompt tokens for Hopper: a projection is read once, and everything written in place.

A block of threads is a warpgroup with a few tokens of a kv head. Their cosines and sines stay in registers for all
heads of the group. A thread holds 16 bytes of either half of a head, so rotating needs no exchange; queries leave as
they lie, keys and values by way of their slots.
"""

import math
from dataclasses import dataclass

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.utils import inline_ptx, memref_ptr
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import vector

from kernels_pallas import mosaic
from kernels_pallas.lowering import lower_once
from kernels_pallas.mosaic import THREADS

VECTOR = 8  # values that a thread loads at once
ROWS_AT_ONCE = (
    5  # heads whose loads are under way together; 3 and 9 take as long but at 32/8 x 128, where 3 are slower
)
LARGEST = 448.0  # of float8_e4m3fn

_PUT = """{{
    .reg .pred p;
    .reg .b32 thread, row, column, slot, page;
    .reg .b64 address;
    mov.u32 thread, %tid.x;
    and.b32 thread, thread, 127;
    div.u32 row, thread, {lanes};
    rem.u32 column, thread, {lanes};
    mul.wide.u32 address, row, 4;
    add.u64 address, address, $1;
    ld.global.nc.b32 slot, [address];
    setp.lt.u32 p, slot, {num_slots};
    div.u32 page, slot, {page_size};
    rem.u32 slot, slot, {page_size};
    mad.lo.u32 page, page, {num_heads}, $2;
    mad.lo.u32 page, page, {page_size}, slot;
    mad.lo.u32 column, column, {vector}, {first};
    mul.wide.u32 address, page, {row_bytes};
    mad.wide.u32 address, column, {item_bytes}, address;
    add.u64 address, address, $0;
    @p st.global.v{words}.b32 [address], {{{values}}};
}}"""


@dataclass(frozen=True)
class Tile:
    """How a warpgroup holds some columns of a head for as many tokens as it takes at once.

    lanes: threads side by side in a row of it; each has VECTOR columns of every `lanes * VECTOR`.
    """

    lanes: int

    @classmethod
    def of(cls, head_dim: int, half: int) -> "Tile":
        parts = math.gcd(half, head_dim - 2 * half) // VECTOR
        return cls(min(parts & -parts, 16))

    @property
    def tokens(self) -> int:
        return THREADS // self.lanes

    @property
    def columns(self) -> int:
        return self.lanes * VECTOR

    @property
    def layout(self):
        lane_tokens = 32 // self.lanes
        tiling = plgpu.Tiling(((self.tokens, self.columns), (lane_tokens, self.columns), (VECTOR,)))
        return plgpu.Layout.TILED(tiling, (-5,), (-3, -2), -1)


def unsupported(qkv: jax.Array, cos: jax.Array, k_pages: jax.Array) -> str | None:
    """Why the kernel cannot take qkv [T, K, G + 2, H], cos [T, rotary_dim / 2] and pages; None if it can."""
    head_dim, half = qkv.shape[3], cos.shape[1]
    if qkv.dtype not in (jnp.bfloat16, jnp.float16):
        return f"qkv is {qkv.dtype}, not bfloat16 or float16"
    if k_pages.dtype not in (qkv.dtype, jnp.float8_e4m3fn):
        return f"pages are {k_pages.dtype}, not {qkv.dtype} or float8_e4m3fn"
    if head_dim % VECTOR or half % VECTOR or half == 0:
        return f"head dim {head_dim} or half of the rotary dim, {half}, is no multiple of {VECTOR}"
    if qkv.shape[0] == 0 or qkv.shape[0] % Tile.of(head_dim, half).tokens:
        return f"{qkv.shape[0]} tokens are no multiple of {Tile.of(head_dim, half).tokens}"
    return None


def run(qkv, k_pages, v_pages, slots, cos, sin, norms, scales, epsilon: float):
    """`kernels_pallas.rope_and_write`; `norms` and `scales` are pairs, of q and k and of k and v, or None."""
    if scales is not None:
        scales = tuple(jnp.asarray(1.0 if x is None else x, jnp.float32).reshape(1) for x in scales)
    return _run(qkv, k_pages, v_pages, slots, cos, sin, norms, scales, epsilon, None)


@lower_once("epsilon", "interpret")
def _run(qkv, k_pages, v_pages, slots, cos, sin, norms, scales, epsilon: float, interpret):
    num_tokens, num_kv_heads, rows, head_dim = qkv.shape
    group, half, dtype = rows - 2, cos.shape[1], qkv.dtype
    tile = Tile.of(head_dim, half)
    interpreted = interpret is not None
    sizes = (half, half, head_dim - 2 * half)
    spans = [pl.ds(start, size) for start, size in zip((0, half, 2 * half), sizes, strict=True) if size]
    operands = {"qkv": qkv, "slots": slots, "cos": cos, "sin": sin}
    if norms is not None:
        operands |= {"q_norm": norms[0], "k_norm": norms[1]}
    if scales is not None:
        operands |= {"k_scale": scales[0], "v_scale": scales[1]}

    def kernel(*refs, staged=None):
        ref = dict(zip((*operands, "k", "v", "q"), refs, strict=True))
        head = lax.axis_index("head")
        tokens = pl.ds(lax.axis_index("tile") * tile.tokens, tile.tokens)

        def load(source):
            return plgpu.load(source, layout=tile.layout, optimized=False)

        def load_row(row):
            return [load(ref["qkv"].at[tokens, head, row, span]) for span in spans]

        def normalised(x, name):
            squares = sum((part * part).sum(axis=1) for part in x) / head_dim
            inverse = lax.rsqrt(squares + epsilon)  # [tokens]
            out = []
            for part, span in zip(x, spans, strict=True):
                weight = plgpu.load(ref[name].at[span], layout=tile.layout.reduce(0), optimized=False)
                weight = lax.broadcast_in_dim(weight.astype(jnp.float32), part.shape, [1])
                out.append(part * lax.broadcast_in_dim(inverse, part.shape, [0]) * weight)
            return [part.astype(dtype).astype(jnp.float32) for part in out]

        def rotated(x, name):
            x = [part.astype(jnp.float32) for part in x]
            if norms is not None:
                x = normalised(x, name)
            return [
                part.astype(dtype)
                for part in (x[0] * cosine - x[1] * sine, x[1] * cosine + x[0] * sine, *x[2:])
            ]

        def write(name, x):
            """Store a token's key or value parts [tokens, columns] at its slot."""
            pages = ref[name]
            if scales is not None or pages.dtype != dtype:
                inverse = 1.0 if scales is None else 1.0 / ref[f"{name}_scale"][0]
                x = [part.astype(jnp.float32) * inverse for part in x]
                if pages.dtype.itemsize == 1:
                    x = [jnp.minimum(jnp.maximum(part, -LARGEST), LARGEST) for part in x]
                x = [part.astype(pages.dtype) for part in x]
            for span, part in zip(spans, x, strict=True):
                if interpreted:  # it has no inline code
                    staged[:, span] = part
                else:
                    put(pages, ref["slots"].at[tokens], head, part, span.start, tile)
            if interpreted:
                put_rows(pages, ref["slots"].at[tokens], head, staged)

        cosine, sine = load(ref["cos"].at[tokens]), load(ref["sin"].at[tokens])
        for first in range(0, rows, ROWS_AT_ONCE):
            # All loads before the first store.
            loaded = [(row, load_row(row)) for row in range(first, min(first + ROWS_AT_ONCE, rows))]
            for row, x in loaded:
                if row == rows - 1:
                    write("v", x)
                elif row == group:
                    write("k", rotated(x, "k_norm"))
                else:
                    for span, part in zip(spans, rotated(x, "q_norm"), strict=True):
                        mosaic.store(ref["q"].at[tokens, head, row, span], part)
        if interpreted:
            plgpu.wait_smem_to_gmem(0)

    launch = plgpu.kernel(
        kernel,
        out_type=mosaic.out_like((num_tokens, num_kv_heads, group, head_dim), dtype, *operands.values()),
        grid=(num_tokens // tile.tokens, num_kv_heads),  # the last changes fastest
        grid_names=("tile", "head"),
        scratch_types={"staged": plgpu.SMEM((tile.tokens, head_dim), k_pages.dtype)} if interpreted else {},
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    pages = jax.new_ref(k_pages), jax.new_ref(v_pages)
    q = launch(*operands.values(), *pages)
    return q.reshape(num_tokens, num_kv_heads * group, head_dim), *(jax.freeze(page) for page in pages)


def put(pages, slots, head, x, first: int, tile: Tile) -> None:
    """Store x [tokens, columns] at the slots [tokens] of pages [P, K, S, H], from column `first` on."""
    num_pages, num_heads, page_size, head_dim = pages.shape
    item_bytes = pages.dtype.itemsize
    words = VECTOR * item_bytes // 4

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT(()), tile.layout))
    def store(_, pages, slots, head, x):
        i32 = ir.IntegerType.get_signless(32)
        pointers = memref_ptr(pages), memref_ptr(slots)
        # A token has one row of registers, whose columns are `tile.columns` apart.
        for i, register in enumerate(x.registers.flat):
            packed = vector.bitcast(ir.VectorType.get((words,), i32), register)
            values = [
                vector.extract(packed, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([w]))
                for w in range(words)
            ]
            code = _PUT.format(
                lanes=tile.lanes,
                num_slots=num_pages * page_size,
                page_size=page_size,
                num_heads=num_heads,
                vector=VECTOR,
                first=first + i * tile.columns,
                row_bytes=head_dim * item_bytes,
                item_bytes=item_bytes,
                words=words,
                values=", ".join(f"${3 + w}" for w in range(words)),
            )
            inline_ptx(code, *pointers, head.registers.item(), *values, has_side_effects=True)

    store(pages, slots, head, x)


def put_rows(pages, slots, head, staged) -> None:
    """As `put`, row by row from shared memory [tokens, H]."""
    num_pages, _, page_size, _ = pages.shape
    plgpu.commit_smem()

    @pl.loop(0, staged.shape[0])
    def _row(i):
        slot = slots[i]

        @pl.when((slot >= 0) & (slot < num_pages * page_size))
        def _store():
            place = pl.ds(lax.rem(slot, jnp.int32(page_size)), 1)
            target = pages.at[lax.div(slot, jnp.int32(page_size)), head, place]
            plgpu.copy_smem_to_gmem(staged.at[pl.ds(i, 1)], target)

    plgpu.wait_smem_to_gmem(0)
