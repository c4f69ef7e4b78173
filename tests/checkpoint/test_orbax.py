"""Ready-to-run checkpoints: what comes back, and that damage is noticed rather than read as zeros."""

import asyncio
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxgen.checkpoint import CheckpointError, open_checkpoint, orbax

CONFIG = {"architectures": ["LlamaForCausalLM"], "vocab_size": tiny.V}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("orbax") / "model"
    params = {path: jnp.asarray(value) for path, value in tiny.expected(tiny.tensors()).items()}
    orbax.save(path, params, CONFIG, {"eos_token_id": 2})
    return path


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def test_weights_and_configuration_come_back(saved):
    checkpoint = open_checkpoint(saved)
    assert checkpoint.config == CONFIG
    assert checkpoint.generation_config == {"eos_token_id": 2}
    counted = []
    arrays = checkpoint.load(tiny.targets(), tiny.table(), counted.append)
    for path, value in tiny.expected(tiny.tensors()).items():
        np.testing.assert_array_equal(arrays[path], value)
    assert sum(counted) == sum(array.nbytes for array in arrays.values())


def test_inside_a_running_event_loop(tmp_path):
    """As when an engine is made in a notebook; Orbax must neither refuse nor patch the loop."""

    async def cell():
        orbax.save(tmp_path / "m", {"a": jnp.arange(6.0)}, CONFIG)
        target = {"a": jax.ShapeDtypeStruct((6,), jnp.float32)}
        return open_checkpoint(tmp_path / "m").load(target, {}, tiny.ignore)["a"]

    np.testing.assert_array_equal(asyncio.run(cell()), np.arange(6.0))
    assert not hasattr(asyncio, "_nest_patched")


def test_weights_are_restored_sharded_and_cast(saved):
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("tensor"))
    targets = tiny.targets(jnp.bfloat16, dict.fromkeys(tiny.table(), sharding))
    arrays = open_checkpoint(saved, "orbax").load(targets, {}, tiny.ignore)
    for path, value in tiny.expected(tiny.tensors()).items():
        assert arrays[path].sharding == sharding
        np.testing.assert_array_equal(np.asarray(arrays[path]), value.astype(jnp.bfloat16))


def test_tokenizer_files_are_copied(tmp_path, request):
    golden = request.config.rootpath / "tests" / "golden" / "tokenizer"
    orbax.save(tmp_path / "m", {"a": jnp.ones(2)}, CONFIG, None, sorted(golden.iterdir()))
    tokenizer = open_checkpoint(tmp_path / "m").load_tokenizer()
    assert tokenizer.decode(tokenizer("A page.", add_special_tokens=False).input_ids) == "A page."
    assert not (tmp_path / "m" / "generation_config.json").exists()


def test_nothing_is_overwritten_and_nothing_is_left_behind(saved, tmp_path):
    with pytest.raises(CheckpointError, match="exists already"):
        orbax.save(saved, {"a": jnp.ones(2)}, CONFIG)
    with pytest.raises(TypeError):
        orbax.save(tmp_path / "m", {"a": jnp.ones(2)}, {"bad": object()})
    assert list(tmp_path.iterdir()) == []


def load_error(path, targets=None) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path).load(targets or tiny.targets(), tiny.table(), tiny.ignore)
    return str(caught.value)


def weight_files(path):
    return sorted(file for file in (path / "weights").rglob("*") if file.is_file())


def test_any_missing_or_short_file_is_named(copy):
    for file in weight_files(copy)[:: max(1, len(weight_files(copy)) // 12)]:
        data = file.read_bytes()
        file.unlink()
        assert str(file) in load_error(copy)
        if data:
            file.write_bytes(data[:-1])
            assert str(file) in load_error(copy)
        file.write_bytes(data)
    open_checkpoint(copy).load(tiny.targets(), tiny.table(), tiny.ignore)


def test_metadata_of_the_right_size_but_wrong_content(copy):
    file = copy / "weights" / "norm" / ".zarray"
    file.write_bytes(b"x" * file.stat().st_size)
    assert str(file) in load_error(copy)


def test_a_partial_copy_is_recognised(copy):
    (copy / orbax.MARKER).unlink()
    assert "incomplete" in load_error(copy)


def test_missing_weights_are_recognised(copy):
    shutil.rmtree(copy / "weights")
    assert "is missing" in load_error(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 99},
        {"format": "other"},
        {"parameters": None},
        {"files": []},
        {"files": {"../../outside": 3}},
        {"files": {"/etc/passwd": 3}},
    ],
    ids=str,
)
def test_bad_markers_are_refused(copy, change):
    marker = json.loads((copy / orbax.MARKER).read_text())
    (copy / orbax.MARKER).write_text(json.dumps(marker | change))
    assert orbax.MARKER in load_error(copy)


def test_another_models_weights_are_refused(saved):
    wider = tiny.targets()
    wider["norm"] = jax.ShapeDtypeStruct((7,), jnp.float32)
    message = load_error(saved, wider)
    assert "'norm'" in message
    assert "[7]" in message
    assert f"[{tiny.D}]" in message
    more = tiny.targets() | {"lm_head.weight": jax.ShapeDtypeStruct((tiny.V, tiny.D), jnp.float32)}
    assert "lm_head.weight" in load_error(saved, more)
    fewer = tiny.targets()
    del fewer["norm"]
    assert "'norm'" in load_error(saved, fewer)
