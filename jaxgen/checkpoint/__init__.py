"""Checkpoints: Hugging Face safetensors, GGUF, Orbax and random weights behind one interface."""

from jaxgen.checkpoint.errors import CheckpointError
from jaxgen.checkpoint.resolve import LOAD_FORMATS, open_checkpoint
from jaxgen.checkpoint.types import Checkpoint

__all__ = ["LOAD_FORMATS", "Checkpoint", "CheckpointError", "open_checkpoint"]
