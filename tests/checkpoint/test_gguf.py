"""GGUF files: every quantization, names and layouts, the configuration they imply, and what is refused."""

import sys

import gguf
import gguf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_convert
import tiny
from gguf_files import Type
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from jaxgen.checkpoint import CheckpointError, open_checkpoint

KINDS = [
    *(Type.F32, Type.F16, Type.BF16),
    *(Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1),
    *(Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_quantization_gives_the_librarys_values(tmp_path, kind):
    read_back = gguf_files.write(tmp_path / "m.gguf", kind=kind)
    arrays = open_checkpoint(tmp_path / "m.gguf").load(tiny.targets(), tiny.table(), tiny.ignore)
    for path, value in tiny.expected(read_back).items():
        assert np.isfinite(value).all()
        np.testing.assert_array_equal(arrays[path], value)


def test_tensors_are_cast_and_sharded(tmp_path):
    read_back = gguf_files.write(tmp_path / "m.gguf", kind=Type.Q8_0)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("tensor"))
    targets = tiny.targets(jnp.bfloat16, dict.fromkeys(tiny.table(), sharding))
    arrays = open_checkpoint(tmp_path).load(targets, tiny.table(), tiny.ignore)
    for path, value in tiny.expected(read_back).items():
        assert arrays[path].sharding == sharding
        np.testing.assert_array_equal(np.asarray(arrays[path]), value.astype(jnp.bfloat16))


def test_tensors_larger_than_one_chunk(tmp_path, monkeypatch):
    """Large tensors are dequantized piece by piece; the pieces have to meet without a seam."""
    monkeypatch.setattr("jaxgen.checkpoint.gguf.CHUNK_ELEMENTS", 3 * tiny.D)
    read_back = gguf_files.write(tmp_path / "m.gguf", kind=Type.Q4_0)
    arrays = open_checkpoint(tmp_path).load(tiny.targets(), tiny.table(), tiny.ignore)
    for path, value in tiny.expected(read_back).items():
        np.testing.assert_array_equal(arrays[path], value)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_only_llama_has_reordered_rows(tmp_path, architecture):
    metadata = {
        key.replace("llama.", architecture + "."): value for key, value in gguf_files.ARCHITECTURE.items()
    } | {"general.architecture": architecture}
    gguf_files.write(tmp_path / "m.gguf", metadata)
    checkpoint = open_checkpoint(tmp_path)
    arrays = checkpoint.load(tiny.targets(), tiny.table(), tiny.ignore)
    for path, value in tiny.expected(tiny.tensors()).items():
        np.testing.assert_array_equal(arrays[path], value)
    assert checkpoint.config["architectures"] == [f"Qwen{architecture[-1]}ForCausalLM"]
    assert checkpoint.config["model_type"] == architecture


@pytest.mark.parametrize("family", ["llama2", "qwen2", "qwen3"])
def test_a_family_is_the_same_model_from_either_format(tmp_path, request, family):
    """The golden Hugging Face models, rewritten as GGUF files, give the same parameters and configuration."""
    directory = request.config.rootpath / "tests" / "golden" / family
    original = open_checkpoint(directory)
    raw, name = original.config, original.config["model_type"]
    heads = raw["num_attention_heads"], raw["num_key_value_heads"]
    theta = raw.get("rope_theta") or raw.get("rope_parameters", {}).get("rope_theta", 10000.0)
    values = {
        "block_count": raw["num_hidden_layers"],
        "context_length": raw["max_position_embeddings"],
        "embedding_length": raw["hidden_size"],
        "feed_forward_length": raw["intermediate_size"],
        "attention.head_count": heads[0],
        "attention.head_count_kv": heads[1],
        "attention.layer_norm_rms_epsilon": raw["rms_norm_eps"],
        "rope.freq_base": theta,
    }
    if "head_dim" in raw:
        values |= {"attention.key_length": raw["head_dim"], "attention.value_length": raw["head_dim"]}
    metadata = dict.fromkeys(gguf_files.ARCHITECTURE) | {"general.architecture": name}
    metadata |= {f"{name}.{key}": value for key, value in values.items()}
    metadata |= {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1}
    weights = {}
    for file in directory.glob("*.safetensors"):
        weights |= load_file(file)
    gguf_files.write(tmp_path / "m.gguf", metadata, weights, heads=heads)
    config, expected = test_convert.load(original, jnp.float32)
    found_config, found = test_convert.load(open_checkpoint(tmp_path), jnp.float32)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value)
    if family != "qwen3":  # its sliding windows have no place in a GGUF file
        assert found_config == config


def test_config_is_that_of_hugging_face(tmp_path):
    ids = {
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 5,
    }
    gguf_files.write(tmp_path / "m.gguf", ids, kind=Type.Q8_0)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tiny.V,
        "hidden_size": tiny.D,
        "intermediate_size": tiny.F,
        "num_hidden_layers": 1,
        "num_attention_heads": tiny.N,
        "num_key_value_heads": tiny.K,
        "head_dim": tiny.H,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": [2, 5],
    }
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": [2, 5]}


@pytest.mark.parametrize(
    "kind, dtype", [(Type.F32, "float32"), (Type.F16, "float16"), (Type.BF16, "bfloat16")]
)
def test_unquantized_files_keep_their_dtype(tmp_path, kind, dtype):
    gguf_files.write(tmp_path / "m.gguf", kind=kind)
    assert open_checkpoint(tmp_path).config["torch_dtype"] == dtype


