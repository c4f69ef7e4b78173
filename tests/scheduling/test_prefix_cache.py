"""The prefix cache against a plain model: the set of id sequences that were inserted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxgen.scheduling.page_pool import PageError, PagePool
from jaxgen.scheduling.prefix_cache import Node, PrefixCache, common_prefix

IDS = st.lists(st.integers(0, 2), min_size=1, max_size=20)


def key_of(ids: list[int]) -> bytes:
    return np.array(ids, ">i4").tobytes()


def shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


class Holder:
    """A request as the cache sees it: its ids so far, its pages and the end of its lock."""

    def __init__(self, ids: list[int], pages: list[int], node: Node) -> None:
        self.ids, self.pages, self.node = ids, pages, node


class CacheMachine(RuleBasedStateMachine):
    """Requests that match, compute, insert, grow and leave, in any order and interleaving."""

    page_size = 4
    num_pages = 400

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(self.num_pages)
        self.cache = PrefixCache(self.pool, self.page_size)
        self.content = np.full((self.num_pages, self.page_size), -1)
        self.inserted: dict[str, list[list[int]]] = {"a": [], "b": []}
        self.holders: list[Holder] = []
        self.evicted = False

    def read(self, pages: list[int], length: int) -> list[int]:
        return self.content[pages].reshape(-1)[:length].tolist()

    def allocate(self, count: int) -> list[int]:
        if self.pool.num_free < count:
            self.cache.evict(count - self.pool.num_free)
            self.evicted = True
        return self.pool.allocate(count)

    def write(self, holder: Holder, start: int) -> None:
        missing = -(-len(holder.ids) // self.page_size) - len(holder.pages)
        holder.pages += self.allocate(max(missing, 0))
        for position in range(start, len(holder.ids)):
            page = holder.pages[position // self.page_size]
            assert self.pool.is_owned(page) or start > position // self.page_size * self.page_size
            self.content[page, position % self.page_size] = holder.ids[position]

    @precondition(lambda self: self.pool.num_free + self.cache.num_unlocked >= 12)
    @rule(namespace=st.sampled_from("ab"), ids=IDS, limit=st.integers(0, 20))
    def start(self, namespace: str, ids: list[int], limit: int) -> None:
        match = self.cache.match(namespace, key_of(ids), limit)
        best = max((min(shared(ids, other), limit) for other in self.inserted[namespace]), default=0)
        assert match.length <= best if self.evicted else match.length == best
        full = len(match.pages) * self.page_size
        assert full <= match.length < full + self.page_size or match.length == full
        assert self.read(match.pages, full) == ids[:full]
        self.cache.lock(match.node)
        pages = list(match.pages)
        if match.tail is not None:
            self.cache.lock(match.tail)
            (copy,) = self.allocate(1)
            self.content[copy] = self.content[match.tail.page]
            assert self.content[copy, : match.length - full].tolist() == ids[full : match.length]
            pages.append(copy)
            self.cache.unlock(match.tail)
        self.cache.use(match)
        holder = Holder(ids, pages, match.node)
        self.write(holder, match.length)
        holder.node = self.cache.insert(key_of(ids), holder.pages, holder.node)
        self.inserted[namespace].append(ids)
        self.holders.append(holder)
        holder.namespace = namespace  # type: ignore[attr-defined]

    @precondition(lambda self: self.holders and self.pool.num_free + self.cache.num_unlocked >= 12)
    @rule(pick=st.integers(0, 99), more=st.lists(st.integers(0, 2), min_size=1, max_size=9))
    def grow(self, pick: int, more: list[int]) -> None:
        holder = self.holders[pick % len(self.holders)]
        start = len(holder.ids)
        holder.ids = holder.ids + more
        self.write(holder, start)
        holder.node = self.cache.insert(key_of(holder.ids), holder.pages, holder.node)
        self.inserted[holder.namespace].append(holder.ids)  # type: ignore[attr-defined]

    @precondition(lambda self: self.holders)
    @rule(pick=st.integers(0, 99))
    def leave(self, pick: int) -> None:
        holder = self.holders.pop(pick % len(self.holders))
        self.cache.unlock(holder.node)
        self.pool.release([page for page in holder.pages if self.pool.is_owned(page)])

    @invariant()
    def nothing_is_lost(self) -> None:
        owned = [page for holder in self.holders for page in holder.pages if self.pool.is_owned(page)]
        self.pool.check(owned, self.cache.check())
        for holder in self.holders:
            assert self.read(holder.pages, len(holder.ids)) == holder.ids

    def teardown(self) -> None:
        while self.holders:
            self.leave(0)
        self.cache.evict(self.num_pages)
        assert self.pool.num_free == self.num_pages and not self.cache._roots


class SmallPoolMachine(CacheMachine):
    """The same under constant eviction."""

    page_size = 2
    num_pages = 40


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
SmallPoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAmplePool = CacheMachine.TestCase
TestSmallPool = SmallPoolMachine.TestCase


def put(cache: PrefixCache, pool: PagePool, ids: list[int], priority: int = 0) -> Node:
    """Insert ids as a finished request would."""
    match = cache.match("", key_of(ids), len(ids))
    cache.lock(match.node)
    cache.use(match)
    pages = match.pages + pool.allocate(-(-len(ids) // 2) - len(match.pages))
    node = cache.insert(key_of(ids), pages, match.node, priority)
    cache.unlock(node)
    pool.release([page for page in pages if pool.is_owned(page)])
    return node


def cached(cache: PrefixCache, ids: list[int]) -> int:
    return cache.match("", key_of(ids), len(ids)).length


@pytest.mark.parametrize(
    ("policy", "survivors"),
    [("lru", [2, 3]), ("lfu", [1, 3]), ("slru", [1, 3]), ("priority", [2, 1])],
)
def test_eviction_follows_the_policy(policy: str, survivors: list[int]) -> None:
    pool = PagePool(8)
    cache = PrefixCache(pool, 2, policy)
    for value, priority in ((1, 5), (2, 9), (3, 0)):  # used in this order ...
        put(cache, pool, [value, value], priority)
    for value in (1, 1, 3):  # ... and then reused, after which 2 is used once more without a hit
        put(cache, pool, [value, value], 0)
    cache.match("", key_of([2, 2]), 2)
    cache._roots[b""].children[key_of([2, 2])].last_used = cache._clock + 1
    assert cache.evict(1) == 1
    assert [v for v in (1, 2, 3) if cached(cache, [v, v])] == sorted(survivors)


def test_parents_outlive_their_children_and_locked_pages_stay() -> None:
    pool = PagePool(8)
    cache = PrefixCache(pool, 2)
    put(cache, pool, [1, 2, 3, 4, 5, 6])
    node = cache.match("", key_of([1, 2]), 2).node
    cache.lock(node)
    assert cache.evict(1) == 1
    assert cached(cache, [1, 2, 3, 4, 5, 6]) == 4
    assert cache.evict(100) == 1, "the locked page must stay"
    cache.unlock(node)
    assert cache.evict(100) == 1 and pool.num_free == 8


def test_a_namespace_without_pages_is_forgotten() -> None:
    cache = PrefixCache(PagePool(8), 2)
    node = cache.match("salt", key_of([1, 2, 3]), 3).node
    cache.lock(node)
    assert list(cache._roots) == [b"salt"]
    cache.unlock(node)
    assert not cache._roots


def test_recomputing_an_unused_prefix_does_not_hold_it_twice() -> None:
    pool = PagePool(8)
    cache = PrefixCache(pool, 2)
    put(cache, pool, [1, 2, 3, 4])
    root = cache.match("", key_of([1]), 0).node
    cache.lock(root)
    pages = pool.allocate(3)
    node = cache.insert(key_of([1, 2, 3, 4, 5]), pages, root)
    assert (pool.num_free, cache.num_unlocked) == (5, 0)
    assert cache.match("", key_of([1, 2, 3, 4, 5]), 4).pages == pages[:2]
    cache.unlock(node)
    cache.check()


def test_namespaces_share_nothing() -> None:
    pool = PagePool(8)
    cache = PrefixCache(pool, 2)
    put(cache, pool, [1, 2, 3])
    assert cached(cache, [1, 2, 3]) == 3
    assert cache.match("other", key_of([1, 2, 3]), 3).length == 0


@pytest.mark.parametrize(
    ("a", "b", "n"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 256], [1, 2, 1], 2), ([0, 0], [0, 0], 2)]
)
def test_common_prefix_counts_whole_ids(a: list[int], b: list[int], n: int) -> None:
    assert common_prefix(key_of(a), key_of(b)) == n


def test_a_broken_pool_is_reported() -> None:
    pool = PagePool(4)
    pages = pool.allocate(2)
    with pytest.raises(PageError, match="two holders"):
        pool.check([pages[0], pages[0]], [])
    with pytest.raises(PageError, match=f"page {pages[1]} is in state"):
        pool.check([pages[0]], [])
    pool.release(pages)
    with pytest.raises(PageError, match="expected"):
        pool.release([pages[0]])
    with pytest.raises(PageError, match="5 pages wanted, 4 free"):
        pool.allocate(5)
