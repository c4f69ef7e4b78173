"""One `generate` call and its four ways of being waited for: sync or asyncio, whole or streaming."""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from jaxgen.outputs import raise_if_failed
from jaxgen.responses import Response


class Call:
    """Waits for the responses of one call and turns them into output dicts.

    The engine thread rings; the caller's thread, or the event loop that awaits, reads. Whoever stops waiting
    before the end (an exception, a closed iterator, a cancelled task) aborts what still runs.

    Args:
        prepare: checks the input and makes the responses of this call; also says whether the result is one dict
            instead of a list.
        submit: hands the responses' requests to the engine thread.
        abort: ends the given responses' requests.
        done: called when nobody waits for the responses any more.
        collections: entered from before `prepare` until the result is there.
    """

    def __init__(
        self,
        *,
        stream: bool,
        prepare: Callable[[Call], tuple[list[Response], bool]],
        submit: Callable[[Sequence[Response]], None],
        abort: Callable[[Sequence[Response]], None],
        done: Callable[[], None],
        collections: AbstractContextManager[None],
    ):
        self.stream = stream
        self.responses: list[Response] = []
        self._single = False
        self._prepare = prepare
        self._submit = submit
        self._abort = abort
        self._done = done
        self._collections = collections
        self._unfinished = 0
        self._events: queue.SimpleQueue[Response | BaseException | None] = queue.SimpleQueue()
        self._post: Callable[[Response | BaseException | None], None] = self._events.put

    # ---- engine thread

    def ring(self, response: Response) -> None:
        """A response has news. Without streaming only the end of all, or a failure, is worth waking for."""
        if self.stream:
            if not response.queued:
                response.queued = True
                self._post(response)
            return
        reason = response.finish_reason
        self._unfinished -= 1
        failed = reason is not None and reason["type"] == "abort" and reason.get("status_code") is not None
        if failed or self._unfinished == 0:
            self._post(response if failed else None)

    def fail(self, error: BaseException) -> None:
        self._post(error)

    # ---- caller's side

    def wait(self) -> dict[str, Any] | list[dict[str, Any]]:
        """Blocks until every response has ended; raises ValueError or RequestError if one failed."""
        with self._under_way():
            if self.responses:
                self._raise(self._events.get())
            return self._result()

    def iterate(self) -> Generator[dict[str, Any]]:
        """Yields chunks as they come; closing the generator aborts what still runs."""
        with self._under_way():
            remaining = len(self.responses)
            while remaining:
                if taken := self._take(self._events.get()):
                    chunk, last = taken
                    remaining -= last
                    yield chunk

    async def wait_async(self) -> dict[str, Any] | list[dict[str, Any]]:
        """`wait` for the running event loop."""
        events = self._bind()
        with self._under_way():
            if self.responses:
                self._raise(await events.get())
            return self._result()

    async def iterate_async(self) -> AsyncGenerator[dict[str, Any]]:
        """`iterate` for the running event loop."""
        events = self._bind()
        with self._under_way():
            remaining = len(self.responses)
            while remaining:
                if taken := self._take(await events.get()):
                    chunk, last = taken
                    remaining -= last
                    yield chunk

    def abort(self) -> None:
        """Ends the requests that still run; nobody is waiting for them any more."""
        running = [response for response in self.responses if response.finish_reason is None]
        if running:
            self._abort(running)

    @contextlib.contextmanager
    def _under_way(self) -> Iterator[None]:
        """Prepares and submits the requests; in the end aborts what still runs and lets go of the responses.

        They know this call: a cycle would keep all their results until the garbage collector has been
        through everything there is.
        """
        with self._collections:
            self.responses, self._single = self._prepare(self)
            self._unfinished = len(self.responses)
            try:
                if self.responses:
                    self._submit(self.responses)
                yield
            finally:
                self.abort()
                self.responses.clear()
                self._done()

    def _bind(self) -> asyncio.Queue[Response | BaseException | None]:
        """Delivers events to the running event loop from now on."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Response | BaseException | None] = asyncio.Queue()

        def post(event: Response | BaseException | None) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the loop was closed under a waiting call: nobody is left to tell
                self.abort()

        self._post = post
        return events

    def _raise(self, event: Response | BaseException | None) -> None:
        if isinstance(event, BaseException):
            raise RuntimeError(f"The engine failed: {event}") from event
        if event is not None:
            raise_if_failed(event.finish_reason)

    def _take(self, event: Response | BaseException | None) -> tuple[dict[str, Any], bool] | None:
        if not isinstance(event, Response):
            self._raise(event)
            raise RuntimeError("a streaming call was woken without a response")
        return event.take()

    def _result(self) -> dict[str, Any] | list[dict[str, Any]]:
        """Makes the outputs; each response goes as soon as its own is there, and the next takes over its memory."""
        responses = self.responses[::-1]
        self.responses.clear()
        outputs: list[dict[str, Any]] = []
        while responses:
            if taken := responses.pop().take():
                outputs.append(taken[0])
        return outputs[0] if self._single else outputs
