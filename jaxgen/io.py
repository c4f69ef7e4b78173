"""From the arguments of a `generate` call to checked, independent requests, all or none of them."""

from __future__ import annotations

import array
import json
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgen.io_limits import FittedLengths, LengthLimits, apply_length_limits
from jaxgen.io_records import InputContext, NormalizedCall, RequestInput
from jaxgen.io_values import (
    boolean,
    hidden_states_option,
    integer,
    nested_depth,
    optional_str,
    per_prompt,
    prompt_id_array,
    to_lists,
    token_id_array,
)
from jaxgen.outputs import (
    LogprobData,
    RequestSnapshot,
    make_output,
    merge_chunks,
    raise_if_failed,
)
from jaxgen.sampling_params import SamplingParams
from jaxgen.shown import shown
from jaxgen.tokenizer import encode

__all__ = [
    "FittedLengths",
    "GenerateReqInput",
    "InputContext",
    "LengthLimits",
    "LogprobData",
    "NormalizedCall",
    "RequestInput",
    "RequestSnapshot",
    "apply_length_limits",
    "make_output",
    "merge_chunks",
    "raise_if_failed",
]

logger = logging.getLogger("jaxgen")


@dataclass(kw_only=True)
class GenerateReqInput:
    """The arguments of `generate` as one record; `normalize` checks them and splits them into requests."""

    prompt: Any = None
    sampling_params: Any = None
    input_ids: Any = None
    image_data: Any = None
    audio_data: Any = None
    video_data: Any = None
    mm_hashes: Any = None
    mm_content_hashes: Any = None
    return_logprob: Any = False
    logprob_start_len: Any = None
    top_logprobs_num: Any = None
    token_ids_logprob: Any = None
    lora_path: Any = None
    custom_logit_processor: Any = None
    require_reasoning: bool = False
    return_hidden_states: Any = False
    return_routed_experts: bool = False
    routed_experts_start_len: int = 0
    stream: Any = False
    bootstrap_host: Any = None
    bootstrap_port: Any = None
    bootstrap_room: Any = None
    routed_dp_rank: int | None = None
    disagg_prefill_dp_rank: int | None = None
    kv_hints: Any = None
    data_parallel_rank: int | None = None
    external_trace_header: dict[str, str] | None = None
    rid: Any = None
    session_params: dict[str, Any] | None = None
    priority: int | None = None
    session_id: str | None = None
    cache_salt: str | None = None
    input_embeds: Any = None
    return_text_in_logprobs: bool = False
    return_prompt_token_ids: bool = False
    extra_key: Any = None

    def normalize(self, context: InputContext) -> NormalizedCall:
        """Check everything, tokenise, and expand to one `RequestInput` per result, in prompt-major order.

        Raises `ValueError` (`TypeError` for an unknown sampling parameter, `NotImplementedError` for
        options that are accepted by name only); then nothing has been submitted.
        """
        if not context.is_generation:
            raise ValueError("generate needs a generation model; this engine serves embeddings: use encode")
        texts, id_rows, single = self._prompts(context)
        count = len(id_rows) if id_rows is not None else len(texts or [])
        params = self._params(context, count)
        n = params[0].n if params else 1
        self._refuse_unavailable(context, count)
        options = self._options(context, count)
        rids, base_rid = self._rids(context, count, n, single)
        namespaces = self._namespaces(count)
        if id_rows is None:
            id_rows = [array.array("I", row) for row in encode(context.tokenizer, texts or [])]
        requests = []
        for row in range(count):
            fitted_params, ids, max_new_tokens = _fit(params[row], id_rows[row], context)
            if options[row]["logprob_start_len"] > len(ids):
                raise ValueError(
                    f"logprob_start_len must not exceed the prompt's {len(ids)} tokens, "
                    f"got {options[row]['logprob_start_len']}"
                )
            for sample in range(n):
                index = row * n + sample
                requests.append(
                    RequestInput(
                        rid=rids[index],
                        base_rid=base_rid,
                        index=index,
                        prompt_index=row,
                        sample=sample,
                        text=texts[row] if texts is not None else None,
                        prompt_ids=ids,
                        params=_params_of_sample(fitted_params, sample),
                        max_new_tokens=max_new_tokens,
                        namespace=namespaces[row],
                        **options[row],
                    )
                )
        return NormalizedCall(requests, single and n == 1)

    def _prompts(self, context: InputContext) -> tuple[list[str] | None, list[array.array[int]] | None, bool]:
        """`(texts, id rows, single)`; id rows are `None` where texts have to be tokenised."""
        if self.prompt is None and self.input_ids is None and self.input_embeds is None:
            raise ValueError("one of prompt, input_ids and input_embeds must be given")
        if self.input_embeds is not None:
            if self.prompt is not None and self.input_ids is not None:
                raise ValueError("prompt, input_ids and input_embeds must not all be given")
            if not context.server_args.disable_radix_cache:
                raise ValueError("input_embeds needs disable_radix_cache=True: embeddings have no prefix key")
            raise NotImplementedError("input_embeds is not available yet; give prompt or input_ids")
        texts, single = self._texts()
        id_rows = None
        if self.input_ids is not None:
            id_rows, single = self._id_rows(context, texts, single)
        elif context.tokenizer is None and texts:
            raise ValueError(
                "a text prompt needs a tokenizer, but the engine runs with skip_tokenizer_init=True; "
                "give input_ids"
            )
        return texts, id_rows, single

    def _texts(self) -> tuple[list[str] | None, bool]:
        prompt = self.prompt
        if prompt is None:
            return None, False
        texts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"prompt must be a str or a list of str, got {shown(prompt)}")
        return list(texts), isinstance(prompt, str)

    def _id_rows(
        self, context: InputContext, texts: list[str] | None, single: bool
    ) -> tuple[list[array.array[int]], bool]:
        ids = to_lists("input_ids", self.input_ids)
        flat = nested_depth(ids) == 1
        rows = [prompt_id_array(row, context.vocab_size) for row in ([ids] if flat else ids)]
        if texts is None:
            return rows, flat
        if len(texts) != len(rows) or single != flat:
            raise ValueError(
                f"prompt and input_ids must describe the same prompts, got {len(texts)} texts "
                f"and {'one list' if flat else f'{len(rows)} lists'} of ids"
            )
        return rows, single

    def _params(self, context: InputContext, count: int) -> list[SamplingParams]:
        """One normalised record per prompt; records given once are checked once."""
        given = self.sampling_params
        shared = not isinstance(given, list | tuple)
        entries = [given] if shared else list(given)
        if not shared and len(entries) != count:
            raise ValueError(f"sampling_params must have one entry per prompt ({count}), got {len(entries)}")
        defaults = context.server_args.preferred_sampling_params
        params = [
            SamplingParams.from_request(entry, defaults).validate(
                context.vocab_size, has_tokenizer=context.tokenizer is not None
            )
            for entry in entries
        ]
        if len({record.n for record in params}) > 1:
            raise ValueError("n must be equal in all entries of sampling_params")
        return params * count if shared else params

    def _refuse_unavailable(self, context: InputContext, count: int) -> None:
        args = context.server_args
        for name in ("image_data", "audio_data", "video_data"):
            if _has_items(getattr(self, name)) and not context.has_vision:
                raise ValueError(f"{name} was given, but the model takes no such input")
        if _has_items(self.image_data) or _has_items(self.mm_hashes) or _has_items(self.mm_content_hashes):
            raise NotImplementedError("multimodal input is not available yet")
        adapters = per_prompt("lora_path", self.lora_path, count, optional_str)
        if any(adapter is not None for adapter in adapters) and not args.enable_lora:
            raise ValueError("lora_path was given, but LoRA is disabled; start the engine with lora_paths")
        processors = per_prompt("custom_logit_processor", self.custom_logit_processor, count, optional_str)
        if any(processor is not None for processor in processors):
            if not args.enable_custom_logit_processor:
                raise ValueError("custom_logit_processor was given, but enable_custom_logit_processor is off")
            raise NotImplementedError("custom logit processors are not available yet")
        if self.session_params is not None and self.session_id is not None:
            raise ValueError("session_params and session_id must not both be given")
        if self.session_params is not None and not isinstance(self.session_params, Mapping):
            raise ValueError(f"session_params must be a dict, got {shown(self.session_params)}")
        if self.session_params is not None or self.session_id is not None:
            raise NotImplementedError("sessions are not available yet; send the whole context as the prompt")
        if self.return_routed_experts:
            raise NotImplementedError("return_routed_experts is not available yet")
        rank = self.routed_dp_rank
        if self.data_parallel_rank is not None:
            warnings.warn("data_parallel_rank is now routed_dp_rank", DeprecationWarning, stacklevel=3)
            rank = self.data_parallel_rank if rank is None else rank
        if rank is not None and not 0 <= integer("routed_dp_rank", rank) < args.dp_size:
            raise ValueError(f"routed_dp_rank must be in [0, {args.dp_size}), got {shown(rank)}")

    def _options(self, context: InputContext, count: int) -> list[dict[str, Any]]:
        """Per prompt, the keyword arguments of `RequestInput` that do not depend on the prompt itself."""
        vocab_size = context.vocab_size

        def start(name: str, value: Any) -> int:
            return -1 if value is None else integer(name, value, low=-1)

        def top(name: str, value: Any) -> int:
            return 0 if value is None else min(integer(name, value, low=0), vocab_size)

        def hidden(name: str, value: Any) -> bool | str:
            return hidden_states_option(name, value, context.server_args)

        columns = {
            "return_logprob": per_prompt("return_logprob", self.return_logprob, count, boolean),
            "logprob_start_len": per_prompt("logprob_start_len", self.logprob_start_len, count, start),
            "top_logprobs_num": per_prompt("top_logprobs_num", self.top_logprobs_num, count, top),
            "token_ids_logprob": self._token_ids_logprob(vocab_size, count),
            "return_hidden_states": per_prompt(
                "return_hidden_states", self.return_hidden_states, count, hidden
            ),
        }
        shared = {
            "return_text_in_logprobs": boolean("return_text_in_logprobs", self.return_text_in_logprobs),
            "return_prompt_token_ids": boolean("return_prompt_token_ids", self.return_prompt_token_ids),
            "priority": _priority(self.priority),
        }
        return [shared | {name: column[row] for name, column in columns.items()} for row in range(count)]

    def _token_ids_logprob(self, vocab_size: int, count: int) -> list[list[int] | None]:
        if self.token_ids_logprob is None:
            return [None] * count
        ids = to_lists("token_ids_logprob", self.token_ids_logprob)
        if any(isinstance(entry, list | tuple) for entry in ids):
            if len(ids) != count:
                raise ValueError(f"token_ids_logprob must have one list per prompt ({count}), got {len(ids)}")
            return [None if row is None else token_id_array(row, vocab_size).tolist() or None for row in ids]
        return [token_id_array(ids, vocab_size).tolist() or None] * count

    def _rids(self, context: InputContext, count: int, n: int, single: bool) -> tuple[list[str], str | None]:
        """Ids of all requests, and the base id if one was given for the whole batch."""
        rid, total, base = self.rid, count * n, None
        if isinstance(rid, str) and rid:
            if single and n == 1:
                rids = [rid]
            else:
                base = rid
                rids = [f"{rid}_{index}" for index in range(total)]
        elif isinstance(rid, list | tuple):
            if not all(isinstance(entry, str) and entry for entry in rid):
                raise ValueError(f"rid must hold non-empty str only, got {shown(rid)}")
            if n == 1 and len(rid) != count:
                raise ValueError(f"rid must have one entry per prompt ({count}), got {len(rid)}")
            # Several samples cannot share the id of their prompt.
            rids = list(rid) if n == 1 else _fresh_rids(total)
        elif rid is None:
            rids = _fresh_rids(total)
        else:
            raise ValueError(f"rid must be a non-empty str, a list of those or None, got {shown(rid)}")
        seen: set[str] = set()
        for entry in rids:
            if entry in seen or entry in context.in_flight:
                raise ValueError(f"Duplicate request ID: {shown(entry)}")
            seen.add(entry)
        return rids, base

    def _namespaces(self, count: int) -> list[str]:
        salt = optional_str("cache_salt", self.cache_salt)
        extra = per_prompt("extra_key", self.extra_key, count, optional_str)
        # JSON keeps different (salt, key) pairs apart whatever characters they contain.
        return ["" if salt is None and key is None else json.dumps([salt, key]) for key in extra]


