"""Make golden.json: what Hugging Face transformers computes in float32 for the demo model.

Run it with torch, transformers, accelerate and gguf installed (none of which the tests need)::

    python make_golden.py PATH/TO/SmolLM2-135M-Instruct.Q4_1.gguf

The prompts have no digits: transformers' own conversion of the tokenizer does not split those one by one,
as the model's tokenizer does.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 32
PROMPTS = {
    "plain": "The capital of France is",
    "code": "def fibonacci(n):\n    ",
    "chat": "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "unicode": "La théorie de l'évolution, 進化論, объясняет 🧬",
}


def main() -> None:
    path = Path(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    cases = []
    for name, text in PROMPTS.items():
        ids = tokenizer(text, add_special_tokens=False).input_ids
        output_ids = list(ids)
        output_logprobs, margins = [], []
        with torch.no_grad():
            prompt = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            for _ in range(NEW_TOKENS):  # no KV cache and no generation settings: plain argmax
                logprobs = model(torch.tensor([output_ids]), use_cache=False).logits[0, -1].log_softmax(-1)
                best = logprobs.topk(2)
                output_ids.append(int(best.indices[0]))
                output_logprobs.append(float(best.values[0]))
                margins.append(float(best.values[0] - best.values[1]))
        cases.append(
            {
                "name": name,
                "text": text,
                "input_ids": ids,
                # log p(input_ids[i + 1] | input_ids[: i + 1])
                "input_logprobs": [round(float(prompt[i, token]), 6) for i, token in enumerate(ids[1:])],
                "output_ids": output_ids[len(ids) :],
                "output_logprobs": [round(x, 6) for x in output_logprobs],
                "smallest_margin": round(min(margins), 6),  # between the best and the second-best token
            }
        )
    Path(__file__).with_name("golden.json").write_text(json.dumps(cases, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
