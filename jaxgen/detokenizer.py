"""Token ids to text, a few tokens at a time, equal in the end to decoding everything at once.

Three ways, by the tokenizer's own decoder:

- byte-level BPE: every token is a byte string; the text is their concatenation decoded as UTF-8;
- SentencePiece with byte fallback: tokens are text, rare characters are runs of single-byte tokens, and a run
  that is not valid UTF-8 as a whole decodes to one U+FFFD per byte;
- anything else: decode a short window of ids and take what is new.

The first two cost constant time per token and are exact. All of them start from the end of the prompt, so
that a character whose first bytes are in the prompt comes out whole, and nothing of the prompt comes out
with it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

REPLACEMENT = "\ufffd"
# A run of byte tokens that is valid so far is held back, because one bad byte would change all of it. A
# script that the vocabulary spells in bytes throughout must still stream, so complete characters are let go
# after this many.
MAX_HELD_BYTES = 64
WINDOW = 8  # ids of context for the generic way
MAX_PENDING = 16  # ids after which the generic way stops waiting for a character to complete

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


def decode(
    tokenizer: Any,
    ids: Sequence[int],
    skip_special_tokens: bool = True,
    spaces_between_special_tokens: bool = True,
) -> str:
    """One-shot decode without the tokenizer's clean-up of spaces (it would change streamed text)."""
    options: dict[str, Any] = {
        "skip_special_tokens": skip_special_tokens,
        "clean_up_tokenization_spaces": False,
    }
    if not getattr(tokenizer, "is_fast", False):
        options["spaces_between_special_tokens"] = spaces_between_special_tokens
    return tokenizer.decode(list(ids), **options)


class TextState(Protocol):
    """The part of a detokenizer that advances; `snapshot` / `restore` undo a push."""

    def push(self, token: int) -> str: ...
    def pending(self) -> str: ...
    def flush(self) -> str: ...
    def snapshot(self) -> Any: ...
    def restore(self, snapshot: Any) -> None: ...


