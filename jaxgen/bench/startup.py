"""`jaxgen bench startup`: start-up with an empty compilation cache against start-up with a filled one.

Each start is a process of its own, from the first line of Python to the first generated token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from jaxgen.bench import report
from jaxgen.bench.engines import model_options


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark; returns the exit status."""
    settings = {"model": args.model, "repeats": args.repeats, "engine": json.dumps(args.engine_options)}
    record = report.header("startup", settings)
    cold, warm = [], []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory(prefix="jaxgen-bench-cache-") as cache:
            cold.append(_start(args, cache))
            warm.append(_start(args, cache))
    phases = list(cold[0]["phases"])
    columns = {name: _median(runs) for name, runs in (("cold", cold), ("warm", warm))}
    ratio = columns["warm"]["total"] / columns["cold"]["total"]
    record["device"] = cold[0]["device"]
    report.device_line(record["device"])
    report.table(
        ["phase", "cold s", "warm s"],
        [[phase, columns["cold"][phase], columns["warm"][phase]] for phase in phases],
    )
    print(f"\nwarm / cold  {ratio:.1%}")
    return report.finish(record | {"results": [columns | {"ratio": ratio}]})


def _start(args: argparse.Namespace, cache: str) -> dict[str, Any]:
    """One start in a fresh process: its device, and seconds by phase."""
    options = model_options(args) | args.engine_options | {"compilation_cache_dir": cache}
    child = subprocess.run(
        [sys.executable, "-m", "jaxgen.bench.startup_process", repr(time.time()), json.dumps(options)],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if child.returncode != 0:
        raise RuntimeError(f"An engine failed to start (exit status {child.returncode}); see above")
    return json.loads(child.stdout.splitlines()[-1])


def _median(runs: list[dict[str, Any]]) -> dict[str, float]:
    return {phase: statistics.median(run["phases"][phase] for run in runs) for phase in runs[0]["phases"]}
