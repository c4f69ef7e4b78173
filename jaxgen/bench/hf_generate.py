"""Times Hugging Face `generate`; run by `jaxgen bench cpu --compare-hf PYTHON` with that interpreter.

Not imported by jaxgen: it needs torch and transformers, and knows nothing of the package it lies in. Arguments:
model directory, dtype. Reads one JSON object a line, {"prompts": [[id]], "new_tokens": n}, all prompts of one
length; answers one JSON line each. The first line it writes says what it runs on.
"""

import json
import os
import sys
import time

import torch
import transformers


def main() -> None:
    model_path, dtype = sys.argv[1:]
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype)).eval()
    config = model.generation_config
    config.do_sample, config.eos_token_id, config.pad_token_id = False, None, 0
    config.temperature = config.top_p = config.top_k = None
    about = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        ids = torch.tensor(request["prompts"])
        started = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=request["new_tokens"]
            )
        seconds = time.perf_counter() - started
        new = output[:, ids.shape[1] :].tolist()
        print(json.dumps({"seconds": seconds, "output_ids": new}), flush=True)


if __name__ == "__main__":
    main()
