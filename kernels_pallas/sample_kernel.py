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

SCANNED, LED, DRAWN, WEIGHED = range(row_parts.TURNS)  # exchanges between the parts of a row

KEPT, REJECTED, UNKNOWN = range(3)  # verdicts on a candidate
SHARED_BYTES = 224 << 10  # of a block of threads, but for its barriers and reports
TYPICAL = 700  # tokens above the largest third logit of a place, of a row in 8 parts

unsupported = row_parts.unsupported


def sample(logits, temperature, top_k, top_p, min_p, seeds, positions, greedy_tokens=None):
    """`kernels_pallas.sample` by the kernel; logits that `unsupported` accepts.

    greedy_tokens: [B] int32, where they are known: then the logits of greedy lanes are not looked at.
    """
    operands = (logits, temperature, top_k, top_p, min_p, seeds, positions, greedy_tokens)
    shape = {"num_lanes": logits.shape[0], "vocab_size": logits.shape[1]}
    return _sample(*operands, tuning.config_for("sample", shape, Cut(logits.shape[1]), candidates), None)


def candidates(num_lanes: int, vocab_size: int) -> Iterator[Cut]:
    """Cuts worth measuring for a shape: those whose parts fit in shared memory beside the leaders."""
    for chunk, parts in itertools.product((512, 1024, 2048), (4, 8)):
        cut = Cut(vocab_size, chunk, parts)
        if cut.share <= MAX_SHARE and 4 * chunk * (cut.share + 4) <= SHARED_BYTES:
            yield cut


class _Sampler:
    """The options of a row, and the passes over one part of it that draw its token.

    A candidate is a (token, logit).
    """

    def __init__(self, part: RowPart, options, leaders: "_Leaders"):
        self.part, self.leaders = part, leaders
        values = [options[i, part.lane] for i in range(options.shape[0])]
        self.factor, self.top_k, self.top_p, self.min_p = values[:4]
        self.greedy, self.keeps_all, self.weighs, self.leads = (value != 0 for value in values[4:8])
        halves = [half.astype(jnp.int32).astype(jnp.uint32) for half in values[8:]]
        self.keys = halves[0] * 2**16 + halves[1], halves[2] * 2**16 + halves[3]

    def score(self, i, x, shift):
        """Noisy logits over temperature; the shift, a logit near the maximum, leaves room for the noise."""
        bits = reference.hash_tokens(*self.keys, self.part.tokens(i).astype(jnp.uint32))
        return (x - shift) * self.factor + reference.gumbel_from_bits(bits)

    def likely(self, x, maximum):
        """Whether min-p keeps the tokens of these logits."""
        return weight(x, maximum, self.factor) >= self.min_p

    def before(self, i, x, candidate):
        token, value = candidate
        return (x > value) | ((x == value) & (self.part.tokens(i) < token))

    def nothing(self):
        """The state of `better` before any token."""
        return self.part.full(LOWEST), self.part.full(0, jnp.int32)

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

    def fold(self, leading, step: Callable, state):
        """step(trips, x, state) over all tokens, or over the leaders alone."""
        return lax.cond(
            leading, lambda: self.leaders.fold(self.part, step, state), lambda: self.part.fold(step, state)
        )

    def weigh(self, leading, candidate, maximum):
        """Count and mass of the tokens before the candidate, scalars float32."""

        def step(i, x, state):
            count, mass = state
            before = jnp.where(self.before(i, x, candidate), self.part.full(1.0), self.part.full(0.0))
            return count + before, mass + before * weight(x, maximum, self.factor)

        counts, masses = self.fold(leading, step, (self.part.full(0.0), self.part.full(0.0)))
        return jnp.sum(counts), jnp.sum(masses)

    def draw(self, leading, candidate, maximum):
        """Score, token and logit of the `winner` among the likely tokens before the candidate, scalars."""

        def step(i, x, best):
            among = self.before(i, x, candidate) & self.likely(x, maximum)
            return better(among, i, self.score(i, x, maximum), best)

        score, token = self.winner(self.fold(leading, step, self.nothing()))
        return score, token, self.part.value(token)

    def winner(self, state):
        """Largest score and its lowest token id (NO_TOKEN: none), scalars."""
        best, trips = state
        top = jnp.max(best)
        token = -jnp.max(jnp.where(best == top, -self.part.tokens(trips), -NO_TOKEN))
        return top, jnp.where(top > LOWEST, token, NO_TOKEN)

    def settle(self, leading, candidate, verdict, maximum, total):
        """The token of the row: while the candidate is not kept, another is drawn before it."""

        def kept(candidate):
            none = candidate[0] == NO_TOKEN
            likely = self.likely(candidate[1], maximum)

            def weigh():
                reports = self.part.exchange(WEIGHED, self.weigh(leading, candidate, maximum))
                count, mass = (sum(report[i] for report in reports) for i in range(2))
                within = (count < self.top_k) & (mass <= total * self.top_p)
                return within | (count == 0.0)  # the first token is always kept

            return lax.cond(likely & self.weighs & ~none, weigh, lambda: likely | none)

        def draw(candidate):
            return merge_winners(self.part.exchange(DRAWN, self.draw(leading, candidate, maximum)))

        def judge(state):
            candidate, verdict = state
            keeps = lax.cond(verdict == REJECTED, lambda: jnp.bool_(False), lambda: kept(candidate))
            candidate = lax.cond(keeps, lambda: candidate, lambda: draw(candidate))
            return candidate, jnp.where(keeps, KEPT, UNKNOWN)

        return lax.while_loop(lambda state: state[1] != KEPT, judge, (candidate, verdict))[0][0]


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
    return token.astype(jnp.int32), value


