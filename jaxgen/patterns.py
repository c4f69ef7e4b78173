"""Regular expressions over text that arrives piece by piece, in time linear in the text.

A pattern may come from an untrusted caller and is looked for after every token on the engine's own thread, so
neither backtracking nor searching the text again is acceptable. The syntax is that of `re`, whose parser is
used; the search runs all alternatives in step (K. Thompson, "Regular Expression Search Algorithm", 1968).
What cannot be run that way (look-around, back-references, possessive and atomic groups) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

MAX_INSTRUCTIONS = 1000  # counted repeats are written out; each character costs at most this many operations

_CATEGORIES = {
    _constants.CATEGORY_DIGIT: r"\d",
    _constants.CATEGORY_NOT_DIGIT: r"\D",
    _constants.CATEGORY_SPACE: r"\s",
    _constants.CATEGORY_NOT_SPACE: r"\S",
    _constants.CATEGORY_WORD: r"\w",
    _constants.CATEGORY_NOT_WORD: r"\W",
}


@dataclass(slots=True)
class _Character:
    """Consumes one character that the one-character regex `test` accepts."""

    test: re.Pattern[str]
    known: dict[str, bool] = field(default_factory=dict)

    def accepts(self, character: str) -> bool:
        answer = self.known.get(character)
        if answer is None:
            answer = self.known[character] = self.test.fullmatch(character) is not None
        return answer


@dataclass(slots=True)
class _Split:
    """Continues at all of `targets` without consuming anything."""

    targets: tuple[int, ...]


@dataclass(slots=True)
class _At:
    """Continues at the next instruction if the position has the property `where`."""

    where: Any
    multiline: bool
    word: re.Pattern[str]

    def holds(self, before: str | None, after: str | None, final_newline: bool) -> bool:
        """`before` and `after` are the neighbouring characters, `None` at the ends of the text."""
        where = self.where
        if where in (_constants.AT_BEGINNING, _constants.AT_BEGINNING_STRING):
            at_line = self.multiline and where is _constants.AT_BEGINNING and before == "\n"
            return before is None or at_line
        if where is _constants.AT_END:
            return after is None or final_newline or (self.multiline and after == "\n")
        if where is _constants.AT_END_STRING:
            return after is None
        differs = self._is_word(before) != self._is_word(after)
        return differs if where is _constants.AT_BOUNDARY else not differs

    def _is_word(self, character: str | None) -> bool:
        return character is not None and self.word.match(character) is not None


class _Match:
    """The end of the pattern."""


Instruction = _Character | _Split | _At | _Match


def compile_pattern(pattern: str) -> list[Instruction]:
    """Translate a regex. Raises `ValueError` if it is malformed, too large, or needs backtracking."""
    try:
        parsed = _parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"does not compile: {error}") from None
    program: list[Instruction] = []
    _emit_sequence(parsed, parsed.state.flags, program)
    if len(program) > MAX_INSTRUCTIONS:
        raise ValueError(f"is too large: more than {MAX_INSTRUCTIONS} steps when repeats are written out")
    program.append(_Match())
    return program


def _emit_sequence(items: Iterable[Any], flags: int, program: list[Instruction]) -> None:
    for operation, argument in items:
        if len(program) > MAX_INSTRUCTIONS:
            return  # growing on would take for ever; the caller reports it
        _emit(operation, argument, flags, program)


def _emit(operation: Any, argument: Any, flags: int, program: list[Instruction]) -> None:
    if operation is _constants.LITERAL:
        program.append(_character(re.escape(chr(argument)), flags))
    elif operation is _constants.NOT_LITERAL:
        program.append(_character(f"[^{re.escape(chr(argument))}]", flags))
    elif operation is _constants.ANY:
        program.append(_character(".", flags))
    elif operation is _constants.IN:
        program.append(_character(_character_class(argument), flags))
    elif operation is _constants.AT:
        word = re.compile(r"\w", flags & re.ASCII)
        program.append(_At(argument, bool(flags & re.MULTILINE), word))
    elif operation is _constants.SUBPATTERN:
        _, added, removed, items = argument
        _emit_sequence(items, (flags | added) & ~removed, program)
    elif operation is _constants.BRANCH:
        _emit_branches(argument[1], flags, program)
    elif operation in (_constants.MAX_REPEAT, _constants.MIN_REPEAT):
        low, high, items = argument
        _emit_repeat(low, high, items, flags, program)
    else:
        name = str(operation).lower().replace("_", " ")
        raise ValueError(
            f"uses {name}, which is not supported: no look-around, back-references or atomic groups"
        )


def _emit_branches(branches: list[Any], flags: int, program: list[Instruction]) -> None:
    split = len(program)
    program.append(_Split(()))
    starts, ends = [], []
    for branch in branches:
        starts.append(len(program))
        _emit_sequence(branch, flags, program)
        ends.append(len(program))
        program.append(_Split(()))
    program[split] = _Split(tuple(starts))
    for end in ends:
        program[end] = _Split((len(program),))


def _emit_repeat(low: int, high: Any, items: Any, flags: int, program: list[Instruction]) -> None:
    for _ in range(low):
        if len(program) > MAX_INSTRUCTIONS:
            return
        _emit_sequence(items, flags, program)
    if high is _constants.MAXREPEAT:
        start = len(program)
        program.append(_Split(()))
        _emit_sequence(items, flags, program)
        program.append(_Split((start,)))
        program[start] = _Split((start + 1, len(program)))
        return
    skips = []
    for _ in range(high - low):
        if len(program) > MAX_INSTRUCTIONS:
            break
        skips.append(len(program))
        program.append(_Split(()))
        _emit_sequence(items, flags, program)
    for skip in skips:
        program[skip] = _Split((skip + 1, len(program)))


def _character(text: str, flags: int) -> _Character:
    return _Character(re.compile(text, flags & (re.IGNORECASE | re.DOTALL | re.ASCII)))


def _character_class(items: list[Any]) -> str:
    text = ""
    for operation, argument in items:
        if operation is _constants.NEGATE:
            text += "^"
        elif operation is _constants.LITERAL:
            text += re.escape(chr(argument))
        elif operation is _constants.RANGE:
            text += f"{re.escape(chr(argument[0]))}-{re.escape(chr(argument[1]))}"
        else:
            text += _CATEGORIES[argument]
    return f"[{text}]"


class PatternSearch:
    """Whether a pattern occurs in the text so far; equal to `re.search` on all of it, at every moment."""

    def __init__(self, pattern: str) -> None:
        self._program = compile_pattern(pattern)
        self._found = False
        # Where the alternatives stand at the end of the text. 0 is always there: a match may begin anywhere.
        self._places = {0}
        self._earlier = {0}  # the same before the last character
        self._last: str | None = None
        self._second_last: str | None = None

    def push(self, text: str) -> None:
        for character in text:
            places, found = self._step(self._places, self._last, character)
            self._found |= found
            self._earlier, self._places = self._places, places
            self._second_last, self._last = self._last, character

    def found(self, pending: str = "") -> bool:
        """Whether the pattern occurs in the text followed by `pending`, which is not kept."""
        if self._found or not pending:
            return self._found or self._found_at_end()
        kept = self._places, self._earlier, self._last, self._second_last
        self.push(pending)
        answer = self._found or self._found_at_end()
        self._places, self._earlier, self._last, self._second_last = kept
        self._found = False
        return answer

    def _found_at_end(self) -> bool:
        if self._closure(self._places, self._last, None)[1]:
            return True
        if self._last != "\n":
            return False
        # `$` also holds before a newline that ends the text.
        places, found = self._step(self._earlier, self._second_last, "\n", final_newline=True)
        return found or self._closure(places, "\n", None)[1]

    def _step(
        self, places: set[int], before: str | None, character: str, final_newline: bool = False
    ) -> tuple[set[int], bool]:
        """Places after `character`, and whether a match ends before it."""
        consuming, found = self._closure(places, before, character, final_newline)
        after = {0}
        after.update(place + 1 for place, step in consuming if step.accepts(character))
        return after, found

    def _closure(
        self, places: set[int], before: str | None, after: str | None, final_newline: bool = False
    ) -> tuple[list[tuple[int, _Character]], bool]:
        """The consuming instructions reachable from `places`, and whether the end of the pattern is."""
        program = self._program
        stack, seen = list(places), set(places)
        consuming: list[tuple[int, _Character]] = []
        found = False
        while stack:
            place = stack.pop()
            step = program[place]
            if isinstance(step, _Character):
                consuming.append((place, step))
                continue
            targets: tuple[int, ...] = ()
            if isinstance(step, _Split):
                targets = step.targets
            elif isinstance(step, _At):
                targets = (place + 1,) if step.holds(before, after, final_newline) else ()
            else:
                found = True
            for target in targets:
                if target not in seen:
                    seen.add(target)
                    stack.append(target)
        return consuming, found
