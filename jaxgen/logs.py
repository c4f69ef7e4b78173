"""The one logger of the package. A library call at level ERROR prints nothing."""

from __future__ import annotations

import logging
import sys


def set_log_level(level: str) -> None:
    """Sets the level of logger "jaxgen"; gives it a stderr handler if nothing would show its records."""
    logger = logging.getLogger("jaxgen")
    logger.setLevel(level.upper())
    if level.upper() in ("DEBUG", "INFO") and not logger.hasHandlers():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("[%(asctime)s jaxgen] %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
