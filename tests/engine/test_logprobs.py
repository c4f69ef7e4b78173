"""Log-probabilities of prompts and outputs, against NumPy, against Hugging Face and against themselves."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_engine import GOLDEN, PAGE, NumpyLlama, golden_cases, greedy, prompt_of, start, values

LLAMA2 = {"model_path": str(GOLDEN / "llama2"), "max_total_tokens": 1024}
CHUNKS = {"one page": PAGE, "off": -1}  # chunked_prefill_size


@pytest.fixture(scope="module")
def model():
    return NumpyLlama()


@pytest.fixture(scope="module", params=CHUNKS)
def any_chunk(request):
    """Engines that differ in chunked_prefill_size, with empty caches."""
    chunk = CHUNKS[request.param]
    bucket = chunk if chunk > 0 else 128
    with start(
        **LLAMA2, chunked_prefill_size=chunk, max_prefill_tokens=128, cuda_graph_bs_prefill=[bucket]
    ) as engine:
        yield engine


@pytest.fixture
def chunked(any_chunk):
    any_chunk.flush_cache()
    return any_chunk


def score(engine, ids, start_len, **more):
    params = greedy(more.pop("max_new_tokens", 4))
    return engine.generate(
        input_ids=ids, sampling_params=params, return_logprob=True, logprob_start_len=start_len, **more
    )["meta_info"]


def check_prompt(meta, ids, start_len, expected):
    """Lengths, ids and values of the input lists; expected: [P, V] NumPy log-probabilities."""
    count = len(ids) - start_len if start_len >= 0 else 0
    entries = meta["input_token_logprobs"]
    assert len(entries) == count
    if not count:
        return
    assert [entry[1] for entry in entries] == ids[start_len:]
    assert entries[0][0] is None
    wanted = [expected[i - 1, ids[i]] for i in range(start_len + 1, len(ids))]
    np.testing.assert_allclose(values(entries), wanted, atol=1e-3)


@pytest.mark.parametrize("prompt_len", [1, 2, PAGE, PAGE + 1, 70, 100])
def test_input_lists_have_one_entry_per_position_from_the_start(chunked, model, prompt_len):
    ids = prompt_of(prompt_len, seed=prompt_len)
    expected = model.logprobs(ids)
    for start_len in sorted({-1, 0, 1, prompt_len // 2, prompt_len - 1, prompt_len}):
        meta = score(chunked, ids, start_len, top_logprobs_num=3, token_ids_logprob=[9, 4])
        check_prompt(meta, ids, start_len, expected)
        tops, chosen = meta["input_top_logprobs"], meta["input_token_ids_logprobs"]
        assert len(tops) == len(chosen) == len(meta["input_token_logprobs"])
        for i, (top, ids_entry) in enumerate(zip(tops, chosen)):
            if i == 0:
                assert top is None and ids_entry is None
                continue
            row = expected[start_len + i - 1]
            assert [entry[1] for entry in ids_entry] == [9, 4]
            np.testing.assert_allclose(values(ids_entry), row[[9, 4]], atol=1e-3)
            np.testing.assert_allclose(values(top), np.sort(row)[:-4:-1], atol=1e-3)
            assert values(top).tolist() == sorted(values(top), reverse=True)
        # A cached prefix may save work only before the first position asked for.
        assert meta["cached_tokens"] <= (start_len if start_len >= 0 else prompt_len - 1)
        assert meta["output_token_logprobs_length"] == len(meta["output_token_logprobs"]) == 4
        assert [len(top) for top in meta["output_top_logprobs"]] == [3] * 4
        assert [[e[1] for e in row] for row in meta["output_token_ids_logprobs"]] == [[9, 4]] * 4


@pytest.mark.parametrize("case", range(4))
def test_golden_prompts_and_outputs(chunked, case):
    """Hugging Face's log-probabilities, within float32 rounding."""
    case = golden_cases("llama2")[case]
    output = chunked.generate(
        input_ids=case["prompt_ids"],
        sampling_params=greedy(32),
        return_logprob=True,
        logprob_start_len=0,
    )
    meta = output["meta_info"]
    assert output["output_ids"] == case["greedy_ids"]
    assert [entry[1] for entry in meta["output_token_logprobs"]] == case["greedy_ids"]
    np.testing.assert_allclose(values(meta["input_token_logprobs"]), case["prompt_logprobs"], atol=1e-4)
    np.testing.assert_allclose(values(meta["output_token_logprobs"]), case["greedy_logprobs"], atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1.7])
