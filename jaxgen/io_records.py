"""What the normalisation of a `generate` call takes beside the arguments, and what it gives."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from jaxgen.io_limits import LengthLimits
from jaxgen.sampling_params import SamplingParams
from jaxgen.server_args import ServerArgs


@dataclass(frozen=True)
class InputContext:
    """What normalisation has to know of the engine. `limits` None skips the length rules."""

    server_args: ServerArgs
    vocab_size: int
    tokenizer: Any = None
    limits: LengthLimits | None = None
    in_flight: Container[str] = ()
    has_vision: bool = False
    is_generation: bool = True


@dataclass(slots=True)
class RequestInput:
    """One checked request. `prompt_ids` are tokenised and cut, `max_new_tokens` is clipped to what fits."""

    rid: str
    base_rid: str | None  # the id given for the whole batch, by which all its members can be aborted
    index: int  # flat position in the result, prompt-major
    prompt_index: int
    sample: int  # 0 .. n-1
    text: str | None
    prompt_ids: Sequence[int]
    params: SamplingParams
    max_new_tokens: int | None
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = 0
    token_ids_logprob: list[int] | None = None
    return_hidden_states: bool | str = False
    return_text_in_logprobs: bool = False
    return_prompt_token_ids: bool = False
    priority: int | None = None
    namespace: str = ""  # prefixes are shared only between equal namespaces


@dataclass(frozen=True)
class NormalizedCall:
    """`single`: the result is one dict and chunks have no `index`; else a list in the order of `requests`."""

    requests: list[RequestInput]
    single: bool
