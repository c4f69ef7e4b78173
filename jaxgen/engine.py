"""The public API: `Engine`, a thin facade over one engine thread."""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import threading
import uuid
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from typing import Any

import jax

from jaxgen import garbage
from jaxgen.calls import Call
from jaxgen.checkpoint.errors import CheckpointError
from jaxgen.checkpoint.resolve import open_checkpoint
from jaxgen.engine_config import (
    claim_device_memory,
    model_config_of,
    pick_mesh,
    resolve_args,
    runner_config_of,
    scheduler_config_of,
)
from jaxgen.engine_info import model_info, server_info
from jaxgen.errors import EngineDeadError, ModelLoadError
from jaxgen.execution.compile import cache_directory
from jaxgen.execution.runner import Runner
from jaxgen.io import GenerateReqInput, InputContext, RequestInput
from jaxgen.logs import set_log_level
from jaxgen.loop import EngineLoop, start_background
from jaxgen.requests import RequestFactory
from jaxgen.responses import Response
from jaxgen.scheduling.request import Request
from jaxgen.scheduling.scheduler import Scheduler
from jaxgen.server_args import ServerArgs
from jaxgen.startup import StartupReport
from jaxgen.tokenizer_manager import FlushCacheResult, TokenizerManager

logger = logging.getLogger("jaxgen")

Output = dict[str, Any]

# The first parameters of `generate`, in the order that callers may pass them positionally.
POSITIONAL = (
    "prompt",
    "sampling_params",
    "input_ids",
    "image_data",
    "audio_data",
    "video_data",
    "mm_hashes",
    "mm_content_hashes",
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "token_ids_logprob",
    "lora_path",
    "custom_logit_processor",
)


