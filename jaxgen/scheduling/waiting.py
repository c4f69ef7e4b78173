"""The waiting requests, always in the static order of the policy."""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Iterator

from jaxgen.scheduling.plan import SchedulerConfig
from jaxgen.scheduling.request import Request

type Entry = tuple[tuple[float, ...], Request]


class QueueFull(RuntimeError):
    """The queue holds `max_queued_requests` requests, none of them less urgent than the new one."""

    status_code = 503


class WaitingQueue:
    """Ordered by urgency (under priority scheduling), then by policy, then by arrival.

    Keys never change while a request waits, so insertion and removal are a binary search. The cache-aware
    policies are ordered by arrival here and rearranged by `policy.order`.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._entries: list[Entry] = []
        self._by_rid: dict[str, Entry] = {}
        self._random = random.Random(config.seed)
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Request]:
        return (request for _, request in self._entries)

    def get(self, rid: str) -> Request | None:
        entry = self._by_rid.get(rid)
        return entry[1] if entry is not None else None

    def urgency(self, request: Request) -> float:
        """Larger is more urgent, whatever the configured direction; -inf without a priority."""
        priority = request.priority if request.priority is not None else self._config.default_priority
        if priority is None:
            return float("-inf")
        return float(-priority if self._config.low_priority_values_first else priority)

    def add(self, request: Request) -> None:
        """Queue a request; one that comes back keeps its place in the order of arrival."""
        if request.sequence < 0:
            request.sequence = self._arrivals
            self._arrivals += 1
        key: tuple[float, ...] = (float(request.sequence),)
        if self._config.schedule_policy == "lof":
            key = (-float(request.max_new_tokens), *key)
        elif self._config.schedule_policy == "random":
            key = (self._random.random(), *key)
        if self._config.priority_scheduling:
            key = (-self.urgency(request), *key)
        entry = (key, request)
        self._by_rid[request.rid] = entry
        insort(self._entries, entry, key=_key)

    def remove(self, request: Request) -> None:
        key, _ = self._by_rid.pop(request.rid)
        del self._entries[bisect_left(self._entries, key, key=_key)]

    def last(self) -> Request:
        """The request that would be served last."""
        return self._entries[-1][1]


def _key(entry: Entry) -> tuple[float, ...]:
    return entry[0]