def _from_all(row: _Sampler):
    """Maximum, softmax denominator, whether to go on with leaders alone, the verdict on a candidate, and it."""
    reports = row.part.exchange(SCANNED, row.scan())
    maximum, total = merge_softmax([report[:2] for report in reports], row.factor)
    candidate = merge_winners(
        [(score + (top - maximum) * row.factor, *winner) for top, _, score, *winner in reports]
    )
    verdict = jnp.where(row.keeps_all, KEPT, UNKNOWN)
    return maximum, total, jnp.bool_(False), verdict, *candidate


def _from_leaders(row: _Sampler):
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


def _largest(row: _Sampler):
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


def _drawn(row: _Sampler):
    """The token drawn for a row; -1 if it holds a NaN."""
    maximum, total, leading, verdict, *candidate = lax.cond(
        row.leads, functools.partial(_from_leaders, row), functools.partial(_from_all, row)
    )
    bad = maximum != maximum
    token = row.settle(leading, tuple(candidate), jnp.where(bad, KEPT, verdict), maximum, total)
    none = token == NO_TOKEN  # nothing but -inf: any token will do
    return jnp.where(bad, -1, jnp.where(none, 0, token))


def _draw(part: RowPart, options, *refs, known: bool):
    *known_refs, out_ref, leaders, trips = refs
    row = _Sampler(part, options, _Leaders(leaders, trips))

    def store(token):
        @pl.when(part.part == 0)
        def _store():
            out_ref[part.lane] = token

    if not known:
        part.fetch()
        store(lax.cond(row.greedy, functools.partial(_largest, row), functools.partial(_drawn, row)))
        return

    @pl.when(row.greedy)
    def _known():
        store(known_refs[0][part.lane])

    @pl.when(~row.greedy)
    def _unknown():
        part.fetch()
        store(_drawn(row))


@lower_once("cut", "interpret")
def _sample(logits, temperature, top_k, top_p, min_p, seeds, positions, greedy_tokens, cut, interpret):
    num_lanes, vocab_size = logits.shape
    greedy = temperature <= 0.0
    weighs = (top_k < vocab_size) | (top_p < 1.0)
    keeps_all = greedy | ~(weighs | (min_p > 0.0))
    leads = ~greedy & (top_k <= cut.parts * cut.chunk // 4)
    factor = jnp.where(greedy, 1.0, 1.0 / jnp.where(greedy, 1.0, temperature))
    halves = [half for key in reference.row_keys(seeds, positions) for half in (key >> 16, key & 0xFFFF)]
    top_p = jnp.where(top_p < 1.0, top_p, jnp.inf)
    # One array, in one type that holds all of it, costs one kernel to make.
    numbers = [jnp.minimum(factor, 1e30), jnp.clip(top_k, 1, NO_TOKEN), top_p, jnp.minimum(min_p, 1.0)]
    options = [*numbers, greedy, keeps_all, weighs, leads, *halves]
    operands = [jnp.stack([option.astype(jnp.float32) for option in options])]
    known = greedy_tokens is not None
    if known:
        operands.append(greedy_tokens)
    outputs = [((num_lanes,), jnp.int32)]
    leaders = [plgpu.SMEM((2, cut.chunk), dtype) for dtype in (jnp.float32, jnp.int32)]
    body = functools.partial(_draw, known=known)
    return row_parts.launch(body, cut, logits, operands, outputs, 5, interpret, leaders)[0]
