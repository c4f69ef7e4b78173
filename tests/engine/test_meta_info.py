"""The exact keys of results and of streamed chunks."""

import math
import threading
import time

import pytest
from tiny_engine import greedy, prompt_of

ALWAYS = {
    "id",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "cached_tokens_details",
    "reasoning_tokens",
    "num_retractions",
    "weight_version",
    "dp_rank",
    "cache_miss_count",
}
FINISHED = {"e2e_latency", "response_sent_to_client_ts", "weight_versions"}
LOGPROBS = {"input_token_logprobs", "output_token_logprobs", "output_token_logprobs_length"}
TOP = {"input_top_logprobs", "output_top_logprobs"}
SELECTED = {"input_token_ids_logprobs", "output_token_ids_logprobs"}

OPTIONS = {
    "plain": ({}, set()),
    "options without return_logprob": ({"top_logprobs_num": 2, "token_ids_logprob": [5]}, set()),
    "logprobs": ({"return_logprob": True}, LOGPROBS),
    "top logprobs": ({"return_logprob": True, "top_logprobs_num": 2}, LOGPROBS | TOP),
    "logprobs of ids": ({"return_logprob": True, "token_ids_logprob": [5]}, LOGPROBS | SELECTED),
    "all logprobs": (
        {"return_logprob": True, "top_logprobs_num": 2, "token_ids_logprob": [5], "logprob_start_len": 0},
        LOGPROBS | TOP | SELECTED,
    ),
    "hidden states": ({"return_hidden_states": True}, {"hidden_states"}),
    "last hidden state": ({"return_hidden_states": "last"}, {"hidden_states"}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_keys_of_results_and_chunks(engine, option):
    arguments, extra = OPTIONS[option]
    result = engine.generate("The fox", greedy(4), **arguments)
    assert set(result) == {"text", "output_ids", "meta_info"}
    assert set(result["meta_info"]) == ALWAYS | FINISHED | extra
    *middle, last = engine.generate("The fox", greedy(60), stream=True, **arguments)
    assert middle
    for chunk in middle:
        assert set(chunk) == {"text", "output_ids", "meta_info"}
        assert set(chunk["meta_info"]) == ALWAYS | extra
        assert chunk["meta_info"]["finish_reason"] is None
    assert set(last["meta_info"]) == ALWAYS | FINISHED | extra
    for chunk in engine.generate(["The fox", "A dog"], greedy(4), stream=True, **arguments):
        assert set(chunk) == {"text", "output_ids", "meta_info", "index"}
    with_ids = engine.generate("The fox", greedy(4), return_prompt_token_ids=True, **arguments)
    assert set(with_ids) == {"text", "output_ids", "meta_info", "prompt_token_ids"}


def test_the_last_chunk_equals_the_whole_result(engine):
    arguments, _ = OPTIONS["all logprobs"]
    whole = engine.generate("The fox", greedy(6), return_hidden_states=True, **arguments)
    engine.flush_cache()
    *_, last = engine.generate("The fox", greedy(6), return_hidden_states=True, stream=True, **arguments)
    assert (last["text"], last["output_ids"]) == (whole["text"], whole["output_ids"])
    differ = {"id", "e2e_latency", "response_sent_to_client_ts"}
    for key in set(whole["meta_info"]) - differ:
        assert last["meta_info"][key] == whole["meta_info"][key], key


def test_values(engine):
    before = time.time()
    meta = engine.generate("The fox", greedy(4))["meta_info"]
    assert meta["finish_reason"] == {"type": "length", "length": 4}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (3, 4, 0)
    assert (meta["reasoning_tokens"], meta["num_retractions"], meta["cache_miss_count"]) == (0, 0, 0)
    assert meta["cached_tokens_details"] is None and meta["dp_rank"] is None
    assert meta["weight_version"] == "default"
    assert meta["weight_versions"] == [{"version": "default", "start": 0, "end": 4}]
    assert 0 < meta["e2e_latency"] < time.time() - before + 1e-3
    assert before <= meta["response_sent_to_client_ts"] <= time.time()


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("stream", [False, True])
def test_keys_of_aborted_requests(engine, option, stream):
    """One request is aborted while it runs, the others while they wait behind it."""
    arguments, extra = OPTIONS[option]
    prompts = [prompt_of(150, seed) for seed in range(12)]  # more than run at once
    results = {}

    def call():
        outputs = engine.generate(
            input_ids=prompts, sampling_params=greedy(100), rid="many", stream=stream, **arguments
        )
        results.update(
            (output["meta_info"]["id"], output)
            for output in outputs
            if output["meta_info"]["finish_reason"] is not None
        )

    thread = threading.Thread(target=call)
    thread.start()
    while not engine.get_server_info()["internal_states"][0]["waiting_queue_size"]:
        time.sleep(0.001)
    engine.abort_request("many")
    thread.join()
    assert len(results) == 12
    messages = set()
    for index in range(12):
        output = results[f"many_{index}"]
        meta = output["meta_info"]
        assert set(meta) == ALWAYS | FINISHED | extra
        reason = meta["finish_reason"]
        if reason["type"] != "abort":
            continue  # it was quicker
        messages.add(reason["message"])
        assert reason["status_code"] is None and reason["err_type"] is None
        assert meta["prompt_tokens"] == 150
        assert meta["completion_tokens"] == len(output["output_ids"])
        if reason["message"] == "Abort in waiting queue":
            assert output["text"] == "" and output["output_ids"] == []
        if "output_token_logprobs" in meta:
            assert len(meta["output_token_logprobs"]) == len(output["output_ids"])
        for entry in meta.get("input_token_logprobs", [])[1:]:
            assert math.isfinite(entry[0])
    assert "Abort in waiting queue" in messages


def test_weight_version_is_echoed(engine):
    assert engine.get_model_info()["weight_version"] == "default"
    assert engine.get_server_info()["weight_version"] == "default"
