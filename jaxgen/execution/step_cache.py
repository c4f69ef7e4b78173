"""Compiled steps on disk, by everything they were made from: found, a step is neither traced nor compiled.

JAX's own cache is keyed by the lowered program. It saves the compiler's work but not Python's, which is the longer
part of a warm start.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.experimental import serialize_executable

logger = logging.getLogger("jaxgen")

SUFFIX = ".step"
MAX_BYTES = 8 << 30
DIGEST_BYTES = 32
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "jax-cuda12-pjrt",
    "jax-cuda13-pjrt",
)
SOURCES = ("jaxgen", "kernels_pallas")
# JAX options that change what is traced or compiled.
OPTIONS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_debug_nans",
    "jax_debug_infs",
    "jax_disable_jit",
    "jax_numpy_dtype_promotion",
    "jax_default_dtype_bits",
)
ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "CUDA_VISIBLE_DEVICES")


class StepCache:
    """Steps of one engine's configuration in a directory that nobody else can write to.

    Loading a step runs code from the file, as loading any compiled program does; the digest at its head tells
    a whole file from a cut one, not a friendly one from a hostile one.
    """

    def __init__(self, directory: Path, devices: Sequence[jax.Device], *identity: object):
        """`identity`: everything beside versions, sources and devices that decides what steps compute."""
        self._directory = directory
        self._devices = tuple(devices)
        self._identity = _digest(
            [
                *(f"{name} {_version(name)}" for name in PACKAGES),
                *(_source_digest(name) for name in SOURCES),
                *(f"{name}={getattr(jax.config, name, None)}" for name in OPTIONS),
                *(f"{name}={os.environ.get(name)}" for name in ENVIRONMENT),
                *(f"{device.id} {device.device_kind}" for device in devices),
                devices[0].client.platform_version,
                *map(repr, identity),
            ]
        )

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    def load(self, name: str) -> jax.stages.Compiled | None:
        """The step stored under `name`, or None."""
        path = self._path(name)
        try:
            content = path.read_bytes()
            os.utime(path)  # used last: removed last
        except OSError:
            return None
        if hashlib.sha256(content[DIGEST_BYTES:]).digest() != content[:DIGEST_BYTES]:
            logger.warning("The cached step %s is damaged and will be compiled anew", path)
            return None
        try:
            payload, in_tree, out_tree = pickle.loads(content[DIGEST_BYTES:])
            return serialize_executable.deserialize_and_load(
                payload, in_tree, out_tree, self._devices[0].client, self._devices
            )
        except Exception as error:  # the runtime refuses in its own ways; compiling is always possible
            logger.warning("The cached step %s cannot be loaded and will be compiled anew: %s", path, error)
            return None

    def save(self, name: str, step: jax.stages.Compiled) -> None:
        """Stores a step; a full disk or a step that cannot be stored costs a warning, no more."""
        try:
            body = pickle.dumps(serialize_executable.serialize(step))
            with tempfile.NamedTemporaryFile(dir=self._directory, delete=False) as file:
                file.write(hashlib.sha256(body).digest() + body)
            os.replace(file.name, self._path(name))
        except (OSError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            logger.warning("The step %s could not be cached: %s", name, error)

    def trim(self, max_bytes: int = MAX_BYTES) -> None:
        """Removes the steps used longest ago until the directory holds at most `max_bytes`."""
        found = [(path, path.stat()) for path in self._directory.glob(f"*{SUFFIX}")]
        total = sum(info.st_size for _, info in found)
        for path, info in sorted(found, key=lambda entry: entry[1].st_mtime):
            if total <= max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= info.st_size

    def _path(self, name: str) -> Path:
        return self._directory / (_digest([self._identity, name]) + SUFFIX)


def _digest(parts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)} {part}".encode())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _source_digest(package: str) -> str:
    """Digest of a package's modules and tables: any change of the code makes other steps."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None
    digest = hashlib.sha256()
    for root in map(Path, spec.submodule_search_locations):
        for path in sorted((*root.rglob("*.py"), *root.rglob("*.json"))):
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
