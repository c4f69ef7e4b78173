"""GGUF metadata and tensor names in the terms of Hugging Face: ``config.json`` keys and weight names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.checkpoint.errors import CheckpointError
from jaxgen.checkpoint.gguf_header import GGUFHeader

# GGUF architecture -> (Hugging Face class, model_type). llama.cpp converts Mistral models as "llama".
ARCHITECTURES: Mapping[str, tuple[str, str]] = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_NAME = re.compile(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)")
_TOP_NAME = re.compile(r"(\w+)\.(weight|bias)")

# ggml type numbers that are stored as they are; everything else is quantized and computed in bfloat16.
_STORED_DTYPES = {0: "float32", 1: "float16", 30: "bfloat16"}


def hf_name(name: str) -> str | None:
    """Hugging Face name of a GGUF tensor; None for one that has none (``rope_freqs.weight``)."""
    if match := _BLOCK_NAME.fullmatch(name):
        layer, kind, suffix = match.groups()
        return f"model.layers.{int(layer)}.{_BLOCK[kind]}.{suffix}" if kind in _BLOCK else None
    if match := _TOP_NAME.fullmatch(name):
        kind, suffix = match.groups()
        return f"{_TOP[kind]}.{suffix}" if kind in _TOP else None
    return None


def build_config(
    path: Path, header: GGUFHeader, read: Callable[[str], np.ndarray]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``config.json`` and ``generation_config.json`` of a GGUF file.

    Args:
        path: The file, for messages.
        header: Its header.
        read: Reads a tensor as float32 (needed for Llama 3's rope frequencies, which are stored as one).

    Raises:
        CheckpointError: the architecture is unknown, or a value is missing or out of range.
    """
    values = _Values(path, header.metadata)
    architecture = str(header.metadata.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: GGUF architecture {architecture!r} is not supported (known: {', '.join(ARCHITECTURES)})"
        )
    class_name, model_type = ARCHITECTURES[architecture]
    values.prefix = architecture
    if values.integer("expert_count", 0, least=0) > 0:
        raise CheckpointError(
            f"{path}: mixture-of-experts models of architecture {architecture!r} are not supported"
        )
    split_count = header.metadata.get("split.count")
    if isinstance(split_count, int) and split_count > 1:
        raise CheckpointError(
            f"{path}: is one of several files of a split model; join them with llama-gguf-split --merge"
        )
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{path}: tensor 'token_embd.weight' is missing or not a matrix")
    num_layers = values.integer("block_count")
    last = f"blk.{num_layers - 1}.attn_norm.weight"
    if last not in header.tensors:  # also bounds the number of layers by the size of the file
        raise CheckpointError(f"{path}: block_count is {num_layers}, but tensor {last!r} is missing")
    hidden_size, num_heads = values.integer("embedding_length"), values.integer("attention.head_count")
    head_dim = values.integer("attention.key_length", hidden_size // num_heads)
    if values.integer("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(
            f"{path}: keys and values have different head dimensions, which is not supported"
        )
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": values.integer("feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": values.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": values.integer("context_length"),
        "rms_norm_eps": values.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": values.real("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(values, header, head_dim, read),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "torch_dtype": _STORED_DTYPES.get(
            header.tensors.get("blk.0.attn_q.weight", embedding).type, "bfloat16"
        ),
    }
    rotary_dim = values.integer("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        config["partial_rotary_factor"] = rotary_dim / head_dim
    if "tokenizer.ggml.bos_token_id" in header.metadata:
        config["bos_token_id"] = values.token_id("bos_token_id")
    eos = dict.fromkeys(
        values.token_id(key)
        for key in ("eos_token_id", "eot_token_id", "eom_token_id")
        if f"tokenizer.ggml.{key}" in header.metadata
    )
    if eos:
        config["eos_token_id"] = list(eos) if len(eos) > 1 else next(iter(eos))
    generation: dict[str, Any] = {
        key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config
    }
    return config, generation


def _rope_scaling(
    values: _Values, header: GGUFHeader, head_dim: int, read: Callable[[str], np.ndarray]
) -> dict[str, Any] | None:
    kind = values.metadata.get(f"{values.prefix}.rope.scaling.type", "none")
    if "rope_freqs.weight" in header.tensors:
        return _llama3_scaling(values, read("rope_freqs.weight"), head_dim)
    if kind == "none":
        return None
    factor = values.real("rope.scaling.factor")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = values.integer("rope.scaling.original_context_length")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise CheckpointError(
        f"{values.path}: rope scaling {kind!r} is not supported (known: none, linear, yarn)"
    )


def _llama3_scaling(values: _Values, factors: np.ndarray, head_dim: int) -> dict[str, Any]:
    """Llama 3.1's rope parameters from the table of frequency divisors that the converter makes of them.

    All published models use the same three wavelength parameters; the table shows whether these did.
    """
    low, high, original = 1.0, 4.0, 8192
    factor = float(factors.max())
    theta = values.real("rope.freq_base", 10000.0)
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise CheckpointError(
            f"{values.path}: the rope frequencies in 'rope_freqs.weight' are of an unknown kind"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


class _Values:
    """Checked access to the metadata of one architecture."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]):
        self.path = path
        self.metadata = metadata
        self.prefix = ""  # the architecture, once it is known to be supported

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """An integer of at least ``least``; a list of equal ones, as of one per layer, counts as one."""
        value = self._get(key, default)
        if isinstance(value, np.ndarray) and value.size and (value == value.flat[0]).all():
            value = value.flat[0].item()
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 31:
            raise CheckpointError(
                f"{self.path}: metadata {self.prefix}.{key} is {value!r}, expected an integer >= {least}"
            )
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A positive number. float32 values come back as the shortest decimal that rounds to them."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise CheckpointError(
                f"{self.path}: metadata {self.prefix}.{key} is {value!r}, expected a number > 0"
            )
        return float(str(np.float32(value)))

    def token_id(self, key: str) -> int:
        value = self.metadata[f"tokenizer.ggml.{key}"]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise CheckpointError(
                f"{self.path}: metadata tokenizer.ggml.{key} is {value!r}, expected a token id"
            )
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self.metadata.get(f"{self.prefix}.{key}", default)
        if value is None:
            raise CheckpointError(f"{self.path}: metadata {self.prefix}.{key} is missing")
        return value
