"""The advancing part of a detokenizer, one class per kind of tokenizer. See `detokenizer.py`."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Any, Protocol

REPLACEMENT = "\ufffd"
# A run of byte tokens that is valid so far is held back, because one bad byte would change all of it. A
# script that the vocabulary spells in bytes throughout must still stream, so complete characters are let go
# after this many.
MAX_HELD_BYTES = 64
WINDOW = 8  # ids of context for the generic way
MAX_PENDING = 16  # ids after which the generic way stops waiting for a character to complete


class TextState(Protocol):
    """The part of a detokenizer that advances; `snapshot` / `restore` undo what came between."""

    def push(self, token: int) -> str: ...

    def extend(self, tokens: Sequence[int]) -> str:
        """As `push` of one after another."""
        return "".join(map(self.push, tokens))

    def pending(self) -> str: ...
    def flush(self) -> str: ...
    def snapshot(self) -> Any: ...
    def restore(self, snapshot: Any) -> None: ...


class ByteLevelState(TextState):
    def __init__(self, lookup: Callable[[int], Any], prompt_ids: Sequence[int]) -> None:
        self._lookup = lookup
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # A UTF-8 character has at most 4 bytes, so 4 non-empty pieces of the prompt hold any incomplete one.
        tail: list[bytes] = []
        for token in reversed(prompt_ids):
            if piece := lookup(token):
                tail.append(piece)
                if len(tail) == 4:
                    break
        self._utf8.decode(b"".join(reversed(tail)))
        self._owed = bool(self._utf8.getstate()[0])  # the prompt's own incomplete bytes have yet to show

    def push(self, token: int) -> str:
        piece = self._lookup(token)
        return self._without_prompt(self._utf8.decode(piece)) if piece else ""

    def extend(self, tokens: Sequence[int]) -> str:
        return self._without_prompt(self._utf8.decode(b"".join(filter(None, map(self._lookup, tokens)))))

    def _without_prompt(self, text: str) -> str:
        # Bytes of the prompt that never became a character are the prompt's U+FFFD, not the output's.
        if self._owed and text:
            self._owed = False
            if text[0] == REPLACEMENT:
                return text[1:]
        return text

    def pending(self) -> str:
        return ""

    def flush(self) -> str:
        return self._without_prompt(self._utf8.decode(b"", True))

    def snapshot(self) -> Any:
        return self._utf8.getstate(), self._owed

    def restore(self, snapshot: Any) -> None:
        state, self._owed = snapshot
        self._utf8.setstate(state)


class ByteFallbackState(TextState):
    def __init__(self, lookup: Callable[[int], Any], prompt_ids: Sequence[int], strip: bool) -> None:
        self._lookup = lookup
        self._new_run()
        tail = []
        for token in reversed(prompt_ids):
            piece = lookup(token)
            if isinstance(piece, bytes):
                tail.append(piece)
            elif piece:
                break
        self._strip = False
        for piece in reversed(tail):
            self._push_byte(piece)
        # What of the run belongs to the prompt: so many characters while the run is valid, so many bytes if
        # not.
        self._prompt_chars, self._prompt_bytes = len(self._good), self._bytes
        self._strip = strip and not any(lookup(token) for token in prompt_ids)

    def _new_run(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self._good = ""  # complete characters of the run, while it is valid
        self._bytes = 0
        self._bad = False
        self._prompt_chars = self._prompt_bytes = 0

    def push(self, token: int) -> str:
        piece = self._lookup(token)
        if not piece:
            return ""
        if isinstance(piece, bytes):
            return self._without_first_space(self._push_byte(piece))
        return self._without_first_space(self._end_run() + piece)

    def _push_byte(self, piece: bytes) -> str:
        self._bytes += 1
        if self._bad:
            return REPLACEMENT
        try:
            self._good += self._utf8.decode(piece)
        except UnicodeDecodeError:
            self._bad = True  # and so is the whole run, whatever follows
            return REPLACEMENT * (self._bytes - self._prompt_bytes)
        if self._bytes - self._prompt_bytes > MAX_HELD_BYTES and self._is_complete():
            text = self._good[self._prompt_chars :]
            self._new_run()
            return text
        return ""

    def _is_complete(self) -> bool:
        return not self._utf8.getstate()[0]

    def _end_run(self) -> str:
        if not self._bytes:
            return ""
        if self._bad:
            text = ""
        elif self._is_complete():
            text = self._good[self._prompt_chars :]
        else:
            text = REPLACEMENT * (self._bytes - self._prompt_bytes)
        self._new_run()
        return text

    def _without_first_space(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def pending(self) -> str:
        if self._bad or not self._is_complete():
            return ""
        text = self._good[self._prompt_chars :]
        return text.removeprefix(" ") if self._strip else text

    def flush(self) -> str:
        return self._without_first_space(self._end_run())

    def snapshot(self) -> Any:
        run = self._utf8.getstate(), self._good, self._bytes, self._bad
        return run, self._prompt_chars, self._prompt_bytes, self._strip

    def restore(self, snapshot: Any) -> None:
        run, self._prompt_chars, self._prompt_bytes, self._strip = snapshot
        state, self._good, self._bytes, self._bad = run
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self._utf8.setstate(state)


class WindowState(TextState):
    def __init__(self, decode_ids: Callable[[Sequence[int]], str], prompt_ids: Sequence[int]) -> None:
        self._decode = decode_ids
        prompt = list(prompt_ids[-2 * WINDOW :])
        # Start from a cut that is not inside a character; what follows the cut waits with the first output
        # ids.
        for held in range(min(WINDOW, len(prompt)) + 1):
            context = prompt[: len(prompt) - held][-WINDOW:]
            base = decode_ids(context)
            if not base.endswith(REPLACEMENT):
                break
        else:
            context, held = prompt[-WINDOW:], 0
            base = decode_ids(context)
        self._context, self._base = context, base
        self._ids = prompt[len(prompt) - held :]
        self._owed = bool(self._ids)

    def push(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode(self._context + self._ids)
        if text.endswith(REPLACEMENT) and len(self._ids) <= MAX_PENDING:
            return ""
        return self._accept(text)

    def _accept(self, text: str) -> str:
        if text.startswith(self._base):
            new = text[len(self._base) :]
        else:
            new = self._decode(
                self._ids
            )  # the window's beginning changed: what was emitted stays, start afresh
        if not new:
            # Ids without text may still matter to what follows (a first space), but skipped special tokens
            # must not push the real context out of the window.
            self._ids = self._ids[-MAX_PENDING:]
            return ""
        self._context = (self._context + self._ids)[-WINDOW:]
        self._base = self._decode(self._context)
        self._ids = []
        if self._owed and new[0] == REPLACEMENT:
            new = new[1:]
        self._owed = False
        return new

    def pending(self) -> str:
        return ""

    def flush(self) -> str:
        return self._accept(self._decode(self._context + self._ids)) if self._ids else ""

    def snapshot(self) -> Any:
        return self._context, self._base, list(self._ids), self._owed

    def restore(self, snapshot: Any) -> None:
        self._context, self._base, self._ids, self._owed = snapshot
