"""Random weights for runs that need only a model's shapes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.checkpoint.assemble import Convert, Params, Progress, sharding_of, unchanged
from jaxgen.checkpoint.directory import ModelDirectory, read_json
from jaxgen.models.weights import WeightSource

SEED = 0
BOUND = 1e-3  # weights this small keep the activations of any depth finite


class ConfigSource(Protocol):
    """Anything with a configuration: another checkpoint, or a model directory without weights."""

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def generation_config(self) -> dict[str, Any]: ...

    def load_tokenizer(self, path: str | None, mode: str, trust_remote_code: bool) -> Any: ...

    def tokenizer_files(self, scratch: Path) -> list[Path]: ...


class DummyCheckpoint:
    """Weights drawn uniformly from [-1e-3, 1e-3], the same for every sharding.

    Args:
        source: Where configuration and tokenizer come from.
    """

    def __init__(self, source: ConfigSource):
        self.config = source.config
        self.generation_config = source.generation_config
        self._source = source

    def load_tokenizer(
        self, path: str | None = None, mode: str = "auto", trust_remote_code: bool = False
    ) -> Any:
        """The tokenizer of the configuration's directory, if it has one."""
        return self._source.load_tokenizer(path, mode, trust_remote_code)

    def tokenizer_files(self, scratch: Path) -> list[Path]:
        """The tokenizer files of the configuration's directory."""
        return self._source.tokenizer_files(scratch)

    def load(
        self,
        params: Params,
        table: Mapping[str, WeightSource],
        progress: Progress,
        convert: Convert = unchanged,
    ) -> dict[str, jax.Array]:
        """Draw every parameter on the devices it belongs to; ``table`` is not needed."""
        arrays: dict[str, jax.Array] = {}
        for path, target in params.items():
            draw = _draw(tuple(target.shape), np.dtype(target.dtype), sharding_of(target))
            array = draw(_key(path))
            progress(array.nbytes)
            # Waiting bounds what is on the device before it is converted.
            arrays |= jax.block_until_ready(convert(path, array))
        return arrays


def config_file(path: Path) -> ModelDirectory:
    """A configuration that is a single ``.json`` file; tokenizer files may lie next to it."""
    return ModelDirectory(path.parent, read_json(path), {})


def _key(path: str) -> np.ndarray:
    """Threefry key of a parameter, [2] uint32: every parameter has its own draw, whatever else there is."""
    digest = hashlib.sha256(f"{SEED}:{path}".encode()).digest()
    return np.frombuffer(digest[:8], np.uint32)


@functools.lru_cache(maxsize=64)
def _draw(shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding) -> Any:
    """The compiled draw for one kind of parameter; layers of a model share it."""

    def uniform(key: jax.Array) -> jax.Array:
        # Drawn in float32 and rounded, so the dtype changes no value by more than its rounding.
        typed = jax.random.wrap_key_data(key, impl="threefry2x32")
        # One subtraction that is exact and one product: no fused multiply-add can round otherwise elsewhere.
        centred = jax.random.uniform(typed, shape, jnp.float32) - 0.5
        return (centred * (2 * BOUND)).astype(dtype)

    return jax.jit(uniform, out_shardings=sharding)
