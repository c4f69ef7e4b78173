"""Packs scheduler plans into the flat array of `layout.py` (NumPy only; the runner uploads them)."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxgen.execution import lanes as L
from jaxgen.execution import layout
from jaxgen.execution.sampler import Variant
from jaxgen.scheduling.plan import Chunk, Plan
from jaxgen.scheduling.request import Request

NEVER = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class RequestNeeds:
    """What one request asks of a compiled step beyond drawing its tokens."""

    mode: int
    edit_width: int
    logprob_width: int
    top_logprobs: int

    @property
    def edits(self) -> bool:
        return (self.mode & (L.PENALTIES | L.EDITS)) != 0

    @property
    def logprobs(self) -> bool:
        return (self.mode & L.LOGPROBS) != 0


def edits_of(request: Request) -> tuple[list[int], list[float], list[int]]:
    """The request's sparse logit edits: ids, added values, and the position each one ends at."""
    params = request.params
    ids, values, until = [], [], []
    if params.min_new_tokens > 0:
        # EOS ids too, even under ignore_eos: SGLang masks both.
        for token in sorted(request.masked_ids):
            ids.append(token)
            values.append(-np.inf)
            until.append(len(request.prompt_ids) + min(params.min_new_tokens, request.max_new_tokens))
    for token, value in (params.logit_bias or {}).items():
        ids.append(token)
        values.append(value)
        until.append(NEVER)
    return ids, values, until


def needs_of(request: Request) -> RequestNeeds:
    params = request.params
    mode = 0
    if params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1.0:
        mode |= L.PENALTIES
    edits = len(params.logit_bias or ())
    if params.min_new_tokens > 0:
        edits += len(request.masked_ids)
    if edits:
        mode |= L.EDITS
    if request.return_logprob:
        mode |= L.LOGPROBS
    return RequestNeeds(
        mode=mode,
        edit_width=edits,
        logprob_width=len(request.token_ids_logprob or ()),
        top_logprobs=request.top_logprobs if request.return_logprob else 0,
    )


class RowMirror:
    """Host copy of the per-row constants in LaneState: what a prefill step uploads for its rows."""

    def __init__(self, rows: int, max_pages: int, edit_width: int, logprob_width: int):
        # (sequence of the request, its retractions): a row is rewritten when either changes.
        self.owner: list[tuple[int, int] | None] = [None] * rows
        self.needs: list[RequestNeeds | None] = [None] * rows
        self.table = np.zeros((rows, max_pages), np.int32)
        self.floats = np.zeros((rows, 6), np.float32)
        self.ints = np.zeros((rows, 4), np.int32)
        self.edit_ids = np.full((rows, edit_width), -1, np.int32)
        self.edit_values = np.zeros((rows, edit_width), np.float32)
        self.edit_until = np.zeros((rows, edit_width), np.int32)
        self.logprob_ids = np.full((rows, logprob_width), -1, np.int32)

    def widen(self, edit_width: int, logprob_width: int) -> None:
        """Grows the sparse fields; existing rows keep their content."""

        def grown(field: np.ndarray, width: int, fill: int) -> np.ndarray:
            extra = width - field.shape[1]
            return np.pad(field, ((0, 0), (0, extra)), constant_values=fill)

        self.edit_ids = grown(self.edit_ids, edit_width, -1)
        self.edit_values = grown(self.edit_values, edit_width, 0)
        self.edit_until = grown(self.edit_until, edit_width, 0)
        self.logprob_ids = grown(self.logprob_ids, logprob_width, -1)

    def claim(self, request: Request) -> bool:
        """Brings the row of a request to be prefilled up to date; True when the request is new to it."""
        row, key = request.row, (request.sequence, request.num_retractions)
        fresh = self.owner[row] != key
        if fresh:
            self.owner[row], self.needs[row] = key, self._write_constants(row, request)
        self.table[row, : len(request.pages)] = request.pages
        return fresh

    def assign_pages(self, updates: list[tuple[int, int, int]]) -> None:
        """Applies (row, column, page) updates of decode lanes to the page tables."""
        for row, column, page in updates:
            self.table[row, column] = page

    def _write_constants(self, row: int, request: Request) -> RequestNeeds:
        needs, params = needs_of(request), request.params
        self.floats[row] = (
            0.0 if params.greedy else params.temperature,
            params.top_p,
            params.min_p,
            params.frequency_penalty,
            params.presence_penalty,
            params.repetition_penalty,
        )
        self.ints[row] = (params.top_k, request.seed, needs.mode, request.kv_limit)
        self.edit_ids[row] = -1
        ids, values, until = edits_of(request)
        n = len(ids)
        self.edit_ids[row, :n], self.edit_values[row, :n], self.edit_until[row, :n] = ids, values, until
        self.logprob_ids[row] = -1
        wanted = request.token_ids_logprob or []
        self.logprob_ids[row, : len(wanted)] = wanted
        return needs


