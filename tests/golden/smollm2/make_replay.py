"""Make replay.npz: 200 requests and what the engine answers them on a CPU in float32.

From the repository root, with the demo model installed or named::

    JAX_PLATFORMS=cpu python tests/golden/smollm2/make_replay.py [SmolLM2-135M-Instruct.Q4_1.gguf]

The prompts, of 8 to 400 tokens, are prose and code of this repository; every third one begins as others do.
Their ids are in the file, so that it stays valid when the repository's words change. Arrays, requests end to
end: prompt_ids and output_ids (uint16), their lengths, and the margin in log-probability of each output token
over the second best (float16).
"""

import re
import sys
from pathlib import Path

import numpy as np

from jaxgen import Engine
from jaxgen.checkpoint.demo import demo_model_path

ROOT = Path(__file__).parents[3]
REQUESTS = 200
PROMPT_TOKENS = 8, 400
NEW_TOKENS = 32, 64
SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
)


def passages() -> list[str]:
    """Paragraphs of the documentation, and functions and classes of the code."""
    prose = [part for path in ROOT.glob("**/README.md") for part in path.read_text().split("\n\n")]
    code = [
        part
        for path in sorted((ROOT / "jaxgen").glob("*.py"))
        for part in re.split(r"\n\n\n|\n(?=    def )", path.read_text())
    ]
    return [part for part in sorted(prose) + code if len(part) > 80 and not part.startswith("|")]


def prompts(tokenizer, rng: np.random.Generator) -> list[list[int]]:
    found = passages()
    picked = [found[i] for i in rng.permutation(len(found))]
    low, high = PROMPT_TOKENS

    def tokens(length: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < length:
            ids += tokenizer.encode(picked.pop() + "\n\n")
        return ids[:length]

    shared = [tokenizer.encode(SYSTEM), tokens(64), tokens(150), tokens(257)]
    result = []
    for index in range(REQUESTS):
        # Short ones are as frequent as long ones.
        length = int(np.exp(rng.uniform(np.log(low), np.log(high + 1))))
        prefix = shared[rng.integers(len(shared))] if index % 3 == 0 else []
        result.append(prefix + tokens(min(length, high - len(prefix))))
    return result


def main() -> None:
    path = sys.argv[1] if len(sys.argv) > 1 else demo_model_path()
    rng = np.random.default_rng(0)
    lengths = rng.integers(NEW_TOKENS[0], NEW_TOKENS[1] + 1, REQUESTS).tolist()
    with Engine(
        model_path=str(path),
        dtype="float32",
        device="cpu",
        context_length=512,
        max_running_requests=32,
        chunked_prefill_size=512,
        cuda_graph_bs_decode=[32],
        cuda_graph_bs_prefill=[512],
    ) as engine:
        ids = prompts(engine.tokenizer_manager.tokenizer, rng)
        outputs = engine.generate(
            input_ids=ids,
            sampling_params=[
                {"temperature": 0.0, "max_new_tokens": length, "ignore_eos": True} for length in lengths
            ],
            return_logprob=True,
            top_logprobs_num=2,
        )
    tops = [row for output in outputs for row in output["meta_info"]["output_top_logprobs"]]
    np.savez_compressed(
        Path(__file__).with_name("replay.npz"),
        prompt_ids=np.concatenate(ids).astype(np.uint16),
        prompt_lengths=np.array([len(row) for row in ids], np.uint16),
        output_ids=np.array([token for output in outputs for token in output["output_ids"]], np.uint16),
        output_lengths=np.array(lengths, np.uint16),
        margins=np.array([best[0] - second[0] for best, second in tops], np.float16),
    )


if __name__ == "__main__":
    main()
