"""Stop strings and stop patterns: found wherever they are split, and never partly shown."""

import random
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxgen.patterns import PatternSearch
from jaxgen.sampling_params import SamplingParams
from jaxgen.stops import StopMatcher
from jaxgen.tokenizer import TextStream, TokenDecoder
from tests.tiny_tokenizers import byte_fallback, byte_level

# Few different characters, so that stops overlap themselves and each other.
letters = st.sampled_from(["a", "b", "ab", "é", "😊", "\n"])
pieces_of_text = st.lists(st.lists(letters, max_size=4).map("".join), max_size=12)
stop_strings = st.lists(st.lists(letters, min_size=1, max_size=4).map("".join), min_size=1, max_size=4)


def longest_partial(text, stops):
    """Length of the longest suffix of `text` that begins some stop."""
    return max(
        (length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length])),
        default=0,
    )


def first_match(pieces, stops):
    """`(number of pieces, stop, text before it)` by searching all text again after every piece."""
    text = ""
    for count, piece in enumerate(pieces, 1):
        text += piece
        for stop in stops:
            if stop in text:
                return count, stop, text.split(stop)[0]
    return None


def check_against_search(pieces, stops, no_stop_trim):
    expected = first_match(pieces, stops)
    matcher = StopMatcher(stops, no_stop_trim=no_stop_trim)
    text = ""
    for count, piece in enumerate(pieces, 1):
        match = matcher.push(piece)
        text += piece
        if expected is not None and count == expected[0]:
            _, stop, before = expected
            assert match is not None and (match.kind, match.matched) == ("stop", stop)
            assert text[: match.cut] == before + (stop if no_stop_trim else "")
            return
        assert match is None
        assert matcher.held == (0 if no_stop_trim else longest_partial(text, stops))
    assert expected is None


@settings(max_examples=800, deadline=None)
@given(pieces_of_text, stop_strings, st.booleans())
def test_matches_and_holds_back_like_a_search_of_all_text(pieces, stops, no_stop_trim):
    check_against_search(pieces, stops, no_stop_trim)


def test_ten_thousand_random_texts_and_stops_agree_with_a_search_of_all_text():
    rng = random.Random(18)

    def word(longest):
        return "".join(rng.choices(["a", "b", "ab", "é"], k=rng.randrange(1, longest)))

    for _ in range(10_000):
        pieces = [word(5) if rng.random() < 0.9 else "" for _ in range(rng.randrange(16))]
        stops = [word(rng.choice([3, 8])) for _ in range(rng.randrange(1, 5))]
        check_against_search(pieces, stops, rng.random() < 0.3)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from([byte_level, byte_fallback]), st.lists(letters, max_size=20), stop_strings, st.data())
def test_streamed_text_never_shows_any_part_of_a_stop(make, letters_of_text, stops, data):
    tokenizer = make()
    ids = tokenizer.encode("the " + "".join(letters_of_text), add_special_tokens=False)
    cut = data.draw(st.integers(0, min(4, len(ids))))
    stream = TextStream(
        TokenDecoder(tokenizer), ids[:cut], SamplingParams(stop=stops, max_new_tokens=None).normalized()
    )
    shown, text = [], None
    for token in ids[cut:]:
        match = stream.push(token)
        if match is not None:
            text = stream.finish({"type": "stop", "matched": match.matched})
            break
        shown.append(stream.emittable)
    if text is None:
        text = stream.finish({"type": "length", "length": len(ids) - cut})
    assert stream.emittable == text
    assert not any(stop in text for stop in stops)
    for earlier, later in zip(shown, [*shown[1:], text]):
        assert later.startswith(earlier)


def run(stops, pieces, **options):
    matcher = StopMatcher(stops, **options)
    text = ""
    for piece in pieces:
        text += piece
        if match := matcher.push(piece):
            return match.matched, text if match.cut is None else text[: match.cut]
    return None, text


def test_the_first_stop_in_the_list_wins_within_a_token_and_the_earliest_across_tokens():
    assert run(["cd", "ab"], ["xabcd"]) == ("cd", "xab")
    assert run(["cd", "ab"], ["xab", "cd"]) == ("ab", "x")


def test_a_stop_that_begins_inside_a_token_and_ends_inside_another():
    assert run(["END"], ["text E", "N", "D of it"]) == ("END", "text ")
    assert run(["END"], ["text E", "N", "D of it"], no_stop_trim=True) == ("END", "text END")


def test_a_stop_that_begins_another_is_found_first():
    assert run(["</s>", "</"], ["a<", "/", "s>"]) == ("</", "a")


def test_a_prompt_ending_in_half_a_stop_does_not_count():
    tokenizer = byte_level()
    prompt = tokenizer.encode("EN", add_special_tokens=False)
    stream = TextStream(tokenizer, prompt, SamplingParams(stop="END").normalized())
    for token in tokenizer.encode("D EN", add_special_tokens=False):
        assert stream.push(token) is None
    assert stream.finish({"type": "length", "length": 3}) == "D EN"


