"""Stop strings and stop patterns on text that arrives piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxgen.patterns import PatternSearch


@dataclass(frozen=True)
class Match:
    """Which stop was found. `cut` is the length of the text that stays, `None` if all of it does."""

    kind: str  # "stop" or "regex"
    matched: str  # the stop string or the pattern, as given
    cut: int | None


class StopMatcher:
    """Looks for stop strings, then for patterns, in each new piece of text.

    If one piece completes several stop strings, the first in list order wins, and the text is cut at its
    first occurrence. Costs time linear in the text per stop string (Knuth-Morris-Pratt), whatever the
    strings.
    """

    def __init__(self, stops: Sequence[str], regexes: Sequence[str] = (), no_stop_trim: bool = False) -> None:
        self._stops = list(stops)
        self._regexes = list(regexes)
        self._trim = not no_stop_trim
        self._searches = [PatternSearch(pattern) for pattern in regexes]
        # A pattern that occurs literally is cut like a stop string, so its literal form is followed as well.
        self._followed = self._stops + self._regexes
        self._failures = [_failure_table(stop) for stop in self._followed]
        self._states = [0] * len(
            self._followed
        )  # length of the longest prefix of each that the text ends with
        self._length = 0

    @property
    def held(self) -> int:
        """Characters at the end of the text that may still become part of a stop: the longest such suffix."""
        return max(self._states, default=0) if self._trim else 0

    def push(self, new: str, pending: str = "") -> Match | None:
        """Look at `new` text and at `pending` text behind it, which will be shown again until it is final."""
        ends = self._advance(new, commit=True)
        base = self._length
        self._length += len(new)
        if pending:
            for index, end in self._advance(pending, commit=False).items():
                ends.setdefault(index, len(new) + end)
        for index, stop in enumerate(self._stops):
            if index in ends:
                end = base + ends[index]
                return Match("stop", stop, end - len(stop) if self._trim else end)
        for offset, search in enumerate(self._searches):
            search.push(new)
            if (new or pending) and search.found(pending):
                cut = None
                literal = self._regexes[offset]
                if (position := ends.get(len(self._stops) + offset)) is not None:
                    cut = base + position - (len(literal) if self._trim else 0)
                return Match("regex", literal, cut)
        return None

    def _advance(self, text: str, commit: bool) -> dict[int, int]:
        """Where each string is first completed inside `text` (index of its end), by index of the string."""
        ends: dict[int, int] = {}
        for index, (stop, failure) in enumerate(zip(self._followed, self._failures)):
            state = self._states[index]
            position = 0
            while position < len(text):
                if state == 0:
                    position = text.find(stop[0], position)
                    if position < 0:
                        break
                while state and text[position] != stop[state]:
                    state = failure[state - 1]
                if text[position] == stop[state]:
                    state += 1
                position += 1
                if state == len(stop):
                    ends.setdefault(index, position)
                    state = failure[-1]
            if commit:
                self._states[index] = state
        return ends


def _failure_table(word: str) -> list[int]:
    """For each prefix of `word`, the length of its longest proper suffix that is also a prefix."""
    table = [0] * len(word)
    length = 0
    for index in range(1, len(word)):
        while length and word[index] != word[length]:
            length = table[length - 1]
        if word[index] == word[length]:
            length += 1
        table[index] = length
    return table
