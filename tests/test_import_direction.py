"""Imports go one way: front-ends, engine, loop, then the host half and the device half, which never meet."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FRONT_ENDS = ("server", "cli", "bench", "integrations")
DEVICE_LIBRARIES = {"jax", "jaxlib", "flax", "kernels_pallas", "orbax"}

# Folder -> the jaxgen modules it may import (itself always). What is not listed here is a module of jaxgen/.
ALLOWED = {
    "scheduling": {"sampling_params"},
    "layers": set(),
    "models": {"layers"},
    "checkpoint": {"models", "logs", "__init__"},
    "execution": {"models", "layers", "checkpoint", "sharding", "scheduling", "startup"},
}
# Modules without JAX, which anybody may import, and which import only each other.
LEAVES = {
    "detokenizer", "detokenizer_states", "errors", "io", "io_limits", "io_records", "io_values",
    "logprobs", "logs",
    "outputs", "patterns", "sampling_params", "server_args", "server_args_checks", "server_args_cli",
    "server_args_defaults", "shown", "startup", "stops", "tokenizer",
}  # fmt: skip


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Absolute names of everything a file imports, at whatever depth, also for type checking only."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            if node.module in ("jaxgen", "kernels_pallas"):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def jaxgen_parts(path: Path) -> set[str]:
    """The jaxgen folders and modules a file imports, less its own folder."""
    own = path.relative_to(ROOT / "jaxgen").parts[0].removesuffix(".py")
    parts = {name.split(".")[1] for name in imported_modules(path) if name.startswith("jaxgen.")}
    return {part for part in parts if _exists(part)} - {own}


def _exists(part: str) -> bool:
    return (ROOT / "jaxgen" / part).is_dir() or (ROOT / "jaxgen" / f"{part}.py").is_file()


def libraries(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_modules(path)}


@pytest.mark.parametrize("folder", ALLOWED)
def test_folders_import_only_what_is_below_them(folder):
    for path in files(f"jaxgen/{folder}"):
        assert jaxgen_parts(path) <= ALLOWED[folder], path


@pytest.mark.parametrize("leaf", sorted(LEAVES))
def test_leaves_import_only_leaves_and_no_device_library(leaf):
    path = ROOT / "jaxgen" / f"{leaf}.py"
    assert jaxgen_parts(path) <= LEAVES
    assert not libraries(path) & DEVICE_LIBRARIES


def test_the_scheduler_knows_no_arrays_on_devices():
    for path in files("jaxgen/scheduling"):
        assert libraries(path) - set(sys.stdlib_module_names) <= {"numpy", "jaxgen"}, path


def test_kernels_know_nothing_of_the_engine():
    for path in files("kernels_pallas"):
        allowed = {"jax", "numpy", "kernels_pallas"} | set(sys.stdlib_module_names)
        assert libraries(path) <= allowed, path


def test_nothing_below_imports_a_front_end_or_the_engine():
    front = {*FRONT_ENDS, "engine"}
    may_import_engine = {"__init__", "__main__", "tokenizer_manager", *FRONT_ENDS}
    for path in files("jaxgen"):
        own = path.relative_to(ROOT / "jaxgen").parts[0].removesuffix(".py")
        if own not in may_import_engine:
            assert not jaxgen_parts(path) & front, path


def test_torch_is_imported_nowhere():
    for folder in ("jaxgen", "kernels_pallas"):
        for path in files(folder):
            # The one script that `jaxgen bench` hands to another interpreter, to time Hugging Face.
            if path.name != "hf_generate.py":
                assert "torch" not in libraries(path), path


def test_event_loops_are_left_as_they_are():
    for path in files("jaxgen"):
        assert not libraries(path) & {"nest_asyncio", "uvloop"}, path


def test_importing_jaxgen_and_its_front_starts_no_backend():
    code = (
        "import jaxgen, sys\n"
        "from jaxgen import Engine, GenerateReqInput, SamplingParams, ServerArgs\n"
        "import jaxgen.utils, jaxgen.scheduling.scheduler\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, xla_bridge._backends\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
