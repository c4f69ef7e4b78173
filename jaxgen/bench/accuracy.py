"""`jaxgen bench accuracy`: what each quantisation does to the log-probabilities of given tokens."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.bench import report
from jaxgen.bench.engines import greedy, round_up
from jaxgen.engine import Engine
from jaxgen.server_args_checks import QUANTIZATIONS


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark; returns the exit status."""
    sequences = read_sequences(Path(args.sequences))
    settings = {"model": args.model, "dtype": args.dtype, "sequences": args.sequences}
    record = report.header("accuracy", settings)
    reference = _score(args, sequences, args.dtype, "unquant")
    record["device"] = report.device()
    rows = [compare("unquant", reference, reference)]
    if args.dtype != "float32":  # what rounding does by itself
        rows.append(compare("unquant, float32", _score(args, sequences, "float32", "unquant"), reference))
    for name in QUANTIZATIONS:
        if name != "unquant":
            rows.append(compare(name, _score(args, sequences, args.dtype, name), reference))
    report.table(
        ["quantization", "weights, MB", "mean |delta logprob|", "99 %", "same best token", "perplexity"],
        [
            [
                row["quantization"],
                row["weight_bytes"] / 1e6,
                row["mean_difference"],
                row["p99_difference"],
                f"{row['same_best']:.1%}",
                row["perplexity"],
            ]
            for row in rows
        ],
    )
    return report.finish(record | {"tokens": rows[0]["tokens"], "results": rows})


def read_sequences(path: Path) -> list[list[int]]:
    """Token ids from a JSON list: of lists of ids, or of objects with `input_ids` and perhaps `output_ids`.

    Raises ValueError for a file that is neither.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        sequences = [
            entry["input_ids"] + entry.get("output_ids", []) if isinstance(entry, dict) else list(entry)
            for entry in entries
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"--sequences {path}: no JSON list of token sequences: {error!r}") from None
    if not sequences or min(map(len, sequences)) < 2:
        raise ValueError(f"--sequences {path}: every sequence needs two tokens or more")
    return sequences


def compare(name: str, found: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """One row: the differences of two scores of the same tokens, in nats."""
    difference = np.abs(found["logprobs"] - reference["logprobs"])
    return {
        "quantization": name,
        "tokens": len(difference),
        "weight_bytes": found["weight_bytes"],
        "mean_difference": float(difference.mean()),
        "p99_difference": float(np.quantile(difference, 0.99)),
        "same_best": float((found["best"] == reference["best"]).mean()),
        "perplexity": float(np.exp(-found["logprobs"].mean())),
    }


def _score(
    args: argparse.Namespace, sequences: list[list[int]], dtype: str, quantization: str
) -> dict[str, Any]:
    """Log-probabilities and most probable ids of every token but each sequence's first."""
    longest = max(map(len, sequences))
    options = {
        "dtype": dtype,
        "load_format": args.load_format or "auto",
        "skip_tokenizer_init": True,
        "context_length": round_up(longest + 16, 16),
        "max_running_requests": min(8, len(sequences)),
        "cuda_graph_bs_decode": [min(8, len(sequences))],
        "quantization": quantization,
    }
    with Engine(model_path=args.model, **(options | args.engine_options)) as engine:
        results = engine.generate(
            input_ids=sequences,
            sampling_params=greedy(1),
            return_logprob=True,
            logprob_start_len=0,
            top_logprobs_num=1,
        )
        memory = engine.get_server_info()["internal_states"][0]["memory_usage"]
    meta = [result["meta_info"] for result in results]
    return {
        "logprobs": np.array([entry[0] for m in meta for entry in m["input_token_logprobs"][1:]]),
        "best": np.array([entry[0][1] for m in meta for entry in m["input_top_logprobs"][1:]]),
        "weight_bytes": memory["weight_bytes"],
    }
