"""How a caller's value is shown in an error message: always short, and never itself the cause of an error."""

from __future__ import annotations

import reprlib

_LIMITS = reprlib.Repr()
_LIMITS.maxstring = _LIMITS.maxother = 80
_LIMITS.maxlong = 40


def shown(value: object) -> str:
    """A bounded `repr`. Huge containers, huge ints and objects with a broken `__repr__` are safe."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"an int of {value.bit_length()} bits"  # str() of a huge int is slow and may be refused
    try:
        return _LIMITS.repr(value)
    except Exception:
        return f"an object of type {type(value).__name__}"
