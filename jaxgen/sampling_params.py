"""`SamplingParams`: how one request is sampled and when it ends."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from typing import Any, Self

from jaxgen.patterns import compile_pattern
from jaxgen.shown import shown

ALL_TOKENS = 1 << 30  # what `top_k` is stored as when the whole vocabulary is meant
GREEDY_BELOW = 1e-6  # temperatures in [0, GREEDY_BELOW) mean greedy
MAX_STOPS = 32
MAX_REGEX_BYTES = 256
MAX_SAMPLES = 4096  # an unbounded `n` would let one request fill the host's memory
MAX_LISTED_IDS = 1 << 20
MAX_FLOAT32 = 3.4028234663852886e38
NAN_MATCH = "NaN happened"  # `matched` of a request that ended because its logits held NaN
GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling and stopping options of one request (keyword only).

    Any value may be given at construction; `normalized()` checks types and ranges and returns the resolved
    record the engine works with, in which greedy is `temperature == 0.0`, "all tokens" is `top_k == 2**30`,
    `stop` and `stop_regex` are lists, `stop_token_ids` is a frozenset and `logit_bias` has int keys. `None`
    for a field in which it has no meaning of its own stands for the default.
    """

    max_new_tokens: int | None = 128
    min_new_tokens: int = 0
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: Any = None
    stop_token_ids: Any = None
    stop_regex: Any = None
    no_stop_trim: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    stream_interval: int | None = None
    logit_bias: Any = None
    sampling_seed: int | None = None
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None
    custom_params: dict[str, Any] | None = None
    beam_width: int | None = None
    watermark: dict[str, Any] | None = None

    def __new__(cls, **given: Any) -> Self:
        # Which keywords were given decides what engine-wide defaults may fill in and whether an over-long
        # max_new_tokens is an error; a dataclass alone cannot tell an explicit default from an absent one.
        self = super().__new__(cls)
        object.__setattr__(self, "_given", frozenset(given))
        return self

    @classmethod
    def from_request(
        cls, value: SamplingParams | Mapping[str, Any] | None, defaults: Mapping[str, Any] | None = None
    ) -> SamplingParams:
        """Merge `defaults` under a caller's parameters, key by key, and normalise.

        Raises `TypeError` for an unknown key, `ValueError` for anything else that is wrong.
        """
        if value is None:
            given: dict[str, Any] = {}
        elif isinstance(value, SamplingParams):
            given = value.given()
        elif isinstance(value, Mapping):
            given = dict(value)
        else:
            raise ValueError(f"sampling_params must be a dict or SamplingParams, got {shown(value)}")
        merged = {**(defaults or {}), **given}
        for key in merged:
            if key not in DEFAULTS:
                raise TypeError(f"unknown sampling parameter {shown(key)}{_nearest(key)}")
        return _resolved(merged, frozenset(merged))

    def given(self) -> dict[str, Any]:
        """The fields that were passed to the constructor, with their values."""
        return {name: getattr(self, name) for name in FIELD_NAMES if name in self._given}  # type: ignore[attr-defined]

    def explicit(self, name: str) -> bool:
        """Whether the field was given, by the request or by the engine's preferred parameters."""
        return name in self._given  # type: ignore[attr-defined]

    @property
    def greedy(self) -> bool:
        return self.top_k == 1 or 0 <= self.temperature < GREEDY_BELOW

    @property
    def grammar(self) -> tuple[str, str] | None:
        """`(kind, text)` of the one grammar option that is set, or `None`."""
        chosen = [(kind, text) for kind in GRAMMARS if (text := getattr(self, kind))]
        return chosen[0] if chosen else None

    def normalized(self) -> SamplingParams:
        """The checked, resolved copy. Idempotent. Raises `ValueError` naming the offending field."""
        return _resolved({name: getattr(self, name) for name in FIELD_NAMES}, self._given)  # type: ignore[attr-defined]

    def validate(self, vocab_size: int, *, has_tokenizer: bool = True) -> SamplingParams:
        """Check normalised parameters against the model; returns the parameters to use.

        `stop_token_ids` that the model cannot produce are dropped. Raises `ValueError` for a `logit_bias` id
        outside `[0, vocab_size)` or for text options without a tokenizer, `NotImplementedError` for options
        accepted by name only.
        """
        for token in self.logit_bias:
            if not 0 <= token < vocab_size:
                raise ValueError(f"logit_bias has token id {token}, outside the vocabulary [0, {vocab_size})")
        if not has_tokenizer:
            for name in ("stop", "stop_regex", "min_new_tokens"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} needs a tokenizer, but the engine runs with skip_tokenizer_init=True"
                    )
        if self.grammar is not None:
            raise NotImplementedError(
                f"{self.grammar[0]}: constrained decoding is not available yet; leave the option unset"
            )
        if self.beam_width is not None and self.beam_width > 1:
            raise NotImplementedError(
                "beam_width > 1: beam search is not available; use n for several samples"
            )
        if self.watermark is not None:
            raise NotImplementedError(
                "watermark: output watermarks are not available; leave the option unset"
            )
        reachable = frozenset(token for token in self.stop_token_ids if 0 <= token < vocab_size)
        return self if reachable == self.stop_token_ids else self.updated(stop_token_ids=reachable)

    def updated(self, **changes: Any) -> SamplingParams:
        """A copy with other values that still remembers which fields the caller gave."""
        copy = SamplingParams(**{**{name: getattr(self, name) for name in FIELD_NAMES}, **changes})
        object.__setattr__(copy, "_given", self._given)  # type: ignore[attr-defined]
        return copy


