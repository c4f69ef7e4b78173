"""Resolves ServerArgs against a model and a device, once, into the frozen configs of the parts."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxgen.checkpoint.kv_scales import read_kv_scales
from jaxgen.execution.kv_cache import device_memory_bytes
from jaxgen.execution.runner_config import RunnerConfig
from jaxgen.layers.attention import AttentionBackends
from jaxgen.layers.quantization import scheme_named
from jaxgen.models.config import ModelConfig
from jaxgen.scheduling import environment
from jaxgen.scheduling.buckets import decode_buckets, prefill_buckets
from jaxgen.scheduling.plan import SchedulerConfig
from jaxgen.server_args import ServerArgs
from jaxgen.server_args_defaults import default_max_running_requests, resolve
from jaxgen.sharding import check_mesh, make_mesh

logger = logging.getLogger("jaxgen")

DTYPES = {
    "half": jnp.float16,
    "float16": jnp.float16,
    "bfloat16": jnp.bfloat16,
    "bf16": jnp.bfloat16,
    "float": jnp.float32,
    "float32": jnp.float32,
    "fp8_e4m3": jnp.float8_e4m3fn,
}
# Smallest packed prefill step: below it the launch costs more than the tokens.
SMALLEST_PREFILL = {"cpu": 32, "gpu": 64}
HALF_STEPS_FROM = {"cpu": None, "gpu": 512}
MOST_PREFILL_ROWS = 64
# Decode buckets where compiling costs more than padding: a CPU compiles on the cores that are to generate.
COARSE_BUCKETS = {"cpu": (1, 2, 4, 8, 16, 32, 64, 128)}


def environment_flag(name: str) -> bool:
    """Whether `JAXGEN_<name>`, or `SGLANG_<name>`, is set to a word for true."""
    return (environment.read(name) or "").lower() in ("1", "true", "yes")


def claim_device_memory(fraction: float | None) -> None:
    """Lets JAX take most of a GPU, as mem_fraction_static counts on; its own default is 75 %.

    Without effect once a backend runs, or where the user has said something about JAX's memory.
    """
    if not any(name.startswith("XLA_PYTHON_CLIENT_") for name in os.environ):
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{max(0.9, min(fraction or 0.0, 0.97)):.2f}"


def pick_devices(args: ServerArgs) -> list[jax.Device]:
    """The devices of the mesh: tp_size of them from base_gpu_id in steps of gpu_id_step.

    Raises ValueError when there are not enough, RuntimeError when the platform asked for does not start.
    """
    platform = {"cuda": "gpu", "gpu": "gpu", "cpu": "cpu", None: None}[args.device]
    devices = jax.devices(platform) if platform else jax.devices()
    chosen = devices[args.base_gpu_id :: args.gpu_id_step][: args.tp_size]
    if len(chosen) < args.tp_size:
        raise ValueError(
            f"tp_size={args.tp_size} with base_gpu_id={args.base_gpu_id} and gpu_id_step={args.gpu_id_step} "
            f"needs more than the {len(devices)} {devices[0].platform} device(s) found"
        )
    return chosen


def pick_mesh(args: ServerArgs) -> jax.sharding.Mesh:
    """The caller's mesh, or one of tp_size devices."""
    if args.mesh is None:
        return make_mesh(args.tp_size, pick_devices(args))
    check_mesh(args.mesh)
    return args.mesh


def platform_of(mesh: jax.sharding.Mesh) -> str:
    return "cpu" if mesh.devices.flat[0].platform == "cpu" else "gpu"


def resolve_args(args: ServerArgs, mesh: jax.sharding.Mesh) -> ServerArgs:
    """ServerArgs with every default that depends on the device filled in, and a root seed drawn."""
    memory = device_memory_bytes(mesh.devices.flat[0])
    resolved = resolve(args, platform_of(mesh), None if memory is None else memory >> 20)
    if resolved.random_seed is None:
        resolved = dataclasses.replace(resolved, random_seed=random.SystemRandom().randint(0, 1 << 30))
    return resolved


def model_config_of(
    args: ServerArgs, config: Mapping[str, Any], generation_config: Mapping[str, Any]
) -> ModelConfig:
    """The model's config with json_model_override_args and context_length applied.

    Raises ValueError for a context_length beyond the model's own, unless
    JAXGEN_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN is set.
    """
    overrides = json.loads(args.json_model_override_args)
    model = _with_kv_scales(args, ModelConfig.from_hf({**config, **overrides}, generation_config))
    if args.context_length is None:
        return model
    if args.context_length > model.context_length:
        message = (
            f"context_length={args.context_length} exceeds the model's own {model.context_length}; positions "
            "past it were never trained. "
        )
        if not environment_flag("ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"):
            raise ValueError(
                message + "Lower it, or set JAXGEN_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1 to go ahead."
            )
        logger.warning(message)
    return dataclasses.replace(model, context_length=args.context_length)


def _with_kv_scales(args: ServerArgs, model: ModelConfig) -> ModelConfig:
    if args.kv_cache_dtype != "fp8_e4m3":
        return model
    if args.quantization_param_path is None:
        logger.warning(
            "kv_cache_dtype='fp8_e4m3' without quantization_param_path: keys and values are stored unscaled, "
            "and saturate at 448"
        )
        return model
    scales = read_kv_scales(Path(args.quantization_param_path), model.num_layers)
    return dataclasses.replace(model, kv_scales=scales)


