"""Per-lane state that lives on the device between steps, so that a decode step needs no upload."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

# Bits of LaneState.mode: which optional parts of the full step apply to a row.
PENALTIES = 1  # frequency, presence or repetition penalty: counts are maintained
EDITS = 2  # logit_bias or min_new_tokens: the sparse edit list is applied
LOGPROBS = 4  # the row wants output log-probabilities

# Columns of LaneState.floats.
TEMPERATURE, TOP_P, MIN_P, FREQUENCY, PRESENCE, REPETITION = range(6)
# Columns of LaneState.ints.
TOP_K, SEED, MODE, LIMIT = range(4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LaneState:
    """Device-resident state of `R` rows; a step reads the rows of its lanes and writes them back.

    token       [R] int32       newest token, the input of the next decode step
    drawn       [K, R] int32    tokens of the last decode launch, step by step
    length      [R] int32       KV positions already written
    page_table  [R, MP] int32   pages of the row, in order
    floats      [R, 6] float32  temperature (0 = greedy), top_p, min_p, frequency, presence, repetition
    ints        [R, 4] int32    top_k, seed, mode bits, KV length at which the last allowed token is drawn
    edit_ids    [R, W] int32    sparse additive logit edits: token ids (-1 = none)
    edit_values [R, W] float32  ... added value
    edit_until  [R, W] int32    ... applied while the sampled token's position is below this
    logprob_ids [R, M] int32    token ids whose log-probabilities are reported (-1 = none)
    counts      [R, V] int32    how often each token was generated (rows with PENALTIES only)
    """

    token: jax.Array
    drawn: jax.Array
    length: jax.Array
    page_table: jax.Array
    floats: jax.Array
    ints: jax.Array
    edit_ids: jax.Array
    edit_values: jax.Array
    edit_until: jax.Array
    logprob_ids: jax.Array
    counts: jax.Array

    @property
    def rows(self) -> int:
        return self.token.shape[0]

    @property
    def edit_width(self) -> int:
        return self.edit_ids.shape[1]

    @property
    def logprob_width(self) -> int:
        return self.logprob_ids.shape[1]


def lane_state_shapes(
    rows: int, max_pages: int, vocab_size: int, edit_width: int, logprob_width: int, steps: int
) -> LaneState:
    """The abstract LaneState (`jax.ShapeDtypeStruct` leaves) of the given sizes; `steps` is K."""
    i32, f32 = jnp.int32, jnp.float32

    def s(shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    return LaneState(
        token=s((rows,), i32),
        drawn=s((steps, rows), i32),
        length=s((rows,), i32),
        page_table=s((rows, max_pages), i32),
        floats=s((rows, 6), f32),
        ints=s((rows, 4), i32),
        edit_ids=s((rows, edit_width), i32),
        edit_values=s((rows, edit_width), f32),
        edit_until=s((rows, edit_width), i32),
        logprob_ids=s((rows, logprob_width), i32),
        counts=s((rows, vocab_size), i32),
    )


def lane_state_bytes(shapes: LaneState) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
