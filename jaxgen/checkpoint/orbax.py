"""Ready-to-run checkpoints: the engine's own parameters, fused and cast, in an Orbax directory.

Layout::

    MODEL/jaxgen_checkpoint.json   format version, parameters, and every weight file with its size
    MODEL/config.json, generation_config.json, tokenizer files
    MODEL/weights/                 written by Orbax

The directory appears under its name only when complete; the sizes in ``jaxgen_checkpoint.json`` tell a
damaged copy from a whole one before anything is read.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgen.checkpoint.assemble import Convert, Params, Progress, sharding_of, unchanged
from jaxgen.checkpoint.directory import ModelDirectory, read_json
from jaxgen.checkpoint.errors import CheckpointError
from jaxgen.checkpoint.zarr import read_array
from jaxgen.models.weights import WeightSource

FORMAT = "jaxgen-orbax"
VERSION = 1
MARKER = "jaxgen_checkpoint.json"
WEIGHTS = "weights"

_CONCURRENT_GB = 8  # host memory for writing; more than the largest parameter of any supported model
_READERS = min(8, os.cpu_count() or 1)  # parameters read at a time


def is_orbax(path: Path) -> bool:
    """Whether a directory is meant to be an Orbax checkpoint, whole or not."""
    return (path / MARKER).exists() or (path / WEIGHTS).is_dir()


def save(
    path: str | Path,
    params: Mapping[str, jax.Array],
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None = None,
    tokenizer_files: Iterable[Path] = (),
) -> None:
    """Write a checkpoint.

    Args:
        path: Directory to create.
        params: Parameter path -> array, as the model takes them.
        config: ``config.json``.
        generation_config: ``generation_config.json``; none is written when empty.
        tokenizer_files: Files to copy next to the configuration.

    Raises:
        CheckpointError: ``path`` exists already.
    """
    import orbax.checkpoint as ocp

    path = Path(path).absolute()
    if path.exists():
        raise CheckpointError(f"{path}: exists already; choose another directory or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        tree = dict(params)
        with _checkpointer() as checkpointer:
            checkpointer.save(partial / WEIGHTS, args=ocp.args.PyTreeSave(tree))
        _write_json(partial / "config.json", dict(config))
        if generation_config:
            _write_json(partial / "generation_config.json", dict(generation_config))
        for file in tokenizer_files:
            shutil.copyfile(file, partial / file.name)
        files = sorted(file for file in (partial / WEIGHTS).rglob("*") if file.is_file())
        marker = {
            "format": FORMAT,
            "version": VERSION,
            "parameters": {
                name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in tree.items()
            },
            "files": {str(file.relative_to(partial)): file.stat().st_size for file in files},
        }
        _write_json(partial / MARKER, marker)
        partial.chmod(0o755)  # mkdtemp's 0o700 would keep other users out
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


class OrbaxCheckpoint(ModelDirectory):
    """A directory written by :func:`save`."""

    def load(
        self,
        params: Params,
        table: Mapping[str, WeightSource],
        progress: Progress,
        convert: Convert = unchanged,
    ) -> dict[str, jax.Array]:
        """Restore the parameters onto their shardings, cast to their dtypes; ``table`` is not needed.

        Raises:
            CheckpointError: the directory is damaged, incomplete, or of another model or version.
        """
        self._check(params)
        weights = self.path / WEIGHTS

        def restore(path: str) -> tuple[int, dict[str, jax.Array]]:
            target = params[path]
            values = read_array(weights / path, tuple(target.shape)).astype(target.dtype, copy=False)
            array = jax.device_put(values, sharding_of(target))
            # Waiting here bounds the host buffers still being copied to a device.
            return array.nbytes, jax.block_until_ready(convert(path, array))

        arrays: dict[str, jax.Array] = {}
        with ThreadPoolExecutor(_READERS, thread_name_prefix="jaxgen-restore") as pool:
            try:
                for nbytes, converted in pool.map(restore, params):
                    arrays |= converted
                    progress(nbytes)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return arrays

    def _check(self, params: Params) -> None:
        path = self.path / MARKER
        if not path.is_file():
            raise CheckpointError(
                f"{self.path}: {MARKER} is missing, so this copy is incomplete; "
                "copy or convert the model again"
            )
        marker = read_json(path)
        if marker.get("format") != FORMAT or marker.get("version") != VERSION:
            raise CheckpointError(
                f"{path}: format {marker.get('format')!r} version {marker.get('version')!r}, "
                f"expected {FORMAT!r} version {VERSION}; convert the model again"
            )
        parameters, files = marker.get("parameters"), marker.get("files")
        if not isinstance(parameters, dict) or not isinstance(files, dict):
            raise CheckpointError(f"{path}: has no list of parameters or files; convert the model again")
        for name, target in params.items():
            entry = parameters.get(name)
            found = entry.get("shape") if isinstance(entry, dict) else None
            if found != list(target.shape):
                raise CheckpointError(
                    f"{path}: parameter {name!r} has shape {found}, expected {list(target.shape)}; "
                    "was it converted from this model, by this version?"
                )
        if extra := sorted(parameters.keys() - params.keys()):
            raise CheckpointError(f"{path}: the model has no parameter {extra[0]!r}; convert it again")
        for name, size in files.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise CheckpointError(f"{path}: names {name!r}, a file outside the checkpoint")
            file = self.path / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes, expected {size}"
                raise CheckpointError(f"{file}: {state}; copy or convert the model again")


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    # Plain uncompressed chunks: weights hardly compress, and decompression would dominate the load time.
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(
            use_ocdbt=False,
            use_compression=False,
            save_concurrent_gb=_CONCURRENT_GB,
        )
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
