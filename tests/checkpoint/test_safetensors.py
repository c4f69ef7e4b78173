"""Loading Hugging Face safetensors directories: values, casts, placement, and what is refused."""

import json
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from jaxgen.checkpoint import CheckpointError, open_checkpoint

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("shards", [1, 3])
def test_parameters_are_the_fused_tensors(tmp_path, shards):
    weights = tiny.tensors()
    tiny.write_model(tmp_path, weights, shards)
    loaded_bytes = []
    arrays = open_checkpoint(tmp_path).load(tiny.targets(), tiny.table(), loaded_bytes.append)
    for path, value in tiny.expected(weights).items():
        np.testing.assert_array_equal(arrays[path], value)
    assert sum(loaded_bytes) == sum(array.nbytes for array in arrays.values())


@pytest.mark.parametrize(
    "stored, loaded",
    [
        (ml_dtypes.bfloat16, jnp.float32),
        (ml_dtypes.bfloat16, jnp.bfloat16),
        (np.float16, jnp.bfloat16),
        (np.float32, jnp.bfloat16),
        (np.float64, jnp.float32),
    ],
)
def test_stored_types_are_cast_to_the_type_asked_for(tmp_path, stored, loaded):
    weights = {name: value.astype(stored) for name, value in tiny.tensors().items()}
    tiny.write_model(tmp_path, weights)
    arrays = open_checkpoint(tmp_path).load(tiny.targets(loaded), tiny.table(), tiny.ignore)
    for path, value in tiny.expected(weights).items():
        assert arrays[path].dtype == loaded
        np.testing.assert_array_equal(np.asarray(arrays[path]), value.astype(loaded))


def test_fp8_tensors_are_read_as_fp8(tmp_path):
    values = np.array([0.0, 1.0, -448.0, 0.001953125], ml_dtypes.float8_e4m3fn)
    header = {"model.norm.weight": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + values.tobytes())
    target = {"norm": jax.ShapeDtypeStruct((4,), jnp.float32)}
    source = {"norm": tiny.WeightSource((tiny.Part("model.norm.weight", (4,)),))}
    arrays = open_checkpoint(tmp_path).load(target, source, tiny.ignore)
    np.testing.assert_array_equal(arrays["norm"], values.astype(np.float32))


def test_every_device_gets_only_its_shard(tmp_path):
    weights = tiny.tensors()
    tiny.write_model(tmp_path, weights, 2)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    specs = {
        "embed.weight": PartitionSpec("tensor"),
        "layers.0.attention.qkv": PartitionSpec("tensor"),
        "layers.0.attention.out": PartitionSpec(None, "tensor"),
        "layers.0.mlp.gate_up": PartitionSpec(None, ("data", "tensor")),
        "layers.0.mlp.down": PartitionSpec("data", "tensor"),
        "norm": PartitionSpec(),
    }
    shardings = {path: NamedSharding(mesh, spec) for path, spec in specs.items()}
    arrays = open_checkpoint(tmp_path).load(tiny.targets(shardings=shardings), tiny.table(), tiny.ignore)
    for path, value in tiny.expected(weights).items():
        assert arrays[path].sharding == shardings[path]
        np.testing.assert_array_equal(arrays[path], value)
        for shard in arrays[path].addressable_shards:
            np.testing.assert_array_equal(shard.data, value[shard.index])
    assert arrays["layers.0.mlp.gate_up"].addressable_shards[0].data.shape == (2, tiny.F // 4, tiny.D)


def test_an_axis_split_across_the_fused_parts(tmp_path):
    """The sharded axis is the concatenated one, so a shard takes pieces of several tensors."""
    a, b = np.arange(9, dtype=np.float32).reshape(3, 3), np.arange(15, dtype=np.float32).reshape(5, 3)
    tiny.write_model(tmp_path, {"a": a, "b": b + 100})
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("tensor"))
    source = {"p": tiny.WeightSource((tiny.Part("a", (3, 3)), tiny.Part("b", (5, 3))))}
    target = {"p": jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=sharding)}
    arrays = open_checkpoint(tmp_path).load(target, source, tiny.ignore)
    np.testing.assert_array_equal(arrays["p"], np.concatenate([a, b + 100]))


def test_loaded_weights_survive_the_file_being_overwritten(tmp_path):
    weights = tiny.tensors()
    tiny.write_model(tmp_path, weights)
    arrays = open_checkpoint(tmp_path).load(tiny.targets(), tiny.table(), tiny.ignore)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * (tmp_path / "model.safetensors").stat().st_size)
    for path, value in tiny.expected(weights).items():
        np.testing.assert_array_equal(arrays[path], value)


def test_extra_tensors_are_ignored(tmp_path):
    weights = tiny.tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    tiny.write_model(tmp_path, weights)
    arrays = open_checkpoint(tmp_path).load(tiny.targets(), tiny.table(), tiny.ignore)
    assert arrays.keys() == tiny.table().keys()


