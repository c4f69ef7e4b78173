"""`jaxgen bench latency` and `jaxgen bench offline`: named workloads on one engine, each beside its floor."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from typing import Any

from jaxgen.bench import plot, profiling, report, workloads
from jaxgen.bench.costs import ModelCosts, Rates
from jaxgen.bench.engines import model_options
from jaxgen.bench.floors import floor_seconds
from jaxgen.bench.runs import Run, measure
from jaxgen.bench.workloads import Workload
from jaxgen.checkpoint import open_checkpoint
from jaxgen.engine import Engine
from jaxgen.engine_config import kv_dtype_of, model_config_of, param_dtype_of, pick_mesh, platform_of
from jaxgen.layers.quantization import scheme_named
from jaxgen.models.config import ModelConfig
from jaxgen.server_args import ServerArgs

CONTEXT = 8192
UNITS = {"decode": "ms/step", "prefill": "tok/s", "output": "output tok/s", "prefix": "s"}


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark; returns the exit status."""
    picked = _picked(args)
    if args.plot:
        plot.check(args.plot)
    options = model_options(args) | {"skip_tokenizer_init": True, "context_length": CONTEXT}
    options |= {"dtype": args.dtype} | args.engine_options
    settings = {"scale": args.scale, "repeats": args.repeats}
    record = report.header(args.bench, {key: str(value) for key, value in options.items()} | settings)
    measured: list[tuple[Workload, list[Run]]] = []
    profiles: dict[str, Any] = {}
    with Engine(**options) as engine:
        record["device"] = report.device()
        engine.wait_until_compiled()
        if args.profile:
            profiling.require_gpu()
        for group in workloads.groups(picked, args.scale):
            for workload, runs in zip(group, measure(engine, group, args.repeats)):
                _progress(workload, runs)
                measured.append((workload, runs))
        server_args = engine.server_args
        model = _model_of(server_args)
        if args.profile:
            profiles = _profiles(engine, measured, model.num_layers)
    costs, rates = _floors(server_args, model)
    rows = [
        row
        for workload, runs in measured
        for row in _rows(workload, runs, floor_seconds(workload, costs, rates, server_args.tp_size))
    ]
    _add_costs(rows, measured)
    _print(rows)
    for name, found in profiles.items():
        profiling.show(name, found)
    if args.plot:
        title = f"jaxgen bench {args.bench}, {args.model}, {record['device']['kind']}"
        plot.save(args.plot, title, _bars(rows))
    results = record | {"rates": dataclasses.asdict(rates), "results": rows}
    return report.finish(results | ({"profiles": profiles} if profiles else {}))


def _picked(args: argparse.Namespace) -> list[Workload]:
    """The workloads asked for; giving the shape of a custom one asks for that one."""
    shape = (args.requests, args.input_len, args.output_len)
    default = (workloads.CUSTOM,) if any(shape) else workloads.SUITES[args.bench]
    names = args.workloads or default
    if any(shape) and workloads.CUSTOM not in names:
        raise ValueError(
            "--requests, --input-len and --output-len shape the workload `custom`, which is not run"
        )
    requests, input_len, output_len = shape
    chosen = {
        workloads.CUSTOM: lambda: workloads.custom(
            args.bench, requests or 32, input_len or (1024, 1024), output_len or (128, 128)
        )
    }
    return [chosen[name]() if name in chosen else workloads.WORKLOADS[name] for name in names]


def _model_of(args: ServerArgs) -> ModelConfig:
    checkpoint = open_checkpoint(args.model_path, args.load_format)
    return model_config_of(args, checkpoint.config, checkpoint.generation_config)


