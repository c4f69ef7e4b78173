"""What every benchmark prints: where it ran, a table, and one JSON line last."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Cell = str | int | float | None


def device() -> dict[str, Any]:
    """Platform, kind and number of the default devices, and the host's processor. Starts the backend."""
    import jax

    devices = jax.devices()
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
    } | host()


def host() -> dict[str, Any]:
    """The host's processor and the cores this process may use."""
    return {"host_cpu": _processor(), "host_cores": len(os.sched_getaffinity(0))}


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    import jax
    import jaxlib

    import jaxgen

    return {
        "jaxgen": jaxgen.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
    }


def command() -> str:
    """The command line of this process, as typed."""
    return shlex.join(["jaxgen", *sys.argv[1:]])


def header(name: str, settings: Mapping[str, Any], *, with_device: bool = True) -> dict[str, Any]:
    """Prints where and how this benchmark runs; returns the same as the start of its JSON record.

    with_device: False for a benchmark that must not start a backend in this process.
    """
    record: dict[str, Any] = {"bench": name, "command": command(), "versions": versions()}
    print(f"$ {record['command']}")
    where = record["device"] = device() if with_device else host()
    gpus = f"{where['count']} x {where['kind']}, " if where.get("platform", "cpu") != "cpu" else ""
    print(f"device    {gpus}host {where['host_cpu']}, {where['host_cores']} cores")
    print("versions  " + ", ".join(f"{name} {version}" for name, version in record["versions"].items()))
    print("settings  " + ", ".join(f"{key} {_text(value)}" for key, value in settings.items()))
    print(flush=True)
    return record | {"settings": dict(settings)}


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """Prints rows under headings; text to the left, numbers to the right."""
    cells = [[_text(value) for value in row] for row in rows]
    widths = [max(len(column), *(len(row[i]) for row in cells)) for i, column in enumerate(columns)]
    numeric = [all(not isinstance(row[i], str) for row in rows) for i in range(len(columns))]

    def line(values: Sequence[str]) -> str:
        return "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(values, widths, numeric)
        ).rstrip()

    print(line(columns))
    for row in cells:
        print(line(row))


def finish(record: Mapping[str, Any]) -> int:
    """Prints the JSON line; returns the exit status."""
    print()
    print(json.dumps(record), flush=True)
    return 0


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, list | tuple):
        return "/".join(map(_text, value))
    return str(value)


def _processor() -> str:
    """The processor's name; the machine type where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
