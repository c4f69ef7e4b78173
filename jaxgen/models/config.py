"""The one description of a model that everything else reads, made from a Hugging Face config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxgen.layers.rope import RopeConfig
from jaxgen.models.hf_config import HFConfig, extended_context, read_rope

DTYPES = ("float32", "float16", "bfloat16")


class UnsupportedModelError(ValueError):
    """The checkpoint's architecture is not one that jaxgen implements."""


@dataclass(frozen=True)
class ModelConfig:
    """Hyper-parameters of a decoder-only language model. Sizes are element counts, lengths are in tokens."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope: RopeConfig
    context_length: int
    tie_word_embeddings: bool
    attention_bias: bool
    """q, k and v projections have a bias."""
    attention_out_bias: bool
    """The output projection of the attention has a bias."""
    mlp_bias: bool
    qk_norm: bool
    """Each q and k head is RMS-normalised before rope."""
    sliding_windows: tuple[int | None, ...]
    """Per layer: how many last positions a token sees, itself included; None for all."""
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str
    """Type of the checkpoint's weights: float32, float16 or bfloat16."""
    kv_scales: tuple[float, ...] | None = None
    """Per layer: what keys and values are divided by for an 8-bit KV cache; None for nothing."""

    @classmethod
    def from_hf(
        cls, raw: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
    ) -> "ModelConfig":
        """Read a config.json; `generation_config` (generation_config.json) adds end-of-sequence ids.

        Raises:
            UnsupportedModelError: no entry of `architectures` is implemented; the message lists those known.
            ValueError: a key is missing or its value impossible; the message names the key.
        """
        # The registry imports the model files, and those import this module.
        from jaxgen.models.registry import find_architecture

        architecture, model_class = find_architecture(raw.get("architectures"))
        config = HFConfig(raw)
        if config.get("quantization_config") is not None:
            raise ValueError(
                "config.json: quantization_config: quantised checkpoints are not supported; use the unquantised"
                " model, which the engine option quantization='fp8' (or another) quantises as it is loaded"
            )
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ValueError(f"config.json: hidden_act {activation!r} is not supported; known: silu")

        hidden_size = config.integer("hidden_size")
        num_heads = config.integer("num_attention_heads")
        num_kv_heads = config.integer("num_key_value_heads", num_heads)
        head_dim = _head_dim(config, hidden_size, num_heads)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads ({num_heads}) must be a multiple of"
                f" num_key_value_heads ({num_kv_heads})"
            )
        max_positions = config.integer("max_position_embeddings")
        rope = read_rope(config, head_dim, max_positions)
        bos_token_ids = config.token_ids("bos_token_id")
        return cls(
            architecture=architecture,
            vocab_size=config.integer("vocab_size"),
            hidden_size=hidden_size,
            num_layers=config.integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=config.integer("intermediate_size"),
            rms_norm_eps=config.number("rms_norm_eps", 1e-6),
            rope=rope,
            context_length=extended_context(max_positions, rope.scaling),
            tie_word_embeddings=config.flag("tie_word_embeddings", False),
            eos_token_ids=_eos_token_ids(config, generation_config),
            bos_token_id=bos_token_ids[0] if bos_token_ids else None,
            dtype=_dtype(config),
            **model_class.family_fields(config),
        )


def _head_dim(config: HFConfig, hidden_size: int, num_heads: int) -> int:
    head_dim = config.integer("head_dim", None)
    if head_dim is not None:
        return head_dim
    if hidden_size % num_heads:
        raise ValueError(
            f"config.json: hidden_size ({hidden_size}) must be a multiple of num_attention_heads"
            f" ({num_heads}) when head_dim is not given"
        )
    return hidden_size // num_heads


def _eos_token_ids(config: HFConfig, generation_config: Mapping[str, Any] | None) -> tuple[int, ...]:
    ids = config.token_ids("eos_token_id")
    if generation_config:
        ids += HFConfig(generation_config, "generation_config.json").token_ids("eos_token_id")
    return tuple(dict.fromkeys(ids))


def _dtype(config: HFConfig) -> str:
    name = config.get("dtype", config.get("torch_dtype", "float32"))
    if name not in DTYPES:
        raise ValueError(f"config.json: dtype {name!r} is not supported; known: {', '.join(DTYPES)}")
    return name