def test_rescoring_an_output_gives_its_log_probabilities(chunked, model, temperature):
    """Teacher forcing: prompt + output as a prompt. Output logprobs are those after temperature."""
    ids = prompt_of(37, seed=5)
    output = chunked.generate(
        input_ids=ids,
        sampling_params={
            "temperature": temperature, "max_new_tokens": 30, "sampling_seed": 3, "ignore_eos": True,
            "top_p": 0.9, "top_k": 50, "min_p": 0.01,
        },
        return_logprob=True,
    )  # fmt: skip
    reported = values(output["meta_info"]["output_token_logprobs"])
    full = ids + output["output_ids"]
    divisor = temperature or 1.0
    scaled = model.logprobs(full) / divisor
    scaled -= np.log(np.exp(scaled).sum(-1, keepdims=True))
    wanted = [scaled[i - 1, full[i]] for i in range(len(ids), len(full))]
    np.testing.assert_allclose(reported, wanted, atol=1e-3)
    if divisor == 1.0:
        for start_len in (0, len(ids) - 1):
            meta = score(chunked, full, start_len, max_new_tokens=0)
            rescored = values(meta["input_token_logprobs"])[-len(reported) :]
            np.testing.assert_allclose(rescored, reported, atol=1e-4)


def test_output_logprobs_show_penalties_bias_and_bans(chunked):
    """They are those of the logits that were drawn from, before truncation."""
    ids, eos = prompt_of(12, seed=8), 1
    watched = [20, 21, 50, 51, eos]

    def second_token(**params):
        meta = chunked.generate(
            input_ids=ids,
            sampling_params={"temperature": 0.0, "max_new_tokens": 2, "logit_bias": {20: 100.0}, **params},
            return_logprob=True,
            token_ids_logprob=watched,
        )["meta_info"]
        assert [entry[1] for entry in meta["output_token_logprobs"]] == [20, 20]
        return np.array([entry[0] for entry in meta["output_token_ids_logprobs"][1]])

    plain, edited = (
        second_token(ignore_eos=True),
        second_token(
            logit_bias={20: 100.0, "50": 3.5, 51: -2.0},
            min_new_tokens=2,
            frequency_penalty=0.5,
            presence_penalty=0.25,
        ),
    )
    change = edited - plain
    # Every log-probability moves by the change of the normaliser as well: that of token 21, left alone.
    np.testing.assert_allclose(change - change[1], [-0.75, 0, 3.5, -2.0, -np.inf], atol=1e-3)


def test_text_of_entries_only_on_request(engine):
    common = {
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
        "token_ids_logprob": [70],
    }
    meta = engine.generate("The fox", greedy(4), **common)["meta_info"]
    named = engine.generate("The fox", greedy(4), return_text_in_logprobs=True, **common)["meta_info"]
    tokenizer = engine.tokenizer_manager.tokenizer

    def entries(meta):
        for name in ("input", "output"):
            yield from meta[f"{name}_token_logprobs"]
            for key in ("top_logprobs", "token_ids_logprobs"):
                for row in meta[f"{name}_{key}"]:
                    yield from row or []

    assert all(type(e) is tuple and len(e) == 3 and e[2] is None for e in entries(meta))
    assert [e[:2] for e in entries(named)] == [e[:2] for e in entries(meta)]
    assert all(e[2] == tokenizer.decode([e[1]]) for e in entries(named))


def test_more_tops_than_the_vocabulary_are_clipped(engine):
    meta = score(engine, prompt_of(3), 0, max_new_tokens=1, top_logprobs_num=10_000)
    assert len(meta["output_top_logprobs"][0]) == len(meta["input_top_logprobs"][1]) == 384
    assert np.exp(values(meta["output_top_logprobs"][0])).sum() == pytest.approx(1, abs=1e-5)


