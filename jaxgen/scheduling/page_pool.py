"""The KV pages: which are free, which belong to one request, which belong to the prefix cache."""

from __future__ import annotations

from collections.abc import Iterable

FREE, OWNED, CACHED = 0, 1, 2


class PageError(RuntimeError):
    """The bookkeeping of pages is broken: a bug, never a consequence of load."""


class PagePool:
    """Every page is in exactly one state, so free + owned + cached == total at all times.

    Attributes:
        num_pages: pages in all.
        num_owned: pages that exactly one request holds.
        num_cached: pages that exactly one node of the prefix cache holds (requests may read them).
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_owned = 0
        self.num_cached = 0
        self._free = list(range(num_pages - 1, -1, -1))
        self._state = bytearray(num_pages)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages; the caller owns them.

        Raises:
            PageError: fewer pages are free; callers check, and evict, first.
        """
        if count > len(self._free):
            raise PageError(f"{count} pages wanted, {len(self._free)} free")
        if count == 0:
            return []
        pages = self._free[-count:]
        del self._free[-count:]
        for page in pages:
            self._state[page] = OWNED
        self.num_owned += count
        return pages

    def release(self, pages: Iterable[int]) -> None:
        """Free pages that a request owned."""
        self._free_from(pages, OWNED)

    def release_cached(self, pages: Iterable[int]) -> None:
        """Free pages that the prefix cache held."""
        self._free_from(pages, CACHED)

    def to_cached(self, page: int) -> None:
        """A page passes from a request to the prefix cache."""
        self._move(page, OWNED, CACHED)
        self.num_owned -= 1
        self.num_cached += 1

    def to_owned(self, page: int) -> None:
        """A page passes from the prefix cache back to the request that computed it."""
        self._move(page, CACHED, OWNED)
        self.num_cached -= 1
        self.num_owned += 1

    def is_owned(self, page: int) -> bool:
        return self._state[page] == OWNED

    def _move(self, page: int, old: int, new: int) -> None:
        if self._state[page] != old:
            raise PageError(f"page {page} is in state {self._state[page]}, expected {old}")
        self._state[page] = new

    def _free_from(self, pages: Iterable[int], old: int) -> None:
        count = len(self._free)
        for page in pages:
            self._move(page, old, FREE)
            self._free.append(page)
        count = len(self._free) - count
        if old == OWNED:
            self.num_owned -= count
        else:
            self.num_cached -= count

    def check_counts(self) -> None:
        """The O(1) half of the invariant, cheap enough for every step.

        Raises:
            PageError: the three kinds of pages do not add up to the pool.
        """
        if len(self._free) + self.num_owned + self.num_cached != self.num_pages:
            raise PageError(
                f"{len(self._free)} free + {self.num_owned} owned + {self.num_cached} cached pages "
                f"!= {self.num_pages} in all"
            )

    def check(self, owned: Iterable[int], cached: Iterable[int]) -> None:
        """The full invariant against the holders' own lists: no page is lost, shared or in the wrong state.

        Raises:
            PageError: naming the first page found in a wrong state.
        """
        self.check_counts()
        expected = bytearray(b"\xff") * self.num_pages
        for pages, state in ((self._free, FREE), (owned, OWNED), (cached, CACHED)):
            for page in pages:
                if expected[page] != 0xFF:
                    raise PageError(f"page {page} has two holders: states {expected[page]} and {state}")
                expected[page] = state
        for page, (found, state) in enumerate(zip(expected, self._state)):
            if found != state:
                raise PageError(f"page {page} is in state {state}, its holders say {found} (255: no holder)")
