"""Measures the kernels' configurations on the GPU at hand: `python -m kernels_pallas.tune [op ...]`.

For each shape the default and every candidate that the kernel names are timed. One that is faster beyond
doubt, and gives the same results, goes into the tuning table of this GPU; where none is, the default stays and
the table has no entry. Entries of other shapes are kept.
"""

import argparse
import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import (
    bench,
    bench_decode,
    bench_linear,
    paged_decode_update,
    ragged_prefill,
    sample,
    tuning,
)

MARGIN = 0.02  # a candidate must gain this share: less is noise
TOLERANCE = 2e-2  # of bfloat16 results
TOP_P = (1.0, 2**30, 0.95, 0.0)  # temperature, top_k, top_p, min_p


@dataclass(frozen=True)
class Task:
    """One shape of an op: `seconds(repeats)` times a call of it, `result()` is what a call gives."""

    op: str
    name: str
    seconds: Callable[[int], float]
    result: Callable[[], jax.Array]


@dataclass(frozen=True)
class Found:
    """The fastest configuration of a shape; None where the default is."""

    op: str
    shape: tuning.Shape
    config: Any | None
    us: float
    default_us: float


def decode_tasks(args: argparse.Namespace) -> Iterator[Task]:
    for heads in args.heads:
        for lanes in args.lanes:
            case = bench_decode.DecodeCase(f"{lanes} x {args.length}", (args.length,) * lanes, *heads)

            def result(case: bench_decode.DecodeCase = case) -> jax.Array:
                pages, (qkv, lengths, cos, sin), tables = bench_decode.decode_inputs(case)
                return jax.jit(_fresh(paged_decode_update))(qkv, *pages, tables[0], lengths, cos, sin)[0]

            seconds = functools.partial(bench_decode.time_update, case, paged_decode_update)
            yield Task("paged_decode", _name(case.name, heads), seconds, result)


