"""`jaxgen demo`: stream a real completion from the demo model to the terminal."""

from __future__ import annotations

import argparse
import time
from typing import Any

PROMPT = "Explain in a few sentences what a language model is and how it writes text."


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand; its parsed arguments carry `run(args) -> exit status`."""
    parser = subparsers.add_parser("demo", help="stream an answer of SmolLM2-135M-Instruct")
    parser.add_argument("prompt", nargs="?", default=PROMPT, help="what to ask")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    from jaxgen import Engine
    from jaxgen.checkpoint.demo import demo_model_path

    path = demo_model_path()
    started = time.perf_counter()
    print("Starting the engine. The first start compiles; later ones find the result in a cache.", flush=True)
    # One prompt at a time, its tokens in chunks of one size: few steps to compile before the first answer.
    with Engine(
        model_path=str(path),
        max_running_requests=1,
        context_length=2048,
        chunked_prefill_size=128,
        cuda_graph_bs_prefill=[128],
    ) as engine:
        tokenizer = engine.tokenizer_manager.tokenizer
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": args.prompt}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=False,
        )
        ready = time.perf_counter()
        print(f"{path.name}, ready after {ready - started:.1f} s\n\n> {args.prompt}\n", flush=True)
        params = {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens}
        shown, chunk = 0, None
        for chunk in engine.generate(input_ids=ids, sampling_params=params, stream=True):
            print(chunk["text"][shown:], end="", flush=True)
            shown = len(chunk["text"])
        seconds = time.perf_counter() - ready
    tokens = chunk["meta_info"]["completion_tokens"] if chunk else 0
    print(f"\n\n{tokens} tokens in {seconds:.1f} s ({tokens / seconds:.1f} tokens/s)")
    return 0
