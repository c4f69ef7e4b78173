"""Defaults that depend on the platform and on device memory. Nothing here touches a device."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxgen.server_args import ServerArgs
from jaxgen.server_args_checks import CACHE_AWARE_POLICIES

GIB = 1024  # MiB
# Prefill step of deterministic mode: every prompt pays for the whole step, so it is kept small.
DETERMINISTIC_CHUNK = 1024


def default_page_size(platform: str) -> int:
    """Token positions per KV page for `platform` "cpu" or "gpu"."""
    return 16 if platform == "cpu" else 64


def default_chunked_prefill_size(memory_mib: int | None) -> int:
    """Prefill tokens per step, by device memory in MiB (`None`: CPU)."""
    if memory_mib is None:
        return 4096
    for below_gib, tokens in ((20, 2048), (60, 4096), (160, 8192)):
        if memory_mib < below_gib * GIB:
            return tokens
    return 16384


def default_max_decode_bucket(memory_mib: int | None, tp_size: int = 1) -> int:
    """Lanes of the largest decode bucket compiled at start, by device memory in MiB (`None`: CPU)."""
    if memory_mib is None:
        return 160
    for below_gib, lanes, lanes_wide in ((20, 8, 8), (35, 48, 160), (60, 32, 160)):
        if memory_mib < below_gib * GIB:
            return lanes_wide if tp_size >= 4 else lanes
    return 512


def default_max_running_requests(pool_tokens: int, context_length: int, explicit: int | None = None) -> int:
    """Rows that may decode at once for a KV pool of `pool_tokens`; at least 1."""
    cap = max(1, pool_tokens // 2)
    if explicit is not None:
        return min(explicit, cap)
    return min(max(2048, min(int(pool_tokens / context_length * 512), 4096)), cap)


def request_limits(context_length: int, pool_tokens: int) -> tuple[int, int]:
    """`(max_req_len, max_req_input_len)` in tokens."""
    max_req_len = min(context_length, pool_tokens) - 1
    return max_req_len, max_req_len - 5


def single_shapes(args: ServerArgs, chunk: int, max_decode: int) -> dict[str, Any]:
    """Changes to `args` that leave one compiled shape for prefill and one for decode.

    A matrix product may sum in another order at another shape, so results that must not depend on the company
    a request keeps need a shape that does not either.
    """
    chunk = min(chunk, DETERMINISTIC_CHUNK)
    lanes = args.max_running_requests or max_decode
    return {
        "enable_mixed_chunk": False,
        "chunked_prefill_size": chunk,
        "cuda_graph_bs_prefill": [chunk if chunk > 0 else args.max_prefill_tokens],
        "cuda_graph_max_bs_prefill": None,
        "cuda_graph_bs_decode": [lanes],
        "cuda_graph_max_bs_decode": lanes,
    }


def resolve(args: ServerArgs, platform: str, memory_mib: int | None = None) -> ServerArgs:
    """Validate, then fill in every default that needs no device: `platform` is "cpu" or "gpu".

    `memory_mib` is the memory of one device in MiB, `None` on CPU. Raises what `ServerArgs.validate` raises,
    and `ValueError` when the derived page size does not divide an explicit chunked_prefill_size.
    """
    args.validate()
    page_size = args.page_size
    if page_size in (None, 1):
        page_size = default_page_size(platform)
    chunk = args.chunked_prefill_size
    if chunk is None:
        chunk = default_chunked_prefill_size(memory_mib)
    elif chunk > 0 and chunk % page_size:
        raise ValueError(
            f"chunked_prefill_size must be divisible by page_size, got {chunk} and {page_size} "
            f"(the default on {platform})"
        )
    max_decode = args.cuda_graph_max_bs_decode
    if max_decode is None:
        max_decode = default_max_decode_bucket(memory_mib, args.tp_size)
        if args.cuda_graph_bs_decode:
            max_decode = max(args.cuda_graph_bs_decode)
    if args.max_running_requests is not None:
        max_decode = min(max_decode, args.max_running_requests)
    # Without a prefix cache there is nothing to be aware of.
    policy = args.schedule_policy
    if args.disable_radix_cache and policy in CACHE_AWARE_POLICIES:
        policy = "fcfs"
    shapes: dict[str, Any] = {"chunked_prefill_size": chunk, "cuda_graph_max_bs_decode": max_decode}
    if args.enable_deterministic_inference:
        shapes = single_shapes(args, chunk, max_decode)
    return dataclasses.replace(
        args,
        **shapes,
        page_size=page_size,
        schedule_policy=policy,
        tokenizer_path=args.tokenizer_path or args.model_path,
        served_model_name=args.served_model_name or args.model_path,
        device=args.device.split(":")[0] if args.device else None,
        enable_lora=True if args.lora_paths else args.enable_lora,
    )
