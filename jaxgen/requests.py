"""Makes scheduler requests out of checked inputs: seeds, stop ids, and text streams where they are needed."""

from __future__ import annotations

import random
import threading
from typing import Any

from jaxgen.io import RequestInput
from jaxgen.io_limits import LengthLimits
from jaxgen.models.config import ModelConfig
from jaxgen.sampling_params import SamplingParams
from jaxgen.scheduling.request import Request
from jaxgen.server_args import ServerArgs
from jaxgen.server_args_defaults import request_limits
from jaxgen.tokenizer import TextStream, TokenDecoder, eos_token_ids

DETERMINISTIC_SEED = 42  # of requests without a seed under enable_deterministic_inference


class RequestFactory:
    """What every request of one engine has in common.

    Args:
        pool_tokens: tokens the KV pool holds.
    """

    def __init__(self, args: ServerArgs, model: ModelConfig, tokenizer: Any, pool_tokens: int):
        self.args = args
        self.model = model
        self.tokenizer = tokenizer
        self.eos_ids = frozenset(
            token for token in eos_token_ids(tokenizer, model.eos_token_ids) if token < model.vocab_size
        )
        max_req_len, max_req_input_len = request_limits(model.context_length, pool_tokens)
        self.limits = LengthLimits(
            context_length=model.context_length,
            max_req_len=max_req_len,
            max_req_input_len=max_req_input_len,
            pool_tokens=pool_tokens,
            page_size=args.page_size or 1,
        )
        self._decoder = None if tokenizer is None else TokenDecoder(tokenizer)
        self._seeds = random.Random(args.random_seed)
        self._lock = threading.Lock()

    def request(self, spec: RequestInput) -> Request:
        """The scheduler's half of one checked input."""
        params = spec.params
        stops = self.eos_ids | params.stop_token_ids
        needs_text = bool(params.stop or params.stop_regex)
        return Request(
            rid=spec.rid,
            prompt_ids=spec.prompt_ids,
            params=params,
            vocab_size=self.model.vocab_size,
            max_new_tokens=spec.max_new_tokens or 0,
            eos_ids=frozenset() if params.ignore_eos else stops,
            eos_id=min(self.eos_ids, default=0),
            masked_ids=stops if params.min_new_tokens > 0 else frozenset(),
            seed=self._seed(spec),
            priority=spec.priority,
            namespace=spec.namespace,
            return_logprob=spec.return_logprob,
            logprob_start=spec.logprob_start_len,
            top_logprobs=spec.top_logprobs_num,
            token_ids_logprob=spec.token_ids_logprob,
            return_hidden=spec.return_hidden_states,
            text=self.text_stream(spec) if needs_text else None,
        )

    def warm_up_request(self, spec: RequestInput, rid: str) -> Request:
        """A request that only prefills the prompt of `spec`, so that its samples find it in the cache."""
        params = SamplingParams(temperature=0.0, max_new_tokens=0).normalized()
        return Request(
            rid=rid,
            prompt_ids=spec.prompt_ids,
            params=params,
            vocab_size=self.model.vocab_size,
            max_new_tokens=0,
            priority=spec.priority,
            namespace=spec.namespace,
        )

    def text_stream(self, spec: RequestInput) -> TextStream:
        """Decodes the output of `spec` as its tokens arrive."""
        return TextStream(self._decoder, spec.prompt_ids, spec.params)

    def token_text(self, token: int) -> str:
        return self.tokenizer.decode([token])

    def _seed(self, spec: RequestInput) -> int:
        """A signed 32-bit seed: the request's own, folded, or the next of the engine's sequence."""
        seed = spec.params.sampling_seed
        if seed is None and self.args.enable_deterministic_inference:
            seed = DETERMINISTIC_SEED + spec.sample
        if seed is None:
            with self._lock:
                seed = self._seeds.getrandbits(32)
        else:
            # The high half is spread before it is folded in: -1 must not be the same seed as 0.
            seed = (seed ^ (((seed >> 32) & 0xFFFFFFFF) * 0x9E3779B1)) & 0xFFFFFFFF
        return seed - (1 << 32) if seed >= 1 << 31 else seed