def param_dtype_of(args: ServerArgs, model: ModelConfig, platform: str) -> Any:
    """dtype="auto": float32 on a CPU (bf16 is slower there); on a GPU the checkpoint's, float32 as float16."""
    if args.dtype != "auto":
        return DTYPES[args.dtype]
    if platform == "cpu":
        return jnp.float32
    return jnp.float16 if model.dtype == "float32" else DTYPES[model.dtype]


def kv_dtype_of(args: ServerArgs, param_dtype: Any) -> Any:
    return param_dtype if args.kv_cache_dtype == "auto" else DTYPES[args.kv_cache_dtype]


def _prefill_shapes(args: ServerArgs, rows: int, platform: str) -> tuple[tuple[int, int], ...]:
    """(packed tokens, rows) of the prefill steps."""
    chunk = args.chunked_prefill_size
    largest = chunk if chunk is not None and chunk > 0 else args.max_prefill_tokens
    if args.cuda_graph_max_bs_prefill is not None:
        largest_compiled = min(largest, args.cuda_graph_max_bs_prefill)
    else:
        largest_compiled = largest
    sizes = prefill_buckets(
        largest_compiled,
        min(SMALLEST_PREFILL[platform], largest_compiled),
        args.cuda_graph_bs_prefill,
        HALF_STEPS_FROM[platform],
    )

    def row_count(tokens: int) -> int:
        if args.enable_mixed_chunk:  # every running lane may ride along
            return min(tokens, rows + MOST_PREFILL_ROWS)
        return max(1, min(tokens // 8, rows, MOST_PREFILL_ROWS))

    return tuple((tokens, row_count(tokens)) for tokens in sizes)


def runner_config_of(args: ServerArgs, model: ModelConfig, mesh: jax.sharding.Mesh) -> RunnerConfig:
    """What the device half needs, from resolved ServerArgs."""
    platform = platform_of(mesh)
    largest_bucket = args.cuda_graph_max_bs_decode or 1
    rows = args.max_running_requests or largest_bucket
    decode_at_start = not (args.disable_cuda_graph or args.disable_decode_cuda_graph)
    prefill_at_start = not (args.disable_cuda_graph or args.disable_prefill_cuda_graph)
    if args.strict_compile:
        if not (decode_at_start and prefill_at_start):
            raise ValueError(
                "strict_compile=True needs the steps that disable_cuda_graph, disable_decode_cuda_graph and "
                "disable_prefill_cuda_graph leave out at start-up; set only one of the two"
            )
        rows = min(rows, largest_bucket)  # a larger batch would have to be compiled
    param_dtype = param_dtype_of(args, model, platform)
    return RunnerConfig(
        page_size=args.page_size or 16,
        context_length=model.context_length,
        rows=rows,
        decode_buckets=decode_buckets(
            min(largest_bucket, rows), args.cuda_graph_bs_decode or COARSE_BUCKETS.get(platform)
        ),
        decode_steps=args.num_continuous_decode_steps,
        prefill_buckets=_prefill_shapes(args, rows, platform),
        param_dtype=param_dtype,
        kv_dtype=kv_dtype_of(args, param_dtype),
        quantization=scheme_named(args.quantization),
        attention=AttentionBackends.named(
            args.prefill_attention_backend or args.attention_backend,
            args.decode_attention_backend or args.attention_backend,
            args.enable_deterministic_inference,
        ),
        max_total_tokens=args.max_total_tokens,
        mem_fraction_static=args.mem_fraction_static,
        return_hidden=args.enable_return_hidden_states or args.return_hidden_states_mode is not None,
        original_logprobs=environment_flag("RETURN_ORIGINAL_LOGPROB"),
        precompile_decode=decode_at_start,
        precompile_prefill=prefill_at_start,
        strict_compile=args.strict_compile,
        background=platform != "cpu" if args.background_compile is None else args.background_compile,
        chunked=args.chunked_prefill_size is not None and args.chunked_prefill_size > 0,
    )


def scheduler_config_of(
    args: ServerArgs, runner: RunnerConfig, pool_tokens: int, decode_steps: tuple[tuple[int, int], ...]
) -> SchedulerConfig:
    """What the host half needs, once the KV pool and the decode launches (lanes, steps) are known."""
    chunk = args.chunked_prefill_size
    largest, rows = runner.prefill_buckets[-1]
    if args.strict_compile and runner.chunked:
        chunk = min(chunk or largest, largest // runner.page_size * runner.page_size)
    return SchedulerConfig(
        num_pages=pool_tokens // runner.page_size,
        page_size=runner.page_size,
        max_rows=runner.rows,
        context_length=runner.context_length,
        max_running_requests=min(
            runner.rows,
            default_max_running_requests(pool_tokens, runner.context_length, args.max_running_requests),
        ),
        chunked_prefill_size=chunk if chunk is not None and chunk > 0 else None,
        max_prefill_tokens=args.max_prefill_tokens,
        prefill_max_requests=min(args.prefill_max_requests or rows, rows),
        decode_steps=decode_steps,
        schedule_policy=args.schedule_policy,
        schedule_conservativeness=args.schedule_conservativeness,
        radix_cache=not args.disable_radix_cache,
        eviction_policy=args.radix_eviction_policy,
        mixed_chunk=args.enable_mixed_chunk,
        max_queued_requests=args.max_queued_requests,
        priority_scheduling=args.enable_priority_scheduling,
        low_priority_values_first=args.schedule_low_priority_values_first,
        priority_preemption_threshold=args.priority_scheduling_preemption_threshold,
        priority_preemption=not args.disable_priority_preemption,
        default_priority=args.default_priority_value,
        retraction_policy=args.retraction_policy,
        seed=args.random_seed or 0,
    )