FIELD_NAMES = tuple(field.name for field in fields(SamplingParams))
DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(SamplingParams)}


def _nearest(key: Any) -> str:
    close = (
        difflib.get_close_matches(key, FIELD_NAMES, n=1) if isinstance(key, str) and len(key) < 100 else []
    )
    return f"; did you mean {close[0]!r}?" if close else f"; known parameters: {', '.join(FIELD_NAMES)}"


def _boolean(name: str, value: Any) -> bool:
    # NumPy's bool is not a subclass of bool.
    if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise ValueError(f"{name} must be a bool, got {shown(value)}")


def _integer(name: str, value: Any, *, low: int, high: int | None = None) -> int:
    if type(value).__name__ in ("bool", "bool_"):
        raise ValueError(f"{name} must be an int, got {shown(value)}")
    try:
        number = operator.index(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be an int, got {shown(value)}") from None
    if number < low or (high is not None and number > high):
        bounds = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {bounds}, got {shown(value)}")
    return number


def _real(name: str, value: Any, *, low: float, high: float = math.inf, open_low: bool = False) -> float:
    number = _finite(name, value)
    if number < low or number > high or (open_low and number == low):
        bounds = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if math.isinf(high) else ']'}"
        raise ValueError(f"{name} must be in {bounds}, got {shown(value)}")
    return number


def _finite(name: str, value: Any) -> float:
    if type(value).__name__ in ("bool", "bool_") or isinstance(value, str | bytes | bytearray):
        raise ValueError(f"{name} must be a number, got {shown(value)}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be a finite number, got {shown(value)}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {shown(value)}")
    return number + 0.0  # -0.0 becomes 0.0


def _strings(name: str, value: Any) -> list[str]:
    """A str or a list of non-empty str, at most `MAX_STOPS` of them."""
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list | tuple):
        raise ValueError(f"{name} must be a str or a list of str, got {shown(value)}")
    if len(entries) > MAX_STOPS:
        raise ValueError(f"{name} may have at most {MAX_STOPS} entries, got {len(entries)}")
    for entry in entries:
        if not isinstance(entry, str):
            raise ValueError(f"{name} must hold only str, got {shown(entry)}")
        if not entry:
            raise ValueError(f"{name} must not contain an empty string: it would match at once")
    return list(entries)


def _patterns(name: str, value: Any) -> list[str]:
    patterns = _strings(name, value)
    for pattern in patterns:
        if len(pattern.encode("utf-8", "surrogatepass")) > MAX_REGEX_BYTES:
            raise ValueError(
                f"stop_regex patterns may have at most {MAX_REGEX_BYTES} UTF-8 bytes, got {shown(pattern)}"
            )
        try:
            compile_pattern(pattern)
        except ValueError as error:
            raise ValueError(f"stop_regex {shown(pattern)} {error}") from None
    return patterns


def _token_ids(name: str, value: Any) -> frozenset[int]:
    if isinstance(value, str | bytes | bytearray | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"{name} must be a list of int, got {shown(value)}")
    ids = list(islice(value, MAX_LISTED_IDS + 1))
    if len(ids) > MAX_LISTED_IDS:
        raise ValueError(f"{name} may have at most {MAX_LISTED_IDS} entries")
    # Negative ids are harmless here: they match nothing and are dropped against the vocabulary.
    return frozenset(_integer(name, token, low=-(1 << 63)) for token in ids if token is not None)


