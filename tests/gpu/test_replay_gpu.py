"""200 requests at once on a GPU in bfloat16, against the CPU's float32 answers (golden/smollm2/replay.npz)."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from jaxgen import Engine

pytestmark = [pytest.mark.gpu, pytest.mark.real_model]
REPLAY = Path(__file__).parent.parent / "golden" / "smollm2" / "replay.npz"
# What rounding does to these 9,813 tokens, each after the float32 tokens before it, in Hugging Face's own bfloat16
# run: so many stay the best, and the largest lead over the second best that another token made up for. Leads of
# 0.25 to 0.3 were lost in 1 % of the cases, of 0.3 to 0.6 in none of 914.
HF_AGREEMENT, HF_MARGIN = 0.980, 0.28


@dataclass
class Replay:
    """Requests, and of each the greedy tokens and their margins in log-probability over the second best."""

    prompts: list[list[int]]
    outputs: list[list[int]]
    margins: list[np.ndarray]

    @classmethod
    def load(cls) -> "Replay":
        with np.load(REPLAY) as file:

            def rows(name: str, lengths: str) -> list[np.ndarray]:
                return np.split(file[name], np.cumsum(file[lengths], dtype=int)[:-1])

            return cls(
                [row.tolist() for row in rows("prompt_ids", "prompt_lengths")],
                [row.tolist() for row in rows("output_ids", "output_lengths")],
                rows("margins", "output_lengths"),
            )


def first_divergence(found: list[int], wanted: list[int]) -> int | None:
    """Where two outputs part, or None."""
    return next((i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b), None)


def overcome_margins(engine: Engine, replay: Replay) -> list[float]:
    """All requests at once: the margin of the float32 token at each request's first divergence."""
    params = [
        {"temperature": 0.0, "max_new_tokens": len(output), "ignore_eos": True} for output in replay.outputs
    ]
    results = engine.generate(input_ids=replay.prompts, sampling_params=params)
    assert any(result["meta_info"]["cached_tokens"] >= 64 for result in results)
    parted = [first_divergence(r["output_ids"], o) for r, o in zip(results, replay.outputs)]
    return [float(m[at]) for m, at in zip(replay.margins, parted) if at is not None]


def agreement(engine: Engine, replay: Replay) -> float:
    """Share of the float32 tokens that are the best ones after the float32 tokens before them."""
    results = engine.generate(
        input_ids=[prompt + output for prompt, output in zip(replay.prompts, replay.outputs)],
        sampling_params={"temperature": 0.0, "max_new_tokens": 0},
        return_logprob=True,
        logprob_start_len=[len(prompt) - 1 for prompt in replay.prompts],
        top_logprobs_num=1,
    )
    agree = []
    for result, output in zip(results, replay.outputs):
        top = result["meta_info"]["input_top_logprobs"][1:]
        agree += [entry[0][1] == token for entry, token in zip(top, output, strict=True)]
    return float(np.mean(agree))


def start(**options) -> Engine:
    """Default options, but fewer lanes than requests and fewer steps to compile."""
    path = os.environ.get("JAXGEN_TEST_GGUF")
    if path is None:
        from jaxgen.checkpoint.demo import demo_model_path

        path = demo_model_path()
    return Engine(
        model_path=str(path),
        skip_tokenizer_init=True,
        context_length=512,
        max_running_requests=64,
        chunked_prefill_size=2048,
        cuda_graph_bs_decode=[64],
        cuda_graph_bs_prefill=[2048],
        max_total_tokens=32768,  # fewer than all requests have: cached prefixes are evicted
        **options,
    )


def test_200_requests_part_from_float32_only_where_rounding_decides():
    replay = Replay.load()
    with start(dtype="bfloat16", device="cuda") as engine:
        engine.wait_until_compiled()  # launches of several steps are among the last
        margins = overcome_margins(engine, replay)
        share = agreement(engine, replay)
    figures = f"agreement {share:.4f}, {len(margins)} requests part, margins {sorted(margins)[-10:]}"
    print(figures)
    assert share >= HF_AGREEMENT - 0.02, figures
    assert max(margins) <= 2 * HF_MARGIN, (
        figures
    )  # other kernels round otherwise; four leads in five are larger
