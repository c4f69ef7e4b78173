"""Llama 2, Llama 3.x and models that share their architecture, such as SmolLM2."""

from typing import Any

from jaxgen.models.causal_lm import CausalLM
from jaxgen.models.hf_config import HFConfig


class LlamaForCausalLM(CausalLM):
    """Full attention in every layer; biases only where the config asks for them."""

    @classmethod
    def family_fields(cls, config: HFConfig) -> dict[str, Any]:
        attention_bias = config.flag("attention_bias", False)
        return {
            "attention_bias": attention_bias,
            "attention_out_bias": attention_bias,
            "mlp_bias": config.flag("mlp_bias", False),
            "qk_norm": False,
            "sliding_windows": (None,) * config.integer("num_hidden_layers"),
        }
