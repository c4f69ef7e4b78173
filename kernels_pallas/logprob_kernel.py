"""Log-probabilities of chosen and likeliest tokens on Hopper: one read of the logits, no sort.

Rows are held in shared memory (see `row_parts`). The first pass finds the softmax denominator and, for each of
the places of a chunk, the best token that the place holds in any chunk. The best place then gives its token
and looks up its next one, as often as tokens are wanted; the first part of the row merges these short lists.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import row_parts
from kernels_pallas.lowering import lower_once
from kernels_pallas.reference import LogProbabilities
from kernels_pallas.row_parts import NO_TOKEN, Cut, RowPart, merge_softmax

MOST = 64  # tokens per row; more are better sorted


def unsupported(logits: jax.Array, top_n: int) -> str | None:
    """Why the kernel cannot take these operands; None if it can."""
    if top_n > MOST:
        return f"top_n {top_n} is above {MOST}"
    return row_parts.unsupported(logits)


def log_probabilities(logits, tokens, temperature, top_n):
    """`kernels_pallas.log_probabilities` by the kernel; operands that `unsupported` accepts."""
    return _log_probabilities(logits, tokens, temperature, top_n, Cut(logits.shape[1]), None)


def _best_of_places(part: RowPart, factor):
    """Maximum and softmax denominator, scalars; best logit of each place of a chunk, and its token."""

    def step(i, x, shift, maxima, state):
        best, trips = state
        wins = x > best
        return jnp.where(wins, x, best), jnp.where(wins, i, trips)

    nothing = part.full(-jnp.inf), part.full(0, jnp.int32)
    maximum, total, _, _, (best, trips) = part.softmax(factor, step, nothing)
    return maximum, total, best, part.tokens(trips)


def _next_of_place(part: RowPart, value, token):
    """The logit and token that follow in the order among the tokens of the same place, scalars."""
    place = lax.rem(token - part.first_token, jnp.int32(part.chunk))
    best, best_token = jnp.float32(-jnp.inf), jnp.int32(NO_TOKEN)
    for i in range(part.smem.shape[0]):
        x, other = part.smem[i, place], part.first_token + i * part.chunk + place
        behind = (i < part.trips) & ((x < value) | ((x == value) & (other > token)))
        wins = behind & ((x > best) | (best_token == NO_TOKEN))
        best, best_token = jnp.where(wins, x, best), jnp.where(wins, other, best_token)
    return place, best, best_token


def _collect(part: RowPart, best, tokens, top_n: int):
    """Put the part's `top_n` best logits, then their tokens, into its report behind the softmax."""

    def take(j, state):
        best, tokens = state
        value = jnp.max(best)
        token = -jnp.max(jnp.where(best == value, -tokens, -NO_TOKEN))
        part.report(2 + j, value)
        part.report(2 + top_n + j, token.astype(jnp.float32))
        place, following, following_token = _next_of_place(part, value, token)
        here = part.places() == place
        return jnp.where(here, following, best), jnp.where(here, following_token, tokens)

    lax.fori_loop(0, top_n, take, (best, tokens))


def _merge(part: RowPart, top_n: int, put):
    """put(j, value, token) for the row's `top_n` best logits, in order, from the reports of all parts."""

    def take(j, heads):
        value, token, source = jnp.float32(-jnp.inf), jnp.int32(NO_TOKEN + 1), jnp.int32(0)
        for p, head in enumerate(heads):
            other = part.theirs[0, p, 2 + head]
            other_token = part.theirs[0, p, 2 + top_n + head].astype(jnp.int32)
            wins = (other > value) | ((other == value) & (other_token < token))
            value, token = jnp.where(wins, other, value), jnp.where(wins, other_token, token)
            source = jnp.where(wins, p, source)
        put(j, value, token)
        return tuple(head + (source == p).astype(jnp.int32) for p, head in enumerate(heads))

    lax.fori_loop(0, top_n, take, (jnp.int32(0),) * part.parts)


def _report(part: RowPart, tokens_ref, factor_ref, values_ref, ids_ref, chosen_ref, normaliser_ref, *, top_n):
    part.fetch()
    factor = factor_ref[part.lane]
    maximum, total, best, tokens = _best_of_places(part, factor)
    _collect(part, best, tokens, top_n)
    reports = part.exchange(0, (maximum, total))

    @pl.when(part.part == 0)
    def _store():
        maximum, total = merge_softmax(reports, factor)
        normaliser = maximum * factor + jnp.log(total)
        normaliser_ref[part.lane] = normaliser
        chosen = part.logits_ref[part.lane, jnp.maximum(tokens_ref[part.lane], 0)]
        chosen_ref[part.lane] = chosen * factor - normaliser

        def put(j, value, token):
            values_ref[part.lane, j] = value * factor - normaliser
            ids_ref[part.lane, j] = token

        _merge(part, top_n, put)


@lower_once("top_n", "cut", "interpret")
def _log_probabilities(logits, tokens, temperature, top_n, cut, interpret):
    num_lanes = logits.shape[0]
    operands = (
        jnp.clip(tokens, -1, logits.shape[1] - 1),
        1.0 / jnp.where(temperature > 0.0, temperature, 1.0),
    )
    top, lanes = (num_lanes, max(top_n, 1)), (num_lanes,)
    outputs = [(top, jnp.float32), (top, jnp.int32), (lanes, jnp.float32), (lanes, jnp.float32)]
    body = functools.partial(_report, top_n=top_n)
    values, ids, chosen, normaliser = row_parts.launch(
        body, cut, logits, operands, outputs, 2 + 2 * top_n, interpret
    )
    return LogProbabilities(chosen, values[:, :top_n], ids[:, :top_n], normaliser)
