"""Qwen3 (dense)."""

from typing import Any

from jaxgen.models.causal_lm import CausalLM
from jaxgen.models.hf_config import HFConfig, read_sliding_windows


class Qwen3ForCausalLM(CausalLM):
    """Every q and k head is RMS-normalised before rope; the upper layers may use a sliding window."""

    @classmethod
    def family_fields(cls, config: HFConfig) -> dict[str, Any]:
        attention_bias = config.flag("attention_bias", False)
        return {
            "attention_bias": attention_bias,
            "attention_out_bias": attention_bias,
            "mlp_bias": False,
            "qk_norm": True,
            "sliding_windows": read_sliding_windows(config),
        }
