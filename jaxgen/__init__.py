"""jaxgen: an in-process LLM inference engine for JAX. Importing it starts no accelerator backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jaxgen import utils
    from jaxgen.engine import Engine
    from jaxgen.errors import RequestError
    from jaxgen.io import GenerateReqInput
    from jaxgen.sampling_params import SamplingParams
    from jaxgen.server_args import ServerArgs

# Public name -> module that holds it. Loaded on first use: `import jaxgen` stays fast and imports no JAX.
_PUBLIC = {
    "Engine": "jaxgen.engine",
    "GenerateReqInput": "jaxgen.io",
    "RequestError": "jaxgen.errors",
    "SamplingParams": "jaxgen.sampling_params",
    "ServerArgs": "jaxgen.server_args",
    "utils": "jaxgen.utils",
}

__all__ = [
    "Engine",
    "GenerateReqInput",
    "RequestError",
    "SamplingParams",
    "ServerArgs",
    "__version__",
    "utils",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'jaxgen' has no attribute {name!r}")
    import importlib

    module = importlib.import_module(_PUBLIC[name])
    value = module if _PUBLIC[name] == f"jaxgen.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
