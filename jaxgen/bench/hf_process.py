"""Hugging Face `generate` in another interpreter, driven line by line over its standard streams."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

SCRIPT = Path(__file__).with_name("hf_generate.py")


class HFProcess:
    """`hf_generate.py` as a child process; a context manager that ends it.

    Args:
        python: an interpreter with torch and transformers.
        model: directory in Hugging Face form.
        dtype: torch's name of the weights' type.

    Raises:
        ValueError: the interpreter is missing, lacks a package, or the model does not load there.
    """

    def __init__(self, python: str, model: str, dtype: str):
        try:
            self._process = subprocess.Popen(
                [python, "-P", str(SCRIPT), model, dtype],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        except OSError as error:
            raise ValueError(f"--compare-hf: cannot run {python}: {error}") from error
        self.about: dict[str, Any] = self._read()

    def generate(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
        """(seconds, new token ids of each prompt) of one greedy run that ignores EOS."""
        assert self._process.stdin is not None
        print(
            json.dumps({"prompts": prompts, "new_tokens": new_tokens}), file=self._process.stdin, flush=True
        )
        answer = self._read()
        return answer["seconds"], answer["output_ids"]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise ValueError(f"--compare-hf: the other interpreter ended with status {status}; see above")
        return json.loads(line)

    def __enter__(self) -> HFProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()  # the script ends at the end of its input
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
