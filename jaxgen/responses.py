"""What callers wait on: one Response per request, one Call per `generate`.

The engine thread writes into Responses and rings the Call's bell; the caller's thread (or event loop) turns
them into output dicts. Decoding text happens on the caller's side unless a stop string needs it earlier.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np

from jaxgen.errors import EngineDeadError, RequestError
from jaxgen.execution.sampler import Logprobs
from jaxgen.io import RequestInput, RequestSnapshot, build_output
from jaxgen.scheduling.request import Request
from jaxgen.tokenizer import TextStream


class Response:
    """The growing result of one request. Written by the engine thread, read by the caller's.

    index: flat position in the call's results. stream: whether each due token rings the call.
    """

    def __init__(
        self,
        call: Call,
        index: int,
        spec: RequestInput,
        *,
        stream_interval: int,
        new_text: Callable[[list[int]], TextStream] | None,
        compile_count: Callable[[], int],
    ):
        self.call = call
        self.index = index
        self.spec = spec
        self.request: Request | None = None
        self.created = time.time()
        self.finished_at: float | None = None
        self.cache_misses = 0
        self.input_logprobs: list[tuple[float, int, np.ndarray, np.ndarray, np.ndarray]] = []
        self.output_logprobs: list[tuple[float, np.ndarray, np.ndarray, np.ndarray]] = []
        self.hidden: list[np.ndarray] = []
        self.announced = 0  # tokens at the last ring
        self.queued = False  # an event for this response is waiting in the call's queue
        # (tokens, text or None, finish reason), replaced as one object so that a reader never sees halves.
        self.state: tuple[int, str | None, dict[str, Any] | None] = (0, None, None)
        self._interval = stream_interval
        self._new_text = new_text
        self._text: TextStream | None = None
        self._decoded = 0
        self._compile_count = compile_count
        self._compiles_before = compile_count()

    # ---- engine thread

    def update(self, request: Request) -> None:
        tokens, reason = len(request.output_ids), request.finish_reason
        if reason is None and not self._due(tokens):
            return
        text = None
        if request.text is not None:
            text = request.text.emittable if reason is None else request.text.finish(reason)
        if reason is not None:
            self.finished_at = time.time()
            self.cache_misses = self._compile_count() - self._compiles_before
        self.state = (tokens, text, reason)
        self.announced = tokens
        self.call.ring(self)

    def _due(self, tokens: int) -> bool:
        if not self.call.stream or tokens == 0:
            return False
        return self.announced == 0 or tokens - self.announced >= self._interval

    def fail(self, error: BaseException) -> None:
        self.call.fail(error)

    def add_input_logprobs(self, request: Request, start: int, logprobs: Logprobs) -> None:
        """Keeps the entries not seen yet, in order; a chunk after a retraction repeats earlier ones."""
        prompt = request.prompt_ids
        for i in range(len(logprobs.chosen)):
            target = start + i + 1
            if target == request.logprob_start + 1 + len(self.input_logprobs) and target < len(prompt):
                self.input_logprobs.append(
                    (
                        float(logprobs.chosen[i]),
                        prompt[target],
                        logprobs.top_values[i],
                        logprobs.top_ids[i],
                        logprobs.id_values[i],
                    )
                )

    def add_output_logprobs(self, logprobs: Logprobs, row: int) -> None:
        self.output_logprobs.append(
            (
                float(logprobs.chosen[row]),
                logprobs.top_values[row],
                logprobs.top_ids[row],
                logprobs.id_values[row],
            )
        )

    def add_hidden(self, vectors: np.ndarray) -> None:
        self.hidden.append(vectors)

    def add_next_hidden(self, vector: np.ndarray) -> None:
        self.hidden.append(vector)

    # ---- caller's side

    @property
    def finished(self) -> bool:
        return self.state[2] is not None

    def snapshot(self) -> RequestSnapshot:
        """The response as it stands: plain data for the output builders."""
        raise NotImplementedError
