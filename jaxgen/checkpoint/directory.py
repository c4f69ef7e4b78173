"""What all model directories in Hugging Face layout share: the configuration files and the tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from jaxgen.checkpoint.errors import CheckpointError
from jaxgen.logs import torch_not_missed

MAX_JSON_BYTES = 256 << 20  # the largest tokenizer and index files in use are some tens of MiB

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is unreadable, oversized, not JSON or not an object.
    """
    try:
        _check_size(path)
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _check_size(path: Path) -> None:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path}: has more than {MAX_JSON_BYTES >> 20} MiB, too many for its kind of file"
        )


def read_index(path: Path, suffix: str) -> dict[str, str]:
    """Tensor name -> file of a sharded checkpoint's index, all of them files of the index's directory.

    Raises:
        CheckpointError: the index names no files, files elsewhere, or files that are not there.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map")
    for tensor, file in weight_map.items():
        # A plain file name cannot lead out of the directory.
        is_name = isinstance(file, str) and Path(file).name == file and "\\" not in file
        if not is_name or not file.endswith(suffix):
            raise CheckpointError(f"{path}: tensor {tensor!r} is said to be in {file!r}, not a file name")
    missing = [file for file in sorted(set(weight_map.values())) if not (path.parent / file).is_file()]
    if missing:
        raise CheckpointError(f"{path}: names files that are not there: {', '.join(missing)}")
    return dict(weight_map)


def read_config(directory: Path) -> dict[str, Any]:
    """The ``config.json`` of a model directory."""
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory}: has no config.json, so it is not a model directory")
    return read_json(path)


def read_generation_config(directory: Path) -> dict[str, Any]:
    """The ``generation_config.json`` of a model directory; empty when there is none."""
    path = directory / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def load_tokenizer(path: str | Path, mode: str = "auto", trust_remote_code: bool = False) -> Any:
    """Load a tokenizer with ``transformers.AutoTokenizer``.

    Args:
        path: Directory or hub id.
        mode: ``auto`` (fast tokenizer when there is one) or ``slow``.
        trust_remote_code: Whether Python code that comes with the tokenizer may run.

    Raises:
        CheckpointError: there is no usable tokenizer.
    """
    if mode not in ("auto", "slow"):
        raise ValueError(f"tokenizer_mode must be 'auto' or 'slow', not {mode!r}")
    directory = Path(path)
    if directory.is_dir() and not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{directory}: has no tokenizer files; give tokenizer_path, "
            "or skip_tokenizer_init=True to work on ids"
        )
    for name in TOKENIZER_FILES:
        if (directory / name).is_file():
            _check_size(directory / name)
    with torch_not_missed():
        from transformers import (
            AutoTokenizer,  # a second of import that configuration-only callers need not pay
        )

    try:
        return AutoTokenizer.from_pretrained(
            str(path), use_fast=mode != "slow", trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the library raises whatever its parsers raise
        raise CheckpointError(f"{path}: the tokenizer cannot be loaded: {error}") from error


@dataclass(frozen=True)
class ModelDirectory:
    """A directory with a ``config.json`` and, usually, tokenizer files."""

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the configuration files of a directory."""
        return cls(path, read_config(path), read_generation_config(path))

    def load_tokenizer(
        self, path: str | None = None, mode: str = "auto", trust_remote_code: bool = False
    ) -> Any:
        """The tokenizer at ``path``, or the directory's own. See :func:`load_tokenizer`."""
        return load_tokenizer(path or self.path, mode, trust_remote_code)

    def tokenizer_files(self, scratch: Path) -> list[Path]:
        """Tokenizer files present in the directory; nothing is written to ``scratch``."""
        return [self.path / name for name in TOKENIZER_FILES if (self.path / name).is_file()]
