"""Qwen2 and Qwen2.5."""

from typing import Any

from jaxgen.models.causal_lm import CausalLM
from jaxgen.models.hf_config import HFConfig, read_sliding_windows


class Qwen2ForCausalLM(CausalLM):
    """Biases on q, k and v (always, and nowhere else); the upper layers may use a sliding window."""

    @classmethod
    def family_fields(cls, config: HFConfig) -> dict[str, Any]:
        return {
            "attention_bias": True,
            "attention_out_bias": False,
            "mlp_bias": False,
            "qk_norm": False,
            "sliding_windows": read_sliding_windows(config),
        }
