"""The KV pages of requests: reuse, growth, publication in the prefix cache, and return."""

from __future__ import annotations

import numpy as np

from jaxgen.scheduling.page_pool import PageError, PagePool
from jaxgen.scheduling.plan import SchedulerConfig
from jaxgen.scheduling.prefix_cache import Match, Node, PrefixCache
from jaxgen.scheduling.request import Request
from jaxgen.scheduling.rows import RowTable


class KVManager:
    """Joins page pool, prefix cache and row table; all sizes in pages unless a name says tokens."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.page_size = config.page_size
        self.pool = PagePool(config.num_pages)
        self.cache = PrefixCache(self.pool, config.page_size, config.eviction_policy)
        self.rows = RowTable(config.max_rows)
        self._radix = config.radix_cache
        self._copy_sources: list[Node] = []

    @property
    def available(self) -> int:
        """Pages that are free or can be evicted."""
        return self.pool.num_free + self.cache.num_unlocked

    def pages_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def match(self, request: Request) -> Match:
        """The request's cached prefix, within its own limit; remembered until the cache changes."""
        if request.match is None or request.match_version != self.cache.version:
            request.match, request.match_version = self._look_up(request), self.cache.version
        return request.match

    def _look_up(self, request: Request) -> Match:
        """`match`, looked up anew. Most prompts are in no cached page, and only their first page is converted."""
        limit = request.match_limit if self._radix else 0
        first_page = request.head_key(min(limit, self.page_size))
        match = self.cache.match(request.namespace, first_page, limit)
        if match.pages:
            match = self.cache.match(request.namespace, request.key(limit), limit)
        return match

    def available_beside(self, match: Match) -> int:
        """Pages available to a request that reuses `match`, which pins the pages it shares and copies."""
        tail = match.tail is not None and match.tail.locks == 0
        return self.available - self.cache.num_unlocked_on_path(match.node) - tail

    def without_tail(self, match: Match) -> Match:
        """The match without the page that would be copied."""
        return Match(len(match.pages) * self.page_size, match.pages, match.node, None)

    def attach(self, request: Request, match: Match, full_reserve: bool) -> None:
        """Give the request a row and the matched pages. `grow` must follow in the same plan."""
        self.cache.lock(match.node)
        self.cache.use(match)
        if match.tail is not None:
            self.cache.lock(match.tail)
            self._copy_sources.append(match.tail)
        request.rows = self.rows
        request.row = self.rows.take(request.kv_limit, full_reserve)
        request.node = match.node
        request.match = None  # its limit may be another when it is queued again
        request.pages = list(match.pages)
        self.rows.kv_len[request.row] = match.length
        self.rows.capacity[request.row] = len(match.pages) * self.page_size

    def end_plan(self) -> None:
        """The plan is complete: its copy sources may be evicted by later plans, which run after it."""
        for node in self._copy_sources:
            self.cache.unlock(node)
        self._copy_sources.clear()

    def allocate(self, count: int) -> list[int]:
        """Owned pages, evicting as needed; the caller has checked `available`."""
        missing = count - self.pool.num_free
        if missing > 0:
            self.cache.evict(missing)
        return self.pool.allocate(count)

    def grow(self, request: Request, num_tokens: int) -> None:
        """Give the request pages for positions [0, num_tokens)."""
        missing = self.pages_of(num_tokens) - len(request.pages)
        if missing > 0:
            request.pages += self.allocate(missing)
            self.rows.capacity[request.row] = len(request.pages) * self.page_size

    def lanes_missing(self, rows: np.ndarray, ahead: int = 1) -> int:
        """Pages that lanes lack for their next `ahead` tokens, none past its limit."""
        end = np.minimum(self.rows.kv_len[rows] + ahead, self.rows.limit[rows])
        missing = end - self.rows.capacity[rows]
        return int(np.sum((np.maximum(missing, 0) + self.page_size - 1) // self.page_size))

    def publish(self, request: Request, num_tokens: int, priority: int = 0) -> None:
        """Insert the KV of the first `num_tokens` tokens into the prefix cache."""
        if self._radix and request.node is not None:
            key = request.key(num_tokens)
            request.node = self.cache.insert(key, request.pages, request.node, priority)

    def release(self, request: Request) -> None:
        """Return the request's row and pages; what it published stays cached."""
        if request.node is None:
            raise PageError(f"request {request.rid!r} has no pages to return")
        self.cache.unlock(request.node)
        self.pool.release([page for page in request.pages if self.pool.is_owned(page)])
        self.rows.give_back(request.row)
        request.node = None
        request.pages = []
        request.row = -1

    def held_alone(self, request: Request) -> int:
        """Pages that would become available if the request were retracted."""
        if request.node is None:
            return 0
        owned = sum(self.pool.is_owned(page) for page in request.pages)
        return owned + self.cache.num_locked_once_on_path(request.node)

    def check(self, running: list[Request]) -> None:
        """The full invariant; raises PageError."""
        owned = [page for request in running for page in request.pages if self.pool.is_owned(page)]
        self.pool.check(owned, self.cache.check())
        for request in running:
            node = request.node
            if node is None or request.row < 0:
                raise PageError(f"running request {request.rid!r} has no lock or no row")
            if len(request.pages) * self.page_size != int(self.rows.capacity[request.row]):
                raise PageError(f"request {request.rid!r} and its row disagree about its pages")
        locks: dict[int, int] = {}
        for request in running:
            node = request.node
            while node is not None:
                locks[id(node)] = locks.get(id(node), 0) + 1
                if node.locks < locks[id(node)]:
                    raise PageError(f"page {node.page} has fewer locks than requests that use it")
                node = node.parent
        if len(running) + self.rows.num_free != self.rows.max_rows:
            raise PageError(f"{len(running)} running requests and {self.rows.num_free} free rows")