def _floors(args: ServerArgs, model: ModelConfig) -> tuple[ModelCosts, Rates]:
    """The model in bytes and operations under an engine's resolved arguments, and the device's measured rates.

    To be called after the engine's end: the measurement needs memory that the engine would hold.
    """
    dtype = param_dtype_of(args, model, platform_of(pick_mesh(args)))
    scheme = scheme_named(args.quantization)
    rates = Rates.measure(scheme.dtype if scheme is not None and scheme.activations else dtype)
    print(
        f"measured  reads {rates.read_bytes_per_s / 1e9:,.1f} GB/s, "
        f"multiplies {rates.matrix_flops / 1e9:,.1f} GFLOP/s\n"
    )
    layer_dtype = scheme.dtype if scheme is not None else None
    return ModelCosts.of(model, dtype, kv_dtype_of(args, dtype), layer_dtype), rates


def _median(runs: list[Run], figure: str) -> float:
    return statistics.median(run.seconds[figure] for run in runs)


def _rows(workload: Workload, runs: list[Run], floors: dict[str, float]) -> list[dict[str, Any]]:
    """One row for each figure of a workload that has a floor."""
    inputs, outputs = workload.lengths()
    rows = []
    for figure, floor in floors.items():
        seconds = _median(runs, figure)
        row: dict[str, Any] = {
            "workload": f"{workload.name} {figure}" if len(floors) > 1 else workload.name,
            "requests": workload.requests,
            "input_tokens": sum(inputs) + workload.prefix * workload.requests,
            "output_tokens": sum(outputs),
            "measured": _value(workload, seconds),
            "unit": UNITS[workload.measure],
            "floor": _value(workload, floor),
            "of_floor": floor / seconds,
            "cost": None,
            "seconds": [run.seconds[figure] for run in runs],
            "compiles": max(run.compiles for run in runs),
        }
        if workload.measure == "decode":
            row["first_token_seconds"] = _median(runs, "first token")
        rows.append(row)
    return rows


def _value(workload: Workload, seconds: float) -> float:
    """A figure in the workload's unit."""
    inputs, outputs = workload.lengths()
    tokens = {"prefill": sum(inputs), "output": sum(outputs)}
    if workload.measure in tokens:
        return tokens[workload.measure] / seconds
    return seconds * 1e3 if workload.measure == "decode" else seconds


def _add_costs(rows: list[dict[str, Any]], measured: list[tuple[Workload, list[Run]]]) -> None:
    """Throughput lost against the baseline, as a share, for workloads that have one."""
    steps = {row["workload"]: row["measured"] for row in rows}
    baselines = {workload.name: workload.baseline for workload, _ in measured if workload.baseline}
    for row in rows:
        if baseline := baselines.get(row["workload"]):
            row["cost"] = 1 - steps[baseline] / row["measured"]


def _progress(workload: Workload, runs: list[Run]) -> None:
    """One line as soon as a workload is measured: the table comes last, and much later."""
    figures = ", ".join(f"{figure} {_median(runs, figure):.4g} s" for figure in runs[0].seconds)
    print(f"{workload.name}: {figures}", file=sys.stderr, flush=True)


def _profiles(engine: Engine, measured: list[tuple[Workload, list[Run]]], num_layers: int) -> dict[str, Any]:
    profiling.warm_up(engine)
    return {
        workload.name: dataclasses.asdict(
            profiling.decode(engine, workload, _median(runs, "decode"), num_layers)
        )
        for workload, runs in measured
        if workload.measure == "decode"
    }


def _print(rows: list[dict[str, Any]]) -> None:
    def percent(share: float | None) -> str:
        return "-" if share is None else f"{share:.1%}"

    report.table(
        ["workload", "requests", "in", "out", "measured", "floor", "unit", "of floor", "cost", "compiles"],
        [
            [
                *(row[key] for key in ("workload", "requests", "input_tokens", "output_tokens")),
                *(row[key] for key in ("measured", "floor", "unit")),
                percent(row["of_floor"]),
                percent(row["cost"]),
                row["compiles"],
            ]
            for row in rows
        ],
    )


def _bars(rows: list[dict[str, Any]]) -> list[plot.Bar]:
    return [plot.Bar(row["workload"], row["unit"], row["measured"], row["floor"]) for row in rows]
