"""The layout of the packed host-to-device array of a step: written by `batch.py`, read by `step.py`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping

import numpy as np

# 256 bytes: XLA passes a field to a kernel in place, and kernels want aligned buffers.
ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Field:
    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    dtype: type[np.number]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Named, shaped fields in one flat int32 array, each starting at a multiple of ALIGNMENT elements.

    Those of float32 are there by their bits.
    """

    fields: tuple[Field, ...]

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], floats: Collection[str] = ()) -> Layout:
        """Fields of these shapes, in this order; those named in `floats` are float32."""
        fields, start = [], 0
        for name, shape in shapes.items():
            stop = start + math.prod(shape)
            fields.append(Field(name, shape, start, stop, np.float32 if name in floats else np.int32))
            start = -(-stop // ALIGNMENT) * ALIGNMENT
        return cls(tuple(fields))

    @property
    def size(self) -> int:
        return self.fields[-1].stop if self.fields else 0

    def views(self, flat) -> dict:
        """The fields of `flat` [size] by name, reshaped; views for NumPy, slices for a traced array."""
        return {f.name: flat[f.start : f.stop].view(f.dtype).reshape(f.shape) for f in self}

    def __iter__(self) -> Iterator[Field]:
        return iter(self.fields)


def decode_layout(lanes: int) -> Layout:
    """int32 fields of a decode step of B lanes.

    rows [B]: state row of each lane (out of range = padding).
    updates [B, 3]: newly assigned pages as (row, column of the page table, page); padding is out of range.
    common [1]: tokens that all lanes have in the same pages, for steps that read them once.
    """
    return Layout.of({"rows": (lanes,), "updates": (lanes, 3), "common": (1,)})


def prefill_layout(
    tokens: int, rows: int, max_pages: int, edit_width: int, logprob_width: int, *, full: bool
) -> Layout:
    """Fields of a prefill step of T packed tokens in N rows.

    token [T] (-1 = the row's newest token on the device), segment [T] index of the token's row in this batch
    (N = padding), target [T] the prompt token that follows (-1 = none wanted);
    per row: row (state row), offset (first packed token), length (packed tokens), start (position of the
    first one), prompt (prompt length; later positions are output), flags, ints and floats (columns of the lane
    state), table (pages) and, in a full step, the sparse edits and the token ids of wanted log-probabilities.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "token": (tokens,),
        "segment": (tokens,),
        "row": (rows,),
        "offset": (rows,),
        "length": (rows,),
        "start": (rows,),
        "prompt": (rows,),
        "flags": (rows,),
        "ints": (rows, 4),
        "table": (rows, max_pages),
        "floats": (rows, 6),
    }
    if full:
        shapes |= {
            "target": (tokens,),
            "edit_ids": (rows, edit_width),
            "edit_until": (rows, edit_width),
            "edit_values": (rows, edit_width),
            "logprob_ids": (rows, logprob_width),
        }
    return Layout.of(shapes, floats=("floats", "edit_values"))


# Bits of the prefill field `flags`.
SAMPLES = 1  # the chunk is the last of its prompt (or a decode lane): its drawn token is real
FIRST_CHUNK = 2  # counts of the row start from zero
INPUT_LOGPROBS = 4  # log-probabilities of the chunk's `target` tokens are wanted