def _logit_bias(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise ValueError(f"logit_bias must be a dict from token id to number, got {shown(value)}")
    bias: dict[int, float] = {}
    for key, amount in value.items():
        if isinstance(key, str):
            if not (key.isascii() and key.isdecimal() and len(key) <= 20):
                raise ValueError(f"logit_bias keys must be token ids, got {shown(key)}")
            token = int(key)
        else:
            token = _integer("logit_bias", key, low=0)
        if token in bias:
            raise ValueError(f"logit_bias gives token id {token} twice")
        number = _finite("logit_bias", amount)
        if abs(number) > MAX_FLOAT32:
            raise ValueError(f"logit_bias values must fit in float32, got {shown(amount)}")
        bias[token] = number
    return bias


def _string_keyed(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} must be a dict with str keys, got {shown(value)}")
    return dict(value)


def _top_k(name: str, value: Any) -> int:
    number = _integer(name, value, low=-1)
    if number == 0:
        raise ValueError("top_k must be -1 (whole vocabulary) or at least 1, got 0")
    return ALL_TOKENS if number == -1 else min(number, ALL_TOKENS)


def _grammar(name: str, value: Any) -> str | None:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a str, got {shown(value)}")
    return value or None


# What checks a field that was given, and gives the resolved value.
CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "max_new_tokens": partial(_integer, low=0),
    "min_new_tokens": partial(_integer, low=0),
    "n": partial(_integer, low=1, high=MAX_SAMPLES),
    "temperature": partial(_real, low=0.0),
    "top_p": partial(_real, low=0.0, high=1.0, open_low=True),
    "top_k": _top_k,
    "min_p": partial(_real, low=0.0, high=1.0),
    "frequency_penalty": partial(_real, low=-2.0, high=2.0),
    "presence_penalty": partial(_real, low=-2.0, high=2.0),
    "repetition_penalty": partial(_real, low=0.0, high=2.0, open_low=True),
    "stop": _strings,
    "stop_token_ids": _token_ids,
    "stop_regex": _patterns,
    "no_stop_trim": _boolean,
    "ignore_eos": _boolean,
    "skip_special_tokens": _boolean,
    "spaces_between_special_tokens": _boolean,
    "stream_interval": partial(_integer, low=1),
    "logit_bias": _logit_bias,
    "sampling_seed": partial(_integer, low=-(1 << 63), high=(1 << 63) - 1),
    **dict.fromkeys(GRAMMARS, _grammar),
    "custom_params": _string_keyed,
    "beam_width": partial(_integer, low=1),
    "watermark": _string_keyed,
}
# The resolved values of what was not given. Records share them: nobody changes one.
RESOLVED_DEFAULTS = DEFAULTS | {
    "top_k": ALL_TOKENS,
    "stop": [],
    "stop_regex": [],
    "stop_token_ids": frozenset(),
    "logit_bias": {},
}


def _resolved(values: Mapping[str, Any], given: frozenset[str]) -> SamplingParams:
    """The checked record of some fields; the others, and those that are None, have their defaults."""
    found = RESOLVED_DEFAULTS | {
        name: CHECKS[name](name, value) for name, value in values.items() if value is not None
    }
    if "max_new_tokens" in values and values["max_new_tokens"] is None:
        found["max_new_tokens"] = None  # as many as there is room for
    least, most = found["min_new_tokens"], found["max_new_tokens"]
    if most is not None and least > most:
        raise ValueError(f"min_new_tokens must not exceed max_new_tokens, got {shown(least)} > {shown(most)}")
    if found["beam_width"] is not None and found["n"] > found["beam_width"]:
        raise ValueError(f"n must not exceed beam_width, got {found['n']} > {found['beam_width']}")
    if found["temperature"] < GREEDY_BELOW or found["top_k"] == 1:
        found["temperature"], found["top_k"] = 0.0, 1
    used = [kind for kind in GRAMMARS if found[kind]]
    if len(used) > 1:
        raise ValueError(f"at most one of {', '.join(GRAMMARS)} may be set, got {' and '.join(used)}")
    resolved = object.__new__(SamplingParams)
    vars(resolved).update(found, _given=given)
    return resolved
