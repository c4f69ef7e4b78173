"""The sampling kernel for Hopper: one read of the logits, no sort.

The algorithm is the one of `reference.sample`, over rows held in shared memory (see `row_parts`). The first
pass finds maximum, softmax denominator and the noisy maximum of all tokens. Rows that truncate then count the
tokens before that candidate and their mass, and draw again among them while it is not kept. Greedy rows draw
no noise.

Of flat logits a small top_k would reject candidate after candidate. Rows of a small top_k therefore begin with
their `_Leaders`, the two largest logits of each place of a chunk. They are all the tokens above the largest
third one, and when those include all that the row keeps, it draws among them in registers.
"""

import functools
import math
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import reference, row_parts
from kernels_pallas.row_parts import LOWEST, NO_TOKEN, Cut, RowPart, merge_softmax, weight

SCANNED, LED, DRAWN, WEIGHED = range(row_parts.TURNS)  # exchanges between the parts of a row

TYPICAL = 700  # leaders of a large row

unsupported = row_parts.unsupported


def sample(logits, temperature, top_k, top_p, min_p, seeds, positions):
    """`kernels_pallas.sample` by the kernel; logits that `unsupported` accepts."""
    operands = (logits, temperature, top_k, top_p, min_p, seeds, positions)
    return _sample(*operands, Cut(logits.shape[1]), None)


class _Tokens(Protocol):
    """Tokens of one part of a row; a candidate is a (token, logit)."""

    def weigh(self, candidate, maximum):
        """Count and mass of the tokens before the candidate, scalars float32."""

    def draw(self, candidate, maximum):
        """Score, token and logit of the noisy maximum among the likely ones before the candidate, scalars."""


class _Sampler:
    """The options of a row, and the passes over one part of it that draw its token."""

    def __init__(self, part: RowPart, options):
        self.part = part
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

        def greedy():
            def step(i, x, state):
                maxima, best = state
                return jnp.maximum(maxima, x), better(True, i, x, best)  # NaN if any is

            state = (self.part.full(LOWEST), self.nothing())
            maxima, best = self.part.fold(step, state, first_pass=True)
            maximum, (score, token) = jnp.max(maxima), self.winner(best)
            return maximum, jnp.float32(0.0), score - maximum, token

        def noisy():
            def also(i, x, shift, maxima, best):
                return better(True, i, self.score(i, x, shift), best)

            maximum, total, shift, _, best = self.part.softmax(self.factor, also, self.nothing())
            score, token = self.winner(best)
            return maximum, total, score + (shift - maximum) * self.factor, token

        maximum, total, score, token = lax.cond(self.greedy, greedy, noisy)
        return maximum, total, score, token, self.part.value(token)

    def weigh(self, candidate, maximum):
        def step(i, x, state):
            count, mass = state
            before = jnp.where(self.before(i, x, candidate), self.part.full(1.0), self.part.full(0.0))
            return count + before, mass + before * weight(x, maximum, self.factor)

        counts, masses = self.part.fold(step, (self.part.full(0.0), self.part.full(0.0)))
        return jnp.sum(counts), jnp.sum(masses)

    def draw(self, candidate, maximum):
        def step(i, x, best):
            among = self.before(i, x, candidate) & self.likely(x, maximum)
            return better(among, i, self.score(i, x, maximum), best)

        score, token = self.winner(self.part.fold(step, self.nothing()))
        return score, token, self.part.value(token)

    def winner(self, state):
        """Largest score and its lowest token id (NO_TOKEN: none), scalars."""
        best, trips = state
        top = jnp.max(best)
        token = -jnp.max(jnp.where(best == top, -self.part.tokens(trips), -NO_TOKEN))
        return top, jnp.where(top > LOWEST, token, NO_TOKEN)

    def kept(self, tokens: _Tokens, candidate, maximum, total):
        """Whether the row keeps the candidate, which is among the tokens, or there is none."""
        none = candidate[0] == NO_TOKEN
        likely = self.likely(candidate[1], maximum)

        def weigh():
            reports = self.part.exchange(WEIGHED, tokens.weigh(candidate, maximum))
            count, mass = (sum(report[i] for report in reports) for i in range(2))
            within = (count < self.top_k) & (mass <= total * self.top_p)
            return within | (count == 0.0)  # the first token is always kept

        return lax.cond(likely & self.weighs & ~none, weigh, lambda: likely | none)

    def settle(self, tokens: _Tokens, candidate, done, maximum, total):
        """The candidate if done, or the first of those drawn before it that the row keeps."""

        def draw_again(state):
            candidate = merge_winners(self.part.exchange(DRAWN, tokens.draw(state[0], maximum)))
            return candidate, self.kept(tokens, candidate, maximum, total)

        return lax.while_loop(lambda state: ~state[1], draw_again, (candidate, done))[0]


