"""The sampling kernel for Hopper: one read of the logits, no sort.

The algorithm is the one of `reference.sample`. A cluster of up to eight blocks of threads takes a row, each
block a part of it, which stays in shared memory: the logits are read once, by the copy engine, and the first
pass over a chunk starts when it arrives. That pass finds maximum, softmax denominator and noisy maximum of all
tokens. Rows that truncate then count the tokens before that candidate and their mass, and draw again among
them while it is not kept. Between passes the blocks of a row exchange a few scalars through device memory.

A block is a single warpgroup: Mosaic's reductions of whole arrays go through one scratch buffer per block.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import mosaic, reference
from kernels_pallas.mosaic import LOG2E

LOWEST = -3.0e38  # below every logit that matters, and finite
NO_TOKEN = 2**24  # token ids below it are exact in float32, in which parts report them
CHUNK = 1024  # tokens in registers at once
PARTS = 8  # the largest portable cluster
MAX_VOCAB = PARTS * 54 * CHUNK  # 216 KiB of a multiprocessor's 227
IN_BOUNDS = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # and so contiguous, of any length
REPORT = 8  # float32 a part reports at a time


def unsupported(logits: jax.Array) -> str | None:
    """Why the kernel cannot take these logits; None if it can."""
    if logits.dtype != jnp.float32:
        return f"logits are {logits.dtype}, not float32"
    if logits.shape[1] % 4 or not CHUNK <= logits.shape[1] <= MAX_VOCAB:
        return f"the vocabulary of {logits.shape[1]} is not a multiple of 4 from {CHUNK} to {MAX_VOCAB}"
    return None


def sample(logits, temperature, top_k, top_p, min_p, seeds, positions):
    """`kernels_pallas.sample` by the kernel; logits that `unsupported` accepts."""
    return _sample(logits, temperature, top_k, top_p, min_p, seeds, positions, CHUNK, PARTS, None)


class _Part:
    """A block's part of a row: the row's options, and passes over the part's logits in shared memory."""

    def __init__(self, keys, options, limits, lane, first_token, trips, smem):
        self.keys = keys[0, lane], keys[1, lane]
        self.factor, self.top_p, self.min_p = (options[i, lane] for i in range(3))
        self.top_k, self.greedy, self.keeps_all = (limits[i, lane] for i in range(3))
        self.first_token, self.trips, self.smem, self.chunk = first_token, trips, smem, smem.shape[1]
        self.layout = plgpu.Layout.WG_STRIDED((self.chunk,), vec_size=4)

    def full(self, value, dtype=jnp.float32):
        return plgpu.layout_cast(jnp.full((self.chunk,), value, dtype), self.layout)

    def nothing(self):
        """The state of `better` before any token."""
        return self.full(LOWEST), self.full(0, jnp.int32)

    def load(self, i):
        return plgpu.load(self.smem.at[i], layout=self.layout, optimized=False)

    def tokens(self, trips):
        """Ids of the tokens that each place of a chunk holds in its trip, `trips` an array or a scalar."""
        place = plgpu.broadcasted_iota(jnp.int32, (self.chunk,), 0, layout=self.layout)
        return self.first_token + trips * self.chunk + place

    def fold(self, step, state, arrived=None, arrived_chunks=0):
        """step(i, x, state) over the part's chunks; given barriers, waits for all but the `arrived_chunks`."""

        def trip(i, state):
            if arrived is not None:

                @pl.when(i >= arrived_chunks)
                def _wait():
                    plgpu.barrier_wait(arrived.at[i])

            return step(i, self.load(i), state)

        return lax.fori_loop(0, self.trips, trip, state)

    def weight(self, x, maximum):
        return jnp.exp2((x - maximum) * (self.factor * LOG2E))

    def score(self, i, x, shift):
        """Noisy logits over temperature; the shift, a logit near the maximum, leaves room for the noise."""
        bits = reference.hash_tokens(*self.keys, self.tokens(i).astype(jnp.uint32))
        return (x - shift) * self.factor + reference.gumbel_from_bits(bits)

    def scan(self, arrived):
        """Maximum (NaN: a bad row), softmax denominator against it, scalars, and the `winner`."""

        def greedy_step(i, x, state):
            maxima, best = state
            return jnp.maximum(maxima, x), better(True, i, x, best)  # NaN if any is

        def greedy():
            maxima, best = self.fold(greedy_step, (self.full(LOWEST), self.nothing()), arrived)
            return jnp.max(maxima), jnp.float32(0.0), *self.winner(best)

        def noisy():
            # Weights against the maximum so far would cost another exponential each. The first chunk's
            # maximum serves as well, unless what follows is so much larger that the sum overflows.
            plgpu.barrier_wait(arrived.at[0])
            shift = jnp.maximum(jnp.max(self.load(0)), LOWEST)

            def step(i, x, state):
                maxima, denominator, best = state
                best = better(True, i, self.score(i, x, shift), best)
                return jnp.maximum(maxima, x), denominator + self.weight(x, shift), best

            state = (self.full(LOWEST), self.full(0.0), self.nothing())
            maxima, denominators, best = self.fold(step, state, arrived, arrived_chunks=1)
            maximum, denominator = jnp.max(maxima), jnp.sum(denominators)
            score, token = self.winner(best)
            denominator = lax.cond(
                denominator < 1e30,
                lambda: denominator * self.weight(shift, maximum),
                lambda: jnp.sum(self.fold(lambda i, x, sums: sums + self.weight(x, maximum), self.full(0.0))),
            )
            return maximum, denominator, score + (shift - maximum) * self.factor, token

        return lax.cond(self.greedy != 0, greedy, noisy)

    def before(self, i, x, candidate):
        token, value = candidate
        return (x > value) | ((x == value) & (self.tokens(i) < token))

    def weigh(self, candidate, maximum):
        """Count and mass of the tokens before the candidate, scalars float32."""

        def step(i, x, state):
            count, mass = state
            before = jnp.where(self.before(i, x, candidate), self.full(1.0), self.full(0.0))
            return count + before, mass + before * self.weight(x, maximum)

        counts, masses = self.fold(step, (self.full(0.0), self.full(0.0)))
        return jnp.sum(counts), jnp.sum(masses)

    def draw(self, candidate, maximum):
        """The `winner` among the tokens before the candidate."""

        def step(i, x, best):
            return better(self.before(i, x, candidate), i, self.score(i, x, maximum), best)

        return self.winner(self.fold(step, self.nothing()))

    def winner(self, state):
        """Largest score and its lowest token id (NO_TOKEN: none), scalars."""
        best, trips = state
        top = jnp.max(best)
        tokens = jnp.where(best == top, self.tokens(trips), NO_TOKEN)
        return top, jnp.where(top > LOWEST, -jnp.max(-tokens), NO_TOKEN)

    def value(self, token):
        """The logit of the token, if it is in this part."""
        place = jnp.clip(token - self.first_token, 0, self.smem.shape[0] * self.chunk - 1)
        return self.smem[lax.div(place, jnp.int32(self.chunk)), lax.rem(place, jnp.int32(self.chunk))]


