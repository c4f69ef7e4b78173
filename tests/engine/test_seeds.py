"""Sampling is reproducible: what a seed decides does not depend on the company, the schedule or the cache."""

import os
from unittest import mock

import pytest
from tiny_engine import prompt_of
from workload import assert_idle, strict_engine


def sampled(seed, **more):
    params = {"temperature": 1.0, "top_p": 0.95, "max_new_tokens": 16, "ignore_eos": True, **more}
    return params if seed is None else {**params, "sampling_seed": seed}


PROMPTS = [prompt_of(length, length) for length in (3, 20, 70, 100)]
SEEDS = [0, 1, -5, 2**62 + 12345]


def ids(results):
    return [result["output_ids"] for result in results]


def seeded_call():
    return {"input_ids": PROMPTS, "sampling_params": [sampled(seed) for seed in SEEDS]}


@pytest.fixture(scope="module")
def engine():
    with strict_engine() as engine:
        yield engine
        assert_idle(engine)


@pytest.fixture(scope="module")
def alone(engine):
    """Each prompt by itself on a cold cache."""
    outputs = []
    for prompt, seed in zip(PROMPTS, SEEDS):
        engine.flush_cache()
        outputs.append(engine.generate(input_ids=prompt, sampling_params=sampled(seed))["output_ids"])
    return outputs


def test_same_seed_same_tokens_alone_cached_and_in_a_batch(engine, alone):
    assert ids(engine.generate(**seeded_call())) == alone
    crowd = {
        "input_ids": [*PROMPTS, *(prompt_of(30, 50 + i) for i in range(9))],
        "sampling_params": [*seeded_call()["sampling_params"], *(sampled(None) for _ in range(9))],
    }
    assert ids(engine.generate(**crowd))[:4] == alone


def test_the_seed_matters_and_so_does_the_position(engine, alone):
    seeds = (0, 1, 4, -1, -5, 2**32, 2**63 - 1, -(2**63))
    others = engine.generate(input_ids=[PROMPTS[0]] * 8, sampling_params=[sampled(seed) for seed in seeds])
    assert others[0]["output_ids"] == alone[0]
    assert len({tuple(output) for output in ids(others)}) == 8
    flat = sampled(3, temperature=50.0, top_p=1.0)  # close to uniform: the noise alone decides
    assert len(set(engine.generate(input_ids=[7] * 5, sampling_params=flat)["output_ids"])) > 10


def test_samples_of_one_seeded_request_differ_and_are_those_of_the_following_seeds(engine):
    results = engine.generate(input_ids=PROMPTS[1], sampling_params=sampled(40, n=4))
    single = [engine.generate(input_ids=PROMPTS[1], sampling_params=sampled(40 + j)) for j in range(4)]
    assert ids(results) == ids(single)
    assert len({tuple(output) for output in ids(results)}) == 4
    assert [result["meta_info"]["cached_tokens"] for result in results] == [len(PROMPTS[1]) - 1] * 4
    two = engine.generate(input_ids=PROMPTS[:2], sampling_params=sampled(40, n=2))
    assert ids(two)[2:] == ids(results)[:2]


def test_asking_for_logprobs_does_not_change_what_is_drawn(engine, alone):
    assert ids(engine.generate(**seeded_call(), return_logprob=True, top_logprobs_num=5)) == alone


@pytest.mark.parametrize(
    "options",
    [
        {"chunked_prefill_size": 16, "cuda_graph_bs_prefill": [16]},
        {"enable_mixed_chunk": True},
        {"disable_overlap_schedule": True, "disable_radix_cache": True},
        {"random_seed": 77},
        {"max_running_requests": 2, "cuda_graph_bs_decode": [2]},
    ],
    ids=str,
)
def test_the_schedule_does_not_change_seeded_results(alone, options):
    with strict_engine(**options) as other:
        assert ids(other.generate(**seeded_call())) == alone


def test_retraction_does_not_change_seeded_results(alone):
    with mock.patch.dict(os.environ, JAXGEN_TEST_RETRACT="2"):
        engine = strict_engine()
    with engine:
        results = engine.generate(**seeded_call())
        assert sum(result["meta_info"]["num_retractions"] for result in results) > 0
        assert ids(results) == alone


def test_without_request_seeds_the_engine_seed_decides():
    call = {"input_ids": [PROMPTS[0]] * 3, "sampling_params": sampled(None)}
    runs = []
    for seed in (5, 5, 6):
        with strict_engine(random_seed=seed) as engine:
            runs.append([ids(engine.generate(**call)), ids(engine.generate(**call))])
    assert runs[0] == runs[1] != runs[2]
    assert len({tuple(output) for batch in runs[0] for output in batch}) == 6
