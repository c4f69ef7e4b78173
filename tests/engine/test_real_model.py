"""A real checkpoint in, right text out: SmolLM2-135M-Instruct against Hugging Face in float32."""

import json

import numpy as np
import pytest
from tiny_engine import GOLDEN, greedy, values

from jaxgen import Engine
from jaxgen.checkpoint import CheckpointError
from jaxgen.checkpoint.demo import demo_model_path

pytestmark = pytest.mark.real_model
CASES = json.loads((GOLDEN / "smollm2" / "golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def engine():
    try:
        path = demo_model_path()
    except CheckpointError as error:
        pytest.skip(str(error))
    with Engine(
        model_path=str(path),
        dtype="float32",
        max_running_requests=4,
        context_length=512,
        chunked_prefill_size=64,
        cuda_graph_bs_decode=[4],
        cuda_graph_bs_prefill=[64],
    ) as engine:
        yield engine


def test_texts_become_hugging_faces_tokens_and_text(engine):
    texts = [case for case in CASES if case["text"] is not None]
    outputs = engine.generate([case["text"] for case in texts], greedy(32), return_prompt_token_ids=True)
    for case, output in zip(texts, outputs):
        assert output["prompt_token_ids"] == case["input_ids"], case["name"]
        assert output["output_ids"] == case["output_ids"], case["name"]


def test_greedy_tokens_and_log_probabilities_equal_hugging_face(engine):
    outputs = engine.generate(
        input_ids=[case["input_ids"] for case in CASES],
        sampling_params=greedy(32),
        return_logprob=True,
        logprob_start_len=0,
    )
    for case, output in zip(CASES, outputs):
        assert output["output_ids"] == case["output_ids"], case["name"]
        meta = output["meta_info"]
        np.testing.assert_allclose(values(meta["input_token_logprobs"]), case["input_logprobs"], atol=2e-3)
        np.testing.assert_allclose(values(meta["output_token_logprobs"]), case["output_logprobs"], atol=2e-3)


def test_a_streamed_chat_answer_is_the_whole_answer(engine):
    tokenizer = engine.tokenizer_manager.tokenizer
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    params = {"temperature": 0.0, "max_new_tokens": 24}
    chunks = list(engine.generate(input_ids=ids, sampling_params=params, stream=True))
    assert "Paris" in chunks[-1]["text"]
    assert chunks[-1]["meta_info"]["finish_reason"]["type"] == "stop"
    assert chunks[-1]["text"] == engine.generate(input_ids=ids, sampling_params=params)["text"]
