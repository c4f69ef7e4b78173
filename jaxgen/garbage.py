"""How often Python's garbage collector runs while an engine lives."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

RARE = 1000  # collections of the middle generation before a full one


def set_thresholds(given: Sequence[int] | None) -> Callable[[], None]:
    """Sets the collector's thresholds, or only makes full collections rare; returns what undoes it.

    A full collection visits every token id of every prompt and every log-probability of every result. For a few
    hundred requests that is some 0.1 s in which no thread launches anything, spent in vain: nothing that a request
    leaves behind is in a cycle.
    """
    before = gc.get_threshold()
    wanted = tuple(given) if given is not None else (*before[:2], max(before[2], RARE))
    gc.set_threshold(*wanted)
    found = gc.get_threshold()

    def restore() -> None:
        if gc.get_threshold() == found:  # not if somebody has set others since
            gc.set_threshold(*before)

    return restore
