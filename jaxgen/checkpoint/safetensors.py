"""Hugging Face checkpoints in safetensors files, one or many, memory-mapped."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors

from jaxgen.checkpoint.assemble import Convert, Params, Progress, assemble, unchanged
from jaxgen.checkpoint.directory import ModelDirectory, read_index
from jaxgen.checkpoint.errors import CheckpointError
from jaxgen.models.weights import WeightSource

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# Only floating types: an integer tensor under a weight's name belongs to a quantization scheme.
DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


@dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    start: int  # byte offset from the start of the file


class SafetensorsFile:
    """One memory-mapped safetensors file.

    Raises:
        CheckpointError: the file is damaged. The safetensors library validates the header against the file.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with safetensors.safe_open(path, framework="np"):
                pass
            with path.open("rb") as file:
                (header_bytes,) = struct.unpack("<Q", file.read(8))
                header: dict[str, Any] = json.loads(file.read(header_bytes))
        except (OSError, safetensors.SafetensorError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: not a complete safetensors file ({error}); download or copy it again"
            ) from error
        header.pop("__metadata__", None)
        base = 8 + header_bytes
        self.entries = {
            name: _Entry(entry["dtype"], tuple(entry["shape"]), base + entry["data_offsets"][0])
            for name, entry in header.items()
        }
        self._bytes = np.memmap(path, np.uint8, "r")

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the file."""
        entry = self.entries[name]
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has type {entry.dtype}; "
                f"weights must be one of {', '.join(DTYPES)}"
            )
        count = int(np.prod(entry.shape, dtype=np.int64))
        return np.frombuffer(self._bytes, dtype, count, entry.start).reshape(entry.shape)


class SafetensorsReader:
    """The tensors of a model directory, over all its files."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._index: dict[str, str] = {}
        files = self._find_files()
        self._files = {name: SafetensorsFile(directory / name) for name in files}
        for name, file in self._files.items():
            for tensor in file.entries:
                # With an index, only the file it names counts: other copies of a tensor are ignored.
                self._index.setdefault(tensor, name)

    def where(self, name: str) -> str:
        return str(
            self.directory / self._index.get(name, INDEX if len(self._files) > 1 else next(iter(self._files)))
        )

    def shape(self, name: str) -> tuple[int, ...] | None:
        entry = self._entry(name)
        return entry.shape if entry else None

    def read(self, name: str, dtype: np.dtype) -> np.ndarray:
        return self._files[self._index[name]].read(name)

    def _entry(self, name: str) -> _Entry | None:
        file = self._index.get(name)
        return self._files[file].entries.get(name) if file is not None else None

    def _find_files(self) -> list[str]:
        if (self.directory / INDEX).is_file():
            self._index = read_index(self.directory / INDEX, ".safetensors")
            return sorted(set(self._index.values()))
        if (self.directory / SINGLE).is_file():
            return [SINGLE]
        found = sorted(path.name for path in self.directory.glob("*.safetensors"))
        if len(found) == 1:
            return found
        if not found:
            raise CheckpointError(f"{self.directory}: has no .safetensors file")
        raise CheckpointError(
            f"{self.directory}: has several .safetensors files but no {INDEX}: {', '.join(found)}"
        )


class SafetensorsCheckpoint(ModelDirectory):
    """A Hugging Face model directory with safetensors weights."""

    def load(
        self,
        params: Params,
        table: Mapping[str, WeightSource],
        progress: Progress,
        convert: Convert = unchanged,
    ) -> dict[str, jax.Array]:
        """Load the parameters. See :func:`jaxgen.checkpoint.assemble.assemble`."""
        quantization = self.config.get("quantization_config")
        if quantization:
            method = (
                quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
            )
            raise CheckpointError(
                f"{self.path}: the weights are quantized (quant_method {method!r}), which is not supported; "
                "use the unquantized model"
            )
        return assemble(params, table, SafetensorsReader(self.path), progress, convert)
