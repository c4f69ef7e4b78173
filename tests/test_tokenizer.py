"""Streamed text equals decoding everything at once, and the prompt never shows in it."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgen.detokenizer_states import MAX_PENDING, WINDOW, WindowState
from jaxgen.sampling_params import SamplingParams
from jaxgen.tokenizer import (
    IncrementalDetokenizer,
    TextStream,
    TokenDecoder,
    decode,
    encode,
    eos_token_ids,
)
from tests.tiny_tokenizers import byte_fallback, byte_level, metaspace, plain_bytes, word_pieces

TEXTS = ["Hello 好 😊 the", "the 👨‍👩‍👧 é", " 🇩🇪", "all  or\n", "สวัสดี", ""]


def byte_token(byte: int) -> int:
    return byte_fallback().convert_tokens_to_ids(f"<0x{byte:02X}>")


def streamed(decoder, prompt, output, skip_special=True):
    """Text pieces of pushing ids one at a time, and of the flush."""
    detokenizer = IncrementalDetokenizer(decoder, prompt, skip_special)
    pieces = [detokenizer.push([token]) for token in output]
    pieces.append(detokenizer.flush())
    assert detokenizer.text == "".join(pieces)
    return pieces


def output_text(tokenizer, prompt, output, skip_special=True):
    """One-shot decode of both, less what it has in common with the decode of the prompt alone.

    An incomplete character at the prompt's end is U+FFFD in the latter and not part of the former.
    """
    everything = decode(tokenizer, prompt + output, skip_special)
    own = decode(tokenizer, prompt, skip_special)
    while not everything.startswith(own):
        own = own[:-1]
    return everything[len(own) :]


def output_text_with_fallback(tokenizer, prompt, output, skip_special=True):
    """The same where a run of byte tokens crosses the boundary: the run decodes as a whole or not at all."""
    special = set(tokenizer.all_special_ids) if skip_special else set()
    prompt = [token for token in prompt if token not in special]
    output = [token for token in output if token not in special]
    head = len(prompt)
    while head and 3 <= prompt[head - 1] < 259:
        head -= 1
    own_run = bytes(token - 3 for token in prompt[head:])
    tail = 0
    while tail < len(output) and 3 <= output[tail] < 259:
        tail += 1
    run = own_run + bytes(token - 3 for token in output[:tail])
    try:
        run.decode()
        own_characters = len(own_run.decode(errors="ignore"))
    except UnicodeDecodeError:
        own_characters = len(own_run)
    before = decode(tokenizer, prompt[:head], skip_special)
    return decode(tokenizer, prompt + output, skip_special)[len(before) + own_characters :]


def random_case(tokenizer, rng):
    """Prompt and output: half of them random ids, half real text cut anywhere, also inside a character."""

    def ids(longest):
        if rng.random() < 0.5:
            return [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(longest))]
        encoded = tokenizer.encode(rng.choice(TEXTS), add_special_tokens=False)
        start = rng.randrange(len(encoded) + 1)
        return encoded[start : start + rng.randrange(longest)]

    return ids(10), ids(24), rng.random() < 0.5


@pytest.mark.parametrize("make", [byte_level, metaspace, word_pieces, plain_bytes])
def test_random_sequences_stream_to_the_one_shot_decode(make):
    tokenizer, rng = make(), random.Random(17)
    decoder = TokenDecoder(tokenizer)
    for _ in range(10_000 if make is byte_level else 2000):
        prompt, output, skip = random_case(tokenizer, rng)
        assert "".join(streamed(decoder, prompt, output, skip)) == output_text(
            tokenizer, prompt, output, skip
        )


def test_random_sequences_with_byte_fallback_stream_to_the_one_shot_decode():
    tokenizer, rng = byte_fallback(strip=False), random.Random(18)
    decoder = TokenDecoder(tokenizer)
    for _ in range(10_000):
        prompt, output, skip = random_case(tokenizer, rng)
        expected = output_text_with_fallback(tokenizer, prompt, output, skip)
        assert "".join(streamed(decoder, prompt, output, skip)) == expected


def test_the_first_space_is_stripped_only_where_the_whole_text_begins():
    tokenizer = byte_fallback()
    decoder = TokenDecoder(tokenizer)
    the = tokenizer.convert_tokens_to_ids("▁the")
    space, bos = byte_token(0x20), tokenizer.bos_token_id
    for prompt in ([], [bos], [the], [tokenizer.convert_tokens_to_ids("▁")]):
        for output in ([the, the], [space, the], [space], [tokenizer.convert_tokens_to_ids("▁▁"), the]):
            everything = decode(tokenizer, prompt + output)
            own = decode(tokenizer, prompt)
            assert "".join(streamed(decoder, prompt, output)) == everything[len(own) :]


@settings(max_examples=400, deadline=None)
@given(st.text(min_size=1), st.data())
def test_text_cut_at_any_token_streams_back_exactly(text, data):
    for make in (byte_level, byte_fallback):
        tokenizer = make()
        text = text.replace("▁", "_")  # SentencePiece cannot tell it from a space
        ids = tokenizer.encode(text, add_special_tokens=False)
        cut = data.draw(st.integers(0, len(ids)))
        pieces = streamed(TokenDecoder(tokenizer), ids[:cut], ids[cut:], skip_special=False)
        full = decode(tokenizer, ids, skip_special_tokens=False)
        assert full.endswith("".join(pieces))
        own = decode(tokenizer, ids[:cut], skip_special_tokens=False).rstrip("\ufffd")
        if "\ufffd" not in full:
            assert len("".join(pieces)) <= len(full) - len(own)
            assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_split_between_prompt_and_output_comes_out_whole():
    tokenizer = byte_level()
    ids = tokenizer.encode("ok 😊!", add_special_tokens=False)
    for cut in range(1, len(ids)):
        text = "".join(streamed(tokenizer, ids[:cut], ids[cut:]))
        assert "ok 😊!".endswith(text) and "\ufffd" not in text
    assert "".join(streamed(tokenizer, ids[:-2], ids[-2:])).startswith("😊")


def test_an_unfinished_character_is_held_back_and_flushed_at_the_end():
    tokenizer = byte_fallback()
    face = [byte_token(byte) for byte in "😊".encode()]
    hello = tokenizer.encode("Hello", add_special_tokens=False)
    assert streamed(tokenizer, hello, face[:3]) == ["", "", "", "\ufffd" * 3]
    assert streamed(tokenizer, hello, face) == ["", "", "", "", "😊"]


def test_text_spelled_in_bytes_only_still_streams():
    tokenizer = byte_fallback()
    ids = [byte_token(byte) for byte in ("བོད་ཡིག" * 30).encode()]
    pieces = streamed(tokenizer, [], ids)
    assert "".join(pieces) == "བོད་ཡིག" * 30
    assert sum(bool(piece) for piece in pieces) > 5


def test_a_replacement_character_that_was_really_generated_is_not_held_back():
    for make in (byte_level, byte_fallback):
        tokenizer = make()
        ids = tokenizer.encode("a\ufffdb", add_special_tokens=False)
        assert "".join(streamed(tokenizer, [], ids)) == "a\ufffdb"


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_thousands_of_lone_bytes_come_out_as_replacement_characters(make):
    tokenizer = make()
    lone = byte_token(0xE2) if make is byte_fallback else tokenizer.convert_tokens_to_ids("â")
    assert "".join(streamed(tokenizer, [], [lone] * 32000)) == "\ufffd" * 32000


def test_the_generic_way_never_decodes_more_than_a_short_window():
    lengths = []

    def decode_ids(ids):
        lengths.append(len(ids))
        return "".join("\ufffd" if token == 7 else "" if token == 8 else "x" for token in ids)

    state = WindowState(decode_ids, [1] * 100)
    text = "".join(state.push(token) for token in [7] * 1000 + [8] * 1000 + [1]) + state.flush()
    assert text == "\ufffd" * 1000 + "x"
    assert max(lengths) <= 2 * WINDOW + MAX_PENDING + 1


def test_the_generic_way_holds_back_an_unfinished_character():
    text = "é 😊好 ok"

    def decode_ids(ids):
        return bytes(ids).decode(errors="replace")

    state = WindowState(decode_ids, list("😊".encode())[:2])
    pieces = [state.push(byte) for byte in list("😊".encode())[2:] + list(text.encode())]
    assert "".join(pieces) + state.flush() == "😊" + text
    assert not any("\ufffd" in piece for piece in pieces)


def test_ids_the_tokenizer_does_not_know_add_no_text():
    for make in (byte_level, byte_fallback, metaspace):
        tokenizer = make()
        known = tokenizer.encode("the", add_special_tokens=False)
        assert "".join(streamed(tokenizer, [], [10**6, *known, 10**6])) == decode(tokenizer, known)


def test_special_tokens_show_only_when_asked_for():
    tokenizer = byte_level()
    ids = [tokenizer.convert_tokens_to_ids("Hell"), tokenizer.eos_token_id]
    assert "".join(streamed(tokenizer, [], ids, True)) == "Hell"
    assert "".join(streamed(tokenizer, [], ids, False)) == "Hell<|eos|>"


def test_spaces_between_special_tokens_reaches_slow_tokenizers_only():
    class Recorder:
        def __init__(self, is_fast):
            self.is_fast, self.options = is_fast, {}

        def decode(self, ids, **options):
            self.options = options
            return "x"

    slow, fast = Recorder(False), Recorder(True)
    decode(slow, [1], True, False)
    decode(fast, [1], True, False)
    assert slow.options["spaces_between_special_tokens"] is False
    assert "spaces_between_special_tokens" not in fast.options


def test_encode_one_or_many():
    tokenizer = byte_level()
    assert encode(tokenizer, "Hello") == tokenizer.encode("Hello")
    assert encode(tokenizer, ["Hello", "fox"]) == [tokenizer.encode("Hello"), tokenizer.encode("fox")]
    assert encode(tokenizer, []) == []


def test_a_text_without_ids_becomes_bos_or_an_error():
    assert encode(byte_level(), "") == [byte_level().bos_token_id]
    with pytest.raises(ValueError, match="cannot be empty"):
        encode(metaspace(), ["a", ""])


def test_a_lone_surrogate_in_a_prompt_is_a_value_error():
    with pytest.raises(ValueError, match="not valid Unicode"):
        encode(byte_level(), "a\ud800")


def test_eos_ids_are_the_union_of_all_sources():
    tokenizer = byte_level()
    end_of_message = tokenizer.convert_tokens_to_ids("<|eom_id|>")
    assert eos_token_ids(tokenizer, 3, [4, 5], None) == {3, 4, 5, tokenizer.eos_token_id, end_of_message}
    assert eos_token_ids(None, 3) == {3}


def text_of(tokenizer, ids, reason, **params):
    stream = TextStream(tokenizer, [], SamplingParams(**params).normalized())
    for token in ids:
        stream.push(token)
    return stream.finish(reason)


def test_the_stop_token_gives_no_text_unless_asked_for():
    tokenizer = byte_level()
    ids = tokenizer.encode("Hello world", add_special_tokens=False)
    shorter = decode(tokenizer, ids[:-1])
    reason = {"type": "stop", "matched": ids[-1]}
    assert text_of(tokenizer, ids, reason) == shorter
    assert text_of(tokenizer, ids, reason, no_stop_trim=True) == "Hello world"
    assert text_of(tokenizer, ids, {"type": "length", "length": len(ids)}) == "Hello world"
    assert text_of(tokenizer, ids, {"type": "abort", "message": "Aborted"}) == "Hello world"


def test_dropping_the_stop_token_restores_an_unfinished_character():
    tokenizer = byte_fallback()
    face = [byte_token(byte) for byte in "😊".encode()]
    ids = [tokenizer.convert_tokens_to_ids("the"), *face]
    ids[0] = tokenizer.convert_tokens_to_ids("a")
    reason = {"type": "stop", "matched": face[-1]}
    assert text_of(tokenizer, ids, reason) == decode(tokenizer, ids[:-1]) == "a" + "\ufffd" * 3


def test_dropping_the_last_token_equals_never_having_seen_it():
    rng = random.Random(5)
    for make in (byte_level, byte_fallback, metaspace):
        tokenizer = make()
        decoder = TokenDecoder(tokenizer)
        for _ in range(300):
            prompt, output, skip = random_case(tokenizer, rng)
            if not output:
                continue
            detokenizer = IncrementalDetokenizer(decoder, prompt, skip)
            for part in random_parts(output, rng):
                detokenizer.push(part)
            detokenizer.drop_last()
            detokenizer.flush()
            assert detokenizer.text == "".join(streamed(decoder, prompt, output[:-1], skip))


def random_parts(ids, rng):
    """The ids in runs of random lengths, some of them empty."""
    cuts = sorted(rng.randrange(len(ids) + 1) for _ in range(rng.randrange(4)))
    return [ids[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(ids)])]


@pytest.mark.parametrize("make", [byte_level, byte_fallback, metaspace])
def test_many_ids_at_once_give_what_they_give_one_by_one(make):
    tokenizer, rng = make(), random.Random(6)
    decoder = TokenDecoder(tokenizer)
    for _ in range(1000):
        prompt, output, skip = random_case(tokenizer, rng)
        detokenizer = IncrementalDetokenizer(decoder, prompt, skip)
        pieces = [detokenizer.push(part) for part in random_parts(output, rng)]
        assert "".join([*pieces, detokenizer.flush()]) == "".join(streamed(decoder, prompt, output, skip))