def prefill_tasks(args: argparse.Namespace) -> Iterator[Task]:
    for heads in args.heads:
        for tokens in args.tokens:
            rows = max(1, tokens // args.length)
            case = bench.PrefillCase(f"{rows} x {tokens // rows}", ((tokens // rows, 0),) * rows, *heads)

            def result(case: bench.PrefillCase = case) -> jax.Array:
                return jax.jit(_fresh(ragged_prefill))(*bench.prefill_inputs(case))

            seconds = functools.partial(bench.time_prefill, case, ragged_prefill)
            yield Task("ragged_prefill", _name(case.name, heads), seconds, result)


def sample_tasks(args: argparse.Namespace) -> Iterator[Task]:
    for vocab_size in args.vocab:
        for lanes in args.lanes:

            def result(lanes: int = lanes, vocab_size: int = vocab_size) -> jax.Array:
                options, logits = bench.sample_inputs(lanes, vocab_size, TOP_P)
                seeds = jnp.arange(lanes, dtype=jnp.int32)
                return jax.jit(_fresh(sample))(logits[0], *options, seeds, seeds)

            seconds = functools.partial(bench.time_sample, lanes, vocab_size, TOP_P, sample)
            yield Task("sample", f"{lanes} x {vocab_size}", seconds, result)


def linear_tasks(args: argparse.Namespace) -> Iterator[Task]:
    for case in bench_linear.LAYERS:
        for lanes in (lanes for lanes in args.lanes if lanes > 1):
            for name in case.shapes():
                seconds = functools.partial(bench_linear.time_product, case, name, lanes)
                result = functools.partial(bench_linear.product_result, case, name, lanes)
                yield Task("fused_linear", f"{case.name} {name}, {lanes} tokens", seconds, result)


TASKS = {"decode": decode_tasks, "prefill": prefill_tasks, "sample": sample_tasks, "linear": linear_tasks}


def _fresh(function: Callable) -> Callable:
    """The function under an identity of its own: `jax.jit` would find the trace of another configuration."""
    return lambda *args: function(*args)


def _name(case: str, heads: tuple[int, int, int]) -> str:
    return "{}, {}/{} x {}".format(case, *heads)


def tune(task: Task, repeats: int) -> Found:
    """Times the default and all candidates of a task, printing each.

    Raises RuntimeError for an op that asked for no configuration: it has nothing to tune, or its kernel cannot
    run here.
    """
    with tuning.trying(task.op) as trial:
        default_seconds = task.seconds(repeats)
    if trial.shape is None:
        raise RuntimeError(f"{task.op} at {task.name} asks for no configuration")
    print(f"{task.op} {task.name}\n{default_seconds * 1e6:11.1f} us   default {trial.default}", flush=True)
    timed = []
    for config in trial.candidates:
        if config == trial.default:
            continue
        try:
            with tuning.trying(task.op, config):
                seconds = task.seconds(repeats)
        except Exception as error:  # whatever the compiler refuses is no candidate
            print(f"{'refused':>14}   {config}: {str(error).partition(chr(10))[0][:200]}", flush=True)
            continue
        print(f"{seconds * 1e6:11.1f} us   {config}", flush=True)
        if seconds < default_seconds * (1 - MARGIN):
            timed.append((seconds, config))
    seconds, config = _fastest_right(task, timed) or (default_seconds, None)
    return Found(task.op, trial.shape, config, seconds * 1e6, default_seconds * 1e6)


def _fastest_right(task: Task, timed: Sequence[tuple[float, Any]]) -> tuple[float, Any] | None:
    """The fastest of (seconds, config) that gives what the default gives; None if none does."""
    if not timed:
        return None
    with tuning.trying(task.op):
        wanted = task.result()
    for seconds, config in sorted(timed, key=lambda item: item[0]):
        with tuning.trying(task.op, config):
            found = task.result()
        if _same(found, wanted):
            return seconds, config
        print(f"{'wrong result':>14}   {config}", flush=True)
    return None


def _same(found: jax.Array, wanted: jax.Array) -> bool:
    if jnp.issubdtype(wanted.dtype, jnp.integer):
        return np.array_equal(found, wanted)
    values = np.asarray(wanted, np.float32)
    return np.allclose(np.asarray(found, np.float32), values, TOLERANCE, TOLERANCE * np.abs(values).max())


def save(path: Path, device: str, results: Iterable[Found]) -> None:
    """Writes results into the table at `path`, in place of earlier ones for the same shapes."""
    ops = tuning.read_ops(path)
    for found in results:
        entries = [entry for entry in ops.get(found.op, []) if entry["shape"] != dict(found.shape)]
        if found.config is not None:
            entries.append(
                {
                    "shape": dict(found.shape),
                    "config": dataclasses.asdict(found.config),
                    "us": round(found.us, 1),
                    "default_us": round(found.default_us, 1),
                }
            )
        entries.sort(key=lambda entry: list(entry["shape"].values()))
        ops[found.op] = entries
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(_text({"device": device, "jax": jax.__version__, "ops": ops}))
    os.replace(scratch, path)


def _text(table: dict[str, Any]) -> str:
    """JSON with an entry on each line."""
    ops = ",\n".join(
        f"  {json.dumps(op)}: [\n" + ",\n".join(f"   {json.dumps(entry)}" for entry in entries) + "\n  ]"
        for op, entries in table["ops"].items()
        if entries
    )
    head = ",\n".join(f" {json.dumps(key)}: {json.dumps(table[key])}" for key in ("device", "jax"))
    return f'{{\n{head},\n "ops": {{\n{ops}\n }}\n}}\n'


def _heads(text: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected QUERY/KVxDIM, for example 32/8x128, not {text!r}")
    query, kv, dim = map(int, match.groups())
    return query, kv, dim


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels_pallas.tune", description=__doc__)
    parser.add_argument("ops", nargs="*", choices=[[], *TASKS], help="operations to tune (default: all)")
    parser.add_argument("--heads", type=_heads, nargs="+", default=[(32, 8, 128), (14, 2, 64)])
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 8, 64, 256], help="of decode and sample")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192], help="of a prefill step")
    parser.add_argument("--length", type=int, default=1024, help="of a lane, or of a prompt")
    parser.add_argument("--vocab", type=int, nargs="+", default=[128_256, 151_936])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="default: the table that the kernels read")
    args = parser.parse_args(argv)
    device = jax.devices()[0]
    if device.platform != "gpu":
        parser.error(f"the kernels run on a GPU, and the device is a {device.platform}")
    path = args.out or tuning.table_path(device.device_kind)
    for op in args.ops or TASKS:
        for task in TASKS[op](args):
            save(path, device.device_kind, [tune(task, args.repeats)])
    print(path)


if __name__ == "__main__":
    main()