def _fit(
    params: SamplingParams, ids: array.array[int], context: InputContext
) -> tuple[SamplingParams, array.array[int], int | None]:
    """Apply the length rules to one prompt: parameters, ids and clipped max_new_tokens."""
    if context.limits is None:
        return params, ids, params.max_new_tokens
    fitted = apply_length_limits(len(ids), params, context.limits, context.server_args.allow_auto_truncate)
    for message in fitted.warnings:
        logger.warning("%s", message)
    if fitted.min_new_tokens != params.min_new_tokens:
        params = params.updated(min_new_tokens=fitted.min_new_tokens)
    if fitted.prompt_len < len(ids):
        ids = ids[: fitted.prompt_len]
    return params, ids, fitted.max_new_tokens


def _params_of_sample(params: SamplingParams, sample: int) -> SamplingParams:
    """Samples of one prompt differ even with one seed: sample j draws with seed + j, in 64 bits."""
    if sample == 0 or params.sampling_seed is None:
        return params
    seed = (params.sampling_seed + sample + (1 << 63)) % (1 << 64) - (1 << 63)
    return params.updated(sampling_seed=seed)


def _has_items(value: Any) -> bool:
    """Whether any image, audio or video item is in there; `None` and empty lists, nested or not, are none."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return any(_has_items(entry) for entry in value)
    return value is not None and not (isinstance(value, np.ndarray) and value.size == 0)


def _priority(value: Any) -> int | None:
    return None if value is None else integer("priority", value, low=-(1 << 63), high=(1 << 63) - 1)


def _fresh_rids(count: int) -> list[str]:
    """Random ids of 32 hexadecimal digits."""
    digits = os.urandom(16 * count).hex()
    return [digits[i : i + 32] for i in range(0, len(digits), 32)]
