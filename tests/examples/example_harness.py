"""Runs the example programs as a user does: in a process of their own, here on a tiny model."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
# Two steps to compile instead of a dozen.
SMALL = "--cuda-graph-bs-prefill 256 --cuda-graph-bs-decode 4".split()


def make_model(directory: Path) -> Path:
    """A tiny Llama with a tokenizer next to its weights."""
    for part in ("llama3", "tokenizer"):
        shutil.copytree(ROOT / "tests/golden" / part, directory, dirs_exist_ok=True)
    return directory


def environment(cache: Path) -> dict[str, str]:
    """The environment of an example; `cache` keeps compiled steps from one example to the next."""
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": python_path, "JAXGEN_COMPILATION_CACHE_DIR": str(cache)}


def run_program(path: Path, cache: Path, *args: str) -> str:
    """What the program prints; fails with its errors if it fails."""
    done = subprocess.run(
        [sys.executable, str(path), *args],
        capture_output=True,
        text=True,
        env=environment(cache),
        cwd=cache,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def serving(name: str, cache: Path, *args: str) -> Iterator[int]:
    """Runs a server example on a free port until the block ends; yields the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(EXAMPLES / name), "--port", str(port), *args]
    server = subprocess.Popen(command, env=environment(cache), cwd=cache, stderr=subprocess.PIPE, text=True)
    try:
        while not _answers(port):
            assert server.poll() is None, server.communicate()[1]
            time.sleep(0.2)
        yield port
    finally:
        server.terminate()
        server.communicate(timeout=30)


def _answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
