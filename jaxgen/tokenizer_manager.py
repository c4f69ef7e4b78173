"""`Engine.tokenizer_manager`: the attribute programs written for SGLang reach through."""

from __future__ import annotations

import dataclasses
import weakref
from typing import TYPE_CHECKING, Any

from jaxgen.io import GenerateReqInput
from jaxgen.io_limits import LengthLimits
from jaxgen.models.config import ModelConfig
from jaxgen.server_args import ServerArgs

if TYPE_CHECKING:
    from jaxgen.engine import Engine


@dataclasses.dataclass(frozen=True)
class ServedModelConfig:
    """The few facts about the model that callers look up."""

    context_len: int
    vocab_size: int
    is_multimodal: bool = False


@dataclasses.dataclass(frozen=True)
class FlushCacheResult:
    """Whether the prefix cache was emptied, and why not."""

    success: bool
    message: str


class TokenizerManager:
    """`tokenizer` (None under skip_tokenizer_init), `model_config`, `server_args`, `max_req_input_len`, and
    request control under the names SGLang programs use."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        model: ModelConfig,
        args: ServerArgs,
        limits: LengthLimits,
    ):
        self._reference = weakref.ref(engine)  # no cycle: an engine that nobody holds goes at once
        self.tokenizer = tokenizer
        self.server_args = args
        self.max_req_input_len = limits.max_req_input_len
        self.model_config = ServedModelConfig(model.context_length, model.vocab_size)

    @property
    def _engine(self) -> Engine:
        engine = self._reference()
        if engine is None:
            raise RuntimeError("The engine of this tokenizer manager is gone")
        return engine

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        self._engine.abort_request(rid, abort_all)

    async def pause_generation(self, obj: Any = None) -> None:
        """`obj.mode` is abort, retract or in_place."""
        self._engine.pause_generation(getattr(obj, "mode", "abort"))

    async def continue_generation(self, obj: Any = None) -> None:
        self._engine.continue_generation()

    async def generate_request(self, obj: GenerateReqInput, request: Any = None):
        """Async generator of outputs: chunks when `obj.stream`, otherwise the one result."""
        call = self._engine.call_for(obj)
        if call.stream:
            async for chunk in call.iterate_async():
                yield chunk
        else:
            yield await call.wait_async()
