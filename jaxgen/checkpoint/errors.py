"""The error every checkpoint format raises."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be read. The message names file, tensor and, where there is one, remedy."""
