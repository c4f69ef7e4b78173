"""Penalties, bias and min_new_tokens through the whole engine, recomputed from the returned hidden states."""

import os
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_engine import GOLDEN, greedy, prompt_of
from workload import assert_idle, strict_engine

VOCAB = 384
REQUESTS = [
    {"frequency_penalty": 1.5},
    {"presence_penalty": -2.0},  # rewards repetition: the same few ids again and again
    {"repetition_penalty": 2.0},
    {"repetition_penalty": 0.5, "frequency_penalty": 0.7, "presence_penalty": 0.3},
    {"logit_bias": {17: 4.0, "20": -3.0, 300: 5.5}, "frequency_penalty": 2.0},
    {"min_new_tokens": 12, "stop_token_ids": list(range(0, VOCAB, 2)), "ignore_eos": False},
    {"min_new_tokens": 5, "repetition_penalty": 1.3, "logit_bias": {1: 30.0}, "ignore_eos": False},
    {},
]


def expected_choice(logits: np.ndarray, params: dict, output: list[int]) -> tuple[int, float]:
    """The greedy token after `output`, and by how much it wins."""
    counts = np.bincount(output, minlength=VOCAB)
    x = logits - params.get("frequency_penalty", 0.0) * counts
    x -= params.get("presence_penalty", 0.0) * (counts > 0)
    if len(output) < params.get("min_new_tokens", 0):
        x[[1, *params.get("stop_token_ids", [])]] = -np.inf
    factor = params.get("repetition_penalty", 1.0)
    x = np.where(counts > 0, np.where(x < 0, x * factor, x / factor), x)
    for token, value in params.get("logit_bias", {}).items():
        x[int(token)] += value
    second, first = np.sort(x)[-2:]
    return int(x.argmax()), first - second


def check(results) -> None:
    embedding = load_file(GOLDEN / "llama3" / "model.safetensors")["model.embed_tokens.weight"].astype(float)
    differs = 0
    for result, params in zip(results, REQUESTS, strict=True):
        output = result["output_ids"]
        vectors = [np.atleast_2d(entry)[-1] for entry in result["meta_info"]["hidden_states"]]
        assert len(vectors) == len(output)
        for step, token in enumerate(output):
            logits = embedding @ vectors[step]  # the fixture ties its embeddings
            choice, margin = expected_choice(logits, params, output[:step])
            assert token == choice or margin < 1e-3, (params, step)
            differs += choice != logits.argmax()
        if not params.get("ignore_eos", True):
            assert len(output) > params["min_new_tokens"]
    assert differs > 20  # the edits decided


def run(engine):
    return engine.generate(
        input_ids=[prompt_of(20, i) for i in range(len(REQUESTS))],
        sampling_params=[greedy(40) | params for params in REQUESTS],
        return_hidden_states=True,
    )


@pytest.mark.parametrize("options", [{}, {"enable_mixed_chunk": True}], ids=str)
def test_every_choice_follows_the_formulas(options):
    with strict_engine(enable_return_hidden_states=True, **options) as engine:
        check(run(engine))
        check(run(engine))  # rows and counts of earlier owners are used again
        assert_idle(engine)


@pytest.mark.parametrize(
    "options", [{}, {"chunked_prefill_size": 16, "cuda_graph_bs_prefill": [16]}], ids=str
)
def test_retraction_keeps_the_counts(options):
    """Each request beside one with a shorter prompt, which leaves every retraction to the longer one."""
    with mock.patch.dict(os.environ, JAXGEN_TEST_RETRACT="7"):
        engine = strict_engine(enable_return_hidden_states=True, **options)
    with engine:
        results = []
        for i, params in enumerate(REQUESTS):
            result, _ = engine.generate(
                input_ids=[prompt_of(20, i), [5]],
                sampling_params=[greedy(40) | params, greedy(100)],
                return_hidden_states=[True, False],
            )
            assert result["meta_info"]["num_retractions"] > 0 or len(result["output_ids"]) < 10
            results.append(result)
        check(results)
        assert_idle(engine)
