"""Small helpers for scripts and notebooks around an engine."""

from __future__ import annotations

import html
import json
import os
import shutil
import tempfile
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any


def trim_overlap(existing_text: str, new_chunk: str) -> str:
    """`new_chunk` without the longest prefix of it that `existing_text` ends with."""
    for length in range(min(len(existing_text), len(new_chunk)), 0, -1):
        if existing_text.endswith(new_chunk[:length]):
            return new_chunk[length:]
    return new_chunk


def stream_and_merge(llm: Any, prompt: str, sampling_params: Any) -> str:
    """Stream one prompt through `llm` and return the whole text."""
    text = ""
    for chunk in llm.generate(prompt, sampling_params, stream=True):
        text += _new_piece(llm, text, chunk["text"])
    return text


async def async_stream_and_merge(llm: Any, prompt: str, sampling_params: Any) -> AsyncIterator[str]:
    """Stream one prompt through `llm`, yielding pieces that join to the whole text."""
    text = ""
    async for chunk in await llm.async_generate(prompt, sampling_params, stream=True):
        piece = _new_piece(llm, text, chunk["text"])
        text += piece
        yield piece


def _new_piece(llm: Any, text: str, chunk: str) -> str:
    # Trimming would swallow a piece that repeats the end of the text, as chunks that are deltas may.
    if llm.server_args.incremental_streaming_output:
        return chunk
    return trim_overlap(text, chunk)


def print_highlight(obj: Any) -> None:
    """Print a value; where notebooks are rendered automatically, show it in bold blue."""
    if any(
        os.environ.get(name, "").lower() in ("1", "true") for name in ("JAXGEN_IS_IN_CI", "SGLANG_IS_IN_CI")
    ):
        from IPython.display import HTML, display

        text = html.escape(str(obj)).replace("\n", "<br>")
        display(HTML(f"<strong style='color: #00008B;'>{text}</strong>"))
    else:
        print(obj)


def convert_json_schema_to_str(json_schema: Any) -> str:
    """A schema given as dict, JSON str or pydantic model class, as JSON; else raises `ValueError`."""
    if isinstance(json_schema, str):
        return json_schema
    if isinstance(json_schema, dict):
        try:
            return json.dumps(json_schema)
        except (TypeError, RecursionError) as error:
            raise ValueError(f"json_schema cannot be written as JSON: {error}") from None
    # By name, so that pydantic is not needed for the other forms.
    if isinstance(json_schema, type) and hasattr(json_schema, "model_json_schema"):
        return json.dumps(json_schema.model_json_schema())
    raise ValueError(f"json_schema must be a dict, a str or a pydantic model class, got {type(json_schema)}")


def download_and_cache_file(url: str, filename: str | None = None) -> str:
    """Path of the file behind an http(s) URL, downloaded unless it is there already.

    Without `filename` it is kept under the user's cache directory, by the last part of the URL's path. Raises
    `ValueError` for other URL schemes and for a URL without a file name, `OSError` if the download fails.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"only http and https URLs are downloaded, got {parts.scheme or 'no scheme'!r}")
    if filename is None:
        name = Path(urllib.parse.unquote(parts.path)).name
        if not name:
            raise ValueError("the URL has no file name; give filename")
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxgen" / "downloads"
        filename = str(cache / name)
    target = Path(filename)
    if target.is_file():
        return filename
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the target and renamed, so that an interrupted download leaves no half file behind.
    descriptor, partial = tempfile.mkstemp(dir=target.parent, prefix=target.name)
    try:
        with os.fdopen(descriptor, "wb") as file, urllib.request.urlopen(url) as response:
            shutil.copyfileobj(response, file)
            announced = response.headers.get("Content-Length")
            if announced is not None and file.tell() != int(announced):
                raise OSError(f"the download of {url} broke off: {file.tell()} of {announced} bytes")
        os.replace(partial, target)
    except BaseException:
        os.unlink(partial)
        raise
    return filename
