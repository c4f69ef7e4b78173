"""The public API: `Engine`, a thin facade over one engine thread. Normative behaviour: the README's API notes."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import platform as host_platform
import sys
import time
import weakref
from collections.abc import AsyncGenerator, Generator, Sequence
from typing import Any

import jax

import jaxgen
from jaxgen.calls import Call
from jaxgen.checkpoint.errors import CheckpointError
from jaxgen.checkpoint.resolve import open_checkpoint
from jaxgen.engine_config import (
    model_config_of,
    pick_mesh,
    resolve_args,
    runner_config_of,
    scheduler_config_of,
)
from jaxgen.errors import EngineDeadError, ModelLoadError
from jaxgen.execution.compile import enable_persistent_cache
from jaxgen.execution.runner import Runner
from jaxgen.io import GenerateReqInput
from jaxgen.loop import EngineLoop
from jaxgen.requests import RequestFactory
from jaxgen.scheduling.scheduler import Scheduler
from jaxgen.server_args import ServerArgs
from jaxgen.startup import StartupReport
from jaxgen.tokenizer_manager import FlushCacheResult, TokenizerManager

logger = logging.getLogger("jaxgen")


class Engine:
    """An in-process inference engine: one model on one mesh of devices, driven by one thread.

    `Engine(model_path=..., **options)`; every option is a field of `ServerArgs`. `Engine(server_args=record)`
    uses a ready-made record and ignores all other keywords. Returns once weights are loaded, the KV pool is
    allocated and the start-up buckets are compiled.

    Raises:
        TypeError: unknown option (names the nearest known one).
        ValueError: bad configuration, unknown architecture, or a model path that leads nowhere.
        RuntimeError: weights that cannot be loaded, or a device that fails or lacks memory.
    """

    def __init__(self, *, server_args: ServerArgs | None = None, **options: Any):
        if server_args is None:
            server_args = ServerArgs(**{"log_level": "error", **options})
        self._loop: EngineLoop | None = None
        self._runner: Runner | None = None
        self._closed = False
        self._pid = os.getpid()
        set_log_level(server_args.log_level)
        self.startup_report = StartupReport()
        try:
            self._start(server_args)
        except BaseException:
            self.shutdown()
            raise
        self._at_exit = weakref.WeakMethod(self.shutdown)
        atexit.register(_shutdown_at_exit, self._at_exit)
        self.startup_report.finish()

    def _start(self, args: ServerArgs) -> None:
        report = self.startup_report
        args.validate()
        with report.phase("start backend"):
            enable_persistent_cache(args.compilation_cache_dir)
            mesh = pick_mesh(args)
            args = resolve_args(args, mesh)
        with report.phase("open checkpoint"):
            checkpoint = open_checkpoint(
                args.model_path,
                args.load_format,
                revision=args.revision,
                download_dir=args.download_dir,
            )
            model = model_config_of(args, checkpoint.config, checkpoint.generation_config)
        with report.phase("load tokenizer"):
            tokenizer = None
            if not args.skip_tokenizer_init:
                path = None if args.tokenizer_path == args.model_path else args.tokenizer_path
                tokenizer = checkpoint.load_tokenizer(path, args.tokenizer_mode, args.trust_remote_code)
        runner_config = runner_config_of(args, model, mesh)
        try:
            self._runner = Runner(checkpoint, model, runner_config, mesh, report)
        except CheckpointError as error:
            raise ModelLoadError(str(error)) from error
        except jax.errors.JaxRuntimeError as error:
            raise RuntimeError(f"The device failed while starting: {error}") from error
        pool_tokens = self._runner.kv_shape.num_tokens
        self.server_args = args
        scheduler = Scheduler(scheduler_config_of(args, runner_config, pool_tokens))
        self._factory = RequestFactory(args, model, tokenizer, pool_tokens, self._runner)
        self._loop = EngineLoop(scheduler, self._runner, overlap=not args.disable_overlap_schedule)
        self.tokenizer_manager = TokenizerManager(self, tokenizer, model, args, self._factory.limits)

    # ---- generation

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Any = None,
        input_ids: Any = None,
        image_data: Any = None,
        audio_data: Any = None,
        video_data: Any = None,
        mm_hashes: Any = None,
        mm_content_hashes: Any = None,
        return_logprob: Any = False,
        logprob_start_len: Any = None,
        top_logprobs_num: Any = None,
        token_ids_logprob: Any = None,
        lora_path: Any = None,
        custom_logit_processor: Any = None,
        require_reasoning: bool = False,
        return_hidden_states: Any = False,
        return_routed_experts: bool = False,
        routed_experts_start_len: int = 0,
        stream: bool = False,
        **more: Any,
    ) -> dict[str, Any] | list[dict[str, Any]] | Generator[dict[str, Any]]:
        """Generates for one prompt (dict) or a list of prompts (list of dicts, in order).

        With `stream=True` returns an iterator of dicts; closing or dropping it aborts what still runs. Works
        from any thread, inside or outside a running event loop. Errors of the input surface here, or at the
        first `next()` when streaming.
        """
        given = {name: value for name, value in locals().items() if name not in ("self", "more")}
        call = self._call(given | more)
        return call.iterate() if call.stream else call.wait()
