"""The jitted functions: one launch is forward, logits, sampling, KV write and next-token feed.

Only flat arrays cross the jit boundary: the weights as a tuple of leaves, the KV pages as a flat tuple, the
lane state, and the packed host array of `layout.py`. KV pages and lane state are donated.

A plain step has no output that is not written over one of its inputs. With every buffer at the address of the step
before, a GPU replays the captured step as it is; a new one costs the host an update of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import kernels_pallas
from jaxgen.execution import lanes as L
from jaxgen.execution import layout, sampler
from jaxgen.execution.sampler import Variant
from jaxgen.layers.attention import DecodeBatch, PrefillBatch

# Rows of logits computed at a time for prompt log-probabilities: bounds their memory to 128 x V floats.
LOGPROB_BLOCK = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepOutput:
    """What a step leaves for the host.

    Its tokens are in the lane state. logprobs [N or K, B, ...] of the drawn tokens and input_logprobs [T, ...] of
    the packed tokens' targets, both packed; hidden [T or K, B, D] final-norm vectors (engines that return hidden
    states).
    """

    logprobs: jax.Array | None
    input_logprobs: jax.Array | None
    hidden: jax.Array | None


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """Everything static about a family of compiled steps.

    graphdef and treedef rebuild the model from its flat weights. logits_sharding: where logits are gathered
    before sampling (None on one device). skips: what no row wants is skipped at run time; on a GPU such a branch
    ends the captured step and waits for the host.
    """

    graphdef: Any
    treedef: Any
    logits_sharding: jax.sharding.Sharding | None
    page_size: int
    return_hidden: bool
    original_logprobs: bool
    skips: bool

    def model(self, weights: Sequence[jax.Array]):
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, weights))

    def logits(self, model, hidden: jax.Array) -> jax.Array:
        """Logits [R, V] float32 of hidden rows [R, D], whole on every device."""
        logits = model.logits(hidden)
        if self.logits_sharding is None:
            return logits
        return jax.lax.with_sharding_constraint(logits, self.logits_sharding)


def pair_pages(flat: Sequence[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
    """[k0, v0, k1, v1, ...] -> [(k0, v0), (k1, v1), ...]."""
    return list(zip(flat[::2], flat[1::2]))


def flatten_pages(pairs: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, ...]:
    return tuple(page for pair in pairs for page in pair)


def slots_of(table: jax.Array, position: jax.Array, active: jax.Array, page_size: int, num_pages: int):
    """KV slot of each token: table [T, MP], position [T]; inactive tokens get a slot past the pool."""
    page = jnp.take_along_axis(table, (position // page_size)[:, None], axis=1)[:, 0]
    slot = page * page_size + position % page_size
    return jnp.where(active, slot, num_pages * page_size)


def decode_step(spec: StepSpec, lanes: int, steps: int, variant: Variant, shared: bool) -> Callable:
    """(weights, kv, state, packed int32) -> (StepOutput, kv, state): a token for each of B lanes, `steps` times.

    A lane stops at the last token it may draw. Tokens end in `state.drawn`, [K, R]. `shared`: the lanes' common
    prefix is read once for all.
    """

    def one(index, weights, kv, state: L.LaneState, rows, batch_table, common):
        """The step of this index."""
        length = state.length.at[rows].get(mode="clip")  # [B]
        active = (rows < state.rows) & (length < state.ints.at[rows, L.LIMIT].get(mode="clip"))
        rows = jnp.where(active, rows, state.rows)
        position = jnp.where(active, length, 0)
        batch = DecodeBatch(batch_table, jnp.where(active, position + 1, 0), common if shared else None)
        model = spec.model(weights)
        tokens = state.token.at[rows].get(mode="clip")
        hidden, pages = model(tokens, position, pair_pages(kv), batch)  # [B, D]
        params = sampler.gather_rows(state, jnp.minimum(rows, state.rows - 1), position + 1)
        drawn, logprobs, counts = _sample(spec, variant, model, hidden, params, state.counts, rows, active)
        state = dataclasses.replace(
            state,
            token=state.token.at[rows].set(drawn, mode="drop"),
            drawn=state.drawn.at[index, rows].set(drawn, mode="drop"),
            length=state.length.at[rows].set(position + 1, mode="drop"),
            counts=counts,
        )
        return (flatten_pages(pages), state), (logprobs, hidden if spec.return_hidden else None)

    def step(weights, kv, state: L.LaneState, packed):
        fields = layout.decode_layout(lanes).views(packed)
        rows, updates = fields["rows"], fields["updates"]
        table = state.page_table.at[updates[:, 0], updates[:, 1]].set(updates[:, 2], mode="drop")
        state = dataclasses.replace(state, page_table=table)
        batch_table = table.at[rows].get(mode="clip")  # [B, MP]

        def body(carry, index):
            pages, state = carry
            return one(index, weights, pages, state, rows, batch_table, fields["common"])

        (kv, state), (logprobs, hidden) = jax.lax.scan(body, (tuple(kv), state), jnp.arange(steps))
        return StepOutput(logprobs, None, hidden), kv, state

    return step


def prefill_step(spec: StepSpec, tokens: int, rows: int, variant: Variant) -> Callable:
    """(weights, kv, state, packed int32) -> (StepOutput, kv, state): T tokens of N rows.

    The token drawn for a row (-1: NaN) ends in `state.drawn[0]`.
    """

    def step(weights, kv, state: L.LaneState, packed):
        widths = state.page_table.shape[1], state.edit_width, state.logprob_width
        f = layout.prefill_layout(tokens, rows, *widths, full=not variant.plain).views(packed)
        row, segment = f["row"], f["segment"]
        active = segment < rows  # [T]
        owner = jnp.minimum(segment, rows - 1)  # [T] index into this batch's rows
        within = jnp.arange(tokens, dtype=jnp.int32) - f["offset"][owner]
        position = jnp.where(active, f["start"][owner] + within, 0)
        newest = state.token.at[row[owner]].get(mode="clip")
        token = jnp.where(f["token"] < 0, newest, f["token"])
        slots = slots_of(f["table"][owner], position, active, spec.page_size, kv[0].shape[0])
        ends = f["start"] + f["length"]  # [N] KV length after this chunk
        batch = PrefillBatch(
            slots=slots,
            page_table=f["table"],
            cu_seqlens=jnp.concatenate([f["offset"], f["offset"][-1:] + f["length"][-1:]]),
            lengths=ends,
        )
        model = spec.model(weights)
        every_token = spec.return_hidden or not variant.plain
        # [T, D], or [N, D] of the rows' last tokens
        hidden, pages = model(token, position, pair_pages(kv), batch, last_only=not every_token)

        state = _write_rows(state, f, ends, variant)
        counts = state.counts
        if not variant.plain:
            counts = _count_resumed_outputs(counts, f, token, position, active, owner)
        params = sampler.gather_rows(state, jnp.minimum(row, state.rows - 1), ends)
        samples = (f["flags"] & layout.SAMPLES) != 0
        last = hidden[batch.last] if every_token else hidden  # [N, D]
        drawn, logprobs, counts = _sample(spec, variant, model, last, params, counts, row, samples)
        input_logprobs = None
        if not variant.plain:
            input_logprobs = _input_logprobs(spec, model, hidden, f, owner, variant.top_logprobs)
        state = dataclasses.replace(
            state,
            token=state.token.at[row].set(drawn, mode="drop"),
            drawn=state.drawn.at[0, row].set(drawn, mode="drop"),
            counts=counts,
        )
        output = StepOutput(logprobs, input_logprobs, hidden if spec.return_hidden else None)
        return output, flatten_pages(pages), state

    return step


def _sample(spec: StepSpec, variant: Variant, model, hidden, params, counts, rows, real):
    """Draws a token for each of the B rows of hidden [B, D]; counts the real ones of penalised rows."""
    summary = None
    if variant.edits:
        in_range = jnp.minimum(rows, counts.shape[0] - 1)
        logits = spec.logits(model, hidden)  # [B, V] float32
        logits = sampler.edit_logits(logits, counts[in_range], params, skips=spec.skips)
        drawn = sampler.draw(logits, params)
    elif spec.logits_sharding is not None:  # a kernel is opaque to the partitioner
        logits = spec.logits(model, hidden)
        drawn = sampler.draw(logits, params)
    else:
        drawn, logits, summary = sampler.draw_by_head(
            hidden,
            model.head.weight[...],
            params,
            real,
            logprobs=variant.logprobs,
            original=spec.original_logprobs,
        )
    logprobs = None
    if variant.logprobs:
        logprobs = sampler.output_log_probabilities(
            logits,
            drawn,
            params,
            variant.top_logprobs,
            original=spec.original_logprobs,
            skips=spec.skips,
            summary=summary,
        ).packed()
    if variant.edits:
        counted = real & params.wants(L.PENALTIES) & (drawn >= 0)
        counts = counts.at[rows, jnp.maximum(drawn, 0)].add(counted.astype(jnp.int32), mode="drop")
    return drawn, logprobs, counts


def _write_rows(state: L.LaneState, f: dict, ends: jax.Array, variant: Variant) -> L.LaneState:
    """Stores the batch rows' page tables, lengths and sampling parameters in the lane state."""
    row = f["row"]

    def put(field: jax.Array, value: jax.Array) -> jax.Array:
        return field.at[row].set(value, mode="drop")

    state = dataclasses.replace(
        state,
        length=put(state.length, ends),
        page_table=put(state.page_table, f["table"]),
        floats=put(state.floats, f["floats"]),
        ints=put(state.ints, f["ints"]),
    )
    if variant.plain:
        return state
    fresh = (f["flags"] & layout.FIRST_CHUNK) != 0
    return dataclasses.replace(
        state,
        edit_ids=put(state.edit_ids, f["edit_ids"]),
        edit_values=put(state.edit_values, f["edit_values"]),
        edit_until=put(state.edit_until, f["edit_until"]),
        logprob_ids=put(state.logprob_ids, f["logprob_ids"]),
        counts=state.counts.at[jnp.where(fresh, row, state.rows)].set(0, mode="drop"),
    )


