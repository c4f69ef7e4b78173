"""Sampling kernel for Hopper: one block of threads per lane, no sort, as few passes over the logits as the draw needs.

The algorithm is the one of `reference.sample`: the first pass finds the noisy maximum of all tokens and the
softmax denominator; each further pass counts the tokens before the candidate and finds their noisy maximum, until
the candidate is kept. Greedy lanes and lanes without truncation are done after the first pass. The logits stream
from global memory into registers, a chunk per warpgroup at a time; the warpgroups meet once per pass.
"""

import functools
from dataclasses import dataclass

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import mosaic, reference
from kernels_pallas.mosaic import LOG2E

LOWEST = -3.0e38  # below every finite logit that matters, and finite
INT_MAX = 2**31 - 1


@dataclass(frozen=True)
class SampleConfig:
    """Tuning: tokens a warpgroup holds at once, and warpgroups per lane."""

    chunk: int = 1024
    warpgroups: int = 4


def unsupported(logits: jax.Array) -> str | None:
    """Why the kernel cannot take these logits; None if it can."""
    if logits.dtype != jnp.float32:
        return f"logits are {logits.dtype}, not float32"
    if logits.shape[1] % 8 or logits.shape[1] < 1024:
        return f"the vocabulary of {logits.shape[1]} is not a multiple of 8 of at least 1024"
    return None


