"""`jaxgen bench cpu`: tokens per second of a small real model, beside Hugging Face on the same weights."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxgen.bench import report
from jaxgen.bench.engines import generate_seconds, medians, random_prompts, round_up
from jaxgen.bench.hf_export import export
from jaxgen.bench.hf_process import HFProcess
from jaxgen.engine import Engine


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark; returns the exit status."""
    settings = {
        "model": args.model_path,
        "dtype": args.dtype,
        "batch sizes": args.batch_sizes,
        "input": args.input_len,
        "output": args.output_len,
        "repeats": args.repeats,
    }
    record = report.header("cpu", settings)
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(_engine(args))
        record["device"] = report.device()
        hf = stack.enter_context(_hugging_face(args)) if args.compare_hf else None
        rows = [_measure(args, engine, hf, size) for size in args.batch_sizes]
    if hf is None:
        report.table(
            ["batch", "seconds", "tokens/s"],
            [[row["batch"], row["seconds"], row["tokens_per_s"]] for row in rows],
        )
    else:
        record["hugging_face"] = hf.about
        print(f"Hugging Face: {hf.about}\n")
        report.table(
            ["batch", "seconds", "tokens/s", "HF seconds", "HF tokens/s", "ratio", "same tokens"],
            [
                [
                    row["batch"],
                    row["seconds"],
                    row["tokens_per_s"],
                    row["hf_seconds"],
                    row["hf_tokens_per_s"],
                    row["ratio"],
                    f"{row['same_tokens']:.1%}",
                ]
                for row in rows
            ],
        )
    return report.finish(record | {"results": rows})


def _engine(args: argparse.Namespace) -> Engine:
    """An engine whose only buckets are the ones measured; prompts are computed anew in every run."""
    largest = max(args.batch_sizes)
    options = {
        "dtype": args.dtype,
        "skip_tokenizer_init": True,
        "disable_radix_cache": True,
        "strict_compile": True,  # a compile would pass for slow steps
        "context_length": round_up(args.input_len + args.output_len + 16, 16),
        "max_running_requests": largest,
        "cuda_graph_bs_decode": sorted(set(args.batch_sizes)),
        "chunked_prefill_size": round_up(largest * args.input_len, 128),
    }
    return Engine(model_path=args.model_path, **(options | args.engine_options))


@contextlib.contextmanager
def _hugging_face(args: argparse.Namespace) -> Iterator[HFProcess]:
    with tempfile.TemporaryDirectory(prefix="jaxgen-bench-") as scratch:
        model = args.hf_model
        if model is None:
            model = str(Path(scratch) / "model")
            export(args.model_path, model)
        with HFProcess(args.compare_hf, model, args.dtype) as process:
            yield process


def _measure(args: argparse.Namespace, engine: Engine, hf: HFProcess | None, size: int) -> dict[str, Any]:
    vocab_size = engine.tokenizer_manager.model_config.vocab_size
    prompts = random_prompts([args.input_len] * size, vocab_size)
    runs = {"seconds": lambda: generate_seconds(engine, prompts, args.output_len)}
    if hf is not None:
        runs["hf_seconds"] = lambda: hf.generate(prompts, args.output_len)[0]
    for warm_up in runs.values():
        warm_up()
    row: dict[str, Any] = {"batch": size} | medians(runs, args.repeats)
    tokens = size * args.output_len
    row["tokens_per_s"] = tokens / row["seconds"]
    if hf is not None:
        params = {"temperature": 0, "max_new_tokens": args.output_len, "ignore_eos": True}
        ours = [r["output_ids"] for r in engine.generate(input_ids=prompts, sampling_params=params)]
        theirs = hf.generate(prompts, args.output_len)[1]
        same = sum(a == b for left, right in zip(ours, theirs) for a, b in zip(left, right))
        row["hf_tokens_per_s"] = tokens / row["hf_seconds"]
        row["ratio"] = row["hf_seconds"] / row["seconds"]
        row["same_tokens"] = same / tokens
    return row