def load_error(directory) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(directory).load(tiny.targets(), tiny.table(), tiny.ignore)
    return str(caught.value)


def test_a_missing_tensor_is_named_with_file_and_shape(tmp_path):
    weights = tiny.tensors()
    del weights["model.layers.0.self_attn.k_proj.weight"]
    tiny.write_model(tmp_path, weights)
    message = load_error(tmp_path)
    assert str(tmp_path / "model.safetensors") in message
    assert "model.layers.0.self_attn.k_proj.weight" in message
    assert "(2, 1, 64, 256)" in message


@pytest.mark.parametrize("shape", [(tiny.F, tiny.D), (tiny.D * tiny.F + 1,), (tiny.D, tiny.F // 2)])
def test_a_misshaped_tensor_is_named_with_both_shapes(tmp_path, shape):
    """(F, D) has as many elements as the down projection's (D, F): it must not be reshaped into nonsense."""
    weights = tiny.tensors() | {"model.layers.0.mlp.down_proj.weight": np.zeros(shape, np.float32)}
    tiny.write_model(tmp_path, weights)
    message = load_error(tmp_path)
    assert "model.layers.0.mlp.down_proj.weight" in message
    assert str(shape) in message
    assert str((tiny.D, tiny.F)) in message


def test_integer_weights_are_refused(tmp_path):
    tiny.write_model(tmp_path, tiny.tensors() | {"model.norm.weight": np.zeros(tiny.D, np.int8)})
    message = load_error(tmp_path)
    assert "model.norm.weight" in message
    assert "I8" in message


def test_quantized_checkpoints_are_refused_rather_than_misread(tmp_path):
    tiny.write_model(tmp_path, tiny.tensors())
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    assert "gptq" in load_error(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -1000])
def test_truncated_files_are_refused_by_name(tmp_path, keep):
    tiny.write_model(tmp_path, tiny.tensors(), 2)
    file = tmp_path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert str(file) in load_error(tmp_path)


def hostile_headers():
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    cases = {
        "not json": b"{{{{",
        "array": b"[1, 2]",
        "past the end": {"a": one | {"shape": [2], "data_offsets": [0, 8]}},
        "reversed": {"a": one | {"data_offsets": [4, 0]}},
        "negative shape": {"a": one | {"shape": [-1]}},
        "wrong size": {"a": one | {"shape": [1000]}},
        "huge shape": {"a": one | {"shape": [2**62, 2**62]}},
        "unknown type": {"a": one | {"dtype": "F31"}},
        "deep": b'{"__metadata__":' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
    }
    return [
        pytest.param(v if isinstance(v, bytes) else json.dumps(v).encode(), id=k) for k, v in cases.items()
    ]


@pytest.mark.parametrize("header", hostile_headers())
def test_hostile_headers_are_refused(tmp_path, header):
    tiny.write_model(tmp_path, tiny.tensors())
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert "not a complete safetensors file" in load_error(tmp_path)


@pytest.mark.parametrize("length", [2**63, 10**12, 200 << 20])
def test_huge_header_lengths_are_refused(tmp_path, length):
    tiny.write_model(tmp_path, tiny.tensors())
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" * 10)
    assert "not a complete safetensors file" in load_error(tmp_path)


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "a\\b.safetensors", 7]
)
def test_index_entries_cannot_leave_the_directory(tmp_path, file):
    model = tmp_path / "model"
    tiny.write_model(model, tiny.tensors(), 2)
    save_file(tiny.tensors(), tmp_path / "secret.safetensors")
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (model / INDEX).write_text(json.dumps(index))
    message = load_error(model)
    assert "not a file name" in message
    assert "model.norm.weight" in message


def test_a_shard_missing_from_the_directory_is_named(tmp_path):
    tiny.write_model(tmp_path, tiny.tensors(), 3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in load_error(tmp_path)


def test_an_index_that_names_the_wrong_shard(tmp_path):
    tiny.write_model(tmp_path, tiny.tensors(), 2)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    wrong = next(file for file in files if file != index["weight_map"]["model.norm.weight"])
    index["weight_map"]["model.norm.weight"] = wrong
    (tmp_path / INDEX).write_text(json.dumps(index))
    message = load_error(tmp_path)
    assert wrong in message
    assert "model.norm.weight" in message


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', "[" * 100_000])
def test_a_damaged_index_is_refused(tmp_path, text):
    tiny.write_model(tmp_path, tiny.tensors(), 2)
    (tmp_path / INDEX).write_text(text)
    assert INDEX in load_error(tmp_path)


def test_tensor_names_are_never_paths(tmp_path):
    """Names like these are only names: nothing is opened, and loading goes on."""
    weights = tiny.tensors() | {"../../etc/passwd": np.zeros(1, np.float32), "": np.zeros(1, np.float32)}
    tiny.write_model(tmp_path, weights)
    assert open_checkpoint(tmp_path).load(tiny.targets(), tiny.table(), tiny.ignore)
