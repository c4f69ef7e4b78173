"""Sampling kernel for Hopper: one block of threads per lane, no sort, as few passes as the draw needs.

The algorithm is the one of `reference.sample`: the first pass finds the noisy maximum of all tokens and the
softmax denominator; each further pass counts the tokens before the candidate and finds their noisy maximum,
until the candidate is kept. Greedy lanes and lanes without truncation are done after the first pass. The
logits stream from global memory into registers. A lane has a single warpgroup: Mosaic's reductions of whole
arrays go through one scratch buffer that the warpgroups of a block would share.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import mosaic, reference
from kernels_pallas.mosaic import LOG2E

LOWEST = -3.0e38  # below every finite logit that matters, and finite
INT_MAX = 2**31 - 1
CHUNK = 2048  # tokens in registers at once


def unsupported(logits: jax.Array) -> str | None:
    """Why the kernel cannot take these logits; None if it can."""
    if logits.dtype != jnp.float32:
        return f"logits are {logits.dtype}, not float32"
    if logits.shape[1] % 8 or logits.shape[1] < CHUNK:
        return f"the vocabulary of {logits.shape[1]} is not a multiple of 8 of at least {CHUNK}"
    return None


def sample(logits, temperature, top_k, top_p, min_p, seeds, positions):
    """`kernels_pallas.sample` by the kernel; logits that `unsupported` accepts."""
    return _sample(logits, temperature, top_k, top_p, min_p, seeds, positions, CHUNK, None)


@functools.partial(jax.jit, static_argnames=("chunk", "interpret"))
def _sample(logits, temperature, top_k, top_p, min_p, seeds, positions, chunk, interpret):
    num_lanes, vocab_size = logits.shape
    trips = -(-vocab_size // chunk)  # the last one overlaps its predecessor
    first_key, second_key = reference.row_keys(seeds, positions)
    greedy = temperature <= 0.0
    inverse = jnp.where(greedy, 1.0, 1.0 / jnp.where(greedy, 1.0, temperature)).astype(jnp.float32)
    all_tokens = greedy | ((top_k >= vocab_size) & (top_p >= 1.0) & (min_p <= 0.0))
    top_p = jnp.where(top_p < 1.0, top_p, jnp.inf)
    layout = plgpu.Layout.WG_STRIDED((chunk,), vec_size=4)

    def kernel(
        logits_ref, keys_ref, inverse_ref, noisiness_ref, all_ref, top_k_ref, top_p_ref, min_p_ref, *refs
    ):
        out_ref, out_smem = refs
        lane = lax.axis_index("lane")
        first, second = keys_ref[0, lane], keys_ref[1, lane]
        factor, noisiness = inverse_ref[lane], noisiness_ref[lane]

        def full(value, dtype):
            return plgpu.layout_cast(jnp.full((chunk,), value, dtype), layout)

        def load(trip):
            """Logits and token ids [chunk] of a trip, and which of them no earlier trip has seen."""
            begin = trip * chunk
            start = lax.min(begin, jnp.int32(vocab_size - chunk))
            x = plgpu.load(logits_ref.at[lane, pl.ds(start, chunk)], layout=layout, optimized=False)
            token = start + plgpu.broadcasted_iota(jnp.int32, (chunk,), 0, layout=layout)
            return x, token, token >= begin

        def score(x, token):
            bits = reference.hash_tokens(first, second, token.astype(jnp.uint32))
            return x * factor + reference.gumbel_from_bits(bits) * noisiness

        def better(among, scores, token, state):
            best, best_token = state
            wins = among & (scores > best)  # ids rise, so ties keep the lowest
            return jnp.where(wins, scores, best), jnp.where(wins, token, best_token)

        def winner(state):
            """Lowest token id of the largest score."""
            best, best_token = state
            return -jnp.max(jnp.where(best == jnp.max(best), -best_token, -INT_MAX))

        def nothing():
            return full(LOWEST, jnp.float32), full(INT_MAX, jnp.int32)

        def first_pass(trip, state):
            maximum, denominator, best = state
            x, token, fresh = load(trip)
            new_maximum = jnp.maximum(maximum, jnp.where(fresh, x, LOWEST))
            decay = jnp.exp2((maximum - new_maximum) * (factor * LOG2E))
            weight = jnp.exp2((x - new_maximum) * (factor * LOG2E))
            denominator = denominator * decay + jnp.where(fresh, weight, 0.0)
            return new_maximum, denominator, better(fresh, score(x, token), token, best)

        state = (full(LOWEST, jnp.float32), full(0.0, jnp.float32), nothing())
        maxima, denominators, best = lax.fori_loop(0, trips, first_pass, state)
        maximum = jnp.max(maxima)
        total = jnp.sum(denominators * jnp.exp2((maxima - maximum) * (factor * LOG2E)))
        bad = total != total  # a NaN among the logits
        # A row of nothing but -inf or NaN has no winner; token 0 keeps the address below in range.
        token = winner(best)
        token = jnp.where(token == INT_MAX, 0, token)
        budget = total * top_p_ref[lane]
        limit, least = top_k_ref[lane], min_p_ref[lane]

        def check(state):
            token, _ = state
            candidate = logits_ref[lane, token]

            def count_before(trip, state):
                count, mass, best = state
                x, ids, fresh = load(trip)
                before = fresh & ((x > candidate) | ((x == candidate) & (ids < token)))
                weight = jnp.exp2((x - maximum) * (factor * LOG2E))
                count += before.astype(jnp.int32)
                mass += jnp.where(before, weight, 0.0)
                return count, mass, better(before, score(x, ids), ids, best)

            state = (full(0, jnp.int32), full(0.0, jnp.float32), nothing())
            counts, masses, best = lax.fori_loop(0, trips, count_before, state)
            count, mass = jnp.sum(counts), jnp.sum(masses)
            weight = jnp.exp2((candidate - maximum) * (factor * LOG2E))
            kept = ((count < limit) & (mass <= budget) & (weight >= least)) | (count == 0)
            return jnp.where(kept, token, winner(best)), kept

        done = (all_ref[lane] != 0) | bad
        token, _ = lax.while_loop(lambda state: ~state[1], check, (token, done))
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
        scratch_types=[plgpu.SMEM((128,), jnp.int32)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return launch(*operands)[:, 0]
