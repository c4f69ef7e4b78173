"""Result dicts of `generate`, built from plain host data."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxgen.errors import RequestError
from jaxgen.logprobs import Entry

Rows = list[list[Entry] | None]


@dataclass(slots=True)
class LogprobData:
    """Log-probabilities of one request.

    Input lists have one item per prompt position S .. P-1, S being logprob_start_len; the first has no value, since
    that position is conditioned on nothing that was asked for. Output lists have one item per generated token. Items
    of a `top` list are the largest, descending; those of a `selected` list are of the requested ids. Both lists stay
    empty unless they are asked for. No entry has a text yet.
    """

    input: list[Entry] = field(default_factory=list)
    input_top: Rows = field(default_factory=list)
    input_selected: Rows = field(default_factory=list)
    output: list[Entry] = field(default_factory=list)
    output_top: Rows = field(default_factory=list)
    output_selected: Rows = field(default_factory=list)


@dataclass(slots=True)
class RequestSnapshot:
    """Everything a result dict is made of, at one moment of a request's life.

    `text` is `None` without a tokenizer. `hidden_states` holds float arrays, first [T0, H] for the prompt
    positions of the last prefill chunk, then [H] per later token. Times are seconds of `time.time()`.
    """

    rid: str
    output_ids: list[int]
    text: str | None
    finish_reason: dict[str, Any] | None
    prompt_tokens: int
    cached_tokens: int = 0
    num_retractions: int = 0
    weight_version: str = "default"
    cache_miss_count: int = 0
    dp_rank: int | None = None
    reasoning_tokens: int = 0
    cached_tokens_details: dict[str, int] | None = None
    index: int | None = None  # only for members of a batch
    prompt_token_ids: Sequence[int] | None = None  # only on request
    top_logprobs_num: int = 0
    token_ids_logprob: list[int] | None = None
    logprobs: LogprobData | None = None  # only on request
    return_hidden_states: bool | str = False
    hidden_states: Sequence[np.ndarray] = ()
    received_at: float = 0.0
    finished_at: float | None = None
    weight_versions: list[dict[str, Any]] | None = None
    metrics: Mapping[str, float] | None = None  # timing keys, when enable_metrics is on


@dataclass(frozen=True, slots=True)
class Emitted:
    """How much of a request earlier chunks already carried: characters of text and generated ids."""

    text: int = 0
    ids: int = 0


def make_output(
    snapshot: RequestSnapshot,
    *,
    emitted: Emitted | None = None,
    token_text: Callable[[int], str] | None = None,
) -> dict[str, Any]:
    """The dict for one request: cumulative, or only what is new since `emitted`. It takes over the snapshot's lists.

    `token_text` gives the text of one id for logprob entries; without it that text is `None`.
    """
    text_from, ids_from = (emitted.text, emitted.ids) if emitted else (0, 0)
    output: dict[str, Any] = {}
    if snapshot.text is not None:
        output["text"] = snapshot.text[text_from:]
    output["output_ids"] = _since(snapshot.output_ids, ids_from)
    if snapshot.prompt_token_ids is not None:
        output["prompt_token_ids"] = list(snapshot.prompt_token_ids)
    meta: dict[str, Any] = {
        "id": snapshot.rid,
        "finish_reason": snapshot.finish_reason,
        "prompt_tokens": snapshot.prompt_tokens,
        "completion_tokens": len(snapshot.output_ids),
        "cached_tokens": snapshot.cached_tokens,
        "cached_tokens_details": snapshot.cached_tokens_details,
        "reasoning_tokens": snapshot.reasoning_tokens,
        "num_retractions": snapshot.num_retractions,
        "weight_version": snapshot.weight_version,
        "dp_rank": snapshot.dp_rank,
        "cache_miss_count": snapshot.cache_miss_count,
    }
    if snapshot.logprobs is not None:
        meta |= _logprob_lists(snapshot, snapshot.logprobs, ids_from, token_text)
    if snapshot.return_hidden_states:
        meta["hidden_states"] = _hidden_states(snapshot)
    if snapshot.finish_reason is not None:
        finished_at = snapshot.finished_at if snapshot.finished_at is not None else time.time()
        span = {"version": snapshot.weight_version, "start": 0, "end": len(snapshot.output_ids)}
        meta["e2e_latency"] = finished_at - snapshot.received_at
        meta["response_sent_to_client_ts"] = time.time()
        meta["weight_versions"] = [span] if snapshot.weight_versions is None else snapshot.weight_versions
    if snapshot.metrics is not None:
        meta.update(snapshot.metrics)
    output["meta_info"] = meta
    if snapshot.index is not None:
        output["index"] = snapshot.index
    return output


def _logprob_lists(
    snapshot: RequestSnapshot, data: LogprobData, ids_from: int, token_text: Callable[[int], str] | None
) -> dict[str, Any]:
    def entries(found: list[Entry]) -> list[Entry]:
        if token_text is None:
            return found
        return [(value, token, token_text(token)) for value, token, _ in found]

    def rows(found: Rows) -> Rows:
        return found if token_text is None else [row and entries(row) for row in found]

    meta: dict[str, Any] = {
        "input_token_logprobs": entries(data.input),
        "output_token_logprobs": entries(_since(data.output, ids_from)),
        "output_token_logprobs_length": len(data.output),
    }
    if snapshot.top_logprobs_num > 0:
        meta["input_top_logprobs"] = rows(data.input_top)
        meta["output_top_logprobs"] = rows(_since(data.output_top, ids_from))
    if snapshot.token_ids_logprob:
        meta["input_token_ids_logprobs"] = rows(data.input_selected)
        meta["output_token_ids_logprobs"] = rows(_since(data.output_selected, ids_from))
    return meta


def _since[T](items: list[T], start: int) -> list[T]:
    """The items from `start` on; all of them uncopied."""
    return items[start:] if start else items


def _hidden_states(snapshot: RequestSnapshot) -> list[Any]:
    """Nested floats: all entries, or the newest vector for "last"; empty before there is any."""
    if snapshot.return_hidden_states == "last" and len(snapshot.hidden_states):
        newest = np.asarray(snapshot.hidden_states[-1], dtype=np.float32)
        return (newest[-1] if newest.ndim == 2 else newest).tolist()
    return [np.asarray(entry, dtype=np.float32).tolist() for entry in snapshot.hidden_states]


def merge_chunks(older: dict[str, Any], newer: dict[str, Any], incremental: bool) -> dict[str, Any]:
    """One chunk for a slow consumer out of two consecutive ones of the same request."""
    if not incremental:
        return newer
    merged = dict(newer)
    for key in ("text", "output_ids"):
        if key in newer:
            merged[key] = older[key] + newer[key]
    meta = dict(newer["meta_info"])
    for key in ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs"):
        if key in meta:
            meta[key] = older["meta_info"][key] + meta[key]
    merged["meta_info"] = meta
    return merged


def raise_if_failed(finish_reason: Mapping[str, Any] | None) -> None:
    """Raise what a non-streaming call raises for an abort: `ValueError` for status 400, `RequestError` for
    others.

    A user's own abort has no status and is a normal result.
    """
    if finish_reason is None or finish_reason["type"] != "abort" or finish_reason.get("status_code") is None:
        return
    status, message = finish_reason["status_code"], finish_reason["message"]
    if status == 400:
        raise ValueError(message)
    raise RequestError(status, message)
