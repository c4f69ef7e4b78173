"""From logits to tokens, inside the compiled step: logit edits, the draw, and log-probabilities."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas
from jaxgen.execution import lanes as L


class Variant(NamedTuple):
    """What a compiled step can do; a batch runs in the least variant that covers its rows.

    Every step draws rows with a temperature and takes the greedy token of the others.

    edits: penalties and logit edits. logprobs: log-probabilities, top_logprobs of the largest among them.
    """

    edits: bool = False
    logprobs: bool = False
    top_logprobs: int = 0

    @property
    def plain(self) -> bool:
        return not (self.edits or self.logprobs)


PLAIN = Variant()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowParams:
    """Sampling state of the `B` rows of one step, gathered from LaneState (fields as there)."""

    floats: jax.Array  # [B, 6]
    ints: jax.Array  # [B, 3]
    edit_ids: jax.Array  # [B, W]
    edit_values: jax.Array  # [B, W]
    edit_until: jax.Array  # [B, W]
    logprob_ids: jax.Array  # [B, M]
    position: jax.Array  # [B] position of the token being sampled

    def wants(self, bit: int) -> jax.Array:
        return (self.ints[:, L.MODE] & bit) != 0  # [B]


def gather_rows(state: L.LaneState, rows: jax.Array, position: jax.Array) -> RowParams:
    return RowParams(
        floats=state.floats[rows],
        ints=state.ints[rows],
        edit_ids=state.edit_ids[rows],
        edit_values=state.edit_values[rows],
        edit_until=state.edit_until[rows],
        logprob_ids=state.logprob_ids[rows],
        position=position,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of rows: the chosen token's, the `top` largest, and those of requested ids."""

    chosen: Any  # [B] float32
    top_values: Any  # [B, top] float32
    top_ids: Any  # [B, top] int32
    id_values: Any  # [B, M] float32

    def packed(self) -> jax.Array:
        """One array [B, 1 + 2 top + M] float32, ids as bits: each array that goes to the host costs a copy."""
        ids = jax.lax.bitcast_convert_type(self.top_ids, jnp.float32)
        return jnp.concatenate([self.chosen[:, None], self.top_values, ids, self.id_values], axis=1)

    @classmethod
    def unpacked(cls, packed: np.ndarray, top: int) -> Logprobs:
        """NumPy arrays out of `packed` rows on the host."""
        ids = np.ascontiguousarray(packed[:, 1 + top : 1 + 2 * top]).view(np.int32)
        return cls(packed[:, 0], packed[:, 1 : 1 + top], ids, packed[:, 1 + 2 * top :])


def penalise(logits: jax.Array, counts: jax.Array, params: RowParams) -> jax.Array:
    """Frequency, presence and repetition penalties over generated tokens.

    logits [B, V] float32, counts [B, V] int32. Rows without PENALTIES come back bit-identical.
    """
    on = params.wants(L.PENALTIES)[:, None] & (counts > 0)  # [B, V]
    frequency = params.floats[:, L.FREQUENCY, None]
    presence = params.floats[:, L.PRESENCE, None]
    repetition = params.floats[:, L.REPETITION, None]
    x = logits - frequency * counts - presence
    x = jnp.where(x < 0, x * repetition, x / repetition)
    return jnp.where(on, x, logits)


def apply_edits(logits: jax.Array, params: RowParams) -> jax.Array:
    """Adds each row's sparse edits (logit_bias, and -inf for stop ids under min_new_tokens); logits [B, V]."""
    active = params.wants(L.EDITS)[:, None] & (params.position[:, None] < params.edit_until)  # [B, W]
    ids = jnp.where(active & (params.edit_ids >= 0), params.edit_ids, logits.shape[1])
    rows = jnp.arange(logits.shape[0])[:, None]
    return logits.at[rows, ids].add(params.edit_values, mode="drop")


def edit_logits(logits: jax.Array, counts: jax.Array, params: RowParams, *, skips: bool) -> jax.Array:
    """All logit edits in SGLang's order (penalties, then bias); `skips`: a stage that no row wants does not run."""
    stages = (L.PENALTIES, lambda x: penalise(x, counts, params)), (L.EDITS, lambda x: apply_edits(x, params))
    for bit, edit in stages:
        logits = jax.lax.cond(params.wants(bit).any(), edit, lambda x: x, logits) if skips else edit(logits)
    return logits


