"""The decoding requests, kept as a list and an array of rows that change only when the membership does."""

from __future__ import annotations

import numpy as np

from jaxgen.scheduling.kv import KVManager
from jaxgen.scheduling.plan import Plan
from jaxgen.scheduling.request import Request


class Lanes:
    """Requests whose prompt is computed and whose next token may be launched.

    Attributes:
        requests: the lanes in the order in which they joined; replaced, never changed, so plans may share it.
        rows: [B] int64, the row of each lane.
    """

    def __init__(self, kv: KVManager) -> None:
        self._kv = kv
        self._members: dict[str, Request] = {}
        self._joined: dict[str, Request] = {}  # since the last plan with lanes
        self._stale = False
        self._planned: list[Request] | None = None
        self.requests: list[Request] = []
        self.rows: np.ndarray = np.empty(0, np.int64)
        self._rows32: np.ndarray = np.empty(0, np.int32)

    def join(self, request: Request) -> None:
        self._members[request.rid] = self._joined[request.rid] = request
        self._stale = True

    def leave(self, request: Request) -> None:
        """Drop a request; no effect if it is no lane."""
        if self._members.pop(request.rid, None) is not None:
            self._joined.pop(request.rid, None)
            self._stale = True

    def refresh(self) -> None:
        """Bring `requests` and `rows` up to date; lanes whose last allowed token is launched leave."""
        if self._stale:
            self._rebuild()
        table = self._kv.rows
        complete = table.kv_len[self.rows] >= table.limit[self.rows]
        if complete.any():
            for index in np.flatnonzero(complete).tolist():
                self.leave(self.requests[index])
            self._rebuild()

    def _rebuild(self) -> None:
        self.requests = list(self._members.values())
        self.rows = np.array([request.row for request in self.requests], np.int64)
        self._rows32 = self.rows.astype(np.int32)
        self._planned = None  # not the old list: it would keep requests that have left alive
        self._stale = False

    def advance(self, plan: Plan, steps: int = 1) -> None:
        """Add the next `steps` tokens of every lane to the plan, or as many as it may have.

        The caller has refreshed and has checked for pages; a lane needs at most one.
        """
        table = self._kv.rows
        kv_len = np.minimum(table.kv_len[self.rows] + steps, table.limit[self.rows])
        full = np.flatnonzero(kv_len > table.capacity[self.rows])
        if full.size:
            for index, page in zip(full.tolist(), self._kv.allocate(int(full.size))):
                request = self.requests[index]
                plan.page_updates.append((request.row, len(request.pages), page))
                request.pages.append(page)
            table.capacity[self.rows[full]] += self._kv.page_size
        table.kv_len[self.rows] = kv_len
        plan.lanes, plan.steps = self.requests, steps
        plan.rows = self._rows32
        plan.lengths = kv_len.astype(np.int32)
        plan.membership_changed = self.requests is not self._planned
        self._planned = self.requests
        if self._joined:
            plan.joined = list(self._joined.values())
            self._joined.clear()
