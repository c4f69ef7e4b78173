"""How a row's token is drawn, whatever part of its logits a kernel holds: the passes that the draws share."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
from jax import lax

from kernels_pallas import reference
from kernels_pallas.row_parts import LOWEST, NO_TOKEN, Cut, weight

DRAWN, WEIGHED = 2, 3  # exchanges between the parts of a row
KEPT, REJECTED, UNKNOWN = range(3)  # verdicts on a candidate


class Part(Protocol):
    """Some logits of a row, as `RowPart` has them; i, or trips, is what tells the tokens of a fold's x."""

    lane: Any

    def full(self, value, dtype=...) -> Any: ...
    def tokens(self, trips) -> Any: ...
    def value(self, token) -> Any: ...
    def fold(self, step: Callable, state) -> Any: ...
    def exchange(self, turn, values: Sequence) -> list[list]: ...


class Sampler:
    """The options of a row, and the passes over one part of it that draw its token.

    A candidate is a (token, logit).
    """

    def __init__(self, part: Part, options):
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

    def fold(self, leading, step: Callable, state):
        """step(trips, x, state) over all tokens of the part."""
        del leading
        return self.part.fold(step, state)

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


def options_of(temperature, top_k, top_p, min_p, seeds, positions, cut: Cut):
    """What a `Sampler` reads of each lane, [12, B] float32."""
    greedy = temperature <= 0.0
    weighs = (top_k < cut.vocab_size) | (top_p < 1.0)
    keeps_all = greedy | ~(weighs | (min_p > 0.0))
    leads = ~greedy & (top_k <= cut.parts * cut.chunk // 4)
    factor = jnp.where(greedy, 1.0, 1.0 / jnp.where(greedy, 1.0, temperature))
    halves = [half for key in reference.row_keys(seeds, positions) for half in (key >> 16, key & 0xFFFF)]
    top_p = jnp.where(top_p < 1.0, top_p, jnp.inf)
    # One array, in one type that holds all of it, costs one kernel to make.
    numbers = [jnp.minimum(factor, 1e30), jnp.clip(top_k, 1, NO_TOKEN), top_p, jnp.minimum(min_p, 1.0)]
    options = [*numbers, greedy, keeps_all, weighs, leads, *halves]
    return jnp.stack([option.astype(jnp.float32) for option in options])