class Engine:
    """An in-process inference engine: one model on one mesh of devices, driven by one thread.

    `Engine(model_path=..., **options)`; every option is a field of `ServerArgs`. `Engine(server_args=record)`
    uses a ready-made record and ignores all other keywords. Returns once weights are loaded, the KV pool is
    allocated and the start-up buckets are compiled; on a GPU (or with background_compile=True) as soon as enough
    of them are to serve every request, while the others follow (`wait_until_compiled`). Usable as a context
    manager, from any thread, inside or outside a running event loop.

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
        self._restore_thresholds: Callable[[], None] = lambda: None
        rare = garbage.RareCollections()
        self._collections: contextlib.AbstractContextManager[None] = rare
        self._catch_up: Callable[[], None] = rare.catch_up
        self._closed = False
        self._closing = threading.RLock()
        self._pid = os.getpid()
        self._active: dict[str, Response] = {}
        self._active_lock = threading.Lock()
        self.startup_report = StartupReport()
        try:
            self._start(server_args)
        except BaseException:
            self.shutdown()
            raise
        atexit.register(_shutdown_if_alive, weakref.ref(self))
        self._abandoned = weakref.finalize(
            self, _release, self._pid, self._loop, self._runner, self._restore_thresholds
        )
        self._abandoned.atexit = False  # at exit JAX must still be there, which only the hook above sees to
        # Everything alive by now, JAX above all, is here to stay; a full collection looks at it for 0.2 s each time,
        # and there are many while results are made of many small objects. `_release` undoes it.
        self.freeze_gc()

    def _start(self, args: ServerArgs) -> None:
        report = self.startup_report
        set_log_level(args.log_level)  # first, so that warnings about the options obey it
        args.validate()
        if args.gc_threshold is not None:
            self._restore_thresholds = garbage.set_thresholds(*args.gc_threshold)
            self._collections, self._catch_up = contextlib.nullcontext(), lambda: None
        with report.phase("start backend"):
            cache = cache_directory(args.compilation_cache_dir)
            claim_device_memory(args.mem_fraction_static)
            mesh = pick_mesh(args)
            args = resolve_args(args, mesh)
        with report.phase("open checkpoint"):
            checkpoint = open_checkpoint(
                args.model_path, args.load_format, revision=args.revision, download_dir=args.download_dir
            )
            model = model_config_of(args, checkpoint.config, checkpoint.generation_config)
        tokenizer = None
        if not args.skip_tokenizer_init:
            with report.phase("load tokenizer"):
                path = None if args.tokenizer_path == args.model_path else args.tokenizer_path
                tokenizer = checkpoint.load_tokenizer(path, args.tokenizer_mode, args.trust_remote_code)
        runner_config = runner_config_of(args, model, mesh)
        try:
            self._runner = runner = Runner(checkpoint, model, runner_config, mesh, report, cache)
        except CheckpointError as error:
            raise ModelLoadError(str(error)) from error
        except jax.errors.JaxRuntimeError as error:
            raise RuntimeError(f"The device failed while starting: {error}") from error
        pool_tokens = runner.kv_shape.num_tokens
        scheduler_config = scheduler_config_of(args, runner_config, pool_tokens, runner.steps.decode_steps)
        self.server_args = args
        self._factory = RequestFactory(args, model, tokenizer, pool_tokens)
        self._context = InputContext(
            args, model.vocab_size, tokenizer, limits=self._factory.limits, in_flight=self._active
        )
        self._loop = EngineLoop(
            Scheduler(scheduler_config),
            runner,
            overlap=not args.disable_overlap_schedule,
            meanwhile=self._catch_up,
        )
        self.tokenizer_manager = TokenizerManager(self, tokenizer, model, args, self._factory.limits)
        report.finish()
        self._background = start_background(runner, self._loop, report)

    # ---- generation

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates for one prompt (returns a dict) or a list of prompts (a list of dicts, in order).

        Parameters are the fields of `GenerateReqInput`; the first are positional: prompt (str or list),
        sampling_params (dict, `SamplingParams` or list), input_ids (list of int, or list of those). With
        `stream=True` returns an iterator of dicts instead; closing or dropping it aborts what still runs.

        Raises:
            ValueError: bad input, before anything is submitted (streaming: at the first `next`).
            TypeError: unknown parameter.
            RequestError: the engine had to end a request (queue full, time-out, KV exhausted).
            RuntimeError: the engine is shut down or has failed.
        """
        given = _generate_input(args, kwargs)
        self._check_alive()
        if bool(given.stream):
            return self._stream(given)
        return self.call_for(given).wait()

    async def async_generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` for asyncio: await it for the result, or for an async generator with `stream=True`."""
        given = _generate_input(args, kwargs)
        self._check_alive()
        if bool(given.stream):
            return self._stream_async(given)
        return await self.call_for(given).wait_async()

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Embeddings need an engine started with is_embedding=True."""
        self._check_alive()
        raise ValueError("encode needs an embedding engine (is_embedding=True); this one generates text")

    async_encode = encode

    def _stream(self, given: GenerateReqInput) -> Generator[Output]:
        yield from self.call_for(given).iterate()

    async def _stream_async(self, given: GenerateReqInput) -> AsyncGenerator[Output]:
        chunks = self.call_for(given).iterate_async()
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            await chunks.aclose()

    def call_for(self, given: GenerateReqInput) -> Call:
        """A call that checks its input as a whole, then submits its requests, when it is waited for."""
        loop = self._check_alive()
        return Call(
            stream=bool(given.stream),
            prepare=lambda call: self._prepare(call, given),
            submit=self._submit,
            abort=self._abort_responses,
            done=loop.results_taken,
            collections=self._collections,
        )

    def _prepare(self, call: Call, given: GenerateReqInput) -> tuple[list[Response], bool]:
        if _is_empty_batch(given):
            return [], False
        checked = given.normalize(self._context)
        return [self._response(call, spec, checked.single) for spec in checked.requests], checked.single

    def _response(self, call: Call, spec: RequestInput, single: bool) -> Response:
        factory, args = self._factory, self.server_args
        has_text = factory.tokenizer is not None
        request = factory.request(spec)
        if self._runner is not None:
            self._runner.require_compiled(request)
        response = Response(
            call,
            spec,
            request,
            index=spec.index if call.stream and not single else None,
            stream_interval=spec.params.stream_interval or args.stream_interval,
            incremental=args.incremental_streaming_output,
            weight_version=args.weight_version,
            new_text=(lambda: factory.text_stream(spec)) if has_text else None,
            token_text=factory.token_text if has_text and spec.return_text_in_logprobs else None,
            compile_count=lambda: self._runner.steps.miss_count if self._runner else 0,
            on_end=lambda ended: self._forget(ended.rid),
        )
        request.sink = response
        return response

    def _submit(self, responses: Sequence[Response]) -> None:
        """Registers the ids, all or none, and hands the requests to the engine thread.

        Samples of one prompt wait for a request that only prefills it, so the prompt is computed once.
        """
        loop = self._check_alive()
        with self._active_lock:
            taken = [r.spec.rid for r in responses if r.spec.rid in self._active]
            if taken:
                raise ValueError(f"Duplicate request ID: {taken[0]!r} is still in flight")
            self._active.update((r.spec.rid, r) for r in responses)
        try:
            first: dict[int, list[Request]] = {}
            for response in responses:
                first.setdefault(response.spec.prompt_index, []).append(response.request)
            specs = {r.spec.prompt_index: r.spec for r in responses}
            for prompt, requests in first.items():
                if len(requests) > 1 and not self.server_args.disable_radix_cache:
                    warm_up = self._factory.warm_up_request(specs[prompt], uuid.uuid4().hex)
                    loop.submit_after(warm_up, requests)
                    first[prompt] = []
            loop.submit([request for requests in first.values() for request in requests])
        except BaseException:
            for response in responses:
                self._forget(response.spec.rid)
            raise

    def _forget(self, rid: str) -> None:
        with self._active_lock:
            self._active.pop(rid, None)

    def _abort_responses(self, responses: Sequence[Response]) -> None:
        if self._loop is not None:
            with contextlib.suppress(EngineDeadError):  # then they have ended already
                self._loop.abort(response.spec.rid for response in responses)

    # ---- control

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        """Ends a request by its exact id or a batch by its base id; returns at once. Unknown ids are no-ops."""
        loop = self._check_alive()
        with self._active_lock:
            rids = [
                r for r, response in self._active.items() if abort_all or rid in (r, response.spec.base_rid)
            ]
        loop.abort(rids)

    def pause_generation(self, mode: str = "abort") -> None:
        """Holds generation: "abort" ends everything, "retract" requeues (KV freed), "in_place" freezes."""
        self._check_alive().pause(mode)

    def continue_generation(self) -> None:
        """Goes on after `pause_generation`; requests submitted meanwhile run now."""
        self._check_alive().resume()

    def flush_cache(self) -> FlushCacheResult:
        """Empties the prefix cache; refused (success=False) while requests run or wait."""
        loop = self._check_alive()
        if loop.call(loop.flush_cache):
            return FlushCacheResult(True, "Cache flushed.")
        return FlushCacheResult(False, "The cache was not flushed: requests are running or waiting.")

    def get_server_info(self) -> dict[str, Any]:
        """Every option as resolved, plus version, sizes and, under `internal_states`, the scheduler's state."""
        loop = self._check_alive()
        return loop.call(
            lambda: server_info(self.server_args, self.startup_report, loop, self._factory.limits)
        )

    def get_model_info(self) -> dict[str, Any]:
        self._check_alive()
        return model_info(self.server_args)

    def start_profile(
        self,
        output_dir: str | None = None,
        *,
        profiler_options: jax.profiler.ProfileOptions | None = None,
        **_: Any,
    ) -> None:
        """Starts a JAX profiler trace into `output_dir` between two steps; RuntimeError if one is running."""
        directory = output_dir or os.path.join(os.getcwd(), "jaxgen-profile")
        self._check_alive().call_idle(
            lambda: jax.profiler.start_trace(directory, profiler_options=profiler_options)
        )

    def stop_profile(self) -> None:
        """Ends the trace between two steps; RuntimeError without one."""
        self._check_alive().call_idle(jax.profiler.stop_trace)

    def freeze_gc(self) -> None:
        """Collects, then exempts everything alive from garbage collection."""
        self._check_alive()
        gc.collect()
        gc.freeze()

    def get_all_child_pids(self) -> list[int]:
        """Empty: the engine has no child processes."""
        self._check_alive()
        return []

    def wait_until_compiled(self, timeout: float | None = None) -> bool:
        """Waits for the start-up steps that are still being compiled; False if `timeout` seconds pass first.

        Requests are served meanwhile, some with more padding than later; a measurement wants to wait.
        """
        loop = self._check_alive()
        if not self._background.wait(timeout):
            return False
        loop.call(lambda: None)  # what the last step left to do on the engine thread
        return True

    # ---- the end

    def shutdown(self) -> None:
        """Stops the engine and returns all its device memory. Idempotent; pending calls raise RuntimeError.

        Waits for the steps that are being compiled in the background: seconds, in the first minutes on a GPU.
        """
        if os.getpid() != self._pid:
            return
        with self._closing:
            self._closed = True
            _release(self._pid, self._loop, self._runner, self._restore_thresholds)
            self._runner = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()

    def _check_alive(self) -> EngineLoop:
        if os.getpid() != self._pid:
            raise RuntimeError(
                "This process was forked after the engine was made, and device memory does not survive a fork. "
                "Create the engine in the child."
            )
        if self._closed or self._loop is None:
            raise EngineDeadError("The engine has been shut down")
        if self._loop.error is not None:
            raise EngineDeadError(f"The engine failed: {self._loop.error}") from self._loop.error
        return self._loop


def _generate_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> GenerateReqInput:
    if len(args) > len(POSITIONAL):
        raise TypeError(f"generate takes at most {len(POSITIONAL)} positional arguments, got {len(args)}")
    named = dict(zip(POSITIONAL, args))
    twice = named.keys() & kwargs.keys()
    if twice:
        raise TypeError(f"generate got {', '.join(sorted(twice))} both by position and by name")
    return GenerateReqInput(**named, **kwargs)


def _is_empty_batch(given: GenerateReqInput) -> bool:
    return given.input_ids is None and isinstance(given.prompt, list | tuple) and not given.prompt


def _release(
    pid: int, loop: EngineLoop | None, runner: Runner | None, restore_thresholds: Callable[[], None]
) -> None:
    """Ends the thread, then frees the device memory, of an engine shut down or garbage-collected."""
    if os.getpid() != pid:
        return
    if loop is not None:
        loop.stop()
    if runner is not None:
        runner.shutdown()
    gc.unfreeze()
    restore_thresholds()


def _shutdown_if_alive(reference: Callable[[], Engine | None]) -> None:
    engine = reference()
    if engine is not None:
        engine.shutdown()