class _Leaders:
    """The two largest tokens of each place of a chunk that are above a floor, and draws among them."""

    def __init__(self, row: _Sampler, logits, trips, floor, maximum):
        self.row, self.logits, self.trips = row, logits, trips
        self.above = [x > floor for x in logits]
        self.scores = [
            jnp.where(above & row.likely(x, maximum), row.score(i, x, maximum), LOWEST)
            for i, x, above in zip(trips, logits, self.above, strict=True)
        ]

    @staticmethod
    def scan(row: _Sampler):
        """First pass: maximum and softmax denominator, the largest logit that is no leader, logits and trips."""

        def also(i, x, shift, first, state):
            second, third, first_trip, second_trip = state
            leads, follows = x > first, x > second
            second_trip = jnp.where(leads, first_trip, jnp.where(follows, i, second_trip))
            third = jnp.maximum(third, jnp.minimum(x, second))
            second = jnp.maximum(second, jnp.minimum(x, first))
            return second, third, jnp.where(leads, i, first_trip), second_trip

        lowest, start = row.part.full(LOWEST), row.part.full(0, jnp.int32)
        maximum, total, _, first, (second, third, *trips) = row.part.softmax(
            row.factor, also, (lowest, lowest, start, start)
        )
        return maximum, total, jnp.max(third), (first, second), trips

    def weigh(self, candidate, maximum):
        pairs = zip(self.trips, self.logits, strict=True)
        return self._weigh([self.row.before(i, x, candidate) for i, x in pairs], maximum)

    def weigh_all(self, maximum):
        """Count and mass of the leaders, scalars float32."""
        return self._weigh(self.above, maximum)

    def count_above(self, pivots):
        """How many leaders are above each of the two pivots, scalars int32."""
        full, counts = self.row.part.full, self.row.part.full(0, jnp.int32)
        for x in self.logits:
            for pivot, unit in zip(pivots, (1, 2**16), strict=True):
                counts += jnp.where(x > pivot, full(unit, jnp.int32), full(0, jnp.int32))
        both = jnp.sum(counts)  # one reduction: a part has fewer than 2**16 leaders
        return both & (2**16 - 1), both >> 16

    def draw(self, candidate, maximum):
        triples = zip(self.trips, self.logits, self.scores, strict=True)
        return self._draw([jnp.where(self.row.before(i, x, candidate), s, LOWEST) for i, x, s in triples])

    def draw_all(self):
        """Score, token and logit of the noisy maximum among the likely leaders, scalars."""
        return self._draw(self.scores)

    def _weigh(self, among, maximum):
        count, mass = self.row.part.full(0.0), self.row.part.full(0.0)
        for x, of in zip(self.logits, among, strict=True):
            one = jnp.where(of, self.row.part.full(1.0), self.row.part.full(0.0))
            count, mass = count + one, mass + one * weight(x, maximum, self.row.factor)
        return jnp.sum(count), jnp.sum(mass)

    def _draw(self, scores):
        (first, second), (first_trip, second_trip) = scores, self.trips
        wins = (second > first) | ((second == first) & (second_trip < first_trip))
        best = jnp.where(wins, second, first), jnp.where(wins, second_trip, first_trip)
        score, token = self.row.winner(best)
        return score, token, self.row.part.value(token)


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


