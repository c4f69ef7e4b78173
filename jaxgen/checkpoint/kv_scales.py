"""Scales of an 8-bit KV cache, in the JSON schema that vLLM's and SGLang's calibration tools write."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from jaxgen.checkpoint.directory import read_json
from jaxgen.checkpoint.errors import CheckpointError


def read_kv_scales(path: Path, num_layers: int) -> tuple[float, ...]:
    """What each layer's keys and values are divided by before they are stored.

    The file is `{"kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": {"0": 0.02, "1": ...}}}}`: by
    tensor-parallel rank and layer. One rank is expected, whose scales all shards of a layer share.

    Raises:
        CheckpointError: the file cannot be read, is for another type or more ranks, or lacks a layer.
    """
    cache = read_json(path).get("kv_cache")
    if not isinstance(cache, dict) or cache.get("dtype") != "float8_e4m3fn":
        raise CheckpointError(f'{path}: expected "kv_cache" with the "dtype" "float8_e4m3fn"')
    ranks = cache.get("scaling_factor")
    if not isinstance(ranks, dict) or set(ranks) != {"0"} or not isinstance(ranks["0"], dict):
        raise CheckpointError(
            f'{path}: expected "scaling_factor" with scales by layer under the one rank "0"'
        )
    layers = ranks["0"]
    if set(layers) != {str(i) for i in range(num_layers)}:
        raise CheckpointError(
            f"{path}: has scales of {len(layers)} layers, the model has layers 0 to {num_layers - 1}"
        )
    return tuple(_scale(path, i, layers[str(i)]) for i in range(num_layers))


def _scale(path: Path, layer: int, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise CheckpointError(f"{path}: the scale of layer {layer} must be a positive number, not {value!r}")
    return float(value)