def sample(logits, temperature, top_k, top_p, min_p, seeds, positions):
    """`kernels_pallas.sample` by the kernel; logits that `unsupported` accepts."""
    return _sample(logits, temperature, top_k, top_p, min_p, seeds, positions, SampleConfig(), None)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def _sample(logits, temperature, top_k, top_p, min_p, seeds, positions, config, interpret):
    num_lanes, vocab_size = logits.shape
    chunk, groups = config.chunk, config.warpgroups
    trips = -(-vocab_size // (chunk * groups))  # of each warpgroup; the last ones overlap their predecessors
    first_key, second_key = reference.row_keys(seeds, positions)
    greedy = temperature <= 0.0
    inverse = jnp.where(greedy, 1.0, 1.0 / jnp.where(greedy, 1.0, temperature)).astype(jnp.float32)
    all_tokens = greedy | ((top_k >= vocab_size) & (top_p >= 1.0) & (min_p <= 0.0))
    top_p = jnp.where(top_p < 1.0, top_p, jnp.inf)
    layout = plgpu.Layout.WG_STRIDED((chunk,), vec_size=4)

    def kernel(
        logits_ref,
        keys_ref,
        inverse_ref,
        noisiness_ref,
        all_ref,
        top_k_ref,
        top_p_ref,
        min_p_ref,
        out_ref,
        *scratch,
    ):
        maxima, denominators, bests, ids, counts, masses, ready, consumed, out_smem = scratch
        lane, thread = lax.axis_index("lane"), lax.axis_index("thread")
        first, second = keys_ref[0, lane], keys_ref[1, lane]
        factor = inverse_ref[lane]
        noisiness = noisiness_ref[lane]

        def full(value, dtype):
            return plgpu.layout_cast(jnp.full((chunk,), value, dtype), layout)

        def load(trip):
            """Logits and token ids [chunk] of a trip, and which of them no earlier chunk has seen."""
            begin = (trip * groups + thread) * chunk
            start = lax.min(begin, jnp.int32(vocab_size - chunk))
            x = plgpu.load(logits_ref.at[lane, pl.ds(start, chunk)], layout=layout, optimized=False)
            token = start + plgpu.broadcasted_iota(jnp.int32, (chunk,), 0, layout=layout)
            return x, token, token >= begin

        def noise(token):
            bits = reference.hash_tokens(first, second, token.astype(jnp.uint32))
            return reference.gumbel_from_bits(bits)

        def better(fresh, score, token, state):
            best, best_token = state
            wins = fresh & (score > best)  # ids rise, so ties keep the lowest
            return jnp.where(wins, score, best), jnp.where(wins, token, best_token)

        def meet(values):
            """Leave this warpgroup's scalars for the others and wait for theirs."""
            for ref, value in values:
                ref[thread] = value
            plgpu.barrier_arrive(ready)
            plgpu.barrier_wait(ready)

        def part():
            """All warpgroups have read: the scalars may be overwritten."""
            plgpu.barrier_arrive(consumed)
            plgpu.barrier_wait(consumed)

        def winner(state):
            """Largest score of all warpgroups and its lowest token id, from this warpgroup's [chunk] state."""
            best, best_token = state
            top = jnp.max(best)
            token = -jnp.max(jnp.where(best == top, -best_token, -INT_MAX))
            return top, token

        def combine():
            top, token = bests[0], ids[0]
            for g in range(1, groups):
                wins = (bests[g] > top) | ((bests[g] == top) & (ids[g] < token))
                top = jnp.where(wins, bests[g], top)
                token = jnp.where(wins, ids[g], token)
            return token

        def nothing():
            return full(LOWEST, jnp.float32), full(INT_MAX, jnp.int32)

        def first_pass(trip, state):
            maximum, denominator, best = state
            x, token, fresh = load(trip)
            new_maximum = jnp.maximum(maximum, jnp.where(fresh, x, LOWEST))
            decay = jnp.exp2((maximum - new_maximum) * (factor * LOG2E))
            weight = jnp.exp2((x - new_maximum) * (factor * LOG2E))
            denominator = denominator * decay + jnp.where(fresh, weight, 0.0)
            score = x * factor + noise(token) * noisiness
            return new_maximum, denominator, better(fresh, score, token, best)

        state = (full(LOWEST, jnp.float32), full(0.0, jnp.float32), nothing())
        maximum, denominator, best = lax.fori_loop(0, trips, first_pass, state)
        group_maximum = jnp.max(maximum)
        group_sum = jnp.sum(denominator * jnp.exp2((maximum - group_maximum) * (factor * LOG2E)))
        top, token = winner(best)
        meet([(maxima, group_maximum), (denominators, group_sum), (bests, top), (ids, token)])
        row_maximum = maxima[0]
        for g in range(1, groups):
            row_maximum = jnp.maximum(row_maximum, maxima[g])
        total = jnp.float32(0.0)
        for g in range(groups):
            total += denominators[g] * jnp.exp2((maxima[g] - row_maximum) * (factor * LOG2E))
        token = combine()
        part()
        bad = total != total  # a NaN logit, or two infinities
        budget = total * top_p_ref[lane]
        limit, least = top_k_ref[lane], min_p_ref[lane]

        def unsettled(state):
            return ~state[1]

        def check(state):
            token, _ = state
            candidate = logits_ref[lane, token]

            def count_before(trip, state):
                count, mass, best = state
                x, ids, fresh = load(trip)
                before = fresh & ((x > candidate) | ((x == candidate) & (ids < token)))
                count += before.astype(jnp.int32)
                weight = jnp.exp2((x - row_maximum) * (factor * LOG2E))
                mass += jnp.where(before, weight, 0.0)
                return count, mass, better(before, x * factor + noise(ids), ids, best)

            state = (full(0, jnp.int32), full(0.0, jnp.float32), nothing())
            count, mass, best = lax.fori_loop(0, trips, count_before, state)
            top, token_before = winner(best)
            meet([(counts, jnp.sum(count)), (masses, jnp.sum(mass)), (bests, top), (ids, token_before)])
            count, mass = counts[0], masses[0]
            for g in range(1, groups):
                count, mass = count + counts[g], mass + masses[g]
            weight = jnp.exp2((candidate - row_maximum) * (factor * LOG2E))
            kept = ((count < limit) & (mass <= budget) & (weight >= least)) | (count == 0)
            token = jnp.where(kept, token, combine())
            part()
            return token, kept

        done = (all_ref[lane] != 0) | bad
        token, _ = lax.while_loop(unsettled, check, (token, done))

        @pl.when(thread == 0)
        def _store():
            out_smem[...] = jnp.full((128,), jnp.where(bad, -1, token), jnp.int32)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem, out_ref.at[lane])
            plgpu.wait_smem_to_gmem(0)

    keys = jnp.stack([first_key, second_key])
    operands = (
        logits,
        keys,
        inverse,
        jnp.where(greedy, 0.0, 1.0).astype(jnp.float32),  # greedy scores carry no noise
        all_tokens.astype(jnp.int32),
        top_k,
        top_p.astype(jnp.float32),
        min_p,
    )
    launch = plgpu.kernel(
        kernel,
        out_type=mosaic.out_like((num_lanes, 128), jnp.int32, *operands),
        grid=(num_lanes,),
        grid_names=("lane",),
        num_threads=groups,
        thread_name="thread",
        scratch_types=[
            plgpu.SMEM((groups,), jnp.float32),
            plgpu.SMEM((groups,), jnp.float32),
            plgpu.SMEM((groups,), jnp.float32),
            plgpu.SMEM((groups,), jnp.int32),
            plgpu.SMEM((groups,), jnp.int32),
            plgpu.SMEM((groups,), jnp.float32),
            plgpu.Barrier(num_arrivals=groups),
            plgpu.Barrier(num_arrivals=groups),
            plgpu.SMEM((128,), jnp.int32),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return launch(*operands)[:, 0]
