"""Rows of logits in the shared memory of clusters: what the sampling kernels share.

A cluster of up to eight blocks of threads takes a row, each block a part of it, so that a batch of one uses
many multiprocessors and a kernel that looks at its row again and again reads it from device memory once. The
copy engine brings the part in chunks, and the first pass over a chunk starts when it arrives. Between passes
the blocks exchange a few scalars.

A block is a single warpgroup: Mosaic's reductions of whole arrays go through one scratch buffer per block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import mosaic
from kernels_pallas.mosaic import LOG2E

LOWEST = -3.0e38  # below every logit that matters, and finite
NO_TOKEN = 2**24  # token ids below it are exact in float32, in which parts report them
CHUNK = 1024  # tokens in registers at once
TURNS = 4  # buffers of exchanged scalars
PARTS = 8  # the largest portable cluster
MAX_SHARE = 32  # chunks that a block waits for
MAX_VOCAB = PARTS * MAX_SHARE * CHUNK


def unsupported(logits: jax.Array) -> str | None:
    """Why the kernels cannot take these logits; None if they can."""
    if logits.dtype != jnp.float32:
        return f"logits are {logits.dtype}, not float32"
    if logits.shape[1] % 4 or not CHUNK <= logits.shape[1] <= MAX_VOCAB:
        return f"the vocabulary of {logits.shape[1]} is not a multiple of 4 from {CHUNK} to {MAX_VOCAB}"
    return None


@dataclass(frozen=True)
class Cut:
    """How a row is cut into parts of whole chunks."""

    vocab_size: int
    chunk: int = CHUNK
    most_parts: int = PARTS

    @property
    def trips(self) -> int:
        """Chunks of a row."""
        return -(-self.vocab_size // self.chunk)

    @property
    def parts(self) -> int:
        """Blocks of a cluster; every one has a chunk."""
        return min(self.most_parts, 1 << (self.trips.bit_length() - 1))

    @property
    def share(self) -> int:
        """Chunks of a block at most."""
        return -(-self.trips // self.parts)


class RowPart:
    """A block's part of the logits of its lane, and passes over it."""

    def __init__(self, cut: Cut, logits_ref, smem, mine, theirs, arrived, *interpreted):
        self.cut, self.chunk, self.parts = cut, cut.chunk, cut.parts
        self.logits_ref, self.smem, self.arrived = logits_ref, smem, arrived
        self.mine, self.theirs, self.interpreted = mine, theirs, interpreted
        self.lane, self.part = lax.axis_index("lane"), lax.axis_index("part")
        first_trip = lax.div(self.part * cut.trips, jnp.int32(cut.parts))
        self.trips = lax.div((self.part + 1) * cut.trips, jnp.int32(cut.parts)) - first_trip
        self.first_token = first_trip * cut.chunk
        self.layout = plgpu.Layout.WG_STRIDED((cut.chunk,), vec_size=4)

    def fetch(self):
        """Start the copies of all chunks; what the row's last chunk has too much is -inf."""
        tail = self.cut.vocab_size % self.chunk

        def copy(i, size=self.chunk):
            source = self.logits_ref.at[self.lane, pl.ds(self.first_token + i * self.chunk, size)]
            target = self.smem.at[i] if size == self.chunk else self.smem.at[i, pl.ds(0, size)]
            in_bounds = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # and so contiguous, of any length
            plgpu.copy_gmem_to_smem(source, target, self.arrived.at[i], oob_mode=in_bounds)

        if tail == 0:
            pl.loop(0, self.trips)(copy)
            return
        last = self.part == self.parts - 1
        pl.loop(0, jnp.where(last, self.trips - 1, self.trips))(copy)

        @pl.when(last)
        def _tail():
            mosaic.store(self.smem.at[self.trips - 1], self.full(-jnp.inf))
            plgpu.commit_smem()
            copy(self.trips - 1, tail)

    def full(self, value, dtype=jnp.float32):
        return plgpu.layout_cast(jnp.full((self.chunk,), value, dtype), self.layout)

    def places(self):
        return plgpu.broadcasted_iota(jnp.int32, (self.chunk,), 0, layout=self.layout)

    def tokens(self, trips):
        """Ids of the tokens that the places of a chunk hold in their trip, `trips` an array or a scalar."""
        return self.first_token + trips * self.chunk + self.places()

    def load(self, i):
        return plgpu.load(self.smem.at[i], layout=self.layout, optimized=False)

    def value(self, token):
        """The logit of the token; any, if the token is not in this part."""
        place = jnp.clip(token - self.first_token, 0, self.smem.shape[0] * self.chunk - 1)
        return self.smem[lax.div(place, jnp.int32(self.chunk)), lax.rem(place, jnp.int32(self.chunk))]

    def fold(self, step: Callable, state, *, first_pass: bool = False, arrived_chunks: int = 0):
        """step(i, x, state) over the chunks; the first pass waits for all but the `arrived_chunks`."""

        def trip(i, state):
            if first_pass:

                @pl.when(i >= arrived_chunks)
                def _wait():
                    plgpu.barrier_wait(self.arrived.at[i])

            return step(i, self.load(i), state)

        return lax.fori_loop(0, self.trips, trip, state)

    def softmax(self, factor, also: Callable, state):
        """First pass: maximum (NaN: a bad row) and sum of `weight` against it, scalars, and another fold.

        also(i, x, shift, maxima, state): shift is a logit near the maximum, maxima those of each place of a chunk
        before this one. Returns (maximum, sum, shift, maxima, state).
        """
        # Weights against the maximum so far would cost another exponential each. The first chunk's maximum
        # serves as well, unless what follows is so much larger that the sum overflows. A chunk of nothing but
        # -inf has none, and 0 is in its place: so far from what follows the sum may vanish, too.
        plgpu.barrier_wait(self.arrived.at[0])
        first = jnp.max(self.load(0))
        shift = jnp.where(first <= LOWEST, 0.0, first)

        def step(i, x, carry):
            maxima, sums, state = carry
            state = also(i, x, shift, maxima, state)
            return jnp.maximum(maxima, x), sums + weight(x, shift, factor), state

        carry = (self.full(LOWEST), self.full(0.0), state)
        maxima, sums, state = self.fold(step, carry, first_pass=True, arrived_chunks=1)
        maximum, total = jnp.max(maxima), jnp.sum(sums)

        def sum_again():
            def add(i, x, sums):
                return sums + weight(x, maximum, factor)

            return jnp.sum(self.fold(add, self.full(0.0)))

        in_range = (total > 1e-20) & (total < 1e30)
        total = lax.cond(in_range, lambda: total * weight(shift, maximum, factor), sum_again)
        return maximum, total, shift, maxima, state

    def report(self, i, value):
        """Put a float32 scalar where all parts of the row read it after they `meet`."""
        self.mine[i] = value

    def meet(self, turn):
        """Wait until all parts of the row have come here, and bring what they reported.

        No turn comes twice in a row: others may still be reading.
        """
        theirs = self.theirs.at[turn]
        if not self.interpreted:
            mosaic.gather_cluster(self.mine, theirs, *theirs.shape)
            return
        exchange, met = self.interpreted
        for i in range(self.mine.shape[0]):
            exchange[self.lane, turn, self.part, i] = self.mine[i]
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)
        for part in range(self.parts):
            for i in range(self.mine.shape[0]):
                theirs[part, i] = exchange[self.lane, turn, part, i]

    def exchange(self, turn, values: Sequence) -> list[list]:
        """The scalars of every part of the row, as float32; no turn comes twice in a row."""
        for i, value in enumerate(values):
            self.report(i, value.astype(jnp.float32))
        self.meet(turn)
        return [[self.theirs[turn, p, i] for i in range(len(values))] for p in range(self.parts)]


