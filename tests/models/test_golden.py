"""Every family computes what Hugging Face computes, however the prompt is cut and wherever its pages are."""

import numpy as np
import pytest

from tests.models.harness import FAMILIES, golden_runner, load_cases, run_cases


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
