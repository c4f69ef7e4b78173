"""Every family computes what Hugging Face computes, however the prompt is cut and wherever its pages are."""

from dataclasses import replace

import numpy as np
import pytest

from tests.models.harness import FAMILIES, golden_runner, load_cases, load_config, run_cases


def check_against_golden(family: str, tp_size: int = 1) -> None:
    cases = load_cases(family)
    prompts = [case["prompt_ids"] for case in cases]
    new_tokens = len(cases[0]["greedy_ids"])
    prompt_logprobs, greedy, greedy_logprobs = run_cases(golden_runner(family, tp_size), prompts, new_tokens)
    for i, case in enumerate(cases):
        np.testing.assert_allclose(prompt_logprobs[i], case["prompt_logprobs"], rtol=0, atol=1e-4)
        assert greedy[i] == case["greedy_ids"]
        np.testing.assert_allclose(greedy_logprobs[i], case["greedy_logprobs"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_matches_hugging_face(family):
    check_against_golden(family)


@pytest.mark.parametrize(
    ("family", "without"),
    [
        ("llama3", lambda c: {"rope": replace(c.rope, scaling=None)}),
        ("llama_yarn", lambda c: {"rope": replace(c.rope, attention_factor=1.0)}),
        ("llama_yarn", lambda c: {"rope": replace(c.rope, scaling=None)}),
        ("llama_yarn", lambda c: {"attention_out_bias": False}),
        ("llama_yarn", lambda c: {"mlp_bias": False}),
        ("qwen2", lambda c: {"attention_bias": False}),
        ("qwen3", lambda c: {"qk_norm": False}),
        ("qwen3", lambda c: {"sliding_windows": (None,) * c.num_layers}),
        ("mistral", lambda c: {"sliding_windows": tuple(w + 1 for w in c.sliding_windows)}),
    ],
)
def test_fixtures_would_notice_a_missing_feature(family, without):
    config = load_config(family)
    runner = golden_runner(family, config=replace(config, **without(config)))
    case = load_cases(family)[-1]
    prompt_logprobs, _, _ = run_cases(runner, [case["prompt_ids"]], new_tokens=1)
    assert np.abs(prompt_logprobs[0] - case["prompt_logprobs"]).max() > 0.05


def test_tokens_do_not_depend_on_chunks_or_neighbours():
    case = load_cases("mistral")[-1]
    together = run_cases(golden_runner("mistral"), [case["prompt_ids"]] * 3, 4, chunk=5, bucket=16)
    alone = run_cases(golden_runner("mistral"), [case["prompt_ids"]], 4, chunk=64, bucket=64)
    for prompt_logprobs, greedy in zip(together[0], together[1]):
        np.testing.assert_allclose(prompt_logprobs, alone[0][0], rtol=0, atol=1e-4)
        assert greedy == alone[1][0] == case["greedy_ids"][:4]


@pytest.mark.parametrize(("family", "tp_size"), [("llama3", 1), ("llama3", 3), ("qwen3", 1), ("mistral", 1)])
def test_last_tokens_alone_are_what_they_are_among_all(family, tp_size):
    """Of windowed layers, too; the pages are such that decoding goes on from either."""
    prompts = [case["prompt_ids"] for case in load_cases(family)]
    all_tokens, last_tokens = golden_runner(family, tp_size), golden_runner(family, tp_size)
    for start in range(0, max(map(len, prompts)), 7):
        chunks = [(row, ids[start : start + 7], start) for row, ids in enumerate(prompts) if len(ids) > start]
        expected = all_tokens.prefill(chunks, 32)
        found = last_tokens.prefill(chunks, 32, last_only=True)
        for every, last in zip(expected, found, strict=True):
            np.testing.assert_allclose(last, every[-1:], rtol=0, atol=1e-4)
    empty = all_tokens.max_rows - len(prompts)
    tokens, positions = [5] * len(prompts) + [None] * empty, [*map(len, prompts), *[0] * empty]
    expected, found = (runner.decode(tokens, positions) for runner in (all_tokens, last_tokens))
    np.testing.assert_allclose(found[: len(prompts)], expected[: len(prompts)], rtol=0, atol=1e-4)
