"""Checks of single argument values of a `generate` call."""

from __future__ import annotations

import array
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxgen.server_args import ServerArgs
from jaxgen.shown import shown


def integer(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """An int, not a bool, in [low, high]; otherwise `ValueError` naming the argument."""
    try:
        if type(value).__name__ in ("bool", "bool_"):
            raise TypeError
        number = operator.index(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be an int, got {shown(value)}") from None
    if low is not None and number < low:
        raise ValueError(f"{name} must be at least {low}, got {shown(number)}")
    if high is not None and number > high:
        raise ValueError(f"{name} must be at most {high}, got {shown(number)}")
    return number


def boolean(name: str, value: Any) -> bool:
    if value is None:
        return False
    if type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise ValueError(f"{name} must be a bool, got {shown(value)}")


def optional_str(name: str, value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise ValueError(f"{name} must be a str or None, got {shown(value)}")


def per_prompt(name: str, value: Any, count: int, check: Callable[[str, Any], Any]) -> list[Any]:
    """A scalar is shared by all prompts; a list must have one entry for each of the `count` prompts."""
    if isinstance(value, list | tuple):
        if len(value) != count:
            raise ValueError(f"{name} must have one entry per prompt ({count}), got {len(value)}")
        return [check(name, entry) for entry in value]
    return [check(name, value)] * count


def hidden_states_option(name: str, value: Any, args: ServerArgs) -> bool | str:
    """`False`, `True` or `"last"`, as far as the engine was started to return them."""
    if value is None:
        return False
    if type(value).__name__ in ("bool", "bool_"):
        value = bool(value)
    elif value != "last":
        raise ValueError(f'{name} must be a bool or "last", got {shown(value)}')
    full = args.return_hidden_states_mode == "full" or (
        args.enable_return_hidden_states and args.return_hidden_states_mode is None
    )
    if value and not full and args.return_hidden_states_mode != "last":
        raise ValueError(f"{name} was requested, but enable_return_hidden_states is off")
    if value is True and not full:
        raise ValueError(f'{name}=True was requested, but return_hidden_states_mode allows only "last"')
    return value


def to_lists(name: str, value: Any) -> list[Any]:
    """A list, tuple or array (NumPy, JAX, torch), or a list of arrays, as nested lists."""
    if not isinstance(value, list | tuple):
        if not hasattr(value, "tolist"):
            raise ValueError(f"{name} must be a list of int or an array, got {shown(value)}")
        value = value.tolist()
        if not isinstance(value, list):
            raise ValueError(f"{name} must be a list of int or an array, got a scalar")
        return value
    if not any(hasattr(kind, "ndim") for kind in set(map(type, value))):
        return list(value)
    return [entry.tolist() if getattr(entry, "ndim", 0) else entry for entry in value]


def nested_depth(ids: list[Any]) -> int:
    """1 for a flat list (the empty one included), 2 for a list with lists in it."""
    return 2 if any(issubclass(kind, list | tuple) for kind in set(map(type, ids))) else 1


def prompt_id_array(ids: Any, vocab_size: int) -> array.array[int]:
    """A non-empty list of ids of the vocabulary as an array; otherwise `ValueError`."""
    if not isinstance(ids, list | tuple):
        raise ValueError(f"input_ids must not mix ids and lists of ids, got {shown(ids)}")
    if not ids:
        raise ValueError("input_ids cannot be empty")
    return token_id_array(ids, vocab_size, "input_ids")


def token_id_array(ids: Any, vocab_size: int, name: str = "token_ids_logprob") -> array.array[int]:
    """Ids as unsigned ints; raises `ValueError` for entries that are no int or lie outside `[0, vocab_size)`.

    An array, because a list would hold an object per id, which each copy and each garbage collection visits.
    """
    if not isinstance(ids, list | tuple):
        raise ValueError(f"{name} must be a list of int, got {shown(ids)}")
    try:
        found = array.array("I", ids)
    except (TypeError, OverflowError):
        return _checked_ids(ids, vocab_size, name)
    if not found:
        return found
    values = np.frombuffer(found, np.uint32)
    # An array takes all that is an int, and bools, which are 0 or 1.
    has_bools = values.min() <= 1 and any(type(ids[i]) is bool for i in np.flatnonzero(values <= 1).tolist())
    if has_bools or values.max() >= vocab_size:
        return _checked_ids(ids, vocab_size, name)
    return found


def _checked_ids(ids: list[Any] | tuple[Any, ...], vocab_size: int, name: str) -> array.array[int]:
    """`token_id_array` one by one, for the error message."""
    for token in ids:
        if not 0 <= integer(name, token) < vocab_size:
            raise ValueError(f"{name} has id {shown(token)}, outside the vocabulary [0, {vocab_size})")
    return array.array("I", ids)
