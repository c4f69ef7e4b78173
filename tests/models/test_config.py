"""What a config.json means, and what the user is told when it cannot be used."""

import math
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx

from jaxgen.models.config import ModelConfig, UnsupportedModelError
from jaxgen.models.registry import ARCHITECTURES, build_model
from jaxgen.sharding import abstract_params, make_mesh
from tests.models.harness import FAMILIES, load_config, read_json

CONFIGS = Path(__file__).parent.parent.parent / "configs"

# Parameter counts as published on the model cards (or summed from the published checkpoints).
PUBLISHED_SIZES = {
    "smollm2-135m": 134_515_008,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "mistral-7b-v0.1": 7_241_732_096,
}


def raw_config(**changes) -> dict:
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    raw.update(changes)
    return {key: value for key, value in raw.items() if value is not ...}


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_shipped_configs_describe_the_published_models(name):
    config = ModelConfig.from_hf(read_json(CONFIGS / f"{name}.json"))
    table = ARCHITECTURES[config.architecture].weight_table(config)
    assert sum(math.prod(source.shape) for source in table.values()) == PUBLISHED_SIZES[name]
    assert config.dtype == "bfloat16"


def test_every_shipped_config_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(PUBLISHED_SIZES)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_a_source_of_its_shape(family):
    config = load_config(family)
    model = nnx.eval_shape(lambda: build_model(config, jnp.bfloat16))
    params = abstract_params(model, make_mesh(1))
    table = model.weight_table(config)
    assert {path: param.shape for path, param in params.items()} == {
        path: source.shape for path, source in table.items()
    }
    assert {param.dtype for param in params.values()} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": ...}, ["hidden_size", "missing"]),
        ({"vocab_size": None}, ["vocab_size", "missing"]),
        ({"max_position_embeddings": ...}, ["max_position_embeddings", "missing"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"intermediate_size": "48"}, ["intermediate_size", "'48'"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads", "num_key_value_heads", "3"]),
        ({"num_attention_heads": 5}, ["hidden_size", "num_attention_heads", "head_dim"]),
        ({"head_dim": 7}, ["head_dim", "even"]),
        ({"rms_norm_eps": -1.0}, ["rms_norm_eps"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"torch_dtype": "float8"}, ["dtype", "float8", "bfloat16"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings"]),
        ({"eos_token_id": "</s>"}, ["eos_token_id"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, ["rope_scaling", "longrope", "yarn"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling", "factor", "missing"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["rope_scaling", "low_freq_factor"]),
        ({"rope_parameters": "default"}, ["rope_parameters"]),
    ],
)
def test_mistakes_are_named_by_their_key(changes, words):
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_hf(raw_config(**changes))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("names", [["BertForMaskedLM"], [], None])
def test_unknown_architecture_lists_the_known_ones(names):
    with pytest.raises(UnsupportedModelError) as caught:
        ModelConfig.from_hf(raw_config(architectures=names))
    for name in (
        *(names or []),
        "LlamaForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "MistralForCausalLM",
    ):
        assert name in str(caught.value)


def test_defaults_of_old_configs():
    config = ModelConfig.from_hf(raw_config(num_key_value_heads=...))
    assert config.num_kv_heads == 4 and config.head_dim == 8
    assert config.rope.theta == 10000.0 and config.rope.scaling is None
    assert not config.tie_word_embeddings and config.context_length == 128


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
    ],
)
def test_both_spellings_of_rope_mean_the_same(rope):
    config = ModelConfig.from_hf(raw_config(**rope))
    assert (config.rope.theta, config.rope.scaling.factor, config.context_length) == (5e5, 2.0, 256)


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        ({"rope_type": "dynamic", "factor": 4.0}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            128,
        ),
    ],
)
def test_context_length_includes_the_scaling(scaling, context):
    assert ModelConfig.from_hf(raw_config(rope_scaling=scaling)).context_length == context


def test_end_tokens_come_from_both_files():
    raw = raw_config(eos_token_id=[5, 6], bos_token_id=1)
    config = ModelConfig.from_hf(raw, {"eos_token_id": [6, 7]})
    assert config.eos_token_ids == (5, 6, 7) and config.bos_token_id == 1


def test_sliding_windows_per_layer():
    qwen = raw_config(architectures=["Qwen2ForCausalLM"], sliding_window=16, max_window_layers=1)
    assert ModelConfig.from_hf(qwen).sliding_windows == (None, None, None)
    assert ModelConfig.from_hf(qwen | {"use_sliding_window": True}).sliding_windows == (None, 16, 16)
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    listed = qwen | {"use_sliding_window": True, "layer_types": kinds}
    assert ModelConfig.from_hf(listed).sliding_windows == (16, None, 16)
    with pytest.raises(ValueError, match="layer_types"):
        ModelConfig.from_hf(listed | {"layer_types": kinds[:2]})
    mistral = raw_config(architectures=["MistralForCausalLM"], sliding_window=16)
    assert ModelConfig.from_hf(mistral).sliding_windows == (16, 16, 16)
    assert ModelConfig.from_hf(mistral | {"sliding_window": None}).sliding_windows == (None, None, None)
