"""Hidden states: their shapes for cold, warm and chunked prompts, and their values against NumPy."""

import numpy as np
import pytest
from tiny_engine import GOLDEN, PAGE, NumpyLlama, greedy, prompt_of, start

OPTIONS = {
    "model_path": str(GOLDEN / "llama2"),
    "max_total_tokens": 1024,
    "enable_return_hidden_states": True,
}
CHUNK = 64
WIDTH = 32  # of the llama2 golden checkpoint


@pytest.fixture(scope="module")
def model():
    return NumpyLlama()


@pytest.fixture(scope="module")
def llama2():
    with start(**OPTIONS, chunked_prefill_size=CHUNK) as engine:
        yield engine


@pytest.fixture
def cold(llama2):
    llama2.flush_cache()
    return llama2


def run(engine, ids, tokens, want=True, **more):
    return engine.generate(input_ids=ids, sampling_params=greedy(tokens), return_hidden_states=want, **more)


def joined(entries):
    """The usual consumer: promote 1-D entries to one row, then concatenate."""
    rows = [np.atleast_2d(np.array(entry)) for entry in entries]
    return np.concatenate(rows)


def check(output, ids, first_rows, model):
    """entry 0 is [first_rows, H] up to the last prompt token, later ones are [H]."""
    entries, count = output["meta_info"]["hidden_states"], len(output["output_ids"])
    assert len(entries) == max(count, 1)
    assert np.array(entries[0]).shape == (first_rows, WIDTH)
    assert all(np.array(entry).shape == (WIDTH,) for entry in entries[1:])
    assert type(entries[0][0][0]) is float
    rows = joined(entries)
    assert len(rows) == first_rows + max(count, 1) - 1
    full = (ids + output["output_ids"])[: len(ids) + len(entries) - 1]
    np.testing.assert_allclose(rows, model.hidden(full)[len(ids) - first_rows :], atol=1e-3)


@pytest.mark.parametrize("prompt_len", [1, 2, PAGE, CHUNK - 1, CHUNK])
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_cold_prompt_shows_every_row(cold, model, prompt_len, tokens):
    ids = prompt_of(prompt_len, seed=prompt_len)
    check(run(cold, ids, tokens), ids, prompt_len, model)


@pytest.mark.parametrize("prompt_len", [CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 7])
def test_a_chunked_prompt_shows_its_last_chunk(cold, model, prompt_len):
    ids = prompt_of(prompt_len, seed=prompt_len)
    check(run(cold, ids, 4), ids, (prompt_len - 1) % CHUNK + 1, model)


@pytest.mark.parametrize("cached", [1, PAGE, PAGE + 3, 39])
def test_a_warm_prompt_shows_what_was_computed(cold, model, cached):
    ids = prompt_of(40, seed=3)
    cold.generate(input_ids=ids[:cached], sampling_params=greedy(0))
    output = run(cold, ids, 4)
    assert output["meta_info"]["cached_tokens"] == cached
    check(output, ids, 40 - cached, model)
    again = run(cold, ids, 4)
    assert again["meta_info"]["cached_tokens"] == 39
    check(again, ids, 1, model)


def test_without_prefix_cache_and_chunks_every_row_is_shown(model):
    with start(
        **OPTIONS,
        disable_radix_cache=True,
        chunked_prefill_size=-1,
        max_prefill_tokens=128,
        cuda_graph_bs_prefill=[128],
    ) as engine:
        for prompt_len in (1, 100, 100):
            ids = prompt_of(prompt_len)
            check(run(engine, ids, 3), ids, prompt_len, model)


def test_prefill_only_gives_the_prompt(cold, model):
    ids = prompt_of(20)
    output = run(cold, ids, 0)
    assert output["output_ids"] == []
    check(output, ids, 20, model)


@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_last_is_one_vector(cold, model, tokens):
    ids = prompt_of(20, seed=1)
    output = run(cold, ids, tokens, "last")
    vector = output["meta_info"]["hidden_states"]
    assert np.array(vector).shape == (WIDTH,)
    full = (ids + output["output_ids"])[: len(ids) + max(tokens, 1) - 1]
    np.testing.assert_allclose(vector, model.hidden(full)[-1], atol=1e-3)


def test_requests_with_and_without_share_a_batch(cold, model):
    prompts = [prompt_of(10 + 5 * i, seed=i + 20) for i in range(6)]
    want = [True, False, "last", True, False, True]
    plain = cold.generate(input_ids=prompts, sampling_params=greedy(6))
    cold.flush_cache()
    outputs = cold.generate(input_ids=prompts, sampling_params=greedy(6), return_hidden_states=want)
    assert [o["output_ids"] for o in outputs] == [o["output_ids"] for o in plain]
    for output, ids, kind in zip(outputs, prompts, want):
        assert ("hidden_states" in output["meta_info"]) == bool(kind)
        assert output["meta_info"]["cache_miss_count"] == 0
        if kind is True:
            # A prompt may be split between two prefill steps of the batch.
            rows = len(output["meta_info"]["hidden_states"][0])
            assert 1 <= rows <= len(ids)
            check(output, ids, rows, model)


def test_streamed_states_are_cumulative(cold, model):
    ids = prompt_of(9)
    for chunk in run(cold, ids, 30, stream=True):
        check(chunk, ids, 9, model)


def test_samples_have_their_own_states(cold, model):
    ids = prompt_of(12, seed=4)
    outputs = cold.generate(
        input_ids=ids,
        sampling_params={"max_new_tokens": 5, "n": 2, "ignore_eos": True},
        return_hidden_states=True,
    )
    for output in outputs:
        check(output, ids, 1, model)


def test_the_gate(model):
    ids = prompt_of(5)
    with start(
        **OPTIONS | {"enable_return_hidden_states": False}, return_hidden_states_mode="last"
    ) as engine:
        with pytest.raises(ValueError, match="last"):
            run(engine, ids, 2)
        vector = run(engine, ids, 1, "last")["meta_info"]["hidden_states"]
        np.testing.assert_allclose(vector, model.hidden(ids)[-1], atol=1e-3)
        assert "hidden_states" not in run(engine, ids, 1, False)["meta_info"]
    with start(**OPTIONS | {"enable_return_hidden_states": False}) as engine:
        for want in (True, "last"):
            with pytest.raises(ValueError, match="enable_return_hidden_states"):
                run(engine, ids, 2, want)