def _from_leaders(row: _Sampler):
    """Maximum, softmax denominator, candidate and whether it is the row's token; if not, all are before it."""
    *scanned, logits, trips = _Leaders.scan(row)
    reports = row.part.exchange(SCANNED, scanned)
    maximum, total = merge_softmax([report[:2] for report in reports], row.factor)
    floor = functools.reduce(jnp.maximum, [report[2] for report in reports])
    leaders = _Leaders(row, logits, trips, floor, maximum)
    pivots = _pivots(row, floor, maximum)
    reports = row.part.exchange(
        LED, (*leaders.draw_all(), *leaders.weigh_all(maximum), *leaders.count_above(pivots))
    )
    count, mass = (sum(report[i] for report in reports) for i in (3, 4))
    complete = (count >= row.top_k) | (mass > total * row.top_p)
    complete |= (floor <= LOWEST) | ~row.likely(floor, maximum)

    def settle():
        token, value = merge_winners([report[:3] for report in reports])
        bound = floor
        for i, pivot in enumerate(pivots):
            above = sum(report[5 + i] for report in reports)
            bound = jnp.where(above >= row.top_k, pivot, bound)
        behind = (value <= bound) & (token != NO_TOKEN)
        candidate = jnp.where(behind, -1, token), jnp.where(behind, bound, value)
        kept = lax.cond(
            behind, lambda: jnp.bool_(False), lambda: row.kept(leaders, candidate, maximum, total)
        )
        return row.settle(leaders, candidate, kept, maximum, total)

    token, value = lax.cond(complete, settle, lambda: (jnp.int32(NO_TOKEN), jnp.float32(-jnp.inf)))
    return maximum, total, token, value, complete


def _pivots(row: _Sampler, floor, maximum):
    """Two logits that should have a little more than top_k leaders above them, if the tail is exponential."""
    wanted = jnp.log(row.top_k) * (1.0 / math.log(TYPICAL))
    return [
        floor + (maximum - floor) * jnp.clip(1.0 - wanted - math.log(c) / math.log(TYPICAL), 0.0, 1.0)
        for c in (4.0, 1.5)
    ]


def _from_all(row: _Sampler):
    """Maximum, softmax denominator, candidate and whether it is the row's token."""
    reports = row.part.exchange(SCANNED, row.scan())
    maximum, total = merge_softmax([report[:2] for report in reports], row.factor)
    candidate = merge_winners(
        [(score + (top - maximum) * row.factor, *winner) for top, _, score, *winner in reports]
    )
    done = row.keeps_all | (maximum != maximum)
    done = lax.cond(done, lambda: jnp.bool_(True), lambda: row.kept(row, candidate, maximum, total))
    return maximum, total, *candidate, done


def _draw(part: RowPart, options, out_ref):
    row = _Sampler(part, options)
    first: Callable = functools.partial(_from_all, row)
    maximum, total, *candidate, done = lax.cond(row.leads, functools.partial(_from_leaders, row), first)
    bad = maximum != maximum
    token, _ = row.settle(row, tuple(candidate), done | bad, maximum, total)

    @pl.when(part.part == 0)
    def _store():
        none = token == NO_TOKEN  # nothing but -inf: any token will do
        out_ref[part.lane] = jnp.where(bad, -1, jnp.where(none, 0, token))


@functools.partial(jax.jit, static_argnames=("cut", "interpret"))
def _sample(logits, temperature, top_k, top_p, min_p, seeds, positions, cut, interpret):
    num_lanes, vocab_size = logits.shape
    greedy = temperature <= 0.0
    weighs = (top_k < vocab_size) | (top_p < 1.0)
    keeps_all = greedy | ~(weighs | (min_p > 0.0))
    leads = ~greedy & (top_k <= cut.parts * cut.chunk // 32)  # leaders with three of them in a place are rare
    factor = jnp.where(greedy, 1.0, 1.0 / jnp.where(greedy, 1.0, temperature))
    halves = [half for key in reference.row_keys(seeds, positions) for half in (key >> 16, key & 0xFFFF)]
    top_p = jnp.where(top_p < 1.0, top_p, jnp.inf)
    # One array, in one type that holds all of it, costs one kernel to make.
    numbers = [jnp.minimum(factor, 1e30), jnp.minimum(top_k, NO_TOKEN), top_p, jnp.minimum(min_p, 1.0)]
    options = [*numbers, greedy, keeps_all, weighs, leads, *halves]
    operands = (jnp.stack([option.astype(jnp.float32) for option in options]),)
    return row_parts.launch(_draw, cut, logits, operands, [((num_lanes,), jnp.int32)], 7, interpret)[0]
