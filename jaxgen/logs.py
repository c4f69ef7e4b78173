"""The one logger of the package. A library call at level ERROR prints nothing."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator


def set_log_level(level: str) -> None:
    """Sets the level of logger "jaxgen"; gives it a stderr handler if nothing would show its records."""
    logger = logging.getLogger("jaxgen")
    if not isinstance(level, str) or level.upper() not in logging.getLevelNamesMapping():
        raise ValueError(f"log_level must be the name of a level of logging, got {level!r}")
    logger.setLevel(level.upper())
    if level.upper() in ("DEBUG", "INFO") and not logger.hasHandlers():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("[%(asctime)s jaxgen] %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)


@contextlib.contextmanager
def torch_not_missed() -> Iterator[None]:
    """Around the first import of transformers, which otherwise warns on stderr that there is no PyTorch.

    Only that record is dropped; the caller's logging configuration stays as it is.
    """
    logger = logging.getLogger("transformers")

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("PyTorch was not found")

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
