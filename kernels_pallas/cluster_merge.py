"""Registers handed from one block of threads of a cluster to another, thread by thread.

All blocks hold a value in the same layout, so a thread's registers mean the same to the thread of that number
in any other block, and no layout is taken apart.
"""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.utils import bitcast, inline_ptx, memref_ptr
from jax.extend.mlir import ir

from kernels_pallas import mosaic
from kernels_pallas.mosaic import THREADS

_ADDRESS = """{{
    .reg .b32 a;
    mov.u32 a, %tid.x;
    and.b32 a, a, 127;
    mad.lo.u32 a, a, 8, {base};
    add.u32 a, a, {offset};
"""
_SEND = _ADDRESS + "mapa.shared::cluster.u32 a, a, 0; st.shared::cluster.b64 [a], $1; }}"
_RECEIVE = _ADDRESS + "ld.shared.b64 $0, [a]; }}"


def mailbox(senders: int, shapes: tuple[tuple[int, ...], ...]) -> plgpu.SMEM:
    """Shared memory of the block of rank 0 for float32 arrays of these shapes, [H, G'] or [G'], from others.

    In the layouts of a wgmma a thread holds them in pairs; of [G'] it holds a quarter.
    """
    pairs = sum(shape[0] * shape[1] // THREADS if len(shape) == 2 else shape[0] // 4 for shape in shapes) // 2
    return plgpu.SMEM((senders, pairs * THREADS, 2), jnp.float32)


def send(box, arrays, layouts) -> None:
    """Copy the arrays, of these layouts, to `box` in the block of rank 0, and report it there.

    A warpgroup of every block that takes part comes here once; the one of rank 0 calls `collect` instead.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *layouts))
    def copy(_, box, *arrays):
        registers = [register for array in arrays for register in array.registers.flat]
        for i, register in enumerate(registers):
            code = _SEND.format(base="$0", offset=8 * THREADS * i)
            pair = bitcast(register, ir.IntegerType.get_signless(64))
            inline_ptx(code, memref_ptr(box), pair, has_side_effects=True)
        inline_ptx("barrier.cluster.arrive.release;", has_side_effects=True, convergent=True)

    copy(box, *arrays)


def collect() -> None:
    """Wait until all others have called `send` or ended."""
    mosaic.meet_cluster(None, interpret=False)


def receive(box, shapes, layouts):
    """The float32 arrays that the sender of this `box` sent; after `collect`."""
    types = tuple(
        plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout)
        for shape, layout in zip(shapes, layouts, strict=True)
    )

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=types)
    def load(_, box):
        i64, pair = ir.IntegerType.get_signless(64), ir.VectorType.get((2,), ir.F32Type.get())
        arrays, place = [], 0
        for shape, layout in zip(shapes, layouts, strict=True):
            registers = np.empty(layout.to_mgpu().registers_shape(shape), dtype=object)
            for index in np.ndindex(registers.shape):
                code = _RECEIVE.format(base="$1", offset=8 * THREADS * place)
                word = inline_ptx(code, memref_ptr(box), result_types=i64, has_side_effects=True)
                registers[index], place = bitcast(word, pair), place + 1
            array = mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None)
            arrays.append(array)
        return tuple(arrays)

    return load(box)
