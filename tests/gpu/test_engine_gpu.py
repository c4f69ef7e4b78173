"""The engine on a real GPU: the greedy path against Hugging Face, in float32 and in bfloat16."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgen import Engine
from jaxgen.execution import common_prefix

pytestmark = pytest.mark.gpu
GOLDEN = Path(__file__).parent.parent / "golden"
FAMILIES = ("llama2", "llama3", "qwen2", "qwen3", "mistral")
# Mean |d logprob| of Hugging Face's own bfloat16 run over the same sequences, and its greedy agreement.
HF_BFLOAT16_ERROR, HF_BFLOAT16_AGREEMENT = 0.039, 0.961
GREEDY = {"temperature": 0.0, "max_new_tokens": 32, "ignore_eos": True}


def start(path, dtype: str, **options) -> Engine:
    small = {
        "max_running_requests": 8,
        "chunked_prefill_size": 128,
        "cuda_graph_bs_decode": [8],
        "cuda_graph_bs_prefill": [128],
        "max_total_tokens": 4096,
    }
    return Engine(
        model_path=str(path), skip_tokenizer_init=True, dtype=dtype, device="cuda", **(small | options)
    )


def input_logprobs(output: dict) -> np.ndarray:
    return np.array([value for value, *_ in output["meta_info"]["input_token_logprobs"][1:]])


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_checkpoints_give_hugging_faces_tokens_in_float32(family):
    cases = json.loads((GOLDEN / family / "expected.json").read_text(encoding="utf-8"))["cases"]
    with start(GOLDEN / family, "float32") as engine:
        outputs = engine.generate(
            input_ids=[case["prompt_ids"] for case in cases],
            sampling_params=GREEDY,
            return_logprob=True,
            logprob_start_len=0,
        )
    for case, output in zip(cases, outputs):
        assert output["output_ids"] == case["greedy_ids"]
        found = input_logprobs(output)
        np.testing.assert_allclose(found, case["prompt_logprobs"][-len(found) :], atol=1e-3)


def real_model() -> str:
    if path := os.environ.get("JAXGEN_TEST_GGUF"):
        return path
    from jaxgen.checkpoint.demo import demo_model_path

    return str(demo_model_path())


@pytest.mark.real_model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_real_model_agrees_with_hugging_face_in_float32(dtype):
    cases = json.loads((GOLDEN / "smollm2" / "golden.json").read_text(encoding="utf-8"))
    exact = dtype == "float32"
    with start(real_model(), dtype, context_length=512) as engine:
        outputs = engine.generate(input_ids=[c["input_ids"] for c in cases], sampling_params=GREEDY)
        scored = engine.generate(
            input_ids=[c["input_ids"] + c["output_ids"] for c in cases],
            sampling_params={"temperature": 0.0, "max_new_tokens": 0},
            return_logprob=True,
            logprob_start_len=0,
            top_logprobs_num=1,
        )
    if exact:
        assert [o["output_ids"] for o in outputs] == [c["output_ids"] for c in cases]
    agree, errors = [], []
    for case, output in zip(cases, scored):
        meta, start_of_output = output["meta_info"], len(case["input_ids"])
        errors.append(input_logprobs(output) - (case["input_logprobs"] + case["output_logprobs"]))
        top = meta["input_top_logprobs"][start_of_output:]
        agree += [entry[0][1] == token for entry, token in zip(top, case["output_ids"])]
    error = np.abs(np.concatenate(errors))
    if exact:
        assert all(agree)
        assert error.max() < 5e-3
    else:
        figures = f"agreement {np.mean(agree):.3f}, mean |d logprob| {error.mean():.4f}"
        assert np.mean(agree) >= HF_BFLOAT16_AGREEMENT - 0.02, figures
        assert error.mean() <= 1.5 * HF_BFLOAT16_ERROR, figures


@pytest.mark.real_model
def test_lanes_with_a_common_prefix_give_the_tokens_of_lanes_that_read_it_each(monkeypatch):
    """As often as bfloat16 lets two ways of summing agree."""
    monkeypatch.setattr(common_prefix, "LEAST_BYTES", 1)
    cases = json.loads((GOLDEN / "smollm2" / "golden.json").read_text(encoding="utf-8"))
    text = [token for case in cases for token in case["input_ids"] + case["output_ids"]]
    prefix = (text * 4)[:400]
    prompts = [prefix + text[start : start + 3 + start % 17] for start in range(40)]
    found = []
    for shares in (True, False):
        if not shares:
            monkeypatch.setattr(common_prefix.PrefixSharing, "buckets", lambda *_: ())
        with start(
            real_model(),
            "bfloat16",
            max_running_requests=40,
            context_length=512,
            cuda_graph_bs_decode=[40],
            cuda_graph_bs_prefill=[1024],
            chunked_prefill_size=1024,
            max_total_tokens=32768,
        ) as engine:
            assert engine.wait_until_compiled()
            used, run = set(), engine._runner._run
            engine._runner._run = lambda key, packed, used=used, run=run: used.add(key) or run(key, packed)
            outputs = engine.generate(input_ids=prompts, sampling_params=GREEDY)
        assert any(key.shared for key in used) == shares
        found.append(np.array([output["output_ids"] for output in outputs]))
    first, second = (ids[:, :4] for ids in found)  # later ones part for good where one differs
    assert (first == second).mean() >= HF_BFLOAT16_AGREEMENT**2, (first == second).mean(axis=0)


def test_shutdown_returns_the_device_memory():
    device = jax.devices("gpu")[0]
    start(GOLDEN / "llama3", "bfloat16").shutdown()  # what the process keeps for good is taken by now
    before = device.memory_stats()["bytes_in_use"]
    engine = start(GOLDEN / "llama3", "bfloat16")
    engine.generate(input_ids=[[5, 6, 7]], sampling_params=GREEDY)
    assert device.memory_stats()["bytes_in_use"] > before
    engine.shutdown()
    assert device.memory_stats()["bytes_in_use"] <= before
