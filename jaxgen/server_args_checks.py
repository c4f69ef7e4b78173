"""Validation of `ServerArgs`: types from the field table, then ranges, then rules between fields."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

from jaxgen.sampling_params import SamplingParams
from jaxgen.server_args import FIELDS, ServerArgs
from jaxgen.shown import shown

logger = logging.getLogger("jaxgen")

PAGE_SIZES = (1, 8, 16, 32, 64, 128)  # 1 means the default: prefix reuse is per token at every page size
CACHE_AWARE_POLICIES = ("lpm", "dfs-weight")
POLICIES = ("fcfs", "lpm", "random", "dfs-weight", "lof")
LATER_POLICIES = ("hrrn", "priority", "routing-key", "shortest-prefill-first")
DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
LOAD_FORMATS = ("auto", "safetensors", "pt", "dummy", "gguf", "orbax")
LATER_LOAD_FORMATS = ("sharded_state", "npcache", "bitsandbytes", "layered", "remote")
KV_DTYPES = ("auto", "bf16", "bfloat16", "fp8_e4m3")
LATER_KV_DTYPES = ("fp8_e5m2",)
QUANTIZATIONS = ("fp8", "w8a8_int8", "int8", "w8a16_fp8", "unquant")
LATER_QUANTIZATIONS = ("awq", "gptq", "compressed-tensors")
EVICTION_POLICIES = ("lru", "lfu", "slru", "priority")

# Options accepted by name: what they may be set to until their feature exists. None always means the default.
AVAILABLE: dict[str, tuple[Any, ...]] = {
    "model_loader_extra_config": ("{}",),
    "is_embedding": (False,),
    "enable_multimodal": (False,),
    "abort_on_priority_when_disabled": (False,),
    "enable_memory_saver": (False,),
    "enable_weights_cpu_backup": (False,),
    "enable_streaming_session": (False,),
    "dp_size": (1,),
    "ep_size": (1,),
    "pp_size": (1,),
    "attn_dp_size": (1,),
    "attn_cp_size": (1,),
    "enable_dp_attention": (False,),
    "enable_dp_lm_head": (False,),
    "nnodes": (1,),
    "node_rank": (0,),
    "custom_weight_loader": ([],),
    "enable_lora": (False,),
    "lora_paths": ([], {}),
    "speculative_algorithm": (),
    "speculative_draft_model_path": (),
    "speculative_accept_threshold_single": (1.0,),
    "speculative_accept_threshold_acc": (1.0,),
    "constrained_json_whitespace_pattern": (),
    "constrained_json_disable_any_whitespace": (False,),
    "constrained_json_max_whitespace_cnt": (),
    "enable_custom_logit_processor": (False,),
    "enable_mis": (False,),
    "mm_process_config": ({},),
}

POSITIVE = (
    "context_length", "max_running_requests", "max_queued_requests", "max_total_tokens", "max_prefill_tokens",
    "prefill_max_requests", "num_continuous_decode_steps", "stream_interval", "tp_size", "dp_size", "ep_size",
    "pp_size", "attn_dp_size", "attn_cp_size", "gpu_id_step", "nnodes", "cuda_graph_max_bs_decode",
    "cuda_graph_max_bs_prefill", "watchdog_timeout", "soft_watchdog_timeout", "max_loras_per_batch",
    "max_lora_rank", "decode_log_interval", "scheduler_recv_interval", "dynamic_batch_tokenizer_batch_size",
)  # fmt: skip
NOT_NEGATIVE = (
    "base_gpu_id", "node_rank", "cpu_offload_gb", "schedule_conservativeness",
    "priority_scheduling_preemption_threshold", "dynamic_batch_tokenizer_batch_timeout",
)  # fmt: skip


def validate(args: ServerArgs) -> None:
    for name in FIELDS:
        _check_type(args, name)
    for name in POSITIVE:
        _require(args, name, lambda value: value > 0, "must be positive")
    for name in NOT_NEGATIVE:
        _require(args, name, lambda value: value >= 0, "must not be negative")
    _check_names(args)
    _check_memory(args)
    _check_scheduling(args)
    _check_model_options(args)
    _check_lora(args)
    _check_available(args)
    _warn_replaced(args)


def _check_type(args: ServerArgs, name: str) -> None:
    spec, value = FIELDS[name], getattr(args, name)
    kind, choices = spec.metadata["kind"], spec.metadata["choices"]
    # The annotation is a string (postponed evaluation); "None" in it marks an optional field.
    if value is None and ("None" in str(spec.type) or spec.type == "Any"):
        return
    if kind in ("bool", "bool?"):
        good, wanted = isinstance(value, bool), "a bool"
    elif kind == "int":
        good, wanted = isinstance(value, int) and not isinstance(value, bool), "an int"
    elif kind == "float":
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        wanted = "a finite number"
    elif kind == "ints":
        good = isinstance(value, list | tuple) and all(type(entry) is int for entry in value)
        wanted = "a list of int"
    elif kind == "strs" and name != "lora_paths":
        good = isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value)
        wanted = "a list of str"
    elif kind == "json":
        good, wanted = isinstance(value, dict), "a dict or a JSON object"
    elif kind == "str":
        good, wanted = isinstance(value, str), "a str"
    else:
        good, wanted = True, ""
    if not good:
        raise ValueError(f"{name} must be {wanted}, got {shown(value)}")
    if choices and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {shown(value)}")


def _require(args: ServerArgs, name: str, condition: Any, message: str) -> None:
    value = getattr(args, name)
    if value is not None and not condition(value):
        raise ValueError(f"{name} {message}, got {shown(value)}")


def _one_of(args: ServerArgs, name: str, now: tuple[str, ...], later: tuple[str, ...] = ()) -> None:
    value = getattr(args, name)
    if value in later:
        raise NotImplementedError(f"{name}={value!r} is not available yet; choose one of {', '.join(now)}")
    if value is not None and value not in now:
        raise ValueError(f"{name} must be one of {', '.join(now)}, got {shown(value)}")


def _check_names(args: ServerArgs) -> None:
    _one_of(args, "schedule_policy", POLICIES, LATER_POLICIES)
    _one_of(args, "dtype", DTYPES)
    _one_of(args, "load_format", LOAD_FORMATS, LATER_LOAD_FORMATS)
    _one_of(args, "kv_cache_dtype", KV_DTYPES, LATER_KV_DTYPES)
    _one_of(args, "quantization", QUANTIZATIONS, LATER_QUANTIZATIONS)
    _one_of(args, "radix_eviction_policy", EVICTION_POLICIES, ("tlru",))
    _one_of(args, "load_balance_method", ("auto", "round_robin", "total_requests", "total_tokens"))
    _one_of(args, "grammar_backend", ("xgrammar", "outlines", "llguidance", "none"))
    _one_of(args, "return_hidden_states_mode", ("last", "full"))
    _one_of(args, "log_level", ("debug", "info", "warning", "error", "critical"))
    if args.device is not None and args.device.split(":")[0] not in ("cuda", "gpu", "cpu"):
        raise ValueError(f"device must be cuda or cpu, got {shown(args.device)}")
    if args.served_model_name is not None and ":" in args.served_model_name:
        raise ValueError(f"served_model_name must not contain ':', got {shown(args.served_model_name)}")


def _check_memory(args: ServerArgs) -> None:
    _require(args, "mem_fraction_static", lambda value: 0 < value < 1, "must be between 0 and 1")
    if args.page_size is not None and args.page_size not in PAGE_SIZES:
        raise ValueError(f"page_size must be one of {', '.join(map(str, PAGE_SIZES))}, got {args.page_size}")
    chunk, page = args.chunked_prefill_size, args.page_size
    if chunk is not None and chunk > 0 and page is not None and chunk % page:
        raise ValueError(f"chunked_prefill_size must be divisible by page_size, got {chunk} and {page}")
    for name in ("cuda_graph_bs_decode", "cuda_graph_bs_prefill"):
        _require(args, name, lambda value: value and min(value) > 0, "must hold positive sizes")


def _check_scheduling(args: ServerArgs) -> None:
    if args.enable_priority_scheduling and args.schedule_policy not in ("fcfs", "lof"):
        raise ValueError(
            f"enable_priority_scheduling needs schedule_policy fcfs or lof, got {args.schedule_policy!r}"
        )
    if args.retraction_policy == "priority" and not args.enable_priority_scheduling:
        raise ValueError("retraction_policy='priority' needs enable_priority_scheduling=True")
    _require(args, "gc_threshold", lambda value: 1 <= len(value) <= 3, "must hold 1 to 3 ints")
    devices = args.tp_size * args.pp_size
    if devices % args.nnodes:
        raise ValueError(f"tp_size * pp_size must be divisible by nnodes, got {devices} and {args.nnodes}")


def _check_model_options(args: ServerArgs) -> None:
    if args.quantization_param_path is not None and args.kv_cache_dtype != "fp8_e4m3":
        raise ValueError(
            "quantization_param_path holds scales of an 8-bit KV cache and needs kv_cache_dtype='fp8_e4m3', "
            f"got kv_cache_dtype={args.kv_cache_dtype!r}"
        )
    if args.enable_tokenizer_batch_encode and args.enable_dynamic_batch_tokenizer:
        raise ValueError(
            "enable_tokenizer_batch_encode and enable_dynamic_batch_tokenizer exclude each other"
        )
    for name in ("json_model_override_args", "model_loader_extra_config"):
        try:
            value = json.loads(getattr(args, name))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is not valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be a JSON object, got {shown(value)}")
    for modality, options in args.mm_process_config.items():
        if modality not in ("image", "video", "audio") or not isinstance(options, dict):
            raise TypeError(
                f"mm_process_config maps image, video or audio to a dict, got {shown({modality: options})}"
            )
    if args.preferred_sampling_params is not None:
        try:
            SamplingParams.from_request(args.preferred_sampling_params)
        except (TypeError, ValueError) as error:
            raise ValueError(f"preferred_sampling_params: {error}") from None


def _check_lora(args: ServerArgs) -> None:
    inferred = args.lora_paths or (args.max_lora_rank and args.lora_target_modules)
    if args.enable_lora and not inferred:
        raise ValueError("enable_lora needs lora_paths, or both max_lora_rank and lora_target_modules")
    if args.lora_target_modules and "all" in args.lora_target_modules and len(args.lora_target_modules) > 1:
        raise ValueError("lora_target_modules: 'all' must be the only element")
    loaded, batch = args.max_loaded_loras, args.max_loras_per_batch
    if loaded is not None and loaded < batch:
        raise ValueError(f"max_loaded_loras must be at least max_loras_per_batch, got {loaded} < {batch}")


def _check_available(args: ServerArgs) -> None:
    for name, allowed in AVAILABLE.items():
        value = getattr(args, name)
        if value is not None and value not in allowed:
            raise NotImplementedError(
                f"{name}={shown(value)} is not available yet; leave the option at its default"
            )


def _warn_replaced(args: ServerArgs) -> None:
    for name in ("attention_backend", "prefill_attention_backend", "decode_attention_backend"):
        value = getattr(args, name)
        if value is not None and value not in ("pallas", "xla"):
            logger.warning(
                "%s=%r names no implementation here (pallas, xla); choosing automatically", name, value
            )
    if args.sampling_backend is not None:
        logger.warning(
            "sampling_backend=%r is ignored: there is one sampling implementation", args.sampling_backend
        )
    if args.model_impl not in ("auto", "jax"):
        logger.warning("model_impl=%r is ignored: there is one model implementation", args.model_impl)
    if args.cpu_offload_gb:
        logger.warning("cpu_offload_gb=%d is ignored: weights stay on the device", args.cpu_offload_gb)
