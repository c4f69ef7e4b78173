"""`jaxgen bench kernels`: the operations of `kernels_pallas` on the GPU, each beside its floor."""

from __future__ import annotations

import argparse

from jaxgen.bench import plot, report
from kernels_pallas import bench


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark; returns the exit status."""
    unknown = set(args.ops) - set(bench.BENCHES)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: the operations are {', '.join(bench.BENCHES)}")
    if args.plot:
        plot.check(args.plot)
    record = report.header("kernels", {"ops": args.ops or list(bench.BENCHES), "repeats": args.repeats})
    record["device"] = report.device()
    measured = bench.measure(args.ops, args.repeats)
    if args.plot:
        bars = [
            plot.Bar(row["case"], f"{row['op']}, us", row["us"], row["floor_us"]) for row in measured["rows"]
        ]
        plot.save(args.plot, f"kernels_pallas, {record['device']['kind']}", bars)
    return report.finish(record | {"rates": measured["rates"], "results": measured["rows"]})
