"""The sampling kernel for Hopper: one read of the logits, no sort.

The algorithm is the one of `reference.sample`, over rows held in shared memory (see `row_parts`). The first
pass finds maximum, softmax denominator and the noisy maximum of all tokens. Rows that truncate then count the
tokens before that candidate and their mass, and draw again among them while it is not kept. Greedy rows draw
no noise.

Of flat logits a small top_k rejects candidate after candidate. Rows of a small top_k therefore begin with their
leaders, the two largest logits of each place of a chunk, instead of a draw. The leaders hold all tokens above
the largest third logit of a place: if those are enough for the row, it is drawn among the leaders alone, and
otherwise they tell at least a logit that all kept tokens are above.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import mosaic, reference, row_parts, tuning
from kernels_pallas.lowering import lower_once
from kernels_pallas.row_parts import LOWEST, MAX_SHARE, NO_TOKEN, Cut, RowPart, merge_softmax, weight
from kernels_pallas.row_sampler import KEPT, REJECTED, UNKNOWN, Sampler, better, merge_winners, options_of

SCANNED, LED = range(2)  # exchanges between the parts of a row, before those of `Sampler`

SHARED_BYTES = 224 << 10  # of a block of threads, but for its barriers and reports
TYPICAL = 700  # tokens above the largest third logit of a place, of a row in 8 parts

unsupported = row_parts.unsupported


def sample(logits, temperature, top_k, top_p, min_p, seeds, positions, known=None):
    """`kernels_pallas.sample` by the kernel; logits that `unsupported` accepts."""
    cut = cut_of(*logits.shape)
    options = options_of(temperature, top_k, top_p, min_p, seeds, positions, cut)
    return draw(logits, options, known, cut)


def cut_of(num_lanes: int, vocab_size: int) -> Cut:
    """The tuning table's cut of rows, or else the default."""
    shape = {"num_lanes": num_lanes, "vocab_size": vocab_size}
    return tuning.config_for("sample", shape, Cut(vocab_size), candidates)


def draw(logits, options, known, cut: Cut):
    """Tokens [B] int32 of logits [B, V]; `options` of `options_of` with this cut, `known` as in `sample`."""
    return _sample(logits, options, known, cut, None)


def candidates(num_lanes: int, vocab_size: int) -> Iterator[Cut]:
    """Cuts worth measuring for a shape: those whose parts fit in shared memory beside the leaders."""
    for chunk, parts in itertools.product((512, 1024, 2048), (4, 8)):
        cut = Cut(vocab_size, chunk, parts)
        if cut.share <= MAX_SHARE and 4 * chunk * (cut.share + 4) <= SHARED_BYTES:
            yield cut


class _Leaders:
    """The two largest logits of each place of a chunk and the trips they are from, in shared memory."""

    def __init__(self, logits_ref, trips_ref):
        self.refs = logits_ref, trips_ref

    def fold(self, part: RowPart, step: Callable, state):
        def again(j, state):
            x, trips = (plgpu.load(ref.at[j], layout=part.layout, optimized=False) for ref in self.refs)
            return step(trips, x, state)

        return lax.fori_loop(0, 2, again, state)

    def store(self, logits, trips):
        for ref, arrays in zip(self.refs, (logits, trips), strict=True):
            for j, array in enumerate(arrays):
                mosaic.store(ref.at[j], array)
        plgpu.commit_smem()


class _RowSampler(Sampler):
    """A row with leaders, to which passes that are `leading` keep."""

    part: RowPart

    def __init__(self, part: RowPart, options, leaders: _Leaders):
        super().__init__(part, options)
        self.leaders = leaders

    def fold(self, leading, step: Callable, state):
        """step(trips, x, state) over all tokens, or over the leaders alone."""
        return lax.cond(
            leading, lambda: self.leaders.fold(self.part, step, state), lambda: self.part.fold(step, state)
        )

    def scan(self):
        """Maximum, softmax denominator, and the `winner` among all tokens with its logit, scalars.

        Scores are relative to the maximum of the part.
        """

        def also(i, x, shift, maxima, best):
            return better(True, i, self.score(i, x, shift), best)

        maximum, total, shift, _, best = self.part.softmax(self.factor, also, self.nothing())
        score, token = self.winner(best)
        score = jnp.where(token == NO_TOKEN, LOWEST, score + (shift - maximum) * self.factor)
        return maximum, total, score, token, self.part.value(token)


def _from_all(row: _RowSampler):
    """Maximum, softmax denominator, whether to go on with leaders alone, the verdict on a candidate, and it."""
    reports = row.part.exchange(SCANNED, row.scan())
    maximum, total = merge_softmax([report[:2] for report in reports], row.factor)
    candidate = merge_winners(
        [(score + (top - maximum) * row.factor, *winner) for top, _, score, *winner in reports]
    )
    verdict = jnp.where(row.keeps_all, KEPT, UNKNOWN)
    return maximum, total, jnp.bool_(False), verdict, *candidate


