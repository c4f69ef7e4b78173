"""How often Python's garbage collector runs on an engine's account."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

YOUNG = 10_000  # new objects before a collection: more than 256 prompts need before they are submitted
MIDDLE = 200  # collections of new objects before one of the middle generation, should no prompt be computed
RARE = 1000  # collections of the middle generation before a full one


def set_thresholds(*thresholds: int) -> Callable[[], None]:
    """`gc.set_threshold`; returns what undoes it, unless somebody has set others since."""
    before = gc.get_threshold()
    gc.set_threshold(*thresholds)
    found = gc.get_threshold()

    def restore() -> None:
        if gc.get_threshold() == found:
            gc.set_threshold(*before)

    return restore


class RareCollections:
    """A context in which garbage collections are rare, full ones above all; any number of threads may be in it.

    A full collection visits every token id of every prompt and every log-probability of every result. For a few
    hundred requests that is some 0.1 s in which no thread launches anything, spent in vain: nothing that a request
    leaves behind is in a cycle. The thresholds are the whole process's, so outside they are what they were.

    Collections of new objects look at the prompts that the caller has just made. For 256 of 2,112 ids they took 4 to
    5 ms before the first launch when they came every 700 objects, and 2 ms when every 5,000; now there is none.

    A collection of the middle generation takes 20 to 30 ms when it meets the results of 256 x 128 tokens with five
    log-probabilities each, and is due when they are made (Python 3.12, two cores). So the context leaves nothing due
    at once: the collection comes when some hundreds of objects more have been made or, should the next call be
    quicker, in `catch_up`. By then the results are often gone.
    """

    def __init__(self) -> None:
        self._inside = 0
        self._outside = gc.get_threshold()
        self._restore: Callable[[], None] = lambda: None
        # Re-entrant: the collector may close a dropped iterator, and so leave, from whatever line is running.
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._outside = youngest, middle, full = gc.get_threshold()
                if youngest:  # 0: no collections at all
                    self._restore = set_thresholds(max(youngest, YOUNG), max(middle, MIDDLE), max(full, RARE))

    def __exit__(self, *exc_info: object) -> None:
        with self._lock:
            if self._inside == 1:
                self._collect_if_due(0)  # before the thresholds go back: then any new object may set off more
            self._inside -= 1
            if self._inside == 0:
                self._restore()
                self._restore = lambda: None

    def catch_up(self) -> None:
        """Collects what is due by the thresholds outside, but for a full collection.

        For a thread that waits for the device anyway: what it has seen, the end of the call need not look at.
        """
        if self._inside:
            self._collect_if_due(1)
            self._collect_if_due(0)

    def _collect_if_due(self, generation: int) -> None:
        is_due = gc.get_count()[generation] > self._outside[generation]
        if is_due and gc.isenabled() and self._outside[0]:
            gc.collect(generation)
