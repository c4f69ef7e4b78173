"""Tiny checkpoints made on the fly, and a weight table that fuses like a real model's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxgen.models.weights import Part, WeightSource

V, D, F, K, G, H = 32, 256, 512, 2, 2, 64  # rows of 256 and more, so that every GGUF block size fits
N = K * G


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Hugging Face names and shapes of a one-layer Llama, float32."""
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (V, D),
        "model.norm.weight": (D,),
        layer + "input_layernorm.weight": (D,),
        layer + "post_attention_layernorm.weight": (D,),
        layer + "self_attn.q_proj.weight": (N * H, D),
        layer + "self_attn.k_proj.weight": (K * H, D),
        layer + "self_attn.v_proj.weight": (K * H, D),
        layer + "self_attn.o_proj.weight": (D, N * H),
        layer + "mlp.gate_proj.weight": (F, D),
        layer + "mlp.up_proj.weight": (F, D),
        layer + "mlp.down_proj.weight": (D, F),
    }
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def table() -> dict[str, WeightSource]:
    """Parameter path -> source, with the fusions of a real model."""
    layer = "model.layers.0."
    attention = layer + "self_attn."
    return {
        "embed.weight": WeightSource((Part("model.embed_tokens.weight", (V, D)),)),
        "norm": WeightSource((Part("model.norm.weight", (D,)),)),
        "layers.0.attention.qkv": WeightSource(
            (
                Part(attention + "q_proj.weight", (K, G, H, D)),
                Part(attention + "k_proj.weight", (K, 1, H, D)),
                Part(attention + "v_proj.weight", (K, 1, H, D)),
            ),
            axis=1,
        ),
        "layers.0.attention.out": WeightSource((Part(attention + "o_proj.weight", (D, N * H)),)),
        "layers.0.mlp.gate_up": WeightSource(
            (Part(layer + "mlp.gate_proj.weight", (1, F, D)), Part(layer + "mlp.up_proj.weight", (1, F, D)))
        ),
        "layers.0.mlp.down": WeightSource((Part(layer + "mlp.down_proj.weight", (D, F)),)),
    }


def expected(source: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters, put together the plain way."""
    return {
        path: np.concatenate([source[part.name].reshape(part.shape) for part in entry.parts], entry.axis)
        for path, entry in table().items()
    }


def targets(dtype=jnp.float32, shardings: dict | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """What a model asks a checkpoint for."""
    return {
        path: jax.ShapeDtypeStruct(source.shape, dtype, sharding=(shardings or {}).get(path))
        for path, source in table().items()
    }


def write_model(directory, weights: dict[str, np.ndarray], shards: int = 1) -> None:
    """A Hugging Face model directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    if shards == 1:
        save_file(weights, directory / "model.safetensors")
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(weights.items())[i::shards])
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def ignore(nbytes: int) -> None:
    """A progress callback that does nothing."""
