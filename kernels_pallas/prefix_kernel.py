"""Attention of all lanes' queries over a prefix that they have in common, whose pages are read once for all.

The lanes are the tokens of one row of the prefill kernel, all of whose keys every query sees. What it gives for each
query, the output and the logarithm of the softmax's sum, is what the decode kernel goes on from. Where the tiles of
queries are too few for the multiprocessors, the keys are cut into parts, each with results of its own.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import mosaic, prefill_config, prefill_kernel
from kernels_pallas.lowering import lower_once
from kernels_pallas.mosaic import MULTIPROCESSORS
from kernels_pallas.prefill_block import WG_SLABS
from kernels_pallas.prefill_config import PrefillConfig
from kernels_pallas.prefill_schedule import SLAB, row_tiles

MOST_PARTS = 4  # each is merged by every lane


class Prefix(NamedTuple):
    """What lanes have seen of `tokens` [1] int32 in common, rounded down to a multiple of UNIT.

    A part that is not among the first `tokens // UNIT` holds anything.
    """

    tokens: jax.Array
    o: jax.Array  # [parts, B, K, G, H], not multiplied by the scale of values
    sums: jax.Array  # [parts, K, rows] float32, logarithms to base 2; `row_of` says which

    @staticmethod
    def row_of(lane, member, group: int):
        """The row of a query head of a lane."""
        size = jnp.int32(SLAB)
        return (lax.div(lane, size) * group + member) * SLAB + lax.rem(lane, size)


def attend(q, k_pages, v_pages, page_table, tokens, scale: float, softcap, k_scale) -> Prefix:
    """What queries [B, N, H] see of the first `tokens` [1] of the first row of `page_table`."""
    num_lanes, num_heads, head_dim = q.shape
    num_kv_heads = k_pages.shape[1]
    scales = None if k_scale is None else jnp.stack([jnp.asarray(k_scale, jnp.float32), jnp.float32(1.0)])
    config, parts = choose_config(num_lanes, num_heads // num_kv_heads, num_kv_heads, head_dim)
    operands = (q, k_pages, v_pages, page_table, tokens, scales)
    return Prefix(tokens, *_attend(*operands, scale, softcap, config, parts, None))


def choose_config(num_lanes: int, group: int, num_kv_heads: int, head_dim: int) -> tuple[PrefillConfig, int]:
    """The configuration of the kernel, and the number of parts of the keys that gives every multiprocessor work.

    Where tiles of one warpgroup are too few, they are used: 2,048 tokens, 64 lanes of 14/2 x 64, took 10.3 us on an
    H100 and with two warpgroups 18.5. Where two have enough, they are faster: 256 lanes of 32/8 x 128 18.7 and 23.7.
    """

    def tiles(warpgroups: int) -> int:
        return row_tiles(num_lanes, group, warpgroups * WG_SLABS) * num_kv_heads

    config = prefill_config.default_config(head_dim)
    if 2 * MOST_PARTS * tiles(1) <= MULTIPROCESSORS:
        config = dataclasses.replace(config, warpgroups=1, turns=False)
    return config, max(1, min(MOST_PARTS, MULTIPROCESSORS // tiles(config.warpgroups)))


@lower_once("scale", "softcap", "config", "parts", "interpret")
def _attend(
    q, k_pages, v_pages, page_table, tokens, scales, scale, softcap, config: PrefillConfig, parts: int, interpret
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    num_lanes, _, head_dim = q.shape
    problem = prefill_kernel.problem_of(q, k_pages, 1, scale, None, softcap, config, interpret, parts)
    num_kv_heads, group = problem.num_kv_heads, problem.group
    rows = problem.num_tiles * problem.tile_slabs * SLAB
    given = {"prefix": tokens} if scales is None else {"prefix": tokens, "scales": scales}
    sums = mosaic.out_like((parts, num_kv_heads, rows), jnp.float32, q, k_pages, page_table, tokens)
    further = {"sums": sums}
    got = prefill_kernel.launch(problem, q, k_pages, v_pages, page_table, given, further, interpret)
    o = got["out"].reshape(parts, num_lanes, num_kv_heads, group, head_dim)
    return o, got["sums"]