def test_held_back_text_appears_when_the_request_ends_otherwise():
    tokenizer = byte_level()
    stream = TextStream(tokenizer, [], SamplingParams(stop="fox!").normalized())
    for token in tokenizer.encode("brown fox", add_special_tokens=False):
        stream.push(token)
    assert stream.emittable == "brown "
    assert stream.finish({"type": "length", "length": 3}) == "brown fox"


def test_a_stop_made_of_byte_tokens_ends_the_request_at_its_last_byte():
    tokenizer = byte_fallback()
    ids = tokenizer.encode("the 😊 the", add_special_tokens=False)
    stream = TextStream(tokenizer, [], SamplingParams(stop="😊").normalized())
    used = next(count for count, token in enumerate(ids, 1) if stream.push(token))
    assert "😊" in tokenizer.decode(ids[:used]) and "😊" not in tokenizer.decode(ids[: used - 1])
    assert stream.finish({"type": "stop", "matched": "😊"}) == "the "


def test_special_tokens_are_seen_by_stops_only_if_they_are_shown():
    tokenizer = byte_level()
    for skip, expected in ((True, None), (False, "<|eos|>")):
        params = SamplingParams(stop="<|eos|>", skip_special_tokens=skip).normalized()
        match = TextStream(tokenizer, [], params).push(tokenizer.eos_token_id)
        assert (match.matched if match else None) == expected


def test_patterns_are_tried_after_all_stop_strings_and_do_not_cut():
    assert run(["zz"], ["id 4", "2 zz"], regexes=[r"\d\d"]) == ("zz", "id 42 ")
    assert run([], ["id 4", "2 more"], regexes=[r"\d\d"]) == (r"\d\d", "id 42 more")


def test_a_plain_word_as_pattern_is_held_back_and_cut_like_a_stop_string():
    assert run([], ["the E", "ND here"], regexes=["END"]) == ("END", "the ")
    assert run([], ["the E", "ND here"], regexes=["END"], no_stop_trim=True) == ("END", "the END")
    matcher = StopMatcher([], ["END"])
    matcher.push("the E")
    assert matcher.held == 1


def test_very_long_and_self_similar_stops_cost_linear_time():
    matcher = StopMatcher(["a" * 5000 + "b"] * 4)
    for _ in range(200):
        assert matcher.push("a" * 100) is None
    assert matcher.held == 5000
    assert matcher.push("b").cut == 15000


atoms = st.sampled_from(
    r"a|b|.|[ab]|[^a]|[a-c1]|\d|\w|\W|\s|\b|^|$|\A|\Z|\n|1| |(?i:A)|(?m:^)|(?m:$)|(?s:.)|é|()|(?a:\w)".split(
        "|"
    )
)
repeats = st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?", "{0,2}?", "{2,}"])
patterns = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, repeats).map(lambda pair: f"({pair[0]}){pair[1]}"),
    ),
    max_leaves=6,
)


@settings(max_examples=800, deadline=None)
@given(
    patterns, st.lists(st.text("ab1 \nAé_", min_size=1, max_size=3), max_size=5), st.text("ab\n", max_size=2)
)
def test_patterns_are_found_exactly_when_re_search_finds_them(pattern, pieces, pending):
    search = PatternSearch(pattern)
    text = ""
    for piece in pieces:
        search.push(piece)
        text += piece
        assert search.found(pending) == (re.search(pattern, text + pending) is not None)
        assert search.found() == (re.search(pattern, text) is not None)


@pytest.mark.parametrize(
    "pattern", ["a$", r"a$\n", r"a\Z", "(?m)a$", "^b", "(?m)^b", r"(?m)\Ab", r"\bb", r"a\b", r"a\Bb", "b$$"]
)
@pytest.mark.parametrize("text", ["a", "a\n", "a\n\n", "a\nb", "b\n", "ab", "ab\n", "xb", "a b"])
def test_positions_mean_what_they_mean_to_re(pattern, text):
    search = PatternSearch(pattern)
    for count, character in enumerate(text, 1):
        search.push(character)
        assert search.found() == (re.search(pattern, text[:count]) is not None)


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(a*)*b", "(.*)(.*)(.*)b", "(a|b)*a(a|b){90}c"])
def test_patterns_that_ruin_backtracking_do_no_harm(pattern):
    search = PatternSearch(pattern)
    search.push("a" * 3000)
    assert not search.found()


@pytest.mark.parametrize(
    "pattern", ["(", "[", "a{1,100000}", "((a{99}){99}){99}", "(?=a)", "(?<!a)b", r"(a)\1", "(?>a)", "a++"]
)
def test_patterns_that_cannot_be_followed_are_refused(pattern):
    with pytest.raises(ValueError, match="stop_regex"):
        SamplingParams(stop_regex=pattern).normalized()


@given(st.text(min_size=1, max_size=30))
def test_any_text_as_pattern_is_accepted_or_refused_cleanly(pattern):
    assume(len(pattern.encode()) <= 256)
    try:
        params = SamplingParams(stop_regex=pattern).normalized()
    except ValueError as error:
        assert "stop_regex" in str(error)
    else:
        StopMatcher([], params.stop_regex).push("some text")
