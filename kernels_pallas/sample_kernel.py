"""The sampling kernel for Hopper: one read of the logits, no sort.

The algorithm is the one of `reference.sample`, over rows held in shared memory (see `row_parts`). The first
pass finds maximum, softmax denominator and the noisy maximum of all tokens. Rows that truncate then count the
tokens before that candidate and their mass, and draw again among them while it is not kept. Greedy rows draw
no noise.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import reference, row_parts
from kernels_pallas.row_parts import LOWEST, NO_TOKEN, Cut, RowPart, merge_softmax, weight

unsupported = row_parts.unsupported


def sample(logits, temperature, top_k, top_p, min_p, seeds, positions):
    """`kernels_pallas.sample` by the kernel; logits that `unsupported` accepts."""
    operands = (logits, temperature, top_k, top_p, min_p, seeds, positions)
    return _sample(*operands, Cut(logits.shape[1]), None)


class _Sampler:
    """The options of a row, and the passes over one part of it that draw its token."""

    def __init__(self, part: RowPart, options):
        self.part = part
        values = [options[i, part.lane] for i in range(options.shape[0])]
        self.factor, self.top_k, self.top_p, self.min_p, self.greedy, self.keeps_all, *halves = values
        halves = [half.astype(jnp.int32).astype(jnp.uint32) for half in halves]
        self.keys = halves[0] * 2**16 + halves[1], halves[2] * 2**16 + halves[3]

    def score(self, i, x, shift):
        """Noisy logits over temperature; the shift, a logit near the maximum, leaves room for the noise."""
        bits = reference.hash_tokens(*self.keys, self.part.tokens(i).astype(jnp.uint32))
        return (x - shift) * self.factor + reference.gumbel_from_bits(bits)

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
            def also(i, x, shift, best):
                return better(True, i, self.score(i, x, shift), best)

            maximum, total, shift, best = self.part.softmax(self.factor, also, self.nothing())
            score, token = self.winner(best)
            return maximum, total, score + (shift - maximum) * self.factor, token

        maximum, total, score, token = lax.cond(self.greedy != 0, greedy, noisy)
        return maximum, total, score, token, self.part.value(token)

    def before(self, i, x, candidate):
        token, value = candidate
        return (x > value) | ((x == value) & (self.part.tokens(i) < token))

    def weigh(self, candidate, maximum):
        """Count and mass of the tokens before the candidate, scalars float32."""

        def step(i, x, state):
            count, mass = state
            before = jnp.where(self.before(i, x, candidate), self.part.full(1.0), self.part.full(0.0))
            return count + before, mass + before * weight(x, maximum, self.factor)

        counts, masses = self.part.fold(step, (self.part.full(0.0), self.part.full(0.0)))
        return jnp.sum(counts), jnp.sum(masses)

    def draw(self, candidate, maximum):
        """Score, token and logit of the `winner` among the tokens before the candidate, scalars."""

        def step(i, x, best):
            return better(self.before(i, x, candidate), i, self.score(i, x, maximum), best)

        score, token = self.winner(self.part.fold(step, self.nothing()))
        return score, token, self.part.value(token)

    def winner(self, state):
        """Largest score and its lowest token id (NO_TOKEN: none), scalars."""
        best, trips = state
        top = jnp.max(best)
        token = -jnp.max(jnp.where(best == top, -self.part.tokens(trips), -NO_TOKEN))
        return top, jnp.where(top > LOWEST, token, NO_TOKEN)


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


def _draw(part: RowPart, options, out_ref):
    row = _Sampler(part, options)
    reports = part.exchange(0, row.scan())
    maximum, total = merge_softmax([report[:2] for report in reports], row.factor)
    candidate = merge_winners(
        [(score + (top - maximum) * row.factor, *winner) for top, _, score, *winner in reports]
    )
    bad = maximum != maximum

    def kept(candidate):
        reports = part.exchange(1, row.weigh(candidate, maximum))
        count, mass = (sum(report[i] for report in reports) for i in range(2))
        likely = weight(candidate[1], maximum, row.factor) >= row.min_p
        within = (count < row.top_k) & (mass <= total * row.top_p) & likely
        return within | (count == 0.0)  # the first token is always kept

    def draw_again(state):
        candidate = merge_winners(part.exchange(0, row.draw(state[0], maximum)))
        return candidate, kept(candidate)

    done = (row.keeps_all != 0) | bad
    done = lax.cond(done, lambda: jnp.bool_(True), lambda: kept(candidate))
    (token, _), _ = lax.while_loop(lambda state: ~state[1], draw_again, (candidate, done))

    @pl.when(part.part == 0)
    def _store():
        out_ref[part.lane] = jnp.where(bad, -1, token)


@functools.partial(jax.jit, static_argnames=("cut", "interpret"))
def _sample(logits, temperature, top_k, top_p, min_p, seeds, positions, cut, interpret):
    num_lanes, vocab_size = logits.shape
    greedy = temperature <= 0.0
    keeps_all = greedy | ((top_k >= vocab_size) & (top_p >= 1.0) & (min_p <= 0.0))
    factor = jnp.where(greedy, 1.0, 1.0 / jnp.where(greedy, 1.0, temperature))
    halves = [half for key in reference.row_keys(seeds, positions) for half in (key >> 16, key & 0xFFFF)]
    top_p = jnp.where(top_p < 1.0, top_p, jnp.inf)
    # One array, in one type that holds all of it, costs one kernel to make.
    options = [factor, jnp.minimum(top_k, NO_TOKEN), top_p, min_p, greedy, keeps_all, *halves]
    operands = (jnp.stack([option.astype(jnp.float32) for option in options]),)
    return row_parts.launch(_draw, cut, logits, operands, [((num_lanes,), jnp.int32)], 5, interpret)[0]
