"""Mistral 7B and its relatives."""

from typing import Any

from jaxgen.models.causal_lm import CausalLM
from jaxgen.models.hf_config import HFConfig


class MistralForCausalLM(CausalLM):
    """No biases; one sliding window for all layers, where the config has one."""

    @classmethod
    def family_fields(cls, config: HFConfig) -> dict[str, Any]:
        window = config.integer("sliding_window", None)
        return {
            "attention_bias": False,
            "attention_out_bias": False,
            "mlp_bias": False,
            "qk_norm": False,
            "sliding_windows": (window,) * config.integer("num_hidden_layers"),
        }