def test_per_prompt_options_in_one_batch(engine):
    """Requests with and without logprobs share a batch; each gets its own, and the tokens stay the same."""
    prompts = [prompt_of(20 + i, seed=i) for i in range(5)]
    plain = engine.generate(input_ids=prompts, sampling_params=greedy(6))
    mixed = engine.generate(
        input_ids=prompts,
        sampling_params=greedy(6),
        return_logprob=[True, False, True, True, False],
        logprob_start_len=[0, 0, -1, 7, 3],
        top_logprobs_num=[1, 2, 0, 5, 0],
        token_ids_logprob=[[5], [6], None, [7, 8], []],
    )
    assert [o["output_ids"] for o in mixed] == [o["output_ids"] for o in plain]
    for row in (1, 4):
        assert not [key for key in mixed[row]["meta_info"] if "logprob" in key]
    lengths = [len(mixed[row]["meta_info"]["input_token_logprobs"]) for row in (0, 2, 3)]
    assert lengths == [20, 0, 23 - 7]
    assert len(mixed[3]["meta_info"]["output_top_logprobs"][0]) == 5
    assert "output_top_logprobs" not in mixed[2]["meta_info"]
    assert [len(r) for r in mixed[3]["meta_info"]["input_token_ids_logprobs"][1:]] == [2] * 15


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_warm_cache_does_not_change_the_lists(shared_engine, data):
    """Prompts that share prefixes, scored from anywhere, in batches: equal to the same prompt scored cold."""
    stem = prompt_of(90, seed=11)
    lengths = data.draw(st.lists(st.integers(2, 90), min_size=1, max_size=6))
    starts = [data.draw(st.integers(-1, length)) for length in lengths]
    prompts = [stem[:length] for length in lengths]
    outputs = shared_engine.generate(
        input_ids=prompts, sampling_params=greedy(3), return_logprob=True, logprob_start_len=starts
    )
    for output, ids, start_len in zip(outputs, prompts, starts):
        shared_engine.flush_cache()
        cold = score(shared_engine, ids, 0, max_new_tokens=3)
        meta = output["meta_info"]
        assert len(meta["input_token_logprobs"]) == (len(ids) - start_len if start_len >= 0 else 0)
        if start_len >= 0:
            got, want = values(meta["input_token_logprobs"]), values(cold["input_token_logprobs"])
            np.testing.assert_allclose(got, want[start_len:], atol=1e-4)
        got, want = values(meta["output_token_logprobs"]), values(cold["output_token_logprobs"])
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_streamed_lists_grow_with_the_output(engine):
    ids = prompt_of(30)
    *_, whole = engine.generate(input_ids=ids, sampling_params=greedy(20), return_logprob=True,
                                logprob_start_len=5, top_logprobs_num=1, stream=True)  # fmt: skip
    assert len(whole["meta_info"]["output_top_logprobs"]) == 20
    engine.flush_cache()
    # All of them first: what was handed over grows no more.
    for chunk in list(engine.generate(input_ids=ids, sampling_params=greedy(20), return_logprob=True,
                                      logprob_start_len=5, top_logprobs_num=1, stream=True)):  # fmt: skip
        meta = chunk["meta_info"]
        count = meta["completion_tokens"]
        assert len(meta["output_token_logprobs"]) == meta["output_token_logprobs_length"] == count
        assert meta["output_token_logprobs"] == whole["meta_info"]["output_token_logprobs"][:count]
        assert meta["output_top_logprobs"] == whole["meta_info"]["output_top_logprobs"][:count]
        assert meta["input_token_logprobs"] == whole["meta_info"]["input_token_logprobs"]


def test_temperature_free_logprobs_by_environment(monkeypatch, model):
    monkeypatch.setenv("SGLANG_RETURN_ORIGINAL_LOGPROB", "1")
    ids = prompt_of(10, seed=2)
    with start(**LLAMA2) as engine:
        output = engine.generate(
            input_ids=ids,
            sampling_params={"temperature": 2.5, "max_new_tokens": 8, "ignore_eos": True},
            return_logprob=True,
        )
    full = ids + output["output_ids"]
    expected = model.logprobs(full)
    wanted = [expected[i - 1, full[i]] for i in range(len(ids), len(full))]
    np.testing.assert_allclose(values(output["meta_info"]["output_token_logprobs"]), wanted, atol=1e-3)
