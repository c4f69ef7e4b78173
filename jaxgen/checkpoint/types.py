"""What every checkpoint format provides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

from jaxgen.checkpoint.assemble import Convert, Params, Progress, unchanged
from jaxgen.models.weights import WeightSource


class Checkpoint(Protocol):
    """An opened model: configuration read, weights not yet."""

    @property
    def config(self) -> dict[str, Any]:
        """The configuration, in the terms of ``config.json``."""
        ...

    @property
    def generation_config(self) -> dict[str, Any]:
        """The generation defaults, in the terms of ``generation_config.json``; may be empty."""
        ...

    def load_tokenizer(
        self, path: str | None = None, mode: str = "auto", trust_remote_code: bool = False
    ) -> Any:
        """A ``transformers`` tokenizer: the one at ``path``, or the model's own."""
        ...

    def load(
        self,
        params: Params,
        table: Mapping[str, WeightSource],
        progress: Progress,
        convert: Convert = unchanged,
    ) -> dict[str, jax.Array]:
        """Load every parameter in ``params``, in the dtype and sharding it asks for.

        Args:
            params: Parameter path -> shape, dtype and (optionally) sharding.
            table: Parameter path -> the tensors it consists of.
            progress: Called after each parameter with its size in bytes.
            convert: What is kept of a parameter, called as soon as it is on its devices.
        """
        ...

    def tokenizer_files(self, scratch: Path) -> list[Path]:
        """Files that load as the model's tokenizer; those that have to be made are written to ``scratch``."""
        ...
