"""Which architectures exist. A new family is one file beside this one and one line here."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxgen.layers.attention import AUTOMATIC, AttentionBackends
from jaxgen.layers.quantization import Scheme
from jaxgen.models.causal_lm import CausalLM
from jaxgen.models.config import ModelConfig, UnsupportedModelError
from jaxgen.models.llama import LlamaForCausalLM
from jaxgen.models.mistral import MistralForCausalLM
from jaxgen.models.qwen2 import Qwen2ForCausalLM
from jaxgen.models.qwen3 import Qwen3ForCausalLM

ARCHITECTURES: Mapping[str, type[CausalLM]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": MistralForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
}


def find_architecture(names: Sequence[str] | None) -> tuple[str, type[CausalLM]]:
    """First of `names` (the `architectures` of a config.json) that is implemented, and its class.

    Raises:
        UnsupportedModelError: none is; the message lists the known ones.
    """
    for name in names or ():
        if name in ARCHITECTURES:
            return name, ARCHITECTURES[name]
    found = ", ".join(names) if names else "none given"
    raise UnsupportedModelError(
        f"config.json: architectures: {found}; supported: {', '.join(sorted(ARCHITECTURES))}"
    )


def build_model(
    config: ModelConfig,
    param_dtype: jnp.dtype,
    *,
    mesh: Mesh | None = None,
    backends: AttentionBackends = AUTOMATIC,
    quantization: Scheme | None = None,
) -> CausalLM:
    """Construct the model. Call it under `nnx.eval_shape` to get its structure without any allocation.

    `param_dtype` is the type of every parameter and of the computation between them; `quantization` is how the
    layers' matrices are kept instead. `mesh` is needed only when its tensor axis is wider than one.
    """
    return ARCHITECTURES[config.architecture](
        config, param_dtype, mesh=mesh, backends=backends, quantization=quantization
    )
