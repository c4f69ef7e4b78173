"""Text to ids, EOS ids, and `TextStream`: the text of one request as its tokens arrive."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxgen.detokenizer import IncrementalDetokenizer, TokenDecoder, decode
from jaxgen.sampling_params import NAN_MATCH, SamplingParams
from jaxgen.shown import shown
from jaxgen.stops import Match, StopMatcher

__all__ = [
    "IncrementalDetokenizer",
    "Match",
    "StopMatcher",
    "TextStream",
    "TokenDecoder",
    "decode",
    "encode",
    "eos_token_ids",
]

# Tokens that end a message without being the tokenizer's EOS token.
END_OF_MESSAGE_TOKENS = ("<|eom_id|>",)


def encode(tokenizer: Any, text: str | Sequence[str]) -> Any:
    """Ids of one text (`list[int]`) or of several (`list[list[int]]`), with the tokenizer's own special
    tokens.

    A text without ids becomes the tokenizer's BOS token. Raises `ValueError` if there is none, or for text
    that is not valid Unicode.
    """
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        return []
    for entry in texts:
        try:
            entry.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"prompt is not valid Unicode: {error.reason} in {shown(entry)}") from None
    rows = tokenizer(texts, verbose=False)["input_ids"]
    rows = [list(row) or _bos_only(tokenizer, entry) for row, entry in zip(rows, texts)]
    return rows[0] if isinstance(text, str) else rows


def _bos_only(tokenizer: Any, text: str) -> list[int]:
    if tokenizer.bos_token_id is None:
        raise ValueError(
            f"prompt {shown(text)} cannot be empty: it has no tokens, and the tokenizer has no BOS"
        )
    return [tokenizer.bos_token_id]


def eos_token_ids(tokenizer: Any, *sources: int | Iterable[int] | None) -> frozenset[int]:
    """Union of the given EOS ids (model config, generation config) and of the tokenizer, if any."""
    ids: set[int] = set()
    for source in sources:
        if source is not None:
            ids.update([source] if isinstance(source, int) else source)
    if tokenizer is not None:
        if tokenizer.eos_token_id is not None:
            ids.add(tokenizer.eos_token_id)
        added: Mapping[str, int] = tokenizer.get_added_vocab()
        ids.update(added[name] for name in END_OF_MESSAGE_TOKENS if name in added)
    return frozenset(ids)


class TextStream:
    """The text of one request: detokenised, searched for stops, and held back where it may still be cut.

    Call `push` with each generated id, then `finish` once. `emittable` only grows, and is a prefix of the
    final text.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """`tokenizer` is a tokenizer or, cheaper for many requests, a `TokenDecoder`."""
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, prompt_ids, params.skip_special_tokens, params.spaces_between_special_tokens
        )
        self._matcher: StopMatcher | None = None
        if params.stop or params.stop_regex:
            self._matcher = StopMatcher(params.stop, params.stop_regex, params.no_stop_trim)
        self._no_stop_trim = params.no_stop_trim
        self._match: Match | None = None
        self._final: str | None = None

    def push(self, token_id: int) -> Match | None:
        """Add one generated id; returns the stop it completes, if any. The request must then end."""
        new = self._detokenizer.push([token_id])
        if self._matcher is None:
            return None
        self._match = self._matcher.push(new, self._detokenizer.pending)
        return self._match

    def extend(self, ids: Sequence[int]) -> None:
        """As `push` of one id after another, where there are no stops to look for."""
        self._detokenizer.push(ids)

    @property
    def emittable(self) -> str:
        """Text so far that no stop can cut any more; the final text after `finish`.

        Not to be read between a push and the decision whether that token ends the request.
        """
        if self._final is not None:
            return self._final
        text = self._detokenizer.text
        held = self._matcher.held if self._matcher else 0
        return text[: len(text) - held] if held else text

    def finish(self, reason: Mapping[str, Any], *, keep_last: bool = False) -> str:
        """The final text for a `finish_reason`.

        A reason whose `matched` is a token id (or NaN, for which EOS stands in) drops the text of the last id
        pushed, unless the request asked for no trimming or `keep_last` is set (a grammar that reached its end).
        """
        if self._final is not None:
            return self._final
        matched = reason.get("matched")
        ended_by_token = isinstance(matched, int) or matched == NAN_MATCH
        drops = ended_by_token and not self._no_stop_trim and not keep_last
        if drops and self._match is None:
            self._detokenizer.drop_last()
        self._detokenizer.flush()
        text = self._detokenizer.text
        if self._match is not None and self._match.cut is not None:
            text = text[: self._match.cut]
        self._final = text
        return text
