"""Length rules: which prompts fit, and how many tokens a request may generate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from jaxgen.sampling_params import SamplingParams


@dataclass(frozen=True)
class LengthLimits:
    """Lengths in tokens; the two `max_req` lengths are those of `server_args_defaults.request_limits`."""

    context_length: int
    max_req_len: int
    max_req_input_len: int
    pool_tokens: int
    page_size: int


class FittedLengths(NamedTuple):
    """What a request gets: prompt ids kept from the front, and how many tokens it generates."""

    prompt_len: int
    max_new_tokens: int
    min_new_tokens: int
    warnings: tuple[str, ...] = ()


def apply_length_limits(
    prompt_len: int, params: SamplingParams, limits: LengthLimits, allow_auto_truncate: bool = False
) -> FittedLengths:
    """Fit a prompt of `prompt_len` tokens and its normalised parameters into the limits.

    Raises `ValueError` for an explicit length that does not fit, unless truncation is allowed; then the
    prompt keeps its first ids. A default or `None` max_new_tokens is clipped without complaint.
    """
    context = limits.context_length
    wanted: float = math.inf if params.max_new_tokens is None else params.max_new_tokens
    warnings = []

    def exceeds(what: str, remedy: str) -> None:
        if not allow_auto_truncate:
            raise ValueError(f"{what}; shorten it, or start the engine with allow_auto_truncate=True")
        warnings.append(f"{what}; {remedy}")

    if prompt_len >= context:
        exceeds(
            f"the prompt has {prompt_len} tokens, but the context length is {context}",
            f"keeping its first {context}",
        )
        prompt_len = min(prompt_len, context)
    if params.explicit("max_new_tokens") and params.max_new_tokens is not None:
        if prompt_len + params.max_new_tokens > context:
            exceeds(
                f"prompt ({prompt_len} tokens) and max_new_tokens ({params.max_new_tokens}) exceed "
                f"the context length of {context}",
                f"lowering max_new_tokens to {context - prompt_len}",
            )
            wanted = context - prompt_len
    if prompt_len >= limits.max_req_input_len:
        exceeds(
            f"the prompt has {prompt_len} tokens, but at most {limits.max_req_input_len - 1} fit",
            f"keeping its first {limits.max_req_input_len}",
        )
        prompt_len = min(prompt_len, limits.max_req_input_len)

    page = limits.page_size
    prompt_pages = -(-prompt_len // page) * page
    room = min(limits.max_req_len - prompt_len - 1, limits.pool_tokens - prompt_pages - page - 1)
    max_new_tokens = int(max(0, min(wanted, room)))
    return FittedLengths(
        prompt_len, max_new_tokens, min(params.min_new_tokens, max_new_tokens), tuple(warnings)
    )