def draw(logits: jax.Array, params: RowParams) -> jax.Array:
    """Next tokens [B] int32 from edited logits [B, V] float32; -1 marks a row with NaN."""
    return kernels_pallas.sample(logits, *_options(params))


def draw_by_head(
    hidden: jax.Array,
    weight: jax.Array,
    params: RowParams,
    real: jax.Array,
    *,
    logprobs: bool,
    original: bool,
) -> kernels_pallas.HeadSample:
    """Next tokens of hidden rows [B, D] under a head [V, D], and logits; -1 marks a row with NaN.

    Logits are filled in for `real` rows that are sampled or, with `logprobs`, want log-probabilities; others may hold
    anything. `original`: as in `output_log_probabilities`.
    """
    temperature, *options = _options(params)
    return kernels_pallas.head_sample(
        hidden,
        weight,
        jnp.where(real, temperature, 0.0),
        *options,
        wanted=real & params.wants(L.LOGPROBS) if logprobs else None,
        summary_temperature=_logprob_temperature(params, original) if logprobs else None,
    )


def _options(params: RowParams) -> tuple[jax.Array, ...]:
    return (
        params.floats[:, L.TEMPERATURE],
        params.ints[:, L.TOP_K],
        params.floats[:, L.TOP_P],
        params.floats[:, L.MIN_P],
        params.ints[:, L.SEED],
        params.position,
    )


def log_probabilities(
    logits: jax.Array,
    chosen: jax.Array,
    logprob_ids: jax.Array,
    top: int,
    temperature: jax.Array | None = None,
    summary: kernels_pallas.LogitSummary | None = None,
) -> Logprobs:
    """log_softmax statistics of logits [B, V] float32 for chosen [B] and logprob_ids [B, M] (-1 = none).

    The logits count divided by the temperature [B]; 0, or None, leaves them as they are. A summary of the logits
    at this temperature, if there is one, saves reading them all.
    """
    if temperature is None:
        temperature = jnp.zeros(chosen.shape, jnp.float32)
    found = kernels_pallas.log_probabilities(logits, chosen, temperature, top, summary=summary)
    divisor = jnp.where(temperature > 0, temperature, 1.0)[:, None]
    asked = jnp.take_along_axis(logits, jnp.maximum(logprob_ids, 0), axis=-1) / divisor  # [B, M]
    id_values = asked - found.normaliser[:, None]
    return Logprobs(found.chosen, found.top_values, found.top_ids, id_values)


def no_log_probabilities(rows: int, width: int, top: int) -> Logprobs:
    return Logprobs(
        chosen=jnp.zeros((rows,), jnp.float32),
        top_values=jnp.zeros((rows, top), jnp.float32),
        top_ids=jnp.zeros((rows, top), jnp.int32),
        id_values=jnp.zeros((rows, width), jnp.float32),
    )


def output_log_probabilities(
    logits: jax.Array,
    tokens: jax.Array,
    params: RowParams,
    top: int,
    *,
    original: bool,
    skips: bool,
    summary: kernels_pallas.LogitSummary | None = None,
) -> Logprobs:
    """Log-probabilities of the drawn tokens [B] under edited logits [B, V] / temperature.

    `original` leaves the temperature out. `skips`: not computed when no row wants them. `summary`: of the logits, from
    `draw_by_head`.
    """
    rows, width = params.logprob_ids.shape

    def compute(x):
        temperature = _logprob_temperature(params, original)
        return log_probabilities(x, tokens, params.logprob_ids, top, temperature, summary)

    if not skips:
        return compute(logits)
    return jax.lax.cond(
        params.wants(L.LOGPROBS).any(), compute, lambda x: no_log_probabilities(rows, width, top), logits
    )


def _logprob_temperature(params: RowParams, original: bool) -> jax.Array:
    temperature = params.floats[:, L.TEMPERATURE]
    return jnp.zeros_like(temperature) if original else temperature
