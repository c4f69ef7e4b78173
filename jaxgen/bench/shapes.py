"""What `bench latency` and `bench offline` share: an engine of given shapes, and the floors of its model."""

from __future__ import annotations

import argparse
from typing import Any

from jaxgen.bench.costs import ModelCosts, Rates
from jaxgen.checkpoint import open_checkpoint
from jaxgen.engine import Engine
from jaxgen.engine_config import kv_dtype_of, model_config_of, param_dtype_of, pick_mesh, platform_of


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The common settings, for the report."""
    return {
        "model": args.model,
        "load format": args.load_format,
        "dtype": args.dtype,
        "tp": args.tp_size,
        "input": args.input_len,
        "output": args.output_len,
        "repeats": args.repeats,
    }


def make_engine(args: argparse.Namespace, **options: Any) -> Engine:
    """Token ids in and out, no prefix reuse: every run computes its prompts anew."""
    common = {
        "model_path": args.model,
        "load_format": args.load_format,
        "dtype": args.dtype,
        "page_size": args.page_size,
        "tp_size": args.tp_size,
        "skip_tokenizer_init": True,
        "disable_radix_cache": True,
    }
    return Engine(**(common | options | args.engine_options))


def floors(engine: Engine) -> tuple[ModelCosts, Rates]:
    """The engine's model in bytes and operations, and the measured rates of the device."""
    args = engine.server_args
    checkpoint = open_checkpoint(args.model_path, args.load_format)
    model = model_config_of(args, checkpoint.config, checkpoint.generation_config)
    dtype = param_dtype_of(args, model, platform_of(pick_mesh(args)))
    return ModelCosts.of(model, dtype, kv_dtype_of(args, dtype)), Rates.measure(dtype)


def rates_line(rates: Rates) -> str:
    return (
        f"measured  reads {rates.read_bytes_per_s / 1e9:,.1f} GB/s, "
        f"multiplies {rates.matrix_flops / 1e9:,.1f} GFLOP/s\n"
    )


def rates_record(rates: Rates) -> dict[str, float]:
    return {"read_bytes_per_s": rates.read_bytes_per_s, "matrix_flops": rates.matrix_flops}
