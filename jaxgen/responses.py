"""The growing result of one request, between the engine thread that writes it and the caller that reads it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from jaxgen.io import RequestInput
from jaxgen.logprobs import Entry, StepLogprobs
from jaxgen.outputs import Emitted, LogprobData, RequestSnapshot, make_output
from jaxgen.scheduling.request import Request
from jaxgen.tokenizer import TextStream

State = tuple[int, str | None, dict[str, Any] | None, int]


class Bell(Protocol):
    """Whom a response tells that there is something to read."""

    stream: bool

    def ring(self, response: Response) -> None: ...

    def fail(self, error: BaseException) -> None: ...


class Response:
    """Written by the engine thread (`update`, `add_*`), read by the caller's (`take`).

    Text is decoded on the caller's side, off the engine thread, unless the request has stop strings: then the
    request's own TextStream finds them as tokens arrive, and its text is used.

    Args:
        request: the scheduler's half; `request.sink` is this object.
        stream_interval: tokens between two rings while streaming.
        new_text: makes the caller-side TextStream; None without a tokenizer.
        on_end: called once, on the engine thread, when the request has ended in any way.
        compile_count: steps compiled while serving so far.
    """

    def __init__(
        self,
        bell: Bell,
        spec: RequestInput,
        request: Request,
        *,
        index: int | None,
        stream_interval: int,
        incremental: bool,
        weight_version: str,
        new_text: Callable[[], TextStream] | None,
        token_text: Callable[[int], str] | None,
        compile_count: Callable[[], int],
        on_end: Callable[[Request], None],
    ):
        self.bell = bell
        self.spec = spec
        self.request = request
        self.queued = False  # the caller has been rung and has not looked yet
        self._index = index
        self._interval = stream_interval
        self._incremental = incremental
        self._weight_version = weight_version
        self._new_text = new_text
        self._token_text = token_text
        self._compile_count = compile_count
        self._on_end = on_end
        self._received_at = time.time()
        self._finished_at: float | None = None
        self._compiles_before = compile_count()
        self._announced = 0
        self._logprobs = LogprobData()
        if 0 <= spec.logprob_start_len < len(spec.prompt_ids):
            first: Entry = (None, spec.prompt_ids[spec.logprob_start_len], None)
            self._logprobs = LogprobData(input=[first], input_top=[None], input_selected=[None])
        self._hidden: list[np.ndarray] = []
        # (tokens, text, finish reason, hidden entries): replaced whole, so a reader never sees halves.
        self._state: State = (0, None, None, 0)
        self._taken: object = self._state
        self._text: TextStream | None = None
        self._decoded = 0
        self._emitted = Emitted()

    # ---- engine thread

    def update(self, request: Request) -> None:
        """The request has a new token, or has ended."""
        tokens, reason = len(request.output_ids), request.finish_reason
        if reason is None and not self._due(tokens):
            return
        text = None
        if request.text is not None:
            text = request.text.emittable if reason is None else request.text.finish(reason)
        if reason is not None:
            self._finished_at = time.time()
            self._on_end(request)
        self._state = (tokens, text, reason, len(self._hidden))
        self._announced = tokens
        self.bell.ring(self)

    def _due(self, tokens: int) -> bool:
        """The first token is announced at once, later ones every `stream_interval`."""
        if not self.bell.stream or tokens == 0:
            return False
        return self._announced == 0 or tokens - self._announced >= self._interval

    def fail(self, error: BaseException) -> None:
        self._on_end(self.request)
        self.bell.fail(error)

    def add_input_logprobs(self, request: Request, start: int, logprobs: StepLogprobs) -> None:
        """Entries for the tokens after positions start, start + 1, ...; a resumed request repeats earlier ones."""
        data, spec = self._logprobs, self.spec
        first = request.logprob_start + len(data.input) - (start + 1)
        stop = min(len(logprobs), len(request.prompt_ids) - (start + 1))
        if not 0 <= first < stop:
            return
        rows = range(first, stop)
        tokens = request.prompt_ids[start + 1 + first : start + 1 + stop]
        data.input += zip(logprobs.chosen[first:stop], tokens, itertools.repeat(None))
        if spec.top_logprobs_num:
            data.input_top += [logprobs.top(row, spec.top_logprobs_num) for row in rows]
        if spec.token_ids_logprob:
            data.input_selected += [logprobs.of_ids(row, spec.token_ids_logprob) for row in rows]

    def add_output_logprobs(self, logprobs: StepLogprobs, row: int, token: int | None) -> None:
        data, spec = self._logprobs, self.spec
        if token is not None:
            data.output.append((logprobs.chosen[row], token, None))
        if spec.top_logprobs_num:
            data.output_top.append(logprobs.top(row, spec.top_logprobs_num))
        if spec.token_ids_logprob:
            data.output_selected.append(logprobs.of_ids(row, spec.token_ids_logprob))

    def add_hidden(self, vectors: np.ndarray) -> None:
        self._hidden.append(vectors.copy())

    def add_next_hidden(self, vector: np.ndarray) -> None:
        self._hidden.append(vector.copy())

    # ---- caller's side

    @property
    def finish_reason(self) -> dict[str, Any] | None:
        return self._state[2]

    def take(self) -> tuple[dict[str, Any], bool] | None:
        """(output dict as of now, whether it is the last one); None if it has been taken already.

        That happens when the engine thread rings between the two lines that follow.
        """
        self.queued = False
        state = self._state
        if state is self._taken:
            return None
        self._taken = state
        tokens, text, reason, hidden = state
        if text is None:
            text = self._decode(tokens, reason)
        snapshot = self._snapshot(tokens, text, reason, hidden)
        emitted = self._emitted if self._incremental and self.bell.stream else None
        output = make_output(snapshot, emitted=emitted, token_text=self._token_text)
        self._emitted = Emitted(text=len(text or ""), ids=tokens)
        return output, reason is not None

    def _decode(self, tokens: int, reason: dict[str, Any] | None) -> str | None:
        """Text of the first `tokens` output ids, decoded on from where the last call stopped."""
        if self._new_text is None:
            return None
        if self._text is None:
            self._text = self._new_text()
        self._text.extend(self.request.output_ids[self._decoded : tokens])
        self._decoded = tokens
        return self._text.emittable if reason is None else self._text.finish(reason)

    def _snapshot(
        self, tokens: int, text: str | None, reason: dict[str, Any] | None, hidden: int
    ) -> RequestSnapshot:
        request, spec = self.request, self.spec
        return RequestSnapshot(
            rid=spec.rid,
            output_ids=request.output_ids[:tokens],
            text=text,
            finish_reason=reason,
            prompt_tokens=len(request.prompt_ids),
            cached_tokens=request.cached_tokens,
            num_retractions=request.num_retractions,
            weight_version=self._weight_version,
            cache_miss_count=self._compile_count() - self._compiles_before,
            index=self._index,
            prompt_token_ids=request.prompt_ids if spec.return_prompt_token_ids else None,
            top_logprobs_num=spec.top_logprobs_num,
            token_ids_logprob=spec.token_ids_logprob,
            logprobs=self._logprobs_of(tokens, reason) if spec.return_logprob else None,
            return_hidden_states=spec.return_hidden_states,
            hidden_states=self._hidden[:hidden],
            received_at=self._received_at,
            finished_at=self._finished_at,
        )

    def _logprobs_of(self, tokens: int, reason: dict[str, Any] | None) -> LogprobData:
        """Entries of the prompt and of the first `tokens` output ids."""
        if reason is not None:
            return self._logprobs  # complete: nothing is added any more, and copies would touch every entry
        data = self._logprobs
        return LogprobData(
            input=data.input[:],
            input_top=data.input_top[:],
            input_selected=data.input_selected[:],
            output=data.output[:tokens],
            output_top=data.output_top[:tokens],
            output_selected=data.output_selected[:tokens],
        )
