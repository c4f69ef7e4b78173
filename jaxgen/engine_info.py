"""What `get_server_info` and `get_model_info` report."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jaxgen
from jaxgen.io_limits import LengthLimits
from jaxgen.loop import EngineLoop
from jaxgen.server_args import ServerArgs
from jaxgen.startup import StartupReport


def server_info(
    args: ServerArgs, report: StartupReport, loop: EngineLoop, limits: LengthLimits
) -> dict[str, Any]:
    """Every ServerArgs field plus version, status and one `internal_states` entry; memory sizes in bytes."""
    stats = loop.scheduler.stats()
    runner = loop.runner
    fields = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    state = fields | {
        "last_gen_throughput": loop.throughput.tokens_per_second,
        "memory_usage": {
            "token_capacity": limits.pool_tokens,
            "weight_bytes": runner.steps.weight_bytes,
            "kvcache_bytes": runner.kv_shape.page_bytes * runner.kv_shape.num_pages,
        },
        "effective_max_running_requests_per_dp": loop.scheduler.config.max_running_requests,
        "world_size": int(runner.mesh.size),
        "running_batch_size": stats.running,
        "waiting_queue_size": stats.waiting,
        "available_kv_tokens": stats.available_tokens,
        "engine_paused": stats.paused,
    }
    return fields | {
        "version": jaxgen.__version__,
        "status": "ready",
        "startup_time": report.total,
        "launch_command": " ".join(sys.argv),
        "max_total_num_tokens": limits.pool_tokens,
        "max_req_input_len": limits.max_req_input_len,
        "internal_states": [state],
    }


def model_info(args: ServerArgs) -> dict[str, Any]:
    return {
        "model_path": args.model_path,
        "served_model_name": args.served_model_name,
        "is_generation": True,
        "weight_version": args.weight_version,
        "load_format": args.load_format,
        "reasoning_parser": None,
        "tool_call_parser": None,
        "disaggregation_mode": "null",
    }
