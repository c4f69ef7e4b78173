"""Every field of SamplingParams: what is accepted, what it becomes, and which error names it."""

import copy
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgen.sampling_params import ALL_TOKENS, FIELD_NAMES, MAX_SAMPLES, SamplingParams

NAN, INF = float("nan"), float("inf")
NOT_INTS = [True, False, 1.0, 1.5, "1", [1], {}, NAN, b"1", 1j, object()]
NOT_NUMBERS = ["1", True, [1.0], {}, NAN, INF, -INF, 10**400, 1j, b"1", object()]
NOT_BOOLS = [0, 1, "true", [], 1.0]

BAD = {
    "max_new_tokens": [-1, -(2**63), *NOT_INTS],
    "min_new_tokens": [-1, 129, 2**63, *NOT_INTS],
    "n": [0, -1, MAX_SAMPLES + 1, 2**63, 10**5000, *NOT_INTS],
    "temperature": [-0.1, -1e-300, *NOT_NUMBERS],
    "top_p": [0, -0.0, -0.1, 1.0000001, *NOT_NUMBERS],
    "top_k": [0, -2, -(2**63), *NOT_INTS],
    "min_p": [-0.1, 1.1, *NOT_NUMBERS],
    "frequency_penalty": [-2.1, 2.1, *NOT_NUMBERS],
    "presence_penalty": [-2.1, 2.1, *NOT_NUMBERS],
    "repetition_penalty": [0, -1, 2.1, *NOT_NUMBERS],
    "stop": ["", ["a", ""], ["a", None], [1], 1, {"a"}, b"a", ["a"] * 33, True],
    "stop_token_ids": ["1", b"1", {1: 2}, 5, [1.0], [True], ["1"], [2**63 * 2, "x"], itertools.count()],
    "stop_regex": ["", "(", "x" * 257, "é" * 129, ["a"] * 33, [1], 1, "(?=a)"],
    "no_stop_trim": NOT_BOOLS,
    "ignore_eos": NOT_BOOLS,
    "skip_special_tokens": NOT_BOOLS,
    "spaces_between_special_tokens": NOT_BOOLS,
    "stream_interval": [0, -1, *NOT_INTS],
    "logit_bias": [
        [1],
        "1",
        {-1: 1.0},
        {1.0: 1},
        {"-1": 1},
        {"x": 1},
        {"²": 1},
        {"9" * 5000: 1},
        {True: 1},
        {1: NAN},
        {1: INF},
        {1: "2"},
        {1: None},
        {1: 1e39},
        {1: 10**400},
        {1: 1.0, "1": 2.0},
    ],
    "sampling_seed": [2**63, -(2**63) - 1, *NOT_INTS],
    "json_schema": [{}, 1, b"{}", ["a"]],
    "regex": [1, b"a", ["a"]],
    "ebnf": [1, b"a"],
    "structural_tag": [1, {}],
    "custom_params": [1, "a", [1], {1: 2}],
    "beam_width": [0, -1, *NOT_INTS],
    "watermark": [1, "a", {1: 2}],
}


def test_the_table_of_bad_values_covers_every_field():
    assert set(BAD) == set(FIELD_NAMES)


@pytest.mark.parametrize("name", FIELD_NAMES)
def test_bad_values_are_value_errors_that_name_the_field(name):
    for value in BAD[name]:
        with pytest.raises(ValueError, match=name):
            SamplingParams.from_request({name: value})


