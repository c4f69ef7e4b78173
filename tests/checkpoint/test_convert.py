"""``jaxgen convert``: the saved model is the model, for real families and from every source format."""

import argparse
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from jaxgen.checkpoint import CheckpointError, open_checkpoint
from jaxgen.cli.convert import add_parser, convert
from jaxgen.models.config import ModelConfig
from jaxgen.models.registry import ARCHITECTURES, build_model


def load(checkpoint, dtype):
    """Every parameter of the model that the checkpoint's configuration describes."""
    config = ModelConfig.from_hf(checkpoint.config, checkpoint.generation_config)
    model = nnx.eval_shape(lambda: build_model(config, dtype))
    params = {
        ".".join(map(str, path)): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in nnx.to_flat_state(nnx.state(model))
    }
    table = ARCHITECTURES[config.architecture].weight_table(config)
    return config, checkpoint.load(params, table, tiny.ignore)


@pytest.mark.parametrize("family", ["llama2", "llama3", "qwen2", "qwen3", "mistral"])
def test_a_converted_model_is_the_same_model(tmp_path, request, family):
    golden = request.config.rootpath / "tests" / "golden"
    shutil.copytree(golden / family, tmp_path / "model")
    shutil.copytree(golden / "tokenizer", tmp_path / "model", dirs_exist_ok=True)
    convert(str(tmp_path / "model"), tmp_path / "out")
    before, after = open_checkpoint(tmp_path / "model"), open_checkpoint(tmp_path / "out")
    config, weights = load(before, jnp.float32)
    assert load(after, jnp.float32)[0] == config
    for path, value in load(after, jnp.float32)[1].items():
        np.testing.assert_array_equal(value, weights[path])
    text = "The scheduler decides 12 requests."
    assert after.load_tokenizer()(text).input_ids == before.load_tokenizer()(text).input_ids


def test_a_model_converted_to_another_dtype(tmp_path, request):
    source = str(request.config.rootpath / "tests" / "golden" / "qwen3")
    convert(source, tmp_path / "out", "bfloat16")
    after = open_checkpoint(tmp_path / "out")
    config, weights = load(after, jnp.bfloat16)
    assert config.dtype == "bfloat16"
    for path, value in load(open_checkpoint(source), jnp.float32)[1].items():
        np.testing.assert_array_equal(np.asarray(weights[path]), np.asarray(value).astype(jnp.bfloat16))


def test_refusals(tmp_path, request):
    source = str(request.config.rootpath / "tests" / "golden" / "qwen3")
    with pytest.raises(ValueError, match="int8"):
        convert(source, tmp_path / "out", "int8")
    with pytest.raises(CheckpointError, match="exists already"):
        convert(source, tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        convert(str(tmp_path / "missing.gguf"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_subcommand(tmp_path, request, capsys):
    source = str(request.config.rootpath / "tests" / "golden" / "qwen3")
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["convert", source, str(tmp_path / "out"), "--dtype", "float16"])
    assert args.run(args) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    assert open_checkpoint(tmp_path / "out").config["torch_dtype"] == "float16"
