"""PyTorch checkpoints: `pytorch_model.bin` and its parts, read as data and never as code."""

from __future__ import annotations

import mmap
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from jaxgen.checkpoint.assemble import Convert, Params, Progress, assemble, unchanged
from jaxgen.checkpoint.directory import ModelDirectory, read_index
from jaxgen.checkpoint.errors import CheckpointError
from jaxgen.checkpoint.torch_pickle import PickleRefused, TorchTensor, read_tensors
from jaxgen.models.weights import WeightSource

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"
LOCAL_HEADER = 30  # bytes of a zip entry's own header before its name


class TorchFile:
    """One memory-mapped file and the tensors it describes.

    Raises:
        CheckpointError: the file is no PyTorch zip archive, is damaged, or asks for anything but tensors.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                (description,) = [n for n in archive.namelist() if n.endswith("/data.pkl") or n == "data.pkl"]
                self._prefix = description.removesuffix("data.pkl")
                order = f"{self._prefix}byteorder"
                if order in archive.namelist() and archive.read(order) != b"little":
                    raise CheckpointError(
                        f"{path}: was written on a big-endian machine, which is not supported"
                    )
                self._entries = {info.filename: info for info in archive.infolist()}
                self.tensors: dict[str, TorchTensor] = read_tensors(archive.read(description))
        except PickleRefused as error:
            raise CheckpointError(f"{path}: {error}; convert the model to safetensors") from error
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{path}: is not a PyTorch zip archive ({error}); files of PyTorch before 1.6 must be converted "
                "to safetensors"
            ) from error
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, name: str) -> np.ndarray:
        """The tensor as a view of the file."""
        tensor = self.tensors[name]
        storage = tensor.storage
        info = self._entries.get(f"{self._prefix}data/{storage.key}")
        size = storage.size * storage.dtype.itemsize
        if info is None or info.compress_type != zipfile.ZIP_STORED or info.file_size != size:
            raise CheckpointError(
                f"{self.path}: tensor {name!r}: its data/{storage.key} is missing, compressed, or not of "
                f"{size} bytes"
            )
        header = self._bytes[info.header_offset : info.header_offset + LOCAL_HEADER]
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        start = info.header_offset + LOCAL_HEADER + name_length + extra_length
        if start + size > len(self._bytes):
            raise CheckpointError(f"{self.path}: tensor {name!r}: the file is truncated")
        flat = np.frombuffer(self._bytes, storage.dtype, storage.size, start)
        last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides))
        if 0 in tensor.shape:
            return np.empty(tensor.shape, storage.dtype)
        if last >= storage.size:
            raise CheckpointError(
                f"{self.path}: tensor {name!r}: its shape {tensor.shape} exceeds its storage"
            )
        strides = [step * storage.dtype.itemsize for step in tensor.strides]
        return np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides, writeable=False)


class TorchReader:
    """The tensors of a model directory, over all its files."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._files = {name: TorchFile(directory / name) for name in self._find_files()}
        self._index = {tensor: name for name, file in self._files.items() for tensor in file.tensors}

    def where(self, name: str) -> str:
        return str(
            self.directory / self._index.get(name, INDEX if len(self._files) > 1 else next(iter(self._files)))
        )

    def shape(self, name: str) -> tuple[int, ...] | None:
        file = self._index.get(name)
        return None if file is None else self._files[file].tensors[name].shape

    def read(self, name: str, dtype: np.dtype) -> np.ndarray:
        return self._files[self._index[name]].read(name)

    def _find_files(self) -> list[str]:
        if (self.directory / INDEX).is_file():
            return sorted(set(read_index(self.directory / INDEX, ".bin").values()))
        if (self.directory / SINGLE).is_file():
            return [SINGLE]
        found = sorted(p.name for p in self.directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if len(found) == 1:
            return found
        raise CheckpointError(
            f"{self.directory}: expected {SINGLE}, {INDEX}, or exactly one .bin, .pt or .pth file; found "
            f"{', '.join(found) or 'none'}"
        )


class TorchCheckpoint(ModelDirectory):
    """A Hugging Face model directory with PyTorch weights."""

    def load(
        self,
        params: Params,
        table: Mapping[str, WeightSource],
        progress: Progress,
        convert: Convert = unchanged,
    ) -> dict[str, jax.Array]:
        """Load the parameters. See :func:`jaxgen.checkpoint.assemble.assemble`."""
        return assemble(params, table, TorchReader(self.path), progress, convert)
