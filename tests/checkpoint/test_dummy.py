"""Random weights: their range, that nothing but the path decides them, and what they need."""

import json
import shutil

import gguf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxgen.checkpoint import CheckpointError, open_checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return open_checkpoint(tmp_path, "dummy")


def test_weights_are_uniform_in_a_thousandth(checkpoint):
    arrays = checkpoint.load(tiny.targets(), {}, tiny.ignore)
    assert arrays.keys() == tiny.table().keys()
    values = np.concatenate([np.ravel(array) for array in arrays.values()])
    assert np.abs(values).max() <= 1e-3
    fractions = np.histogram(values, bins=10, range=(-1e-3, 1e-3))[0] / values.size
    np.testing.assert_allclose(fractions, 0.1, atol=0.005)


def test_every_parameter_has_its_own_draw(checkpoint):
    targets = {f"layers.{i}.w": jax.ShapeDtypeStruct((64,), jnp.float32) for i in range(3)}
    arrays = checkpoint.load(targets, {}, tiny.ignore)
    assert not np.array_equal(arrays["layers.0.w"], arrays["layers.1.w"])
    alone = checkpoint.load({"layers.1.w": targets["layers.1.w"]}, {}, tiny.ignore)
    np.testing.assert_array_equal(alone["layers.1.w"], arrays["layers.1.w"])


def test_weights_do_not_depend_on_the_sharding(checkpoint):
    plain = checkpoint.load(tiny.targets(), {}, tiny.ignore)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    for spec in (PartitionSpec(), PartitionSpec("tensor"), PartitionSpec(("data", "tensor"))):
        shardings = {
            path: NamedSharding(mesh, spec)
            for path, source in tiny.table().items()
            if source.shape[0] % 4 == 0
        }
        arrays = checkpoint.load(tiny.targets(shardings=shardings), {}, tiny.ignore)
        for path, value in plain.items():
            np.testing.assert_array_equal(arrays[path], value)
            if path in shardings:
                assert arrays[path].sharding == shardings[path]


def test_other_dtypes_are_the_same_values_rounded(checkpoint):
    exact = checkpoint.load(tiny.targets(), {}, tiny.ignore)
    rounded = checkpoint.load(tiny.targets(jnp.bfloat16), {}, tiny.ignore)
    for path, value in exact.items():
        np.testing.assert_array_equal(np.asarray(rounded[path]), np.asarray(value).astype(jnp.bfloat16))


def test_progress_counts_the_bytes(checkpoint):
    counted = []
    arrays = checkpoint.load(tiny.targets(), {}, counted.append)
    assert sum(counted) == sum(array.nbytes for array in arrays.values())


def test_a_configuration_file_is_enough(tmp_path):
    (tmp_path / "my-model.json").write_text(json.dumps({"hidden_size": 8}))
    checkpoint = open_checkpoint(tmp_path / "my-model.json", "dummy")
    assert checkpoint.config == {"hidden_size": 8}
    assert checkpoint.generation_config == {}
    with pytest.raises(CheckpointError, match="skip_tokenizer_init"):
        checkpoint.load_tokenizer()


def test_configurations_of_the_source_tree_are_found_from_anywhere(tmp_path, monkeypatch):
    package = tmp_path / "tree" / "jaxgen"
    package.mkdir(parents=True)
    (tmp_path / "tree" / "configs").mkdir()
    (tmp_path / "tree" / "configs" / "small.json").write_text('{"hidden_size": 16}')
    monkeypatch.setattr("jaxgen.__file__", str(package / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("configs/small.json", "dummy").config == {"hidden_size": 16}


def test_a_gguf_file_gives_configuration_and_no_weights(tmp_path):
    gguf_files.write(tmp_path / "m.gguf")
    checkpoint = open_checkpoint(tmp_path, "dummy")
    assert checkpoint.config["hidden_size"] == tiny.D
    arrays = checkpoint.load(tiny.targets(), {}, tiny.ignore)
    assert np.abs(arrays["embed.weight"]).max() <= 1e-3


def test_the_tokenizer_is_the_directorys(tmp_path, request):
    golden = request.config.rootpath / "tests" / "golden" / "tokenizer"
    shutil.copytree(golden, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = open_checkpoint(tmp_path / "m", "dummy").load_tokenizer()
    assert tokenizer.decode(tokenizer("A page.", add_special_tokens=False).input_ids) == "A page."


def test_no_configuration_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(tmp_path, "dummy")
