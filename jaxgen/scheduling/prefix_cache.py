"""Prefix cache: a tree of KV pages keyed by token ids, shared between requests at token granularity.

One node holds one page. A node that holds a full page of ids may have children; a shorter one, the tail of
what a request inserted, is always a leaf. Keys are ids as big-endian int32 bytes, whose byte order is the
order of the ids, so the child that shares most leading ids with a key is a neighbour of the key among its
sorted siblings.

Requests lock the path from the root to the deepest node they read or inserted. An unlocked node therefore has
only unlocked nodes below it, and every unlocked node can be evicted, leaves first.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from jaxgen.scheduling.page_pool import PageError, PagePool

ID_BYTES = 4


class Node:
    """One page of the tree, or the pageless root of a namespace (`page` -1, `key` the namespace)."""

    __slots__ = (
        "children", "depth", "hits", "key", "last_used", "locks", "order", "page", "parent", "priority",
        "queued",
    )  # fmt: skip

    def __init__(self, key: bytes, page: int, parent: Node | None, priority: int = 0) -> None:
        self.key = key
        self.page = page
        self.parent = parent
        self.depth: int = 0 if parent is None else parent.depth + 1  # pages from the root to here
        self.children: dict[bytes, Node] = {}
        self.order: list[bytes] = []  # the children's keys, sorted
        self.locks = 0
        self.last_used = 0
        self.hits = 0
        self.priority = priority
        self.queued = False  # has an entry in the eviction heap

    def add_child(self, child: Node) -> None:
        self.children[child.key] = child
        insort(self.order, child.key)

    def remove_child(self, child: Node) -> None:
        del self.children[child.key]
        del self.order[bisect_left(self.order, child.key)]


@dataclass(slots=True, frozen=True)
class Match:
    """What the cache holds of a key.

    Attributes:
        length: matching ids, `len(pages) * page_size` of them in full pages.
        pages: full pages, to be shared.
        node: deepest node of the full pages.
        tail: node whose page holds the remaining `length - len(pages) * page_size` ids, to be copied; or
            None.
    """

    length: int
    pages: list[int]
    node: Node
    tail: Node | None


def common_prefix(a: bytes, b: bytes) -> int:
    """Leading ids that two keys share."""
    n = min(len(a), len(b))
    difference = int.from_bytes(a[:n]) ^ int.from_bytes(b[:n])
    return (n - (difference.bit_length() + 7) // 8) // ID_BYTES


# What is evicted first has the smallest value. slru: nodes reused at least once outlive those never reused.
EVICTION_ORDER: dict[str, Callable[[Node], tuple[int, ...]]] = {
    "lru": lambda node: (node.last_used,),
    "lfu": lambda node: (node.hits, node.last_used),
    "slru": lambda node: (min(node.hits, 1), node.last_used),
    "priority": lambda node: (node.priority, node.last_used),
}


class PrefixCache:
    """The tree of one engine. All lengths are in ids, keys in bytes (4 an id).

    Attributes:
        num_unlocked: nodes, hence pages, that could be evicted now.
        version: changes whenever the result of a match may have changed.
    """

    def __init__(self, pool: PagePool, page_size: int, eviction_policy: str = "lru") -> None:
        self._pool = pool
        self._width = page_size * ID_BYTES
        self._order_of = EVICTION_ORDER[eviction_policy]
        self._roots: dict[bytes, Node] = {}
        self._heap: list[tuple[tuple[int, ...], int, Node]] = []
        self._entries = count()  # breaks ties in the heap, so that nodes are never compared
        self._clock = 0
        self.num_unlocked = 0
        self.version = 0

    def match(self, namespace: str, key: bytes, limit: int) -> Match:
        """The longest cached prefix of `key`, at most `limit` ids of it. Changes nothing."""
        name = namespace.encode()
        node = self._roots.get(name) or Node(name, -1, None)
        width = self._width
        end = min(len(key), limit * ID_BYTES)
        pages: list[int] = []
        offset = 0
        while offset + width <= end:
            child = node.children.get(key[offset : offset + width])
            if child is None:
                break
            pages.append(child.page)
            node = child
            offset += width
        tail, shared = _closest_child(node, key[offset : min(offset + width, end)])
        return Match(offset // ID_BYTES + shared, pages, node, tail)

    def use(self, match: Match) -> None:
        """Record that a request reuses the match."""
        self._clock += 1
        node = match.node if match.tail is None else match.tail
        while node.parent is not None:
            node.last_used = self._clock
            node.hits += 1
            node = node.parent

    def lock(self, node: Node) -> None:
        """Pin the path from the root to `node`."""
        self._extend_lock(node, None)

    def _extend_lock(self, node: Node, locked: Node | None) -> None:
        """Lock the path from `node` up to, and without, its ancestor `locked`; None: to the root."""
        current: Node | None = node
        while current is not None and current is not locked:
            if current.locks == 0:
                if current.parent is None:
                    self._roots[current.key] = current
                    self.version += 1  # matches without a page have a root of their own until then
                else:
                    self.num_unlocked -= 1
            current.locks += 1
            current = current.parent

    def unlock(self, node: Node) -> None:
        """Undo one `lock` of the path from the root to `node`."""
        current: Node | None = node
        while current is not None:
            if current.locks <= 0:
                raise PageError(f"page {current.page} of the prefix cache is unlocked more often than locked")
            current.locks -= 1
            if current.locks == 0:
                self._became_unlocked(current)
            current = current.parent

    def _became_unlocked(self, node: Node) -> None:
        if node.parent is not None:
            self.num_unlocked += 1
            self._offer(node)
        elif not node.children:
            del self._roots[node.key]

    def num_unlocked_on_path(self, node: Node) -> int:
        """Pages that locking the path to `node` would take from the evictable ones."""
        unlocked = 0
        while node.parent is not None and node.locks == 0:
            unlocked += 1
            node = node.parent
        return unlocked

    def num_locked_once_on_path(self, node: Node) -> int:
        """Pages that unlocking the path to `node` would make evictable."""
        once = 0
        while node.parent is not None and node.locks == 1:
            once += 1
            node = node.parent
        return once

    def insert(self, key: bytes, pages: list[int], locked: Node, priority: int = 0) -> Node:
        """Put the KV of `key` into the tree and return the deepest node of its path, to which the caller's
        lock moves.

        `pages[i]` holds ids [i * page_size, (i + 1) * page_size) of the key. Pages that become nodes pass
        from the caller to the cache, and the caller keeps reading them under its lock. Where the tree already
        has an equal page that is in use, the caller's stays its own.

        Args:
            locked: where the caller's lock ends now, on the path of `key`: a match's node or an earlier
                return value.
        """
        node = locked
        own_tail = None
        if 0 < len(node.key) < self._width and node.parent is not None:
            own_tail, node = node, node.parent  # the caller's last insertion ended inside a page
        lock_end = node
        self._clock += 1
        for offset in range(node.depth * self._width, len(key), self._width):
            piece = key[offset : offset + self._width]
            child = node.children.get(piece)
            if own_tail is not None and child is not None and child is not own_tail:
                self._withdraw(own_tail)  # another request was faster to fill an equal page
                own_tail = None
            if child is None:
                if len(piece) < self._width and _is_extended(node, piece):
                    break
                child = own_tail or self._adopt(pages[node.depth], node)
                self._place(child, node, piece)
            elif child is not own_tail and len(piece) < self._width:
                break  # another request's equal tail: nothing to add, no reason to pin it
            elif child.locks == 0 and child.page != pages[node.depth]:
                self._replace_page(child, pages[node.depth])
            if child is own_tail:
                own_tail, lock_end = None, child
            child.last_used = self._clock
            child.priority = max(child.priority, priority)
            node = child
        if own_tail is not None:
            self._withdraw(own_tail)
        self._extend_lock(node, lock_end)
        return node

    def _adopt(self, page: int, parent: Node) -> Node:
        """A new, still unplaced node for a page that passes from its owner to the cache."""
        self._pool.to_cached(page)
        self.num_unlocked += 1
        return Node(b"", page, parent)

    def _replace_page(self, node: Node, page: int) -> None:
        """Keep the caller's equal page instead of one that nobody reads, which the lock would only waste."""
        self._pool.release_cached([node.page])
        self._pool.to_cached(page)
        node.page = page
        self.version += 1

    def _place(self, node: Node, parent: Node, key: bytes) -> None:
        """Set or lengthen the key of `node`, dropping unlocked tails that are now a part of it."""
        if node.key:
            parent.remove_child(node)
        node.key = key
        index = bisect_left(parent.order, key)
        while index > 0 and key.startswith(parent.order[index - 1]):
            index -= 1
            shorter = parent.children[parent.order[index]]
            if shorter.locks == 0:
                self._remove(shorter)
        parent.add_child(node)
        self.version += 1

    def _withdraw(self, node: Node) -> None:
        """Give a tail that fell behind a longer equal page back to the one request that locks it."""
        if node.parent is None or node.locks != 1 or node.children:
            raise PageError(f"page {node.page} of the prefix cache cannot go back to its request")
        node.parent.remove_child(node)
        node.parent = None
        self._pool.to_owned(node.page)
        self.version += 1

    def _remove(self, node: Node) -> None:
        """Free the page of an unlocked leaf."""
        parent = node.parent
        if parent is None or node.locks or node.children:
            raise PageError(f"page {node.page} of the prefix cache is not an unlocked leaf")
        parent.remove_child(node)
        node.parent = None
        self.num_unlocked -= 1
        self.version += 1
        self._pool.release_cached([node.page])

    def _offer(self, node: Node) -> None:
        """Queue an evictable leaf; `queued` keeps the heap at one entry a node."""
        if not node.queued and not node.children:
            node.queued = True
            heapq.heappush(self._heap, (self._order_of(node), next(self._entries), node))

    def evict(self, num_pages: int) -> int:
        """Free up to `num_pages` unlocked pages in the order of the policy; returns how many were freed."""
        freed = 0
        while freed < num_pages and self._heap:
            order, _, node = heapq.heappop(self._heap)
            node.queued = False
            parent = node.parent
            if parent is None or node.locks or node.children:
                continue  # removed, or offered again when it is next unlocked or loses its last child
            if order != self._order_of(node):
                self._offer(node)
                continue
            self._remove(node)
            freed += 1
            if not parent.children and parent.locks == 0:
                if parent.parent is not None:
                    self._offer(parent)
                else:
                    del self._roots[parent.key]
        return freed

    def check(self) -> list[int]:
        """The full invariant of the tree; returns the pages it holds.

        Raises:
            PageError: a counter, a lock or an order is wrong.
        """
        pages: list[int] = []
        unlocked = 0
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            children = list(node.children.values())
            stack.extend(children)
            good = (
                node.order == sorted(node.children) and sum(child.locks for child in children) <= node.locks
            )
            if node.parent is not None:
                pages.append(node.page)
                unlocked += node.locks == 0
                good = good and node.parent.children.get(node.key) is node and len(node.key) <= self._width
                good = good and (not children or len(node.key) == self._width)
                good = good and (bool(children) or node.locks > 0 or node.queued)
            if not good:
                raise PageError(f"the prefix cache's node of page {node.page} is inconsistent")
        if unlocked != self.num_unlocked or len(pages) != self._pool.num_cached:
            raise PageError(
                f"{unlocked} unlocked of {len(pages)} cached pages, the counters say "
                f"{self.num_unlocked} of {self._pool.num_cached}"
            )
        return pages


def _closest_child(node: Node, key: bytes) -> tuple[Node | None, int]:
    """The child that shares most leading ids with `key`, and how many."""
    best, best_shared = None, 0
    if key and node.order:
        index = bisect_left(node.order, key)
        for sibling in node.order[max(index - 1, 0) : index + 1]:
            shared = common_prefix(sibling, key)
            if shared > best_shared:
                best, best_shared = node.children[sibling], shared
    return best, best_shared


def _is_extended(node: Node, piece: bytes) -> bool:
    """Whether a child holds all ids of `piece` and more."""
    index = bisect_left(node.order, piece)
    return index < len(node.order) and node.order[index].startswith(piece)
