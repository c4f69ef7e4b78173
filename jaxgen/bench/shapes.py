"""What `bench latency` and `bench offline` share: an engine of given shapes, and the floors of its model."""

from __future__ import annotations

import argparse
from typing import Any

from jaxgen.bench.costs import ModelCosts, Rates
from jaxgen.checkpoint import open_checkpoint
from jaxgen.engine import Engine
from jaxgen.engine_config import kv_dtype_of, model_config_of, param_dtype_of, pick_mesh, platform_of
from jaxgen.server_args import ServerArgs


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
        "strict_compile": True,  # a compile would pass for slow steps
    }
    return Engine(**(common | options | args.engine_options))


def floors(args: ServerArgs) -> tuple[ModelCosts, Rates]:
    """The model of an engine's resolved arguments in bytes and operations, and the measured rates of the device.

    To be called after the engine's end: the measurement needs memory that the engine would hold.
    """
    checkpoint = open_checkpoint(args.model_path, args.load_format)
    model = model_config_of(args, checkpoint.config, checkpoint.generation_config)
    dtype = param_dtype_of(args, model, platform_of(pick_mesh(args)))
    rates = Rates.measure(dtype)
    print(
        f"measured  reads {rates.read_bytes_per_s / 1e9:,.1f} GB/s, "
        f"multiplies {rates.matrix_flops / 1e9:,.1f} GFLOP/s\n"
    )
    return ModelCosts.of(model, dtype, kv_dtype_of(args, dtype)), rates
