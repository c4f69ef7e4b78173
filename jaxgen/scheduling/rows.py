"""Per-row bookkeeping of the running batch, as arrays indexed by row so that a decode step costs no Python loop."""

from __future__ import annotations

import numpy as np


class RowTable:
    """One entry for each row of the device's lane state.

    Attributes:
        kv_len: [max_rows] int64, KV positions computed or launched.
        capacity: [max_rows] int64, KV positions that the row's pages hold.
        limit: [max_rows] int64, the KV length at which the last allowed token has been launched.
        weight: [max_rows] float64, -1 where the new-token ratio applies to the row, else its own fixed ratio.
    """

    def __init__(self, max_rows: int) -> None:
        self.kv_len = np.zeros(max_rows, np.int64)
        self.capacity = np.zeros(max_rows, np.int64)
        self.limit = np.zeros(max_rows, np.int64)
        self.weight = np.full(max_rows, -1.0)
        self._free = list(range(max_rows - 1, -1, -1))
        self.max_rows = max_rows

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """The lowest free row, so that the rows in use stay dense."""
        return self._free.pop()

    def give_back(self, row: int) -> None:
        self.kv_len[row] = 0
        self.capacity[row] = 0
        self.limit[row] = 0
        self._free.append(row)
        # Rows in use stay near the bottom of the table; only finishing requests pay for the order.
        if len(self._free) > 1 and self._free[-2] < row:
            self._free.sort(reverse=True)