def pack_decode(plan: Plan, lanes: int, rows: int, common: int = 0) -> np.ndarray:
    """The int32 upload of a decode step of `lanes` lanes out of `rows` state rows.

    `common`: tokens that all lanes have in the same pages.
    """
    packing = layout.decode_layout(lanes)
    packed = np.full(packing.size, rows, np.int32)
    fields = packing.views(packed)
    fields["rows"][: len(plan.rows)] = plan.rows
    fields["common"][0] = common
    if plan.page_updates:
        fields["updates"][: len(plan.page_updates)] = plan.page_updates
    return packed


def chunk_targets(chunk: Chunk) -> list[int]:
    """For each position of the chunk, the prompt token that follows it (-1 past the prompt)."""
    targets = chunk.request.prompt_ids[chunk.start + 1 : chunk.start + chunk.length + 1]
    return [*targets, *[-1] * (chunk.length - len(targets))]


def wants_input_logprobs(chunk: Chunk) -> bool:
    """Whether some position of the chunk predicts a prompt token whose log-probability is reported."""
    request = chunk.request
    return (
        request.return_logprob
        and request.logprob_start >= 0
        and chunk.start + chunk.length > request.logprob_start
        and chunk.start < len(request.prompt_ids) - 1
    )


def pack_prefill(
    plan: Plan, mirror: RowMirror, fresh: list[bool], tokens: int, rows: int, variant: Variant
) -> np.ndarray:
    """The int32 upload of a prefill step of T=`tokens` packed tokens in N=`rows` rows.

    Every chunk's request must have been claimed in `mirror`; `fresh` says what the claims returned.
    """
    total_rows = len(mirror.owner)
    widths = mirror.table.shape[1], mirror.edit_ids.shape[1], mirror.logprob_ids.shape[1]
    packing = layout.prefill_layout(tokens, rows, *widths, full=not variant.plain)
    packed = np.zeros(packing.size, np.int32)
    f = packing.views(packed)
    f["segment"][:] = rows
    f["row"][:] = total_rows
    state_rows: list[int] = []
    used = 0
    for index, chunk in enumerate(plan.chunks):
        request, stop = chunk.request, used + chunk.length
        f["token"][used:stop] = request.token_ids(chunk.start, chunk.stop)
        f["segment"][used:stop] = index
        f["offset"][index], f["length"][index], f["start"][index] = used, chunk.length, chunk.start
        f["prompt"][index] = len(request.prompt_ids)
        flags = layout.SAMPLES if chunk.last else 0
        if fresh[index]:
            flags |= layout.FIRST_CHUNK
        if not variant.plain and wants_input_logprobs(chunk):
            flags |= layout.INPUT_LOGPROBS
            f["target"][used:stop] = chunk_targets(chunk)
        f["flags"][index] = flags
        state_rows.append(request.row)
        used = stop
    first_lane, lanes = len(plan.chunks), len(plan.lanes)
    if lanes:  # mixed chunk: decode lanes ride along as chunks of one token that only the device knows
        span = slice(first_lane, first_lane + lanes)
        f["token"][used : used + lanes] = -1
        f["segment"][used : used + lanes] = np.arange(first_lane, first_lane + lanes)
        f["offset"][span] = np.arange(used, used + lanes)
        f["length"][span] = 1
        f["start"][span] = plan.lengths - 1
        f["prompt"][span] = [len(request.prompt_ids) for request in plan.lanes]
        f["flags"][span] = layout.SAMPLES
        state_rows.extend(plan.rows)
        used += lanes
    f["offset"][first_lane + lanes :] = used
    chosen = np.array(state_rows, np.int64)
    span = slice(0, len(chosen))
    f["row"][span] = chosen
    f["ints"][span] = mirror.ints[chosen]
    f["table"][span] = mirror.table[chosen]
    f["floats"][span] = mirror.floats[chosen]
    if not variant.plain:
        f["edit_ids"][span] = mirror.edit_ids[chosen]
        f["edit_until"][span] = mirror.edit_until[chosen]
        f["edit_values"][span] = mirror.edit_values[chosen]
        f["logprob_ids"][span] = mirror.logprob_ids[chosen]
    return packed