class TokenDecoder:
    """What is prepared once per tokenizer: which way to decode, and the bytes or text of tokens seen so
    far."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        backend = (
            getattr(tokenizer, "backend_tokenizer", None) if getattr(tokenizer, "is_fast", False) else None
        )
        self.kind, self.strips_first_space = _decoder_kind(backend)
        self._backend = backend
        self._special: frozenset[str] = frozenset()
        if backend is not None:
            added = backend.get_added_tokens_decoder().values()
            self._special = frozenset(token.content for token in added if token.special)
        self._pieces: dict[bool, dict[int, bytes | str]] = {True: {}, False: {}}

    def state(self, prompt_ids: Sequence[int], skip_special_tokens: bool, spaces_between: bool) -> TextState:
        if self.kind == "bytes":
            return _ByteLevel(self._lookup(skip_special_tokens, _byte_level_piece), prompt_ids)
        if self.kind == "fallback":
            lookup = self._lookup(skip_special_tokens, _fallback_piece)
            return _ByteFallback(lookup, prompt_ids, self.strips_first_space)

        def decode_ids(ids: Sequence[int]) -> str:
            return decode(self.tokenizer, ids, skip_special_tokens, spaces_between)

        return _Window(decode_ids, prompt_ids)

    def _lookup(self, skip_special: bool, convert: Callable[[str], bytes | str]) -> Callable[[int], Any]:
        """A cached function from id to piece; skipped and unknown ids give the empty string."""
        pieces, backend, special = self._pieces[skip_special], self._backend, self._special

        def lookup(token: int) -> bytes | str:
            piece = pieces.get(token)
            if piece is None:
                try:
                    name = backend.id_to_token(token)
                except OverflowError:
                    name = None
                piece = "" if name is None or (skip_special and name in special) else convert(name)
                pieces[token] = piece
            return piece

        return lookup


class IncrementalDetokenizer:
    """Text of generated tokens, given the prompt they follow.

    `push` returns the text that has become final, `flush` the rest as a one-shot decode would show it (an
    incomplete character is U+FFFD); the concatenation of all of it is the one-shot decode of prompt and
    output without the prompt's text.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_ids: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        decoder = tokenizer if isinstance(tokenizer, TokenDecoder) else TokenDecoder(tokenizer)
        self._state = decoder.state(prompt_ids, skip_special_tokens, spaces_between_special_tokens)
        self._before: Any = None
        self._parts: list[str] = []
        self._length = 0
        self._length_before = 0

    def push(self, ids: Iterable[int]) -> str:
        """Add ids; returns the new stable text."""
        new = []
        for token in ids:
            self._before, self._length_before = self._state.snapshot(), self._length
            text = self._state.push(token)
            self._length += len(text)
            new.append(text)
        stable = "".join(new)
        self._parts.append(stable)
        return stable

    @property
    def pending(self) -> str:
        """Complete characters that are not stable yet; empty while a character is incomplete."""
        return self._state.pending()

    @property
    def text(self) -> str:
        """All stable text so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def drop_last(self) -> None:
        """Forget the last id pushed, once."""
        if self._before is not None:
            self._parts = [self.text[: self._length_before]]
            self._length = self._length_before
            self._state.restore(self._before)
            self._before = None

    def flush(self) -> str:
        """The text still held; nothing may be pushed afterwards."""
        rest = self._state.flush()
        self._parts.append(rest)
        self._length += len(rest)
        return rest


class _ByteLevel:
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


class _ByteFallback:
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


class _Window:
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
        if new:
            # Ids without text (skipped special tokens) would push the real context out of the window.
            self._context = (self._context + self._ids)[-WINDOW:]
            self._base = self._decode(self._context)
            if self._owed and new[0] == REPLACEMENT:
                new = new[1:]
            self._owed = False
        self._ids = []
        return new

    def pending(self) -> str:
        return ""

    def flush(self) -> str:
        return self._accept(self._decode(self._context + self._ids)) if self._ids else ""

    def snapshot(self) -> Any:
        return self._context, self._base, list(self._ids), self._owed

    def restore(self, snapshot: Any) -> None:
        self._context, self._base, self._ids, self._owed = snapshot


def _decoder_kind(backend: Any) -> tuple[str, bool]:
    """`(kind, strips one leading space)`; kind is "bytes", "fallback" or "window"."""
    if backend is None or backend.decoder is None:
        return "window", False
    description = json.loads(backend.decoder.__getstate__())
    steps = description["decoders"] if description["type"] == "Sequence" else [description]
    names = [step["type"] for step in steps]
    if names == ["ByteLevel"]:
        return "bytes", False
    if names[:3] == ["Replace", "ByteFallback", "Fuse"] and len(steps) <= 4:
        replaces = steps[0].get("pattern") == {"String": "▁"} and steps[0].get("content") == " "
        strip = steps[3] if len(steps) == 4 else None
        if replaces and (strip is None or strip == {"type": "Strip", "content": " ", "start": 1, "stop": 0}):
            return "fallback", strip is not None
    return "window", False


def _byte_alphabet() -> dict[str, int]:
    """The byte-level alphabet of GPT-2: printable Latin-1 stands for itself, the others for U+0100 on."""
    alphabet = {}
    shifted = 0
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or 0xAE <= byte <= 0xFF:
            alphabet[chr(byte)] = byte
        else:
            alphabet[chr(0x100 + shifted)] = byte
            shifted += 1
    return alphabet


_BYTES = _byte_alphabet()


def _byte_level_piece(name: str) -> bytes:
    try:
        return bytes([_BYTES[character] for character in name])
    except KeyError:  # an added token with characters outside the alphabet stands for itself
        return name.encode()


def _fallback_piece(name: str) -> bytes | str:
    name = name.replace("▁", " ")
    if match := _BYTE_TOKEN.match(name):
        return bytes([int(match[1], 16)])
    return name
