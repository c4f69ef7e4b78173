"""PyTorch files are read as data: right values, and nothing in them ever runs."""

import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgen.checkpoint import CheckpointError, open_checkpoint
from jaxgen.checkpoint.torch_file import TorchFile
from jaxgen.checkpoint.torch_pickle import PickleRefused, read_tensors

FIXTURE = Path(__file__).parent.parent / "golden" / "torch_bin"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def numbers(values) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def description(tensors: dict[str, np.ndarray]) -> bytes:
    """`data.pkl` of float32 tensors, as torch.save writes it."""
    items = b""
    for key, (name, array) in enumerate(tensors.items()):
        strides = [step // array.itemsize for step in array.strides]
        storage = (
            b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(str(key)) + text("cpu")
            + number(array.size) + b"tQ"
        )  # fmt: skip
        arguments = b"(" + storage + number(0) + numbers(array.shape) + numbers(strides) + b"\x89}t"
        items += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"
    return b"\x80\x02}(" + items + b"u."


def write(path: Path, tensors: dict[str, np.ndarray], data: bytes | None = None) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", description(tensors) if data is None else data)
        for key, array in enumerate(tensors.values()):
            archive.writestr(f"model/data/{key}", array.tobytes())


def test_every_kind_of_tensor_has_the_value_torch_gave_it():
    file = TorchFile(FIXTURE / "pytorch_model.bin")
    expected = np.load(FIXTURE / "values.npz")
    assert set(file.tensors) == set(expected.files)
    for name in expected.files:
        np.testing.assert_array_equal(file.read(name).astype(np.float32), expected[name], err_msg=name)


@pytest.mark.parametrize("load_format", ["auto", "pt"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_model_directory_loads_as_its_safetensors_twin_does(tmp_path, load_format, parts):
    tensors = {name: array.astype(np.float32) for name, array in tiny.tensors().items()}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    tiny.write_model(tmp_path / "a", tensors)
    (tmp_path / "b" / "config.json").write_text((tmp_path / "a" / "config.json").read_text())
    names = sorted(tensors)
    if parts == 1:
        write(tmp_path / "b" / "pytorch_model.bin", tensors)
    else:
        half = len(names) // 2
        files = {"p-1.bin": names[:half], "p-2.bin": names[half:]}
        for file, members in files.items():
            write(tmp_path / "b" / file, {name: tensors[name] for name in members})
        index = {name: file for file, members in files.items() for name in members}
        (tmp_path / "b" / "pytorch_model.bin.index.json").write_text(
            '{"weight_map": {' + ", ".join(f'"{k}": "{v}"' for k, v in index.items()) + "}}"
        )
    loaded = [
        open_checkpoint(tmp_path / name, kind).load(tiny.targets(), tiny.table(), tiny.ignore)
        for name, kind in (("a", "auto"), ("b", load_format))
    ]
    for path, value in loaded[0].items():
        np.testing.assert_array_equal(np.asarray(loaded[1][path]), np.asarray(value))


class Evil:
    def __init__(self, target: str):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("protocol", range(6))
def test_code_in_a_file_is_refused_and_does_not_run(tmp_path, protocol):
    target = tmp_path / "made-by-the-pickle"
    data = pickle.dumps({"weight": Evil(str(target))}, protocol)
    write(tmp_path / "pytorch_model.bin", {}, data)
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: .*convert the model to safetensors"):
        TorchFile(tmp_path / "pytorch_model.bin")
    assert not target.exists()


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    array = np.zeros((4, 4), np.float32)
    data = description({"w": array}).replace(numbers((4, 4)), numbers((4, 400)))
    write(tmp_path / "x.bin", {"w": array}, data)
    with pytest.raises(CheckpointError, match="exceeds its storage"):
        TorchFile(tmp_path / "x.bin").read("w")


def test_missing_and_misshaped_tensors_are_named(tmp_path):
    tensors = {name: array.astype(np.float32) for name, array in tiny.tensors().items()}
    tiny.write_model(tmp_path, {})
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    gone = sorted(tensors)[0]
    write(tmp_path / "pytorch_model.bin", {k: v for k, v in tensors.items() if k != gone})
    with pytest.raises(CheckpointError, match=gone.replace(".", r"\.")):
        open_checkpoint(tmp_path).load(tiny.targets(), tiny.table(), tiny.ignore)


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.integers(0, 3))
def test_damaged_descriptions_are_refused_or_read(position, value, cut):
    data = bytearray(description({"w": np.ones((2, 3), np.float32), "v": np.ones(5, np.float32)}))
    data[position % len(data)] = value
    damaged = bytes(data[: len(data) - cut])
    try:
        tensors = read_tensors(damaged)
    except PickleRefused:
        return
    assert all(min((0, *t.shape, *t.strides)) >= 0 for t in tensors.values())


@pytest.mark.parametrize("content", [b"", b"\x80\x02}.", b"PK\x03\x04" + bytes(100)])
def test_files_that_are_no_archive_are_refused(tmp_path, content):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a PyTorch zip archive"):
        TorchFile(tmp_path / "pytorch_model.bin")
