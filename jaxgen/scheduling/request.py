"""A request: one prompt and its growing output, as the host sees it. No JAX here."""

from __future__ import annotations

import array
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from jaxgen.sampling_params import NAN_MATCH
from jaxgen.scheduling.prefix_cache import ID_BYTES

if TYPE_CHECKING:
    from jaxgen.scheduling.prefix_cache import Match, Node
    from jaxgen.scheduling.rows import RowTable


class TextMatch(Protocol):
    """A stop found in the text; `matched` is the stop string or pattern as the user gave it."""

    @property
    def matched(self) -> str: ...


class TextStream(Protocol):
    """What a request needs of a text stream: it is fed every token and tells when a stop is complete."""

    def push(self, token_id: int) -> TextMatch | None: ...

    @property
    def emittable(self) -> str: ...

    def finish(self, reason: Mapping[str, Any]) -> str: ...


def abort_reason(message: str, status_code: int | None = None, err_type: str | None = None) -> dict[str, Any]:
    """The `finish_reason` of a request that was ended instead of ending by itself."""
    return {"type": "abort", "message": message, "status_code": status_code, "err_type": err_type}


@dataclass(slots=True, eq=False, repr=False)
class Request:
    """Host state of one request. The first block is set by the creator, the rest by the scheduler.

    Attributes:
        prompt_ids: prompt token ids, at least one.
        params: the resolved sampling parameters; the scheduler reads only `ignore_eos` and the three
            penalties.
        eos_ids: ids that stop the request (EOS and stop_token_ids; empty under ignore_eos).
        eos_id: id that replaces a sampled id outside [0, vocab_size), which is how NaN logits show.
        masked_ids: ids that may not be drawn before min_new_tokens (EOS and stop_token_ids); read by the device half.
        max_new_tokens: already clipped to what context and pool can hold; 0 means prefill only.
        namespace: prefix-cache namespace; only requests of one namespace share KV.
        text: fed with every token when text is needed per token (streaming, string stops), else None.
        pages: KV pages of positions [0, len(pages) * page_size), shared prefix pages first.
        row: row of the device's lane state from admission to the end or retraction, -1 otherwise.
        cached_tokens: prompt tokens taken from the prefix cache at first admission.
    """

    rid: str
    prompt_ids: Sequence[int]
    params: Any
    vocab_size: int
    max_new_tokens: int
    eos_ids: frozenset[int] = frozenset()
    eos_id: int = 0
    masked_ids: frozenset[int] = frozenset()
    seed: int = 0
    priority: int | None = None
    arrival: float = field(default_factory=time.monotonic)
    namespace: str = ""
    return_logprob: bool = False
    logprob_start: int = -1
    top_logprobs: int = 0
    token_ids_logprob: list[int] | None = None
    return_hidden: bool | str = False
    text: TextStream | None = None
    sink: Any = None

    output_ids: list[int] = field(default_factory=list)
    finish_reason: dict[str, Any] | None = None
    num_retractions: int = 0
    cached_tokens: int = 0
    row: int = -1
    pages: list[int] = field(default_factory=list)

    # Owned by the scheduler.
    rows: RowTable | None = None
    node: Node | None = None
    sequence: int = -1
    queued_at: float = 0.0
    started_at: float = -1.0
    match: Match | None = None
    match_version: int = -1
    prompt_array: np.ndarray | None = None
    prompt_key: bytes | None = None

    def __repr__(self) -> str:
        return (
            f"Request({self.rid!r}, {len(self.prompt_ids)} + {len(self.output_ids)} tokens, row {self.row}, "
            f"finish_reason {self.finish_reason})"
        )

    @property
    def num_tokens(self) -> int:
        """Prompt tokens plus output tokens seen by the host."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def kv_len(self) -> int:
        """KV positions computed or already launched; 0 without a row."""
        return int(self.rows.kv_len[self.row]) if self.row >= 0 and self.rows is not None else 0

    @property
    def inflight(self) -> int:
        """Sampled tokens launched but not yet seen by the host."""
        return max(0, self.kv_len - len(self.prompt_ids) + 1 - len(self.output_ids))

    @property
    def kv_limit(self) -> int:
        """The KV length at which the last allowed token has been launched."""
        return len(self.prompt_ids) + self.max_new_tokens - 1

    @property
    def match_limit(self) -> int:
        """Most leading tokens that may come from the prefix cache: positions past it must be computed here.

        The last token always is, for its logits; positions from `logprob_start` on are, for their logprobs;
        and a resumed request with penalties sends its output tokens again, so that the device can count them.
        """
        limit = self.num_tokens - 1
        if self.return_logprob and self.logprob_start >= 0:
            limit = min(limit, self.logprob_start)
        if self.output_ids and self.has_penalties:
            limit = min(limit, len(self.prompt_ids))
        return limit

    @property
    def has_penalties(self) -> bool:
        """Whether any penalty looks at the tokens so far."""
        p = self.params
        return p.frequency_penalty != 0.0 or p.presence_penalty != 0.0 or p.repetition_penalty != 1.0

    def token_ids(self, start: int, stop: int) -> np.ndarray:
        """Ids at positions [start, stop) of prompt followed by output, uint32."""
        if self.prompt_array is None:  # by way of array.array, which reads a list faster than NumPy
            self.prompt_array = np.frombuffer(array.array("I", self.prompt_ids), np.uint32)
        prompt = len(self.prompt_ids)
        if stop <= prompt:
            return self.prompt_array[start:stop]
        output = np.frombuffer(
            array.array("I", self.output_ids[max(start - prompt, 0) : stop - prompt]), np.uint32
        )
        return output if start >= prompt else np.concatenate([self.prompt_array[start:], output])

    def key(self, length: int) -> bytes:
        """The first `length` ids as big-endian int32 bytes: a key of the prefix cache."""
        if self.prompt_key is None:
            self.prompt_key = _key_of(self.prompt_ids)
        outputs = length - len(self.prompt_ids)
        if outputs <= 0:
            return self.prompt_key[: ID_BYTES * length]
        return self.prompt_key + _key_of(self.output_ids[:outputs])

    def head_key(self, length: int) -> bytes:
        """`key` without converting the rest of the prompt, which often never has to be looked up."""
        if self.prompt_key is not None or length > len(self.prompt_ids):
            return self.key(length)
        return _key_of(self.prompt_ids[:length])

    def append(self, token: int) -> None:
        """Take one sampled token; the first that holds ends the request: NaN, text stop, stop id, length."""
        output = self.output_ids
        if token < 0 or token >= self.vocab_size:
            output.append(self.eos_id)
            if self.text is not None:
                self.text.push(self.eos_id)  # `finish` drops it, like any token that only ends a request
            self.finish_reason = {"type": "stop", "matched": NAN_MATCH}
            return
        output.append(token)
        if self.text is not None:
            match = self.text.push(token)
            if match is not None:
                self.finish_reason = {"type": "stop", "matched": match.matched}
                return
        if token in self.eos_ids:
            self.finish_reason = {"type": "stop", "matched": token}
        elif len(output) >= self.max_new_tokens:
            self.finish_reason = {"type": "length", "length": self.max_new_tokens}


def _key_of(ids: Sequence[int]) -> bytes:
    """Ids as big-endian int32 bytes. NumPy would let go of the interpreter lock, to get it back after up to 5 ms."""
    found = array.array("I", ids)
    if sys.byteorder == "little":
        found.byteswap()
    return found.tobytes()