def _from_leaders(row: _RowSampler):
    """As `_from_all`, by a first pass that finds the leaders and draws no noise."""

    def also(i, x, shift, first, state):
        second, third, first_trip, second_trip = state
        leads, follows = x > first, x > second
        second_trip = jnp.where(leads, first_trip, jnp.where(follows, i, second_trip))
        third = jnp.maximum(third, jnp.minimum(x, second))
        second = jnp.maximum(second, jnp.minimum(x, first))
        return second, third, jnp.where(leads, i, first_trip), second_trip

    part, full = row.part, row.part.full
    start = full(LOWEST), full(LOWEST), full(0, jnp.int32), full(0, jnp.int32)
    maximum, total, _, first, (second, third, *trips) = part.softmax(row.factor, also, start)
    row.leaders.store((first, second), trips)

    reports = part.exchange(SCANNED, (maximum, total, jnp.max(third)))
    maximum, total = merge_softmax([report[:2] for report in reports], row.factor)
    floor = functools.reduce(jnp.maximum, [report[2] for report in reports])
    pivot = _pivot(row.top_k, floor, maximum)

    def step(i, x, state):
        counts, masses = state
        above = x > floor
        counts += jnp.where(above, full(1, jnp.int32), full(0, jnp.int32))
        counts += jnp.where(x > pivot, full(2**16, jnp.int32), full(0, jnp.int32))
        return counts, masses + jnp.where(above, weight(x, maximum, row.factor), 0.0)

    counts, masses = row.leaders.fold(part, step, (full(0, jnp.int32), full(0.0)))
    counts = jnp.sum(counts)  # of both in one reduction: a part has fewer than 2**16 leaders
    reports = part.exchange(LED, (counts & (2**16 - 1), counts >> 16, jnp.sum(masses)))
    count, before_pivot, mass = (sum(report[i] for report in reports) for i in range(3))
    complete = (count >= row.top_k) | (mass > total * row.top_p)
    complete |= (floor <= LOWEST) | ~row.likely(floor, maximum)
    # Before the first draw stand a logit that the row does not reach down to, or else all tokens.
    known, lowest = before_pivot >= row.top_k, jnp.where(complete, floor, -jnp.inf)
    value = jnp.where(known, jnp.maximum(pivot, lowest), lowest)
    token = jnp.where(known | complete, -1, NO_TOKEN)
    return maximum, total, complete, jnp.int32(REJECTED), token, value


def _pivot(top_k, floor, maximum):
    """A logit with about 2.5 top_k tokens above it, if the tail is exponential and TYPICAL above the floor."""
    share = 1.0 - jnp.log(2.5 * top_k) * (1.0 / math.log(TYPICAL))
    return floor + (maximum - floor) * jnp.clip(share, -1.0, 1.0)


def _largest(row: _RowSampler):
    """The first token of the largest logit; -1 for a row that holds a NaN."""

    def step(i, x, state):
        maxima, trips = state
        return jnp.maximum(maxima, x), jnp.where(x > maxima, i, trips)  # NaN if any is

    start = row.part.full(LOWEST), row.part.full(0, jnp.int32)
    maxima, trips = row.part.fold(step, start, first_pass=True)
    maximum = jnp.max(maxima)
    token = -jnp.max(jnp.where(maxima == maximum, -row.part.tokens(trips), -NO_TOKEN))
    reports = row.part.exchange(SCANNED, (maximum, token))
    bad = functools.reduce(jnp.logical_or, [top != top for top, _ in reports])
    token, top = merge_winners([(top, token, top) for top, token in reports])
    return jnp.where(bad, -1, jnp.where(top > LOWEST, token, 0))


def _drawn(row: _RowSampler):
    """The token drawn for a row; -1 if it holds a NaN."""
    maximum, total, leading, verdict, *candidate = lax.cond(
        row.leads, functools.partial(_from_leaders, row), functools.partial(_from_all, row)
    )
    bad = maximum != maximum
    token = row.settle(leading, tuple(candidate), jnp.where(bad, KEPT, verdict), maximum, total)
    none = token == NO_TOKEN  # nothing but -inf: any token will do
    return jnp.where(bad, -1, jnp.where(none, 0, token))


def _draw(part: RowPart, options, *refs, is_known: bool):
    *known_refs, out_ref, leaders, trips = refs
    row = _RowSampler(part, options, _Leaders(leaders, trips))

    def store(token):
        @pl.when(part.part == 0)
        def _store():
            out_ref[part.lane] = token

    if not is_known:
        part.fetch()
        store(lax.cond(row.greedy, functools.partial(_largest, row), functools.partial(_drawn, row)))
        return
    known = known_refs[0][part.lane]
    pl.when(known != reference.UNDRAWN)(lambda: store(known))

    @pl.when(known == reference.UNDRAWN)
    def _unknown():
        part.fetch()
        store(_drawn(row))


@lower_once("cut", "interpret")
def _sample(logits, options, known, cut, interpret):
    operands = [options] if known is None else [options, known]
    outputs = [((logits.shape[0],), jnp.int32)]
    leaders = [plgpu.SMEM((2, cut.chunk), dtype) for dtype in (jnp.float32, jnp.int32)]
    body = functools.partial(_draw, is_known=known is not None)
    return row_parts.launch(body, cut, logits, operands, outputs, 5, interpret, leaders)[0]
