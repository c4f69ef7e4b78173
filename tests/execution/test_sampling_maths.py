"""The compiled path from logits to tokens against a NumPy model of the sampling mathematics, step after step."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgen.execution import lanes as L
from jaxgen.execution import sampler
from jaxgen.execution.batch import RowMirror
from jaxgen.execution.sampler import Logprobs, RowParams, Variant
from jaxgen.execution.step import _sample
from jaxgen.sampling_params import SamplingParams
from jaxgen.scheduling.request import Request
from kernels_pallas import gumbel_noise
from tests.kernels import oracle

V, ROWS, STEPS, PROMPT = 40, 4, 5, 3
FULL = Variant(True, True, V)
# The step with the model cut away: what stands for the hidden vectors are the logits themselves.
SPECS = [
    SimpleNamespace(logits=lambda model, hidden: hidden, original_logprobs=False, skips=skips)
    for skips in (True, False)
]


@jax.jit
def both_steps(logits, params, counts):
    rows = jnp.arange(ROWS, dtype=jnp.int32)
    return [_sample(spec, FULL, None, logits, params, counts, rows, jnp.ones(ROWS, bool)) for spec in SPECS]


def sample_step(logits, params, counts):
    """Tokens, log-probabilities and counts; skipping what no row wants changes nothing that a row wants."""
    skipping, whole = both_steps(logits, params, counts)
    np.testing.assert_array_equal(skipping[0], whole[0])
    np.testing.assert_array_equal(skipping[2], whole[2])
    tokens, packed, counts = whole
    if (np.asarray(params.ints[:, L.MODE]) & L.LOGPROBS).any():
        np.testing.assert_allclose(skipping[1], packed, rtol=1e-6)
    return tokens, Logprobs.unpacked(np.asarray(packed), V), counts


def make_request(params: dict, row: int, seed: int) -> Request:
    resolved = SamplingParams.from_request(params)
    stops = frozenset({1}) | resolved.stop_token_ids
    return Request(
        rid=str(row),
        prompt_ids=[0] * PROMPT,
        params=resolved,
        vocab_size=V,
        max_new_tokens=STEPS,
        masked_ids=stops if resolved.min_new_tokens else frozenset(),
        seed=seed,
        return_logprob=True,
        token_ids_logprob=[3, 0],
        row=row,
        sequence=row,
    )


def row_params(requests, step: int) -> RowParams:
    """What the runner uploads for these requests, at output position `step`."""
    mirror = RowMirror(ROWS, 1, 64, 4)
    for request in requests:
        mirror.claim(request)
    fields = (mirror.floats, mirror.ints, mirror.edit_ids, mirror.edit_values, mirror.edit_until)
    position = jnp.full((ROWS,), PROMPT + step, jnp.int32)
    return RowParams(*map(jnp.asarray, fields), jnp.asarray(mirror.logprob_ids), position)


def processed(logits, params: SamplingParams, masked_ids, generated) -> np.ndarray:
    """Steps 2 to 5 of the order of operations, in float64."""
    x = logits.astype(np.float64)
    counts = np.bincount(generated, minlength=V)
    x = x - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    if len(generated) < params.min_new_tokens:
        x[list(masked_ids)] = -np.inf
    with np.errstate(invalid="ignore"):
        repeated = np.where(x < 0, x * params.repetition_penalty, x / params.repetition_penalty)
    x = np.where(counts > 0, repeated, x)
    for token, value in params.logit_bias.items():
        x[token] += value
    return x


def check_token(token, x, params: SamplingParams, seed, position):
    """The drawn token is the noisy maximum of what truncation leaves, up to rounding at the thresholds."""
    if params.greedy:
        assert x[token] >= x.max() - 1e-5
        return
    noise = np.asarray(gumbel_noise(jnp.array([seed]), jnp.array([position]), V)[0], np.float64)
    noisy = x / params.temperature + noise
    finite = np.where(np.isfinite(x), x, -1e30)
    t, k, p, m = params.temperature, params.top_k, params.top_p, params.min_p
    surely = oracle.kept_tokens(finite, t, k, p - 1e-5 if p < 1 else p, m * 1.0001)
    perhaps = oracle.kept_tokens(finite, t, k, p + 1e-5, m * 0.9999)
    assert perhaps[token]
    assert noisy[token] >= noisy[surely].max() - 1e-3


def log_softmax(x):
    shifted = x - x.max()
    return shifted - np.log(np.exp(shifted).sum())


ROW = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7])},
    optional={
        "top_k": st.integers(1, V),
        "top_p": st.floats(0.05, 1.0),
        "min_p": st.floats(0.0, 0.5),
        "frequency_penalty": st.floats(-2.0, 2.0),
        "presence_penalty": st.floats(-2.0, 2.0),
        "repetition_penalty": st.floats(0.2, 2.0),
        "logit_bias": st.dictionaries(st.integers(0, V - 1), st.floats(-8.0, 8.0), max_size=6),
        "min_new_tokens": st.integers(0, STEPS),
        "stop_token_ids": st.lists(st.integers(0, V - 1), max_size=5),
    },
)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(ROW, min_size=ROWS, max_size=ROWS), seed=st.integers(0, 10**6), spread=st.floats(0.1, 6.0)
)
def test_every_step_follows_the_mathematics(rows, seed, spread):
    rng = np.random.default_rng(seed)
    requests = [make_request({**row, "max_new_tokens": STEPS}, i, seed + i) for i, row in enumerate(rows)]
    counts = jnp.zeros((ROWS, V), jnp.int32)
    generated: list[list[int]] = [[] for _ in requests]
    for step in range(STEPS):
        logits = (rng.normal(size=(ROWS, V)) * spread).astype(np.float32)
        tokens, logprobs, counts = sample_step(logits, row_params(requests, step), counts)
        tokens = np.asarray(tokens).tolist()
        for i, request in enumerate(requests):
            params, token = request.params, tokens[i]
            x = processed(logits[i], params, request.masked_ids, generated[i])
            check_token(token, x, params, request.seed, PROMPT + step)
            expected = log_softmax(x if params.greedy else x / params.temperature)
            np.testing.assert_allclose(logprobs.chosen[i], expected[token], rtol=1e-3, atol=2e-3)
            np.testing.assert_allclose(logprobs.id_values[i, :2], expected[[3, 0]], rtol=1e-3, atol=2e-3)
            top = np.asarray(logprobs.top_values[i])
            np.testing.assert_allclose(top, np.sort(expected)[::-1], rtol=1e-3, atol=2e-3)
            np.testing.assert_allclose(expected[np.asarray(logprobs.top_ids[i])], top, rtol=1e-3, atol=2e-3)
            generated[i].append(token)
    for i, request in enumerate(requests):
        if request.has_penalties:
            np.testing.assert_array_equal(counts[i], np.bincount(generated[i], minlength=V))


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(ROW, min_size=2, max_size=2), seed=st.integers(0, 10**6))
def test_rows_with_default_values_are_bit_identical_beside_any_neighbours(rows, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(ROWS, V)).astype(np.float32) * 3
    counts = jnp.asarray(rng.integers(0, 3, (ROWS, V)), jnp.int32)  # left behind by earlier owners
    plain = [{"temperature": 0.9, "max_new_tokens": STEPS}, {"temperature": 0.0, "max_new_tokens": STEPS}]
    strange = [{**row, "max_new_tokens": STEPS} for row in rows]

    def results(others):
        requests = [make_request(params, i, seed) for i, params in enumerate([*plain, *others])]
        params = row_params(requests, 2)
        tokens, logprobs, after = sample_step(logits, params, counts)
        edited = jax.jit(functools.partial(sampler.edit_logits, skips=False))(logits, counts, params)
        return [np.asarray(a)[:2] for a in (edited, tokens, *jax.tree.leaves(logprobs), after)]

    for alone, beside in zip(results(plain), results(strange), strict=True):
        np.testing.assert_array_equal(alone, beside)
    np.testing.assert_array_equal(results(strange)[0], logits[:2])


def test_a_finite_bias_does_not_revive_a_stop_token_before_min_new_tokens():
    params = {"temperature": 0.0, "max_new_tokens": STEPS, "min_new_tokens": 3, "logit_bias": {1: 100.0}}
    requests = [make_request(params, i, 0) for i in range(ROWS)]
    logits = np.zeros((ROWS, V), np.float32)
    for step in range(STEPS):
        tokens, *_ = sample_step(logits, row_params(requests, step), jnp.zeros((ROWS, V), jnp.int32))
        assert np.asarray(tokens).tolist() == [0 if step < 3 else 1] * ROWS


def test_nan_marks_only_its_own_row_and_ties_go_to_the_lowest_id():
    requests = [
        make_request({"temperature": t, "max_new_tokens": 5}, i, 7) for i, t in enumerate((0, 0, 1, 1))
    ]
    logits = np.zeros((ROWS, V), np.float32)
    logits[:, [9, 30]] = 50.0
    logits[0, 5] = logits[2, 39] = np.nan
    tokens, *_ = sample_step(logits, row_params(requests, 0), jnp.zeros((ROWS, V), jnp.int32))
    tokens = np.asarray(tokens).tolist()
    assert (tokens[0], tokens[1], tokens[2]) == (-1, 9, -1)
    assert tokens[3] in (9, 30)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_after_the_others():
    """By hand: counts (2, 1, 0), f 0.5, p 0.25, r 2."""
    params = {
        "frequency_penalty": 0.5,
        "presence_penalty": 0.25,
        "repetition_penalty": 2.0,
        "temperature": 0.0,
    }
    requests = [make_request({**params, "max_new_tokens": STEPS}, i, 0) for i in range(ROWS)]
    logits = np.tile(np.array([3.25, 0.5, 3.0] + [-9.0] * (V - 3), np.float32), (ROWS, 1))
    counts = jnp.zeros((ROWS, V), jnp.int32).at[:, 0].set(2).at[:, 1].set(1)
    edited = np.asarray(sampler.edit_logits(logits, counts, row_params(requests, 3), skips=True))
    np.testing.assert_array_equal(edited[0, :4], [1.0, -0.5, 3.0, -9.0])
    assert L.PENALTIES & int(row_params(requests, 3).ints[0, L.MODE])


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_steps_without_edits_draw_and_report_what_the_full_one_does(seed):
    rng = np.random.default_rng(seed)
    weight = jnp.asarray(rng.normal(size=(V, 8)), jnp.float32)
    hidden = jnp.asarray(rng.normal(size=(ROWS, 8)), jnp.float32)
    spec = SimpleNamespace(
        logits=lambda model, hidden: hidden @ weight.T,
        logits_sharding=None,
        original_logprobs=False,
        skips=False,
    )
    model = SimpleNamespace(head=SimpleNamespace(weight=weight))
    options = [{"temperature": 0}, {"top_k": 3}, {"temperature": 0.7, "top_p": 0.6}, {"min_p": 0.2}]
    params = row_params([make_request(option, row, seed) for row, option in enumerate(options)], 0)
    rows, counts, real = (
        jnp.arange(ROWS, dtype=jnp.int32),
        jnp.zeros((ROWS, V), jnp.int32),
        jnp.ones(ROWS, bool),
    )

    def run(variant):
        drawn, packed, _ = _sample(spec, variant, model, hidden, params, counts, rows, real)
        return drawn, packed

    tokens, packed = run(FULL)
    np.testing.assert_array_equal(run(Variant())[0], tokens)
    np.testing.assert_array_equal(run(Variant(logprobs=True, top_logprobs=V))[0], tokens)
    np.testing.assert_allclose(run(Variant(logprobs=True, top_logprobs=V))[1], packed, rtol=1e-6)
