"""Arrays that Orbax stored uncompressed, read straight off their chunk files (Zarr storage specification, version 2).

Orbax's own restore spends longer on its event loop and on a second host copy than on reading.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxgen.checkpoint.directory import read_json
from jaxgen.checkpoint.errors import CheckpointError

METADATA = ".zarray"
DTYPES = {
    "<f4": np.dtype(np.float32),
    "<f2": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def read_array(directory: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The array of `shape` stored in a Zarr directory, every chunk read once, straight into place.

    Raises:
        CheckpointError: damaged, of another shape, or stored in another way than uncompressed and row-major.
    """
    metadata = read_json(directory / METADATA)
    dtype, chunk_shape, separator = _layout(directory, metadata, shape)
    out = np.empty(shape, dtype)
    for index in np.ndindex(*(-(-size // chunk) for size, chunk in zip(shape, chunk_shape))):
        # An array without axes has one chunk, called 0.
        _read_chunk(directory / (separator.join(map(str, index)) or "0"), out, index, chunk_shape)
    return out


def _layout(
    directory: Path, metadata: dict[str, Any], shape: tuple[int, ...]
) -> tuple[np.dtype, tuple[int, ...], str]:
    """(dtype, shape of a chunk, what stands between the numbers in a chunk's name)."""
    expected = {"zarr_format": 2, "compressor": None, "filters": None, "order": "C", "shape": list(shape)}
    for key, value in expected.items():
        if metadata.get(key) != value:
            raise CheckpointError(
                f"{directory / METADATA}: {key} is {metadata.get(key)!r}, expected {value!r}; "
                "convert the model again"
            )
    chunks = metadata.get("chunks")
    if (
        not isinstance(chunks, list)
        or len(chunks) != len(shape)
        or not all(isinstance(size, int) and size > 0 for size in chunks)
    ):
        raise CheckpointError(f"{directory / METADATA}: chunks are {chunks!r}; convert the model again")
    name = metadata.get("dtype")
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise CheckpointError(f"{directory / METADATA}: dtype {name!r} is none of {', '.join(DTYPES)}")
    return dtype, tuple(chunks), "/" if metadata.get("dimension_separator") == "/" else "."


def _read_chunk(file: Path, out: np.ndarray, index: tuple[int, ...], chunk_shape: tuple[int, ...]) -> None:
    """Reads a chunk into its part of `out`; a chunk at an edge is stored whole and used in part."""
    part: Any = (*(slice(i * size, (i + 1) * size) for i, size in zip(index, chunk_shape)), ...)
    window = out[part]  # always a view, thanks to the ellipsis
    wanted = math.prod(chunk_shape) * out.dtype.itemsize
    is_direct = window.shape == chunk_shape and window.flags.c_contiguous
    target = window if is_direct else np.empty(chunk_shape, out.dtype)
    try:
        with file.open("rb", buffering=0) as stream:
            found = stream.seek(0, 2)
            if found != wanted:
                raise CheckpointError(f"{file}: has {found} bytes, expected {wanted}; copy or convert again")
            stream.seek(0)
            view = memoryview(target.reshape(-1).view(np.uint8))
            done = 0
            while done < wanted:  # the kernel reads at most 2 GiB at a time
                count = stream.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{file}: ended after {done} of {wanted} bytes; copy it again")
                done += count
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}; copy or convert again") from error
    if not is_direct:
        window[...] = target[tuple(slice(0, size) for size in window.shape)]
