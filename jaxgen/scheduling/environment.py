"""Switches read from the environment when a scheduler is made."""

from __future__ import annotations

import os

TEST_RETRACT_INTERVAL = 3


def read(name: str) -> str | None:
    """The value of JAXGEN_<name>, else of SGLANG_<name>; None when neither is set or it is empty."""
    return os.environ.get(f"JAXGEN_{name}") or os.environ.get(f"SGLANG_{name}") or None


def timeout(name: str, configured: float | None = None) -> float | None:
    """Seconds after which a request is ended, as configured or else from the environment; None: never.

    A value <= 0 means never, too.

    Raises:
        ValueError: the variable is not a number.
    """
    text = read(name) or "0"
    try:
        seconds = float(text) if configured is None else configured
    except ValueError:
        raise ValueError(f"environment variable {name}={text!r} is not a number of seconds") from None
    return seconds if seconds > 0 else None


def retract_interval() -> int:
    """Decode steps between forced retractions: the number in TEST_RETRACT, 3 for "1" and "true", 0 for never.

    Raises:
        ValueError: the variable is neither a truth value nor a number.
    """
    text = (read("TEST_RETRACT") or "0").strip().lower()
    if text in ("0", "false", "no", "off"):
        return 0
    if text in ("1", "true", "yes", "on"):
        return TEST_RETRACT_INTERVAL
    if text.isdigit():
        return int(text)
    raise ValueError(
        f"environment variable TEST_RETRACT={text!r} is neither a truth value nor a number of steps"
    )
