"""The layout of the packed host-to-device arrays: written by `batch.py`, read by `step.py`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

# 256 bytes: XLA passes a field to a kernel in place, and kernels want aligned buffers.
ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Field:
    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """Named, shaped fields in one flat array, each starting at a multiple of ALIGNMENT elements."""

    fields: tuple[Field, ...]

    @classmethod
    def of(cls, **shapes: tuple[int, ...]) -> Layout:
        fields, start = [], 0
        for name, shape in shapes.items():
            stop = start + math.prod(shape)
            fields.append(Field(name, shape, start, stop))
            start = -(-stop // ALIGNMENT) * ALIGNMENT
        return cls(tuple(fields))

    @property
    def size(self) -> int:
        return self.fields[-1].stop if self.fields else 0

    def views(self, flat) -> dict:
        """The fields of `flat` [size] by name, reshaped; views for NumPy, slices for a traced array."""
        return {f.name: flat[f.start : f.stop].reshape(f.shape) for f in self}

    def __iter__(self) -> Iterator[Field]:
        return iter(self.fields)


def decode_layout(lanes: int) -> Layout:
    """int32 fields of a decode step of B lanes.

    rows [B]: state row of each lane (out of range = padding).
    updates [B, 3]: newly assigned pages as (row, column of the page table, page); padding is out of range.
    """
    return Layout.of(rows=(lanes,), updates=(lanes, 3))


def prefill_layouts(
    tokens: int, rows: int, max_pages: int, edit_width: int, logprob_width: int, *, full: bool
) -> tuple[Layout, Layout]:
    """int32 and float32 fields of a prefill step of T packed tokens in N rows.

    token [T] (-1 = the row's newest token on the device), segment [T] index of the token's row in this batch
    (N = padding), target [T] the prompt token that follows (-1 = none wanted);
    per row: row (state row), offset (first packed token), length (packed tokens), start (position of the
    first one), prompt (prompt length; later positions are output), flags, ints (columns of the lane state),
    table (pages) and, in a full step, the sparse edits and the token ids of wanted log-probabilities.
    """
    ints: dict[str, tuple[int, ...]] = {
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
    }
    floats: dict[str, tuple[int, ...]] = {"floats": (rows, 6)}
    if full:
        ints |= {
            "target": (tokens,),
            "edit_ids": (rows, edit_width),
            "edit_until": (rows, edit_width),
            "logprob_ids": (rows, logprob_width),
        }
        floats |= {"edit_values": (rows, edit_width)}
    return Layout.of(**ints), Layout.of(**floats)


# Bits of the prefill field `flags`.
SAMPLES = 1  # the chunk is the last of its prompt (or a decode lane): its drawn token is real
FIRST_CHUNK = 2  # counts of the row start from zero
INPUT_LOGPROBS = 4  # log-probabilities of the chunk's `target` tokens are wanted
