"""Measured configurations of the kernels, per GPU: a table in a file, consulted while an op is traced.

A kernel asks `config_for` with the shape that matters to it and with its safe default, which is the answer
wherever no table, or no entry for exactly this shape, exists. Tables are JSON files named after the device,
written by `python -m kernels_pallas.tune`:

    {"device": "NVIDIA H100 80GB HBM3", "jax": "0.11.2",
     "ops": {"paged_decode": [{"shape": {"num_lanes": 64, ...}, "config": {"block_kv": 64, ...}}]}}

A table is read once per process, and a shape that has been traced keeps its configuration.
"""

import contextlib
import contextvars
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kernels_pallas import mosaic

Shape = Mapping[str, int]
Key = tuple[str, frozenset[tuple[str, int]]]  # op, items of the shape
Fields = dict[str, int]  # of a configuration


class TuningTableError(ValueError):
    """A tuning table that cannot be used; names the file."""


@dataclasses.dataclass
class Trial:
    """An op traced under `trying`: the configuration it is to use (None: its default), and what it asked with."""

    op: str
    config: Any = None
    shape: Shape | None = None
    default: Any = None
    candidates: tuple[Any, ...] = ()


_trial: contextvars.ContextVar[Trial | None] = contextvars.ContextVar("trial", default=None)


def config_for[Config](
    op: str, shape: Shape, default: Config, candidates: Callable[..., Iterable[Config]]
) -> Config:
    """The configuration of a kernel: the table's for the default device, or else `default`.

    Args:
        op: name of the op.
        shape: everything that the best configuration depends on, by name.
        default: a frozen dataclass of integers; an entry of the table replaces some or all of its fields.
        candidates: called with the shape as keywords, by the tuner alone: configurations worth measuring.

    Raises:
        TuningTableError: the device's table is malformed, or has a field that the configuration has not.
    """
    trial = _trial.get()
    if trial is not None and trial.op == op:
        trial.shape, trial.default, trial.candidates = dict(shape), default, tuple(candidates(**shape))
        return default if trial.config is None else trial.config
    path = table_path(mosaic.default_device().device_kind)
    fields = read_table(path).get(_key(op, shape))
    if fields is None:
        return default
    try:
        return dataclasses.replace(default, **fields)  # type: ignore[type-var]
    except (TypeError, ValueError) as error:
        raise TuningTableError(f"{path}: {op} at {dict(shape)}: {error}") from error


@contextlib.contextmanager
def trying(op: str, config: Any = None) -> Iterator[Trial]:
    """Inside, in this thread, `op` is traced with `config` (None: its default) and no table is consulted.

    The trial it gives knows, once the op has been traced, what the op asked with.
    """
    token = _trial.set(trial := Trial(op, config))
    try:
        yield trial
    finally:
        _trial.reset(token)


def table_path(device_kind: str) -> Path:
    """Where the table of a device is, or would be: in the installed package, or in a source tree's configs/."""
    package = Path(__file__).parent
    installed = package / "configs"
    folder = installed if installed.is_dir() else package.parent / "configs" / "kernels"
    return folder / (re.sub(r"[^A-Za-z0-9]+", "_", device_kind).strip("_") + ".json")


@functools.cache
def read_table(path: Path) -> Mapping[Key, Fields]:
    """The configurations of a table; none if there is no such file. Raises TuningTableError as `read_ops`."""
    ops = read_ops(path)
    return {_key(op, entry["shape"]): entry["config"] for op, entries in ops.items() for entry in entries}


def read_ops(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The entries of a table by op, each with "shape" and "config"; none if there is no such file.

    Raises TuningTableError for a file that cannot be read or is malformed.
    """
    try:
        table = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TuningTableError(f"{path}: cannot be read: {error}") from error
    ops = table.get("ops") if isinstance(table, dict) else None
    if not isinstance(ops, dict) or not all(isinstance(entries, list) for entries in ops.values()):
        raise TuningTableError(f'{path}: expected an object with "ops": an object of lists of entries')
    for op, entries in ops.items():
        seen = set()
        for entry in entries:
            _check_entry(path, op, entry)
            key = _key(op, entry["shape"])
            if key in seen:
                raise TuningTableError(f"{path}: {op}: two entries for {entry['shape']}")
            seen.add(key)
    return ops


def _check_entry(path: Path, op: str, entry: Any) -> None:
    for part in ("shape", "config"):
        values = entry.get(part) if isinstance(entry, dict) else None
        if not isinstance(values, dict) or not all(isinstance(value, int) for value in values.values()):
            raise TuningTableError(f'{path}: {op}: want "{part}", an object of integers, in {entry!r:.200}')


def _key(op: str, shape: Shape) -> Key:
    return op, frozenset(shape.items())
