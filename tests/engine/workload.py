"""A tiny engine, a mixed workload, and what has to be true of its results whatever the schedule."""

import numpy as np
from tiny_engine import greedy, prompt_of, start

from jaxgen import Engine


def strict_engine(**options) -> Engine:
    """An engine over a golden fixture on which a request that makes it compile anything fails."""
    return start(**{"strict_compile": True, "random_seed": 0, **options})


def internal_state(engine: Engine) -> dict:
    return engine.get_server_info()["internal_states"][0]


def assert_idle(engine: Engine) -> None:
    """Nothing runs or waits, every page is free or cached, and no page, row or lock is lost."""
    state = internal_state(engine)
    assert (state["running_batch_size"], state["waiting_queue_size"]) == (0, 0)
    assert state["available_kv_tokens"] == state["memory_usage"]["token_capacity"]
    engine._loop.call(engine._loop.scheduler.check_invariants)


def workload() -> dict:
    """Keyword arguments of one `generate` call whose requests differ in everything that could interfere."""
    shared = prompt_of(70, 99)
    ids = [prompt_of(n, n) for n in (1, 5, 16, 33, 64, 100)] + [shared + prompt_of(n, n) for n in (3, 20, 40)]
    drawn = {"max_new_tokens": 24, "ignore_eos": True}
    params = [
        greedy(24),
        greedy(24, repetition_penalty=1.5, frequency_penalty=0.4),
        {**drawn, "temperature": 0.8, "top_k": 40, "sampling_seed": 1},
        greedy(24, logit_bias={7: 6.0, 11: 5.5}),
        {**drawn, "temperature": 1.2, "top_p": 0.9, "min_p": 0.02, "sampling_seed": 2},
        {
            "max_new_tokens": 24,
            "temperature": 0.0,
            "min_new_tokens": 12,
            "stop_token_ids": list(range(3, 200)),
        },
        greedy(24, presence_penalty=1.0),
        {**drawn, "temperature": 1.0, "sampling_seed": 3, "presence_penalty": 0.5, "repetition_penalty": 1.2},
        greedy(24),
    ]
    logprob = [i % 2 == 0 for i in range(9)]
    return {
        "input_ids": ids,
        "sampling_params": params,
        "return_logprob": logprob,
        "logprob_start_len": [0 if i % 4 == 0 else -1 for i in range(9)],
        "top_logprobs_num": 3,
        "token_ids_logprob": [5, 380],
        "return_hidden_states": [i % 3 != 1 for i in range(9)],
    }


def one_of(call: dict, i: int) -> dict:
    """The i-th request of a batch call as a call of its own."""
    per_prompt = lambda v: v[i] if isinstance(v, list) and len(v) == len(call["input_ids"]) else v  # noqa: E731
    return {name: per_prompt(value) for name, value in call.items()}


def assert_complete(out: dict) -> None:
    """Every per-token list has exactly one entry for each generated token."""
    meta, tokens = out["meta_info"], len(out["output_ids"])
    assert meta["completion_tokens"] == tokens
    assert meta["cache_miss_count"] == 0
    for name in ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs"):
        if name in meta:
            assert len(meta[name]) == tokens, name
    for entry, token in zip(meta.get("output_token_logprobs", ()), out["output_ids"]):
        assert entry[1] == token
    if "hidden_states" in meta:
        assert len(meta["hidden_states"]) == tokens
        assert np.ndim(meta["hidden_states"][0]) == 2
        assert all(np.ndim(vector) == 1 for vector in meta["hidden_states"][1:])


def logprob_values(entries) -> np.ndarray:
    return np.array([np.nan if e[0] is None else e[0] for e in entries], np.float64)


def assert_same(out: dict, reference: dict) -> None:
    """Equal tokens, and equal log-probabilities and hidden states up to rounding."""
    assert out["output_ids"] == reference["output_ids"]
    assert out["text"] == reference["text"]
    got, want = out["meta_info"], reference["meta_info"]
    assert got["finish_reason"] == want["finish_reason"]
    assert ("output_token_logprobs" in got) == ("output_token_logprobs" in want)
    for name in ("input_token_logprobs", "output_token_logprobs"):
        if name in want:
            assert [e[1] for e in got[name]] == [e[1] for e in want[name]]
            np.testing.assert_allclose(logprob_values(got[name]), logprob_values(want[name]), atol=2e-4)
    for name in ("input_top_logprobs", "output_top_logprobs", "output_token_ids_logprobs"):
        if name in want:
            assert len(got[name]) == len(want[name])
            for a, b in zip(got[name], want[name]):
                assert (a is None) == (b is None)
                if b is not None:
                    np.testing.assert_allclose(logprob_values(a), logprob_values(b), atol=2e-4)
    if "hidden_states" in want:
        rows = lambda m: [np.atleast_2d(v)[-1] for v in m["hidden_states"]]  # noqa: E731
        np.testing.assert_allclose(rows(got), rows(want), atol=2e-4)
