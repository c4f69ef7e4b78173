"""Writes a model's weights under their Hugging Face names, whatever format they came in."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from jaxgen.checkpoint import open_checkpoint
from jaxgen.models.config import ModelConfig
from jaxgen.models.registry import ARCHITECTURES, build_model
from jaxgen.models.weights import WeightSource
from jaxgen.sharding import abstract_params, make_mesh


def export(model_path: str, out: str | Path) -> None:
    """Writes `config.json` and `model.safetensors` (float32) of a model into the new directory `out`.

    Raises:
        CheckpointError: the model cannot be read.
    """
    checkpoint = open_checkpoint(model_path)
    config = ModelConfig.from_hf(checkpoint.config, checkpoint.generation_config)
    mesh = make_mesh(1, jax.local_devices(backend="cpu")[:1])
    params = abstract_params(nnx.eval_shape(lambda: build_model(config, jnp.dtype("float32"))), mesh)
    table = ARCHITECTURES[config.architecture].weight_table(config)
    arrays = checkpoint.load(params, table, lambda _: None)
    tensors: dict[str, np.ndarray] = {}
    for path, array in arrays.items():
        tensors |= split(np.asarray(array), table[path])
    directory = Path(out)
    directory.mkdir(parents=True)
    raw = {key: value for key, value in checkpoint.config.items() if key != "dtype"}
    (directory / "config.json").write_text(json.dumps(raw | {"torch_dtype": "float32"}))
    save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})


def split(parameter: np.ndarray, source: WeightSource) -> dict[str, np.ndarray]:
    """The checkpoint tensors that a parameter was put together from, by name, in their own shapes."""
    sizes = [part.shape[source.axis] for part in source.parts]
    pieces = np.split(parameter, np.cumsum(sizes)[:-1].tolist(), axis=source.axis)
    tensors = {}
    for part, piece in zip(source.parts, pieces):
        # Biases and the weights of norms are vectors; all else is a matrix [out, in].
        vector = part.name.endswith("bias") or part.name.rsplit(".", 2)[-2].endswith("norm")
        shape = (-1,) if vector else (-1, part.shape[-1])
        tensors[part.name] = np.ascontiguousarray(piece.reshape(shape))
    return tensors