def weight(x, maximum, factor):
    """exp of a logit times factor, against the maximum."""
    return jnp.exp2((x - maximum) * (factor * LOG2E))


def merge_softmax(reports: Sequence[Sequence], factor):
    """Maximum and sum of a row from its parts' (maximum, sum)."""
    maximum = reports[0][0]
    for report in reports[1:]:
        maximum = jnp.maximum(maximum, report[0])
    return maximum, sum(report[1] * weight(report[0], maximum, factor) for report in reports)


def launch(
    body: Callable, cut: Cut, logits, operands, outputs, report_size: int, interpret, own: Sequence = ()
) -> Any:
    """Run body(part: RowPart, *refs of operands, outputs, own) by a cluster per lane of the logits [B, V].

    The body begins with `part.fetch()`, unless its lane has nothing to do. outputs: their (shape, dtype);
    report_size: the float32 scalars of an exchange; own: shared memory of the body.
    """

    results = [mosaic.out_like(*output, logits, *operands) for output in outputs]
    scratch = [
        *own,
        plgpu.SMEM((cut.share, cut.chunk), jnp.float32),
        plgpu.SMEM((report_size,), jnp.float32),
        plgpu.SMEM((TURNS, cut.parts, report_size), jnp.float32),
        plgpu.Barrier(num_barriers=cut.share),
    ]
    if interpret is not None:  # it has no shared memory of clusters
        exchange = (logits.shape[0], TURNS, cut.parts, report_size)
        results.append(jax.ShapeDtypeStruct(exchange, jnp.float32))
        scratch.append(plgpu.ClusterBarrier(collective_axes=("part",), num_barriers=1))

    def kernel(logits_ref, *refs):
        count = len(operands) + len(outputs)
        given, exchange = refs[:count], refs[count : len(operands) + len(results)]
        mine = refs[len(operands) + len(results) :]
        part = RowPart(cut, logits_ref, *mine[len(own) : len(own) + 4], *exchange, *mine[len(own) + 4 :])
        body(part, *given, *mine[: len(own)])

    return plgpu.kernel(
        kernel,
        out_type=tuple(results),
        grid=(logits.shape[0],),
        grid_names=("lane",),
        cluster=(cut.parts,),
        cluster_names=("part",),
        num_threads=1,
        thread_name="thread",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(logits, *operands)[: len(outputs)]
