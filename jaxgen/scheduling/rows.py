"""Bookkeeping per lane row, as arrays indexed by row: a decode step needs no Python loop over lanes."""

from __future__ import annotations

import heapq

import numpy as np


class RowTable:
    """One entry for each row of the device's lane state.

    Attributes:
        kv_len: [max_rows] int64, KV positions computed or launched.
        capacity: [max_rows] int64, KV positions that the row's pages hold.
        limit: [max_rows] int64, the KV length at which the last allowed token has been launched.
        full_reserve: [max_rows] bool, whether admission reserves the row's whole remaining output.
    """

    def __init__(self, max_rows: int) -> None:
        self.kv_len: np.ndarray = np.zeros(max_rows, np.int64)
        self.capacity: np.ndarray = np.zeros(max_rows, np.int64)
        self.limit: np.ndarray = np.zeros(max_rows, np.int64)
        self.full_reserve: np.ndarray = np.zeros(max_rows, np.bool_)
        self.max_rows = max_rows
        self._free = list(range(max_rows))  # a heap

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, limit: int, full_reserve: bool) -> int:
        """The lowest free row, so that the rows in use stay dense."""
        row = heapq.heappop(self._free)
        self.limit[row] = limit
        self.full_reserve[row] = full_reserve
        return row

    def give_back(self, row: int) -> None:
        self.kv_len[row] = self.capacity[row] = self.limit[row] = 0
        heapq.heappush(self._free, row)
