"""Reads the tensor table of a PyTorch file without running its pickle.

A `.bin` or `.pt` file of PyTorch 1.6 and later is a zip archive: `*/data.pkl` describes tensors, `*/data/KEY` hold
their elements. The description is a pickle, which as such could run any code. Here its opcodes are only decoded (by
the standard library's disassembler), and a machine that knows nothing but tensors, containers and plain values follows
them: whatever else a file asks for is refused.
"""

from __future__ import annotations

import dataclasses
import pickletools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

STORAGES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
MOST_BYTES = 64 << 20  # of one description; a large model's has a few hundred KiB


class PickleRefused(ValueError):
    """The description holds something that is no tensor, container or plain value."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """One `data/KEY` entry: `size` elements of `dtype`."""

    dtype: np.dtype
    key: str
    size: int


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """A strided view of a storage; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Name:
    """A global the pickle mentions; nothing is imported."""

    path: str


_MARK = object()


def read_tensors(data: bytes) -> dict[str, TorchTensor]:
    """Tensors by name of a state dict's `data.pkl`.

    Raises:
        PickleRefused: the data is no pickle, or of anything but a dict of tensors.
    """
    if len(data) > MOST_BYTES:
        raise PickleRefused(f"its description has {len(data)} bytes, more than {MOST_BYTES}")
    try:
        top = _Machine().run(data)
    except (PickleRefused, RecursionError) as error:
        raise PickleRefused(str(error)) from None
    except Exception as error:  # malformed opcodes surface in many ways
        raise PickleRefused(f"its description is damaged ({type(error).__name__}: {error})") from error
    if isinstance(top, dict) and isinstance(top.get("state_dict"), dict):
        top = top["state_dict"]
    if not isinstance(top, dict):
        raise PickleRefused("it holds no state dict")
    return {
        name: value for name, value in top.items() if isinstance(name, str) and isinstance(value, TorchTensor)
    }


class _Machine:
    """A pickle machine whose only calls rebuild tensors and ordered dicts."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode.name, argument)
        raise PickleRefused("its description has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in ("PROTO", "FRAME"):
            return
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _LITERALS:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[int(argument)])
        elif name == "GLOBAL":
            stack.append(_Name(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_Name(f"{module}.{attribute}"))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            stack.append(tuple(self._pop_to_mark()))
        elif name == "LIST":
            stack.append(self._pop_to_mark())
        elif name == "APPEND":
            value = stack.pop()
            self._list().append(value)
        elif name == "APPENDS":
            values = self._pop_to_mark()
            self._list().extend(values)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self._dict()[key] = value
        elif name == "SETITEMS":
            items = self._pop_to_mark()
            self._dict().update(zip(items[::2], items[1::2], strict=True))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_call(function, arguments))
        elif name == "BUILD":
            stack.pop()  # attributes such as a state dict's _metadata: of no use here
        else:
            raise PickleRefused(f"its description uses {name}, which no state dict needs")

    def _pop_to_mark(self) -> list[Any]:
        at = max(i for i, value in enumerate(self.stack) if value is _MARK)
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def _list(self) -> list[Any]:
        if not isinstance(self.stack[-1], list):
            raise PickleRefused("it appends to something that is no list")
        return self.stack[-1]

    def _dict(self) -> dict[Any, Any]:
        if not isinstance(self.stack[-1], dict):
            raise PickleRefused("it sets items of something that is no dict")
        return self.stack[-1]


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "MARK": lambda: _MARK,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINSTRING", "SHORT_BINSTRING",
}  # fmt: skip


def _storage(identifier: Any) -> Storage:
    """("storage", type, key, location, size) as a Storage."""
    kind, name, key, _, size = identifier
    dtype = STORAGES.get(name.path.removeprefix("torch.")) if isinstance(name, _Name) else None
    if kind != "storage" or dtype is None or not isinstance(key, str) or not isinstance(size, int):
        raise PickleRefused("it refers to something that is no storage of numbers")
    return Storage(dtype, key, size)


def _call(function: Any, arguments: Any) -> Any:
    path = function.path if isinstance(function, _Name) else f"a {type(function).__name__}"
    if path == "collections.OrderedDict" and arguments in ((), ([],)):
        return {}
    if path == "torch._utils._rebuild_tensor_v2":
        storage, offset, shape, strides = arguments[:4]
        sizes = (offset, *shape, *strides)
        if isinstance(storage, Storage) and all(isinstance(n, int) and n >= 0 for n in sizes):
            if len(shape) == len(strides):
                return TorchTensor(storage, offset, tuple(shape), tuple(strides))
        raise PickleRefused("it describes a tensor in a form that is none")
    if path == "torch._utils._rebuild_parameter":
        return arguments[0]
    raise PickleRefused(f"it asks to call {path}, which is refused: only tensors are read")
