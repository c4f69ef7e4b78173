"""A step's log-probabilities on the host, as the entries of results."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property

import numpy as np

# (log-probability, token id, text). Without a list in it: the garbage collector soon stops looking at it.
Entry = tuple[float | None, int, str | None]


class StepLogprobs:
    """Log-probabilities of the R rows of a step, turned into Python objects for all rows at once.

    Each kind is made when it is first asked for. Done row by row, this would take longer than the device step
    that it has to keep up with.

    Args:
        chosen: [R] float32, of each row's token.
        top_values, top_ids: [R, top] float32 and int32, the largest, descending.
        id_values: [R, M] float32, of the ids that the row's request asked for.
    """

    def __init__(
        self, chosen: np.ndarray, top_values: np.ndarray, top_ids: np.ndarray, id_values: np.ndarray
    ):
        self._arrays = chosen, top_values, top_ids, id_values

    def rows(self, rows: slice) -> StepLogprobs:
        """Those of some rows."""
        return StepLogprobs(*(array[rows] for array in self._arrays))

    def __len__(self) -> int:
        return len(self._arrays[0])

    @cached_property
    def chosen(self) -> list[float]:
        """One value per row."""
        return self._arrays[0].tolist()

    @cached_property
    def _top(self) -> list[list[Entry]]:
        _, values, ids, _ = self._arrays
        entries = zip(values.ravel().tolist(), ids.ravel().tolist(), itertools.repeat(None))
        return list(map(list, zip(*[entries] * values.shape[1])))

    @cached_property
    def _id_values(self) -> list[list[float]]:
        return self._arrays[3].tolist()

    def top(self, row: int, count: int) -> list[Entry]:
        """The `count` largest of a row."""
        found = self._top[row]
        return found if count == len(found) else found[:count]

    def of_ids(self, row: int, ids: Sequence[int]) -> list[Entry]:
        """One entry per id of a row, whose request asked for `ids`."""
        return list(zip(self._id_values[row], ids, itertools.repeat(None)))