@pytest.mark.parametrize(
    ("name", "value", "becomes"),
    [
        ("max_new_tokens", None, None),
        ("max_new_tokens", 0, 0),
        ("max_new_tokens", 2**63, 2**63),
        ("max_new_tokens", np.int32(7), 7),
        ("min_new_tokens", 128, 128),
        ("n", MAX_SAMPLES, MAX_SAMPLES),
        ("temperature", 1e-6, 1e-6),
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", 3, 3.0),
        ("top_p", 1, 1.0),
        ("top_p", 1e-300, 1e-300),
        ("top_k", -1, ALL_TOKENS),
        ("top_k", 2, 2),
        ("top_k", 2**63, ALL_TOKENS),
        ("min_p", 0, 0.0),
        ("min_p", -0.0, 0.0),
        ("min_p", 1, 1.0),
        ("frequency_penalty", -2, -2.0),
        ("presence_penalty", 2, 2.0),
        ("repetition_penalty", 2, 2.0),
        ("stop", "a", ["a"]),
        ("stop", ("a", "b\0"), ["a", "b\0"]),
        ("stop", [], []),
        ("stop_token_ids", [1, None, 2, 2, -1], frozenset({1, 2, -1})),
        ("stop_token_ids", np.array([1, 2]), frozenset({1, 2})),
        ("stop_token_ids", {3}, frozenset({3})),
        ("stop_token_ids", range(3), frozenset({0, 1, 2})),
        ("stop_regex", "a+", ["a+"]),
        ("stop_regex", ["x" * 256], ["x" * 256]),
        ("ignore_eos", np.bool_(True), True),
        ("stream_interval", None, None),
        ("logit_bias", {"007": -1, 8: 2}, {7: -1.0, 8: 2.0}),
        ("sampling_seed", -(2**63), -(2**63)),
        ("sampling_seed", 2**63 - 1, 2**63 - 1),
        ("json_schema", "", None),
        ("custom_params", {"a": [1]}, {"a": [1]}),
    ],
)
def test_good_values(name, value, becomes):
    result = getattr(SamplingParams.from_request({name: value}), name)
    assert result == becomes and type(result) is type(becomes)
    if becomes == 0 and isinstance(result, float):
        assert math.copysign(1, result) == 1


def test_none_means_the_default():
    defaults = SamplingParams.from_request(None)
    everything_none = SamplingParams.from_request(dict.fromkeys(FIELD_NAMES))
    assert everything_none.max_new_tokens is None
    assert dataclasses.replace(everything_none, max_new_tokens=128) == defaults


@pytest.mark.parametrize("given_params", [{"temperature": 0}, {"temperature": 9.9e-7}, {"top_k": 1}])
def test_greedy_in_all_its_forms(given_params):
    params = SamplingParams.from_request(given_params)
    assert params.greedy and params.temperature == 0.0 and params.top_k == 1
    assert not SamplingParams.from_request({}).greedy


def test_minimum_may_not_exceed_an_explicit_maximum():
    with pytest.raises(ValueError, match="min_new_tokens"):
        SamplingParams.from_request({"min_new_tokens": 3, "max_new_tokens": 2})
    assert SamplingParams.from_request({"min_new_tokens": 300, "max_new_tokens": None}).min_new_tokens == 300


def test_unknown_keys_name_the_nearest_parameter():
    with pytest.raises(TypeError, match="temperature"):
        SamplingParams.from_request({"temprature": 1})
    with pytest.raises(TypeError):
        SamplingParams.from_request({1: 1})
    with pytest.raises(TypeError):
        SamplingParams(temprature=1)
    with pytest.raises(TypeError):
        SamplingParams(5)


@pytest.mark.parametrize("value", [1, "temperature", [], (), 1.5, True])
def test_parameters_of_a_wrong_kind_are_value_errors(value):
    with pytest.raises(ValueError, match="sampling_params"):
        SamplingParams.from_request(value)


def test_engine_defaults_fill_in_below_the_request_key_by_key():
    defaults = {"temperature": 0.5, "top_p": 0.9}
    params = SamplingParams.from_request({"temperature": 1.0}, defaults)
    assert (params.temperature, params.top_p) == (1.0, 0.9)
    params = SamplingParams.from_request(SamplingParams(temperature=1.0), defaults)
    assert (params.temperature, params.top_p) == (1.0, 0.9)
    assert SamplingParams.from_request(None, defaults).temperature == 0.5
    with pytest.raises(TypeError, match="typo"):
        SamplingParams.from_request(None, {"typo": 1})


def test_whether_the_length_was_given_survives_normalisation():
    assert SamplingParams.from_request({"max_new_tokens": 128}).explicit("max_new_tokens")
    assert not SamplingParams.from_request({"top_p": 0.5}).explicit("max_new_tokens")
    assert not SamplingParams.from_request(SamplingParams()).validate(10).explicit("max_new_tokens")


def test_at_most_one_grammar():
    with pytest.raises(ValueError, match="regex"):
        SamplingParams.from_request({"json_schema": "{}", "regex": "a"})
    params = SamplingParams.from_request({"json_schema": "", "regex": "a"})
    assert params.grammar == ("regex", "a")
    assert SamplingParams.from_request({"regex": ""}).grammar is None


