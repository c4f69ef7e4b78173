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

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from jaxgen.detokenizer_states import ByteFallbackState, ByteLevelState, TextState, WindowState

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


class TokenDecoder:
    """What is prepared once per tokenizer: which way to decode, and the bytes or text of tokens seen so
    far."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        backend = (
            getattr(tokenizer, "backend_tokenizer", None) if getattr(tokenizer, "is_fast", False) else None
        )
        self.kind, self.strips_first_space = _decoder_kind(backend)
        self._backend: Any = backend  # None only in the generic way, which never looks ids up
        self._special: frozenset[str] = frozenset()
        if backend is not None:
            added = backend.get_added_tokens_decoder().values()
            self._special = frozenset(token.content for token in added if token.special)
        self._pieces: dict[bool, dict[int, bytes | str]] = {True: {}, False: {}}

    def state(self, prompt_ids: Sequence[int], skip_special_tokens: bool, spaces_between: bool) -> TextState:
        if self.kind == "bytes":
            return ByteLevelState(self._lookup(skip_special_tokens, _byte_level_piece), prompt_ids)
        if self.kind == "fallback":
            lookup = self._lookup(skip_special_tokens, _fallback_piece)
            return ByteFallbackState(lookup, prompt_ids, self.strips_first_space)

        def decode_ids(ids: Sequence[int]) -> str:
            return decode(self.tokenizer, ids, skip_special_tokens, spaces_between)

        return WindowState(decode_ids, prompt_ids)

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

    def push(self, ids: Sequence[int]) -> str:
        """Add ids; returns the new stable text."""
        if not ids:
            return ""
        stable = self._state.extend(ids[:-1]) if len(ids) > 1 else ""
        self._before, self._length_before = self._state.snapshot(), self._length + len(stable)
        stable += self._state.push(ids[-1])
        self._length += len(stable)
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
