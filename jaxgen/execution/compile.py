"""Ahead-of-time compilation of step functions, in parallel, and where its results are kept."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import logging
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax

logger = logging.getLogger("jaxgen")

# Python's turn of a thread that lowers a step while another one serves; Python's own, 5 ms, outlasts several steps.
SWITCH_SECONDS = 0.0005


class CompileForbiddenError(RuntimeError):
    """A step had to be compiled while serving, and the engine was started with strict_compile=True."""


def cache_directory(option: str | None) -> Path | None:
    """The private directory (mode 0700) that keeps compiled steps for the next start; None to keep none.

    option: None = `$JAXGEN_COMPILATION_CACHE_DIR` or the user's cache folder; "" = keep none. Where JAX has a
    compilation cache of its own, by its variable or configuration, that one serves instead: a program that
    came out of it cannot be stored again. A directory that others can write to, or own, is refused with
    ValueError, since what is in it is executed.
    """
    directory = os.environ.get("JAXGEN_COMPILATION_CACHE_DIR") if option is None else option
    if directory == "":
        return None
    if jax.config.jax_compilation_cache_dir and jax.config.jax_enable_compilation_cache:
        return None
    if directory is None:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        directory = os.path.join(base, "jaxgen", "steps")
    path = Path(directory).expanduser()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("Compilation cache off: cannot create %s (%s)", path, error)
        return None
    info = path.stat()
    if info.st_uid != os.getuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(
            f"The compilation cache {path} is owned by or writable for somebody else, and its content is "
            'executed. Run `chmod go-w` on it, choose another compilation_cache_dir, or pass "" to go without.'
        )
    return path


class StepTable[Key]:
    """Compiled steps by key; anything compiled by `get()` after `seal()` counts as a cache miss.

    build(key) -> compiled executable. Thread-safe.
    """

    def __init__(self, build: Callable[[Key], Callable], *, strict: bool):
        self._build = build
        self._strict = strict
        self._steps: dict[Key, Callable] = {}
        self._sealed = False
        self.miss_count = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._steps

    def __iter__(self) -> Iterator[Key]:
        return iter(tuple(self._steps))

    def get(self, key: Key) -> Callable:
        """The compiled step for `key`, compiling it now if start-up did not."""
        step = self._steps.get(key)
        if step is None:
            if self._sealed:
                if self._strict:
                    raise CompileForbiddenError(
                        f"Step {key} is outside the start-up buckets and strict_compile=True forbids "
                        "compiling it now; widen the buckets or lower the request's demands."
                    )
                self.miss_count += 1
                logger.info("Compiling step %s while serving", key)
            step = self.add(key)
        return step

    def add(self, key: Key) -> Callable:
        """Builds the step for `key` and publishes it. Never a cache miss."""
        step = self._steps[key] = self._build(key)
        return step

    def seal(self) -> None:
        """Ends start-up: from now on a compile is a cache miss."""
        self._sealed = True

    def clear(self) -> None:
        self._steps.clear()


class StartupCompilation[Key]:
    """Adds steps to a table in parallel threads, beginning in the order given, while the caller goes on."""

    def __init__(self, table: StepTable[Key], keys: Iterable[Key], on_done: Callable[[Key], None]):
        """on_done(key): called as each step is there, from the thread that compiled it."""
        keys = list(keys)
        workers = max(1, min(len(keys), os.cpu_count() or 1))
        self._pool = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="jaxgen-compile")

        def add(key: Key) -> None:
            table.add(key)
            on_done(key)

        self._futures = {key: self._pool.submit(add, key) for key in keys}

    def __len__(self) -> int:
        return len(self._futures)

    def wait(self, keys: Iterable[Key] | None = None, on_done: Callable[[], None] = lambda: None) -> None:
        """Waits for `keys`, or for all; calls on_done() here for each; raises what the first failure raised."""
        futures = self._futures.values() if keys is None else [self._futures[key] for key in keys]
        for future in concurrent.futures.as_completed(futures):
            future.result()
            on_done()

    def stop(self) -> None:
        """Drops what has not begun and waits for what has."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class BackgroundCompilation[Key]:
    """Adds steps to a table while the engine serves; a step that fails is logged and left out.

    The threads are daemons: those of an executor would hold up the interpreter's exit until the last step.
    """

    def __init__(
        self,
        table: StepTable[Key],
        keys: Iterable[Key],
        *,
        on_ready: Callable[[Key], None],
        on_end: Callable[[], None],
        workers: int,
    ):
        """on_ready(key) follows each step, on_end the last one unless stopped; both on a compiling thread."""
        self._table = table
        self._queue = collections.deque(keys)
        self._on_ready, self._on_end = on_ready, on_end
        self._stopping = False
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, name=f"jaxgen-background-{i}", daemon=True)
            for i in range(min(workers, len(self._queue)))
        ]
        self._running = len(self._threads)
        self._switch_interval = sys.getswitchinterval()
        if self._threads:  # so that the thread that serves need not wait long for its turn
            sys.setswitchinterval(min(self._switch_interval, SWITCH_SECONDS))
        else:
            self._end()
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._stopping and self._queue:
            with contextlib.suppress(IndexError):  # another thread took the last one
                self._add(self._queue.popleft())
        with self._lock:
            self._running -= 1
            last = self._running == 0
        if last:
            self._end()

    def _add(self, key: Key) -> None:
        try:
            self._table.add(key)
            self._on_ready(key)
        except Exception as error:  # the compiler fails in its own ways; larger steps serve in its place
            if not self._stopping:
                logger.warning("Step %s could not be compiled, larger ones serve instead: %s", key, error)

    def _end(self) -> None:
        sys.setswitchinterval(self._switch_interval)
        if not self._stopping:
            self._on_end()
        self._ended.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until nothing is left to compile; False if `timeout` seconds pass first."""
        return self._ended.wait(timeout)

    def cancel(self) -> None:
        """Drops what has not begun."""
        self._stopping = True

    def stop(self) -> None:
        """Drops what has not begun and waits for what has: a compiler cannot be interrupted. Idempotent."""
        self.cancel()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