def _count_resumed_outputs(counts, f, token, position, active, owner):
    """Counts the output tokens that a retracted request brings back as part of its prefill."""
    is_output = active & (position >= f["prompt"][owner]) & (f["token"] >= 0)
    counted = is_output & ((f["ints"][owner, L.MODE] & L.PENALTIES) != 0)
    return jax.lax.cond(
        counted.any(),
        lambda c: c.at[f["row"][owner], token].add(counted.astype(jnp.int32), mode="drop"),
        lambda c: c,
        counts,
    )


def _input_logprobs(spec: StepSpec, model, hidden, f, owner, top: int) -> jax.Array:
    """Log-probabilities of each packed token's successor, computed block by block and only if wanted."""
    tokens, width = hidden.shape[0], f["logprob_ids"].shape[1]
    block = min(LOGPROB_BLOCK, tokens)
    blocks = -(-tokens // block)
    padding = blocks * block - tokens

    def one(part):
        x, target, ids = part
        return sampler.log_probabilities(spec.logits(model, x), target, ids, top).packed()

    def compute(_):
        parts = (hidden, f["target"], f["logprob_ids"][owner])
        padded = jax.tree.map(lambda a: jnp.pad(a, ((0, padding), *((0, 0),) * (a.ndim - 1))), parts)
        split = jax.tree.map(lambda a: a.reshape(blocks, block, *a.shape[1:]), padded)
        packed = jax.lax.map(one, split)  # [blocks, block, ...]
        return packed.reshape(-1, packed.shape[-1])[:tokens]

    wanted = ((f["flags"] & layout.INPUT_LOGPROBS) != 0).any()
    return jax.lax.cond(
        wanted, compute, lambda _: sampler.no_log_probabilities(tokens, width, top).packed(), None
    )


def newest_tokens(drawn: jax.Array) -> jax.Array:
    """A copy [K, R] of the tokens of a launch, for the host: the original goes into the next one."""
    return drawn + 0


def refill(buffer: jax.Array, packed: jax.Array) -> jax.Array:
    """`packed` in the place of `buffer`, which is donated."""
    del buffer
    return packed + 0


def copy_step(kv: Sequence[jax.Array], packed: jax.Array) -> tuple[jax.Array, ...]:
    """Copies pages packed[0] -> packed[1] ([2, C] int32; padding out of range) in every layer's KV."""
    src, dst = packed
    return tuple(kernels_pallas.copy_pages(pages, src, dst) for pages in kv)