@pytest.mark.parametrize(
    "given_params",
    [
        {"json_schema": "$$ANY$$"},
        {"regex": "a"},
        {"ebnf": 'root ::= "a"'},
        {"structural_tag": "{}"},
        {"beam_width": 2},
        {"watermark": {}},
    ],
)
def test_options_accepted_by_name_only_say_so(given_params):
    params = SamplingParams.from_request(given_params)
    with pytest.raises(NotImplementedError, match=next(iter(given_params))):
        params.validate(10)


def test_beam_width_one_is_no_beam_search():
    assert SamplingParams.from_request({"beam_width": 1}).validate(10).beam_width == 1
    with pytest.raises(ValueError, match="beam_width"):
        SamplingParams.from_request({"beam_width": 2, "n": 3})


def test_ids_are_checked_against_the_vocabulary():
    assert SamplingParams.from_request({"logit_bias": {9: 1}}).validate(10).logit_bias == {9: 1.0}
    with pytest.raises(ValueError, match="logit_bias"):
        SamplingParams.from_request({"logit_bias": {"10": 1}}).validate(10)
    params = SamplingParams.from_request({"stop_token_ids": [-1, 9, 10]}).validate(10)
    assert params.stop_token_ids == {9}


@pytest.mark.parametrize("given_params", [{"stop": "a"}, {"stop_regex": "a"}, {"min_new_tokens": 1}])
def test_text_options_need_a_tokenizer(given_params):
    params = SamplingParams.from_request(given_params)
    assert params.validate(10) == params
    with pytest.raises(ValueError, match="skip_tokenizer_init"):
        params.validate(10, has_tokenizer=False)


def test_copies_remember_what_was_given():
    params = SamplingParams.from_request({"stop": "a", "max_new_tokens": 3})
    for other in (copy.copy(params), copy.deepcopy(params)):
        assert other == params and other.explicit("max_new_tokens") and not other.explicit("top_p")


def test_a_million_biases_are_checked_and_the_message_stays_short():
    many = {str(token): 0.5 for token in range(1_000_000)}
    params = SamplingParams.from_request({"logit_bias": many})
    assert len(params.logit_bias) == 1_000_000
    with pytest.raises(ValueError) as caught:
        params.validate(1000)
    assert len(str(caught.value)) < 500
    with pytest.raises(ValueError) as caught:
        SamplingParams.from_request({"temperature": [0.5] * 1_000_000})
    assert len(str(caught.value)) < 500


def test_a_value_whose_repr_fails_is_still_a_value_error():
    class Broken:
        def __repr__(self):
            raise RuntimeError

    with pytest.raises(ValueError, match="top_p"):
        SamplingParams.from_request({"top_p": Broken()})


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**31, 2**63, -(2**63), 10**5000, -0.0, 5e-324]),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=4),
)
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=40),
    st.dictionaries(st.one_of(st.integers(), st.text(max_size=4), st.floats()), scalars, max_size=4),
)
usual = st.one_of(st.integers(-2, 10), st.floats(-3, 3), st.text(min_size=1, max_size=3))


@settings(max_examples=3000, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELD_NAMES), st.one_of(values, usual), min_size=1, max_size=4))
def test_whatever_is_given_there_is_a_value_error_or_a_usable_result(request_params):
    try:
        params = SamplingParams.from_request(request_params).validate(1000)
    except ValueError as error:
        assert any(name in str(error) for name in request_params) and len(str(error)) < 600
        return
    except NotImplementedError:
        return
    assert params.normalized() == params
    for name in (
        "temperature",
        "top_p",
        "min_p",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
    ):
        assert type(getattr(params, name)) is float and math.isfinite(getattr(params, name))
    assert 1 <= params.top_k <= ALL_TOKENS and 0 < params.top_p <= 1 and 0 <= params.min_p <= 1
    assert (params.temperature == 0.0) == params.greedy
    assert all(type(token) is int and 0 <= token < 1000 for token in params.stop_token_ids)
    assert all(0 <= token < 1000 and math.isfinite(bias) for token, bias in params.logit_bias.items())
    json.dumps(params.stop)


def test_fifty_thousand_single_values_end_in_a_result_or_a_named_error():
    pool = [*itertools.chain(*(BAD[name] for name in FIELD_NAMES)), 0, 1, 0.5, "a", None, 2**63, -0.0, "\0"]
    pool = [value for value in pool if not isinstance(value, itertools.count)]
    tried = 0
    while tried < 50_000:
        for name in FIELD_NAMES:
            for value in pool:
                tried += 1
                try:
                    SamplingParams.from_request({name: value})
                except ValueError as error:
                    assert name in str(error)