def better(among, trip, scores, state):
    """Best score of each place of a chunk and the trip it is from; ids rise: ties keep the lowest."""
    best, trips = state
    wins = scores > best if among is True else among & (scores > best)
    return jnp.where(wins, scores, best), jnp.where(wins, trip, trips)


def merge_winners(reports):
    """(token int32, value) of the largest of the (score, token, value) reports, the lowest id among equals."""
    score, token, value = reports[0]
    for other_score, other_token, other_value in reports[1:]:
        wins = (other_score > score) | ((other_score == score) & (other_token < token))
        score, token = jnp.where(wins, other_score, score), jnp.where(wins, other_token, token)
        value = jnp.where(wins, other_value, value)
    token = token.astype(jnp.int32)
    return jnp.where(token == NO_TOKEN, 0, token), value  # nothing but -inf: any token will do


@functools.partial(jax.jit, static_argnames=("chunk", "parts", "interpret"))
def _sample(logits, temperature, top_k, top_p, min_p, seeds, positions, chunk, parts, interpret):
    num_lanes, vocab_size = logits.shape
    trips = -(-vocab_size // chunk)
    parts = min(parts, 1 << (trips.bit_length() - 1))  # so that every part has a chunk
    share = -(-trips // parts)  # trips of a part
    tail = vocab_size % chunk
    greedy = temperature <= 0.0
    keeps_all = greedy | ((top_k >= vocab_size) & (top_p >= 1.0) & (min_p <= 0.0))
    factor = jnp.where(greedy, 1.0, 1.0 / jnp.where(greedy, 1.0, temperature))
    operands = (
        logits,
        jnp.stack(reference.row_keys(seeds, positions)),
        jnp.stack([factor, jnp.where(top_p < 1.0, top_p, jnp.inf), min_p]).astype(jnp.float32),
        jnp.stack([top_k, greedy, keeps_all]).astype(jnp.int32),
    )

    def kernel(logits_ref, keys, options, limits, out_ref, exchange_ref, smem, mine, theirs, *barriers):
        arrived, met, returned = barriers
        lane, part = lax.axis_index("lane"), lax.axis_index("part")
        first_trip = lax.div(part * trips, jnp.int32(parts))
        my_trips = lax.div((part + 1) * trips, jnp.int32(parts)) - first_trip
        row = _Part(keys, options, limits, lane, first_trip * chunk, my_trips, smem)
        whole = my_trips if tail == 0 else jnp.where(part == parts - 1, my_trips - 1, my_trips)

        def fetch(i, size):
            source = logits_ref.at[lane, pl.ds((first_trip + i) * chunk, size)]
            target = smem.at[i] if size == chunk else smem.at[i, pl.ds(0, size)]
            plgpu.copy_gmem_to_smem(source, target, arrived.at[i], oob_mode=IN_BOUNDS)

        pl.loop(0, whole)(functools.partial(fetch, size=chunk))

        if tail:

            @pl.when(part == parts - 1)
            def _fetch_tail():
                mosaic.store(smem.at[whole], row.full(-jnp.inf))
                plgpu.commit_smem()
                fetch(whole, tail)

        def exchange(turn, values):
            """The values of every part of the row, a list of float32 scalars each."""
            slot = lax.rem(turn, jnp.int32(2))
            for i, value in enumerate(values):
                mine[i] = value.astype(jnp.float32)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine, exchange_ref.at[lane, slot, part])
            plgpu.wait_smem_to_gmem(0)
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)
            plgpu.copy_gmem_to_smem(exchange_ref.at[lane, slot], theirs, returned)
            plgpu.barrier_wait(returned)
            return [[theirs[p, i] for i in range(len(values))] for p in range(parts)]

        def with_value(best):
            return *best, row.value(best[1])

        maximum, total, *best = row.scan(arrived)
        reports = exchange(jnp.int32(0), (maximum, total, *with_value(best)))
        maximum = functools.reduce(jnp.maximum, [report[0] for report in reports])
        total = sum(report[1] * row.weight(report[0], maximum) for report in reports)
        candidate = merge_winners([report[2:] for report in reports])
        bad = maximum != maximum

        def kept(candidate, turn):
            reports = exchange(turn, row.weigh(candidate, maximum))
            count = sum(report[0] for report in reports)
            mass = sum(report[1] for report in reports)
            likely = row.weight(candidate[1], maximum) >= row.min_p
            within = (count < row.top_k.astype(jnp.float32)) & (mass <= total * row.top_p) & likely
            return within | (count == 0.0)  # the first token is always kept

        def draw_again(state):
            turn, candidate, _ = state
            reports = exchange(turn, with_value(row.draw(candidate, maximum)))
            candidate = merge_winners(reports)
            return turn + 2, candidate, kept(candidate, turn + 1)

        done = (row.keeps_all != 0) | bad
        done = lax.cond(done, lambda: jnp.bool_(True), lambda: kept(candidate, jnp.int32(1)))
        _, (token, _), _ = lax.while_loop(
            lambda state: ~state[2], draw_again, (jnp.int32(2), candidate, done)
        )

        @pl.when(part == 0)
        def _store():
            out_ref[lane] = jnp.where(bad, -1, token)

    launch = plgpu.kernel(
        kernel,
        out_type=(
            mosaic.out_like((num_lanes,), jnp.int32, *operands),
            mosaic.out_like((num_lanes, 2, parts, REPORT), jnp.float32, *operands),
        ),
        grid=(num_lanes,),
        grid_names=("lane",),
        cluster=(parts,),
        cluster_names=("part",),
        num_threads=1,
        thread_name="thread",
        scratch_types=[
            plgpu.SMEM((share, chunk), jnp.float32),
            plgpu.SMEM((REPORT,), jnp.float32),
            plgpu.SMEM((parts, REPORT), jnp.float32),
            plgpu.Barrier(num_barriers=share),
            plgpu.ClusterBarrier(collective_axes=("part",), num_barriers=1),
            plgpu.Barrier(),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return launch(*operands)[0]
