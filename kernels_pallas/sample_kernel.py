"""Sampling kernels for Hopper: no sort, and as few passes over the logits as the draw needs.

The algorithm is the one of `reference.sample`. Three launches cut the rows into parts, so that a batch of one
uses the chip as well as a large one: `scan` reads every part of a row for its noisy maximum and softmax
denominator; `check` counts, again by parts, the tokens before that candidate and finds their noisy maximum;
`settle` decides, one block of threads per row, and goes on alone for the few rows whose candidate is not
kept. Greedy rows and rows without truncation are done after `scan`, which draws no noise for greedy rows.

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


def unsupported(logits: jax.Array) -> str | None:
    """Why the kernels cannot take these logits; None if they can."""
    if logits.dtype != jnp.float32:
        return f"logits are {logits.dtype}, not float32"
    if logits.shape[1] % 8 or not CHUNK <= logits.shape[1] < NO_TOKEN:
        return f"the vocabulary of {logits.shape[1]} is not a multiple of 8 from {CHUNK} to {NO_TOKEN}"
    return None


def sample(logits, temperature, top_k, top_p, min_p, seeds, positions):
    """`kernels_pallas.sample` by the kernels; logits that `unsupported` accepts."""
    parts = max(1, min(16, 1024 // max(logits.shape[0], 1)))
    return _sample(logits, temperature, top_k, top_p, min_p, seeds, positions, CHUNK, parts, None)


class _Row:
    """The row of one block of threads: its options, and passes over a range of its logits."""

    def __init__(self, inputs, chunk: int):
        logits_ref, keys_ref, options_ref, limits_ref = inputs
        self.lane = lax.axis_index("lane")
        self.logits_ref, self.chunk, self.vocab_size = logits_ref, chunk, logits_ref.shape[1]
        self.keys = keys_ref[0, self.lane], keys_ref[1, self.lane]
        self.factor, self.top_p, self.min_p = (options_ref[i, self.lane] for i in range(3))
        self.top_k, self.greedy, self.keeps_all = (limits_ref[i, self.lane] for i in range(3))
        self.layout = plgpu.Layout.WG_STRIDED((chunk,), vec_size=4)

    def full(self, value, dtype):
        return plgpu.layout_cast(jnp.full((self.chunk,), value, dtype), self.layout)

    def nothing(self):
        """The state of `better` before any token."""
        return self.full(LOWEST, jnp.float32), self.full(NO_TOKEN, jnp.int32)

    def _load(self, start):
        source = self.logits_ref.at[self.lane, pl.ds(start, self.chunk)]
        return plgpu.load(source, layout=self.layout, optimized=False)

    def fold(self, begin, trips, step, state):
        """step(x, tokens, fresh, state) over `trips` chunks from token `begin`; fresh: not seen before.

        The chunk at the end of the row overlaps its predecessor. Each chunk is loaded a trip ahead.
        """
        last = jnp.int32(self.vocab_size - self.chunk)

        def trip(i, carry):
            x, state = carry
            following = self._load(lax.min(begin + (i + 1) * self.chunk, last))
            start = lax.min(begin + i * self.chunk, last)
            tokens = start + plgpu.broadcasted_iota(jnp.int32, (self.chunk,), 0, layout=self.layout)
            return following, step(x, tokens, tokens >= begin + i * self.chunk, state)

        return lax.fori_loop(0, trips, trip, (self._load(lax.min(begin, last)), state))[1]

    def weight(self, x, maximum):
        return jnp.exp2((x - maximum) * (self.factor * LOG2E))

    def score(self, x, tokens):
        bits = reference.hash_tokens(*self.keys, tokens.astype(jnp.uint32))
        return x * self.factor + reference.gumbel_from_bits(bits)

    def scan(self, begin, trips):
        """Maximum, denominator (NaN: a bad row), best score and its token, scalars, of a range."""

        def step(x, tokens, fresh, state):
            maximum, denominator, best = state
            new_maximum = jnp.maximum(maximum, jnp.where(fresh, x, LOWEST))
            weight = jnp.where(fresh, self.weight(x, new_maximum), 0.0)
            denominator = denominator * self.weight(maximum, new_maximum) + weight
            return new_maximum, denominator, better(fresh, self.score(x, tokens), tokens, best)

        def greedy_step(x, tokens, fresh, state):
            maximum, denominator, best = state
            return maximum, denominator + (x - x), better(fresh, x, tokens, best)

        state = (self.full(LOWEST, jnp.float32), self.full(0.0, jnp.float32), self.nothing())
        maxima, denominators, best = lax.cond(
            self.greedy != 0,
            lambda: self.fold(begin, trips, greedy_step, state),
            lambda: self.fold(begin, trips, step, state),
        )
        maximum = jnp.max(maxima)
        return maximum, jnp.sum(denominators * self.weight(maxima, maximum)), *winner(best)

    def check(self, begin, trips, token, maximum):
        """Count and mass of the tokens before `token` in a range, their best score and its token, scalars."""
        candidate = self.logits_ref[self.lane, token]

        def step(x, tokens, fresh, state):
            count, mass, best = state
            before = fresh & ((x > candidate) | ((x == candidate) & (tokens < token)))
            mass += jnp.where(before, self.weight(x, maximum), 0.0)
            score = self.score(x, tokens)
            return count + before.astype(jnp.int32), mass, better(before, score, tokens, best)

        state = (self.full(0, jnp.int32), self.full(0.0, jnp.float32), self.nothing())
        counts, masses, best = self.fold(begin, trips, step, state)
        return jnp.sum(counts), jnp.sum(masses), *winner(best)

    def kept(self, token, count, mass, maximum, total):
        """Whether a token with this much before it is kept; the first token always is."""
        likely = self.weight(self.logits_ref[self.lane, token], maximum) >= self.min_p
        return ((count < self.top_k) & (mass <= total * self.top_p) & likely) | (count == 0)


def better(among, scores, tokens, state):
    best, best_tokens = state
    wins = among & (scores > best)  # ids rise, so ties keep the lowest
    return jnp.where(wins, scores, best), jnp.where(wins, tokens, best_tokens)


def winner(state):
    """Largest score and its lowest token id, scalars."""
    best, best_tokens = state
    top = jnp.max(best)
    return top, -jnp.max(jnp.where(best == top, -best_tokens, -NO_TOKEN))


def merge_winners(reports):
    """Token int32 of the largest of the (score, token) reports, the lowest id among equals."""
    score, token = reports[0]
    for other_score, other_token in reports[1:]:
        wins = (other_score > score) | ((other_score == score) & (other_token < token))
        score, token = jnp.where(wins, other_score, score), jnp.where(wins, other_token, token)
    token = token.astype(jnp.int32)
    # Nothing but -inf or NaN: any token will do, but its address must be in range.
    return jnp.where(token == NO_TOKEN, 0, token)


def merge_scans(row, scans_ref, parts: int):
    """Maximum, softmax denominator and candidate of a row from the reports of its parts."""
    reports = [[scans_ref[row.lane, part, i] for i in range(4)] for part in range(parts)]
    maximum = functools.reduce(jnp.maximum, [report[0] for report in reports])
    total = sum(report[1] * row.weight(report[0], maximum) for report in reports)
    return maximum, total, merge_winners([report[2:] for report in reports])


@functools.partial(jax.jit, static_argnames=("chunk", "parts", "interpret"))
def _sample(logits, temperature, top_k, top_p, min_p, seeds, positions, chunk, parts, interpret):
    num_lanes, vocab_size = logits.shape
    trips = -(-vocab_size // chunk)
    share = -(-trips // parts)  # trips of a part
    greedy = temperature <= 0.0
    keeps_all = greedy | ((top_k >= vocab_size) & (top_p >= 1.0) & (min_p <= 0.0))
    factor = jnp.where(greedy, 1.0, 1.0 / jnp.where(greedy, 1.0, temperature))
    operands = (
        logits,
        jnp.stack(reference.row_keys(seeds, positions)),
        jnp.stack([factor, jnp.where(top_p < 1.0, top_p, jnp.inf), min_p]).astype(jnp.float32),
        jnp.stack([top_k, greedy, keeps_all]).astype(jnp.int32),
    )

    def part_range():
        """First token and trips of this block's part of the row."""
        first_trip = lax.axis_index("part") * share
        return first_trip * chunk, lax.max(lax.min(trips - first_trip, jnp.int32(share)), jnp.int32(0))

    def report(values, smem, ref):
        for i, value in enumerate(values):
            smem[i] = value.astype(jnp.float32)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem, ref)
        plgpu.wait_smem_to_gmem(0)

    def scan(*refs):
        *inputs, out_ref, smem = refs
        row = _Row(inputs, chunk)
        report(row.scan(*part_range()), smem, out_ref.at[row.lane, lax.axis_index("part")])

    def check(*refs):
        *inputs, scans_ref, out_ref, smem = refs
        row = _Row(inputs, chunk)

        @pl.when(row.keeps_all == 0)
        def _():
            maximum, _, token = merge_scans(row, scans_ref, parts)
            begin, part_trips = part_range()
            values = row.check(begin, part_trips, token, maximum)
            report(values, smem, out_ref.at[row.lane, lax.axis_index("part")])

    def settle(*refs):
        *inputs, scans_ref, checks_ref, out_ref, smem = refs
        row = _Row(inputs, chunk)
        maximum, total, token = merge_scans(row, scans_ref, parts)
        bad = total != total  # a NaN among the logits

        def first_check():
            reports = [[checks_ref[row.lane, part, i] for i in range(4)] for part in range(parts)]
            count = sum(report[0] for report in reports).astype(jnp.int32)
            kept = row.kept(token, count, sum(report[1] for report in reports), maximum, total)
            return jnp.where(kept, token, merge_winners([report[2:] for report in reports])), kept

        def check_again(state):
            token, _ = state
            count, mass, _, following = row.check(jnp.int32(0), trips, token, maximum)
            kept = row.kept(token, count, mass, maximum, total)
            return jnp.where(kept, token, following), kept

        done = (row.keeps_all != 0) | bad
        state = lax.cond(done, lambda: (token, jnp.bool_(True)), first_check)
        token, _ = lax.while_loop(lambda state: ~state[1], check_again, state)
        smem[...] = jnp.full((128,), jnp.where(bad, -1, token), jnp.int32)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem, out_ref.at[row.lane])
        plgpu.wait_smem_to_gmem(0)

    def launch(body, out_shape, dtype, grid, *args):
        return plgpu.kernel(
            body,
            out_type=mosaic.out_like(out_shape, dtype, *args),
            grid=grid,
            grid_names=("lane", "part")[: len(grid)],
            num_threads=1,
            thread_name="thread",
            scratch_types=[plgpu.SMEM((out_shape[-1],), dtype)],
            compiler_params=plgpu.CompilerParams(approx_math=True),
            interpret=interpret,
        )(*args)

    reports, by_part = (num_lanes, parts, 4), (num_lanes, parts)
    scans = launch(scan, reports, jnp.float32, by_part, *operands)
    checks = launch(check, reports, jnp.float32, by_part, *operands, scans)
    return launch(settle, (num_lanes, 128), jnp.int32, (num_lanes,), *operands, scans, checks)[:, 0]
