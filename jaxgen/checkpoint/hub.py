"""Download a model from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from jaxgen.checkpoint.directory import TOKENIZER_FILES
from jaxgen.checkpoint.errors import CheckpointError

_CONFIG_FILES = ["*.json", "tokenizer*", *(name for name in TOKENIZER_FILES if not name.endswith(".json"))]
_SECOND_COPIES = ["original/*", "consolidated*", "onnx/*", "openvino/*"]


def download(model_id: str, revision: str | None, download_dir: str | None, *, weights: str | None) -> Path:
    """Fetch a model, or find it in the cache, and return its directory.

    Args:
        model_id: ``owner/name``.
        revision: Branch, tag or commit; the main branch when None.
        download_dir: Cache directory; the hub's default when None.
        weights: Pattern of the weight files to fetch; None for the configuration alone.

    Raises:
        CheckpointError: the model cannot be had.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"{model_id}: no such directory, and downloading needs the huggingface-hub package"
        ) from error
    patterns = [*_CONFIG_FILES, *([weights] if weights else [])]
    try:
        directory = snapshot_download(
            model_id,
            revision=revision,
            cache_dir=download_dir,
            allow_patterns=patterns,
            ignore_patterns=_SECOND_COPIES,
        )
    except Exception as error:  # the library's network, cache and permission errors share no base class
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{model_id}: there is no such local path, and the model cannot be fetched from the hub "
            f"(revision {revision or 'main'}): {type(error).__name__}: {''.join(reason[:1])} "
            "Check the name, and that you are online (HF_HUB_OFFLINE unset) and may access the model "
            "(HF_TOKEN); or give the path of a local copy"
        ) from error
    return Path(directory)
