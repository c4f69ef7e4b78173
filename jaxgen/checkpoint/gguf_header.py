"""Bounded parser for the header of a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

Every count and length is checked against the bytes that are left before anything is allocated or looped
over, so a hostile header is refused quickly. (The gguf library's reader loops over array lengths unchecked,
and takes seconds for the token lists of large vocabularies.)
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.checkpoint.errors import CheckpointError

MAX_DIMS = 4  # of ggml
MAX_NAME_BYTES = 1 << 16
MAX_STRINGS = 1 << 22  # in one array; the largest vocabularies have some 2**18 tokens
DEFAULT_ALIGNMENT = 32

# Type numbers of metadata values, from the format's specification.
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: Mapping[int, np.dtype] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in the file.

    Args:
        shape: Row-major shape (the file lists the axes in the opposite order).
        type: ggml type number.
        start: Byte offset from the start of the file.
        nbytes: Stored size in bytes.
    """

    shape: tuple[int, ...]
    type: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata and tensor directory of a GGUF file."""

    metadata: Mapping[str, Any]  # str, int, float, bool, list[str] or a numpy array
    tensors: Mapping[str, TensorInfo]


def read_header(path: Path, block_sizes: Mapping[int, tuple[int, int]]) -> GGUFHeader:
    """Parse and check the header.

    Args:
        path: The file.
        block_sizes: ggml type number -> (elements, bytes) of one block.

    Raises:
        CheckpointError: the file is damaged, truncated or of an unsupported version.
    """
    try:
        size = path.stat().st_size
        data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return _Parser(path, memoryview(data)).parse(block_sizes)


class _Parser:
    def __init__(self, path: Path, data: memoryview):
        self.path = path
        self.data = data
        self.at = 0

    def fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: damaged GGUF file: {message} (at byte {self.at})")

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise self.fail(f"{count} bytes expected, {len(self.data) - self.at} left")
        self.at += count
        return self.data[self.at - count : self.at]

    def u32(self) -> int:
        return struct.unpack("<I", self.take(4))[0]

    def u64(self) -> int:
        return struct.unpack("<Q", self.take(8))[0]

    def count(self, what: str, min_bytes: int) -> int:
        """A number of items, each of at least ``min_bytes``."""
        number = self.u64()
        if number * min_bytes > len(self.data) - self.at:
            raise self.fail(f"{number} {what} cannot fit into the {len(self.data) - self.at} bytes left")
        return number

    def string(self, errors: str = "replace") -> str:
        return str(self.take(self.u64()), "utf-8", errors)

    def name(self) -> str:
        try:
            name = self.string("strict")
        except UnicodeDecodeError:
            raise self.fail("a name is not UTF-8") from None
        if len(name) > MAX_NAME_BYTES:
            raise self.fail(f"a name has {len(name)} characters")
        return name

    def value(self) -> Any:
        kind = self.u32()
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind in _SCALARS:
            return self.scalars(kind, 1)[0].item()
        raise self.fail(f"unknown metadata type {kind}")

    def array(self) -> Any:
        kind = self.u32()
        if kind == _STRING:
            number = self.count("strings", 8)
            if number > MAX_STRINGS:
                raise self.fail(f"an array of {number} strings")
            return [self.string() for _ in range(number)]
        if kind in _SCALARS:
            return self.scalars(kind, self.count("array elements", _SCALARS[kind].itemsize))
        raise self.fail("nested arrays are not supported" if kind == _ARRAY else f"unknown array type {kind}")

    def scalars(self, kind: int, number: int) -> np.ndarray:
        dtype = _SCALARS[kind]
        raw: np.ndarray = np.frombuffer(self.take(number * dtype.itemsize), np.uint8)
        return raw != 0 if kind == _BOOL else raw.view(dtype)

    def parse(self, block_sizes: Mapping[int, tuple[int, int]]) -> GGUFHeader:
        if bytes(self.take(4)) != b"GGUF":
            raise CheckpointError(f"{self.path}: not a GGUF file")
        version = self.u32()
        if version & 0xFFFF == 0:
            raise CheckpointError(f"{self.path}: big-endian GGUF files are not supported")
        if version not in (2, 3):
            raise CheckpointError(f"{self.path}: GGUF version {version} is not supported (2 and 3 are)")
        tensor_count = self.count("tensors", 8 + 4 + 4 + 8)
        metadata: dict[str, Any] = {}
        for _ in range(self.count("metadata entries", 8 + 4 + 1)):
            key = self.name()
            if key in metadata:
                raise self.fail(f"metadata key {key!r} occurs twice")
            metadata[key] = self.value()
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.fail(f"alignment {alignment!r} is not a power of two")
        entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensor_count):
            name = self.name()
            if name in entries:
                raise self.fail(f"tensor {name!r} occurs twice")
            entries[name] = self.entry(name)
        start = -(-self.at // alignment) * alignment
        tensors = {name: self.place(name, start, *entry, block_sizes) for name, entry in entries.items()}
        return GGUFHeader(metadata, tensors)

    def entry(self, name: str) -> tuple[tuple[int, ...], int, int]:
        """Shape, type and offset of a tensor."""
        ndim = self.u32()
        if not 1 <= ndim <= MAX_DIMS:
            raise self.fail(f"tensor {name!r} has {ndim} dimensions")
        shape = tuple(reversed([self.u64() for _ in range(ndim)]))
        if not all(0 < size < 1 << 40 for size in shape):
            raise self.fail(f"tensor {name!r} has shape {shape}")
        return shape, self.u32(), self.u64()

    def place(
        self, name: str, base: int, shape: tuple[int, ...], type: int, offset: int, block_sizes: Mapping
    ) -> TensorInfo:
        if type not in block_sizes:
            raise self.fail(f"tensor {name!r} has the unknown type {type}")
        block_elements, block_bytes = block_sizes[type]
        if shape[-1] % block_elements:
            raise self.fail(f"tensor {name!r}: rows of {shape[-1]} are not whole blocks of {block_elements}")
        nbytes = math.prod(shape) // block_elements * block_bytes
        if base + offset + nbytes > len(self.data):
            raise CheckpointError(
                f"{self.path}: tensor {name!r} of shape {shape} ends at byte {base + offset + nbytes}, "
                f"but the file has {len(self.data)}: it is truncated; download or copy it again"
            )
        return TensorInfo(shape, type, base + offset, nbytes)
