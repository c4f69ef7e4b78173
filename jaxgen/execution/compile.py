"""Ahead-of-time compilation of step functions, in parallel, and where its results are kept."""

from __future__ import annotations

import concurrent.futures
import logging
import os
import stat
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

logger = logging.getLogger("jaxgen")


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
    """Compiled steps by key; anything compiled after `seal()` counts as a cache miss.

    build(key) -> compiled executable. Thread-safe: warm-up compiles from several threads.
    """

    def __init__(self, build: Callable[[Key], Callable], *, strict: bool):
        self._build = build
        self._strict = strict
        self._steps: dict[Key, Callable] = {}
        self._lock = threading.Lock()
        self._sealed = False
        self.miss_count = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._steps

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
            step = self._build(key)
            with self._lock:
                self._steps[key] = step
        return step

    def warm_up(self, keys: Iterable[Key], on_done: Callable[[Key], None]) -> None:
        """Compiles `keys` in parallel threads; calls on_done(key) from this thread as each one is ready."""
        keys = list(keys)
        workers = max(1, min(len(keys), os.cpu_count() or 1))
        with concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="jaxgen-compile") as pool:
            futures = {pool.submit(self.get, key): key for key in keys}
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
                    on_done(futures[future])
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def seal(self) -> None:
        """Ends start-up: from now on a compile is a cache miss."""
        self._sealed = True

    def clear(self) -> None:
        self._steps.clear()
