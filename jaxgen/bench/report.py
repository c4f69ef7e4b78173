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


def host() -> dict[str, Any]:
    """The host's processor and the number of cores this process may use."""
    return {"cpu": _processor(), "cores": len(os.sched_getaffinity(0))}


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


def header(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Prints what runs and how; returns the same as the start of the JSON record. Starts no backend."""
    record: dict[str, Any] = {
        "bench": name,
        "command": command(),
        "versions": versions(),
        "host": host(),
        "settings": dict(settings),
    }
    print(f"$ {record['command']}")
    print("versions  " + ", ".join(f"{name} {version}" for name, version in record["versions"].items()))
    print(f"host      {record['host']['cpu']}, {record['host']['cores']} cores")
    print("settings  " + ", ".join(f"{key} {_text(value)}" for key, value in settings.items()), flush=True)
    return record


def device() -> dict[str, Any]:
    """Prints and returns platform, kind and number of the devices.

    Starts the backend if nothing has: call it once the engine is up, which settles the backend's options.
    """
    import jax

    devices = jax.devices()
    found = {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}
    device_line(found)
    return found


def device_line(found: Mapping[str, Any]) -> None:
    print(f"device    {found['count']} x {found['kind']} ({found['platform']})\n", flush=True)


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
