"""Helpers for scripts and notebooks."""

import asyncio
import json
import subprocess
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgen.utils import (
    async_stream_and_merge,
    convert_json_schema_to_str,
    download_and_cache_file,
    print_highlight,
    stream_and_merge,
    trim_overlap,
)


@given(st.text("ab", max_size=12), st.text("ab", max_size=12))
def test_the_longest_overlap_is_trimmed(existing, new):
    rest = trim_overlap(existing, new)
    overlap = new[: len(new) - len(rest)]
    assert new == overlap + rest and existing.endswith(overlap)
    for longer in range(len(overlap) + 1, len(new) + 1):
        assert not existing.endswith(new[:longer])


@pytest.mark.parametrize(
    ("existing", "new", "rest"), [("", "ab", "ab"), ("ab", "abc", "c"), ("ab", "abab", "ab"), ("ab", "", "")]
)
def test_overlap_of_cumulative_chunks(existing, new, rest):
    assert trim_overlap(existing, new) == rest


class FakeEngine:
    """Streams fixed pieces, cumulatively or not."""

    def __init__(self, pieces, incremental):
        self.pieces = pieces
        self.server_args = types.SimpleNamespace(incremental_streaming_output=incremental)

    def chunks(self):
        text = ""
        for piece in self.pieces:
            text += piece
            yield {"text": piece if self.server_args.incremental_streaming_output else text}

    def generate(self, prompt, sampling_params, stream):
        assert stream
        return self.chunks()

    async def async_generate(self, prompt, sampling_params, stream):
        async def chunks():
            for chunk in self.chunks():
                yield chunk

        return chunks()


@pytest.mark.parametrize("incremental", [False, True])
@given(pieces=st.lists(st.text("ha ", max_size=4), max_size=6))
def test_merged_streams_equal_the_whole_text(incremental, pieces):
    engine = FakeEngine(pieces, incremental)
    assert stream_and_merge(engine, "p", {}) == "".join(pieces)

    async def collect():
        return [piece async for piece in async_stream_and_merge(engine, "p", {})]

    assert asyncio.run(collect()) == pieces


def test_highlight_prints(capsys, monkeypatch):
    monkeypatch.delenv("JAXGEN_IS_IN_CI", raising=False)
    monkeypatch.delenv("SGLANG_IS_IN_CI", raising=False)
    print_highlight({"a": 1})
    assert capsys.readouterr().out == "{'a': 1}\n"


def test_highlight_shows_escaped_html_in_notebook_ci(monkeypatch):
    shown = []
    display = types.SimpleNamespace(HTML=lambda text: text, display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setenv("JAXGEN_IS_IN_CI", "true")
    print_highlight("a<b\nc")
    assert "a&lt;b<br>c" in shown[0] and "strong" in shown[0]


def test_schemas_become_json_text():
    class Model:
        @classmethod
        def model_json_schema(cls):
            return {"type": "object"}

    assert json.loads(convert_json_schema_to_str({"type": "string"})) == {"type": "string"}
    assert convert_json_schema_to_str('{"a": 1}') == '{"a": 1}'
    assert json.loads(convert_json_schema_to_str(Model)) == {"type": "object"}
    for bad in (1, None, [1], Model(), int, {"a": object()}):
        with pytest.raises(ValueError, match="json_schema"):
            convert_json_schema_to_str(bad)


@pytest.fixture
def server():
    """A web server that lists requests, answers `/data.txt` and breaks off within `/broken.txt`."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200 if self.path in ("/data.txt", "/broken.txt") else 404)
            self.send_header("Content-Length", "4" if self.path == "/data.txt" else "400")
            self.end_headers()
            self.wfile.write(b"data")

        def log_message(self, *arguments):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}", requests
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def test_a_file_is_downloaded_once(server, tmp_path, monkeypatch):
    url, requests = server
    target = tmp_path / "sub" / "file"
    assert download_and_cache_file(f"{url}/data.txt", str(target)) == str(target)
    assert target.read_bytes() == b"data"
    download_and_cache_file(f"{url}/data.txt", str(target))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = download_and_cache_file(f"{url}/data.txt")
    assert path.startswith(str(tmp_path)) and path.endswith("data.txt")
    assert len(requests) == 2


def test_a_failed_download_leaves_nothing_behind(server, tmp_path):
    url, _ = server
    for name in ("missing.txt", "broken.txt"):
        with pytest.raises(OSError):
            download_and_cache_file(f"{url}/{name}", str(tmp_path / name))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/a", "data.txt", "http://host/"])
def test_only_web_addresses_of_files_are_downloaded(url, tmp_path):
    with pytest.raises(ValueError):
        download_and_cache_file(url)


def test_the_front_end_loads_neither_jax_nor_transformers():
    program = """
import sys
import jaxgen.io, jaxgen.outputs, jaxgen.server_args_cli, jaxgen.server_args_defaults, jaxgen.utils
print([name for name in ("jax", "transformers", "torch") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