def test_an_output_matrix_means_untied_embeddings(tmp_path):
    head = {"lm_head.weight": np.ones((tiny.V, tiny.D), np.float32)}
    gguf_files.write(tmp_path / "m.gguf", weights=tiny.tensors() | head)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config["tie_word_embeddings"] is False
    source = {"lm_head": tiny.WeightSource((tiny.Part("lm_head.weight", (tiny.V, tiny.D)),))}
    target = {"lm_head": jax.ShapeDtypeStruct((tiny.V, tiny.D), jnp.float32)}
    np.testing.assert_array_equal(checkpoint.load(target, source, tiny.ignore)["lm_head"], 1.0)


def test_biases_are_found_and_reordered(tmp_path):
    name = "model.layers.0.self_attn.q_proj.bias"
    bias = np.arange(tiny.N * tiny.H, dtype=np.float32)
    gguf_files.write(tmp_path / "m.gguf", weights=tiny.tensors() | {name: bias})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config["attention_bias"] is True
    source = {"bias": tiny.WeightSource((tiny.Part(name, (tiny.N * tiny.H,)),))}
    target = {"bias": jax.ShapeDtypeStruct(bias.shape, jnp.float32)}
    np.testing.assert_array_equal(checkpoint.load(target, source, tiny.ignore)["bias"], bias)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_is_recognised_from_its_table(tmp_path, factor):
    """Llama 3.1 and 3.2 files carry the frequency divisors, not the parameters they were made from."""
    wavelengths = 2 * np.pi * 500000.0 ** (np.arange(0, tiny.H, 2) / tiny.H)
    divisors = []
    for wavelength in wavelengths:
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    table = np.array(divisors, np.float32)
    gguf_files.write(tmp_path / "m.gguf", extra_tensors={"rope_freqs.weight": table})
    assert open_checkpoint(tmp_path).config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    gguf_files.write(tmp_path / "other.gguf", extra_tensors={"rope_freqs.weight": table[::-1].copy()})
    with pytest.raises(CheckpointError, match="rope_freqs"):
        open_checkpoint(tmp_path / "other.gguf")


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rope_scaling_by_metadata(tmp_path, kind):
    metadata = {
        "llama.rope.scaling.type": kind,
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 512,
    }
    gguf_files.write(tmp_path / "m.gguf", metadata)
    scaling = open_checkpoint(tmp_path).config["rope_scaling"]
    assert scaling["rope_type"] == kind
    assert scaling["factor"] == 4.0
    assert scaling.get("original_max_position_embeddings") == (512 if kind == "yarn" else None)


def test_per_layer_values_that_agree_count_as_one(tmp_path):
    gguf_files.write(tmp_path / "m.gguf", {"llama.attention.head_count_kv": [tiny.K] * 3})
    assert open_checkpoint(tmp_path).config["num_key_value_heads"] == tiny.K
    gguf_files.write(tmp_path / "n.gguf", {"llama.attention.head_count_kv": [tiny.K, 1, 1]})
    with pytest.raises(CheckpointError, match="head_count_kv"):
        open_checkpoint(tmp_path / "n.gguf")


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"general.architecture": "bert"}, "bert"),
        ({"llama.block_count": None}, "block_count"),
        ({"llama.block_count": 2**31 - 1}, "block_count"),
        ({"llama.block_count": 0}, "block_count"),
        ({"llama.block_count": "one"}, "block_count"),
        ({"llama.attention.head_count": 0}, "head_count"),
        ({"llama.embedding_length": None}, "embedding_length"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon"),
        ({"llama.rope.freq_base": -1.0}, "freq_base"),
        ({"llama.rope.scaling.type": "other", "llama.rope.scaling.factor": 2.0}, "other"),
        ({"llama.expert_count": 8}, "mixture"),
        ({"split.count": 3}, "--merge"),
        ({"tokenizer.ggml.eos_token_id": "two"}, "eos_token_id"),
    ],
)
def test_bad_metadata_is_named(tmp_path, metadata, message):
    gguf_files.write(tmp_path / "m.gguf", metadata)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "m.gguf" in str(caught.value)


def test_a_missing_tensor_is_named_with_its_file(tmp_path):
    weights = tiny.tensors()
    del weights["model.layers.0.mlp.up_proj.weight"]
    gguf_files.write(tmp_path / "m.gguf", weights=weights)
    with pytest.raises(CheckpointError, match=r"m\.gguf.*up_proj"):
        open_checkpoint(tmp_path).load(tiny.targets(), tiny.table(), tiny.ignore)


def test_a_misshaped_tensor_is_named_with_both_shapes(tmp_path):
    weights = tiny.tensors() | {"model.layers.0.mlp.up_proj.weight": np.zeros((tiny.D, tiny.F), np.float32)}
    gguf_files.write(tmp_path / "m.gguf", weights=weights)
    with pytest.raises(CheckpointError, match=r"up_proj.*\(256, 512\).*\(1, 512, 256\)"):
        open_checkpoint(tmp_path).load(tiny.targets(), tiny.table(), tiny.ignore)


def test_without_the_gguf_package_the_extra_is_named(tmp_path, monkeypatch):
    gguf_files.write(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"jaxgen\[gguf\]"):
        open_checkpoint(tmp_path)


def test_the_header_parser_agrees_with_the_library(tmp_path):
    metadata = {"general.name": "tiny é", "x.flag": True, "x.list": [1, 2, 3], "x.words": ["a", "", "ü"]}
    gguf_files.write(tmp_path / "m.gguf", metadata, kind=Type.Q4_1)
    header = open_checkpoint(tmp_path)._file.header
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            np.testing.assert_equal(np.asarray(header.metadata[key]), np.asarray(field.contents()))
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert (info.type, info.start, info.nbytes) == (
            tensor.tensor_type,
            tensor.data_offset,
            tensor.n_bytes,
        )
