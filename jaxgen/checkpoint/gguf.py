"""GGUF files (llama.cpp), dequantized while loading."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxgen.checkpoint.assemble import Convert, Params, Progress, assemble, unchanged
from jaxgen.checkpoint.directory import TOKENIZER_FILES, load_tokenizer
from jaxgen.checkpoint.errors import CheckpointError
from jaxgen.checkpoint.gguf_config import build_config, hf_name
from jaxgen.checkpoint.gguf_header import TensorInfo, read_header
from jaxgen.models.weights import WeightSource

CHUNK_ELEMENTS = 1 << 20  # dequantized to float32 at a time by each thread: 4 MiB


class GGUFFile:
    """One memory-mapped GGUF file; tensors are read under their GGUF names.

    Raises:
        CheckpointError: the file is damaged, or the ``gguf`` package is missing.
    """

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError as error:
            raise CheckpointError(
                f"{path}: reading GGUF files needs the gguf package: pip install 'jaxgen[gguf]'"
            ) from error
        self.path = path
        self._types = gguf.GGMLQuantizationType
        self._dequantize = gguf.quants.dequantize
        self._views = {
            self._types.F32: np.dtype(np.float32),
            self._types.F16: np.dtype(np.float16),
            self._types.BF16: np.dtype(ml_dtypes.bfloat16),
        }
        self.header = read_header(path, {int(key): size for key, size in gguf.GGML_QUANT_SIZES.items()})
        self._bytes = np.memmap(path, np.uint8, "r")

    def read(self, name: str, dtype: np.dtype) -> np.ndarray:
        """The tensor: a view of the file when it is stored unquantized, else dequantized to ``dtype``."""
        info = self.header.tensors[name]
        kind = self._types(info.type)
        stored = self._bytes[info.start : info.start + info.nbytes]
        if kind in self._views:
            return np.frombuffer(stored, self._views[kind]).reshape(info.shape)
        return self._dequantized(name, info, kind, stored, dtype)

    def _dequantized(
        self, name: str, info: TensorInfo, kind: Any, stored: np.ndarray, dtype: np.dtype
    ) -> np.ndarray:
        columns = info.shape[-1]
        rows = stored.reshape(-1, info.nbytes * columns // int(np.prod(info.shape)))
        out = np.empty((len(rows), columns), dtype)
        step = max(1, CHUNK_ELEMENTS // columns)

        def chunk(start: int) -> None:
            out[start : start + step] = self._dequantize(rows[start : start + step], kind)

        try:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                list(pool.map(chunk, range(0, len(rows), step)))
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is quantized as {kind.name}, which cannot be read"
            ) from error
        return out.reshape(info.shape)


class GGUFCheckpoint:
    """A model in one GGUF file: weights, configuration and tokenizer."""

    def __init__(self, path: Path):
        self.path = path
        self._file = GGUFFile(path)
        self._names = {hf_name(name): name for name in self._file.header.tensors}
        float32 = np.dtype(np.float32)
        self.config, self.generation_config = build_config(
            path, self._file.header, lambda name: self._file.read(name, float32)
        )

    def load_tokenizer(
        self, path: str | None = None, mode: str = "auto", trust_remote_code: bool = False
    ) -> Any:
        """The tokenizer at ``path``, or the one built from the file's metadata (always a fast one)."""
        if path is not None:
            return load_tokenizer(path, mode, trust_remote_code)
        from jaxgen.checkpoint.gguf_tokenizer import build_tokenizer

        return build_tokenizer(self.path, self._file.header.metadata, self.config)

    def tokenizer_files(self, scratch: Path) -> list[Path]:
        """The file's tokenizer in Hugging Face format, written to ``scratch``."""
        self.load_tokenizer().save_pretrained(scratch)
        return [scratch / name for name in TOKENIZER_FILES if (scratch / name).is_file()]

    def load(
        self,
        params: Params,
        table: Mapping[str, WeightSource],
        progress: Progress,
        convert: Convert = unchanged,
    ) -> dict[str, jax.Array]:
        """Load the parameters, dequantized. See :func:`jaxgen.checkpoint.assemble.assemble`."""
        return assemble(params, table, self, progress, convert)

    def where(self, name: str) -> str:
        return str(self.path)

    def shape(self, name: str) -> tuple[int, ...] | None:
        stored = self._names.get(name)
        return self._file.header.tensors[stored].shape if stored is not None else None

    def read(self, name: str, dtype: np.dtype) -> np.ndarray:
        """The tensor under its Hugging Face name, in Hugging Face's layout."""
        array = self._file.read(self._names[name], dtype)
        if self.config["model_type"] == "llama":
            if ".q_proj." in name:
                return _unpermute(array, self.config["num_attention_heads"])
            if ".k_proj." in name:
                return _unpermute(array, self.config["num_key_value_heads"])
        return array


def _unpermute(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of the rows of q and k, [N*H, ...], from adjacent rope pairs to halves."""
    if array.shape[0] % (2 * num_heads):
        raise CheckpointError(f"a projection of {array.shape[0]} rows cannot have {num_heads} heads")
    pairs = array.reshape(num_heads, array.shape[0] // num_heads // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
