"""Tokenizers built from GGUF metadata, compared with the tokenizers the metadata was made from."""

import json
import random
from itertools import pairwise

import gguf_files
import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from jaxgen.checkpoint import CheckpointError, open_checkpoint

CORPUS = [
    "The scheduler decides which requests advance, and which pages they own.",
    "Don't panic: I'LL be there at 12:30, won't we've 1234567 reasons?",
    "def add(a, b):\n    return a + b\n\n\nfor i in range(10):\n\tprint(i)\r\n",
    "Größe, naïve café, 日本語のテキスト, Привет мир, 😀👨‍👩‍👧, ½ ² Ⅳ ١٢٣",
] * 4

# The rules as the models' own tokenizer.json files have them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
RULES = {"gpt-2": GPT2, "default": GPT2, "smollm": DIGITS, "llama-bpe": split(LLAMA3), "qwen2": split(QWEN2)}


def texts():
    rng = random.Random(0)
    alphabet = "abcXYZ 0123456789'.,\n\r\t éß日😀½²Ⅳ١\u0301\u00a0\u200b"
    return CORPUS + ["".join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(500)]


def train(pre: str) -> Tokenizer:
    """A small byte-level BPE tokenizer with the rules of a real one."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = RULES[pre]
    tokenizer.normalizer = normalizers.NFC() if pre == "qwen2" else None
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def metadata(tokenizer: Tokenizer, **changes) -> dict:
    """What llama.cpp's converter writes for a byte-level tokenizer."""
    model = json.loads(tokenizer.to_str())["model"]
    size = tokenizer.get_vocab_size()
    kinds = [1] * size
    kinds[0] = kinds[1] = 3
    kinds[tokenizer.token_to_id("<tool>")] = 4
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [tokenizer.id_to_token(i) for i in range(size)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def build(tmp_path, entries):
    gguf_files.write(tmp_path / "m.gguf", entries)
    return open_checkpoint(tmp_path / "m.gguf").load_tokenizer()


@pytest.mark.parametrize("pre", RULES)
def test_ids_are_those_of_the_original(tmp_path, pre):
    original = train(pre)
    built = build(tmp_path, metadata(original, pre=pre))
    for text in texts():
        ids = built(text).input_ids
        assert ids == original.encode(text).ids, text
        assert built.decode(ids) == original.decode(ids)


def test_special_and_added_tokens_are_whole_tokens(tmp_path):
    built = build(tmp_path, metadata(train("smollm"), pre="smollm"))
    ids = built("<|begin|>a<tool>b<|end|>").input_ids
    assert ids[0] == built.bos_token_id == 0
    assert ids[-1] == built.eos_token_id == 1
    assert built.convert_tokens_to_ids("<tool>") in ids
    assert built.decode(ids, skip_special_tokens=True) == "a<tool>b"


def test_chat_template_and_context_length(tmp_path):
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    entries = metadata(train("smollm"), pre="smollm") | {"tokenizer.chat_template": template}
    built = build(tmp_path, entries)
    assert built.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[user] hi"
    assert built.model_max_length == 2048


def test_begin_and_end_tokens_as_the_file_says(tmp_path):
    original = train("llama-bpe")
    plain = original.encode("abc").ids
    flags = {"add_bos_token": True, "add_eos_token": True}
    both = build(tmp_path, metadata(original, pre="llama-bpe", **flags))
    assert both("abc").input_ids == [0, *plain, 1]
    assert both("abc", add_special_tokens=False).input_ids == plain
    assert both("abc", "abc").input_ids == [0, *plain, 0, *plain, 1]
    by_default = build(tmp_path, metadata(original, pre="llama-bpe", add_bos_token=None))
    assert by_default("abc").input_ids == [0, *plain]


def test_saved_tokenizers_load_again(tmp_path):
    built = build(tmp_path, metadata(train("qwen2"), pre="qwen2"))
    files = open_checkpoint(tmp_path / "m.gguf").tokenizer_files(tmp_path)
    assert {file.name for file in files} >= {"tokenizer.json", "tokenizer_config.json"}
    again = open_checkpoint(tmp_path / "m.gguf").load_tokenizer(str(tmp_path))
    for text in texts():
        assert again(text).input_ids == built(text).input_ids
    assert again.eos_token_id == built.eos_token_id


# ---- SentencePiece


def pieces() -> tuple[list[str], list[float], list[int]]:
    """A SentencePiece BPE vocabulary: unknown, control, bytes, merged pieces by score, then characters."""
    words = "▁the ▁th th ▁t he in ▁in ing ▁hello ▁he llo ll lo ▁world wor ld ▁▁ ▁▁▁▁ er re".split()
    letters = sorted(set("▁abcdefghijklmnopqrstuvwxyz,.é"))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words, *letters]
    scores = [0.0] * 259 + [-float(i) for i in range(len(words))] + [-100.0 - i for i in range(len(letters))]
    return tokens, scores, [2, 3, 3] + [6] * 256 + [1] * (len(words) + len(letters))


def sentencepiece_ids(text: str) -> list[int]:
    """SentencePiece's own algorithm: join the neighbours whose piece scores best, the leftmost first."""
    tokens, scores, _ = pieces()
    ids = {token: i for i, token in enumerate(tokens)}
    parts = list(text)
    while True:
        joins = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not joins:
            break
        _, at = min(joins)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    out = []
    for part in parts:
        out.extend([ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()])
    return out


def sentencepiece_metadata(**changes) -> dict:
    tokens, scores, kinds = pieces()
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def test_sentencepiece_ids_are_those_of_its_algorithm(tmp_path):
    built = build(tmp_path, sentencepiece_metadata())
    rng = random.Random(1)
    samples = ["hello world", "the thing in there, er", " two  spaces", "日本 é ü 😀", "a\nb"]
    samples += ["".join(rng.choices("thelowrdin  é😀", k=rng.randrange(1, 20))) for _ in range(300)]
    for text in samples:
        ids = sentencepiece_ids("▁" + text.replace(" ", "▁"))
        assert built(text).input_ids == [1, *ids], text
        assert built.decode(ids) == text


def test_sentencepiece_without_prefix_space_or_begin_token(tmp_path):
    built = build(tmp_path, sentencepiece_metadata(add_space_prefix=False, add_bos_token=False))
    assert built("the world").input_ids == sentencepiece_ids("the▁world")
    assert built.decode(sentencepiece_ids("the▁world")) == "the world"


# ---- refusals


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokens": None}, "no tokenizer"),
        ({"model": "rwkv"}, "rwkv"),
        ({"model": None}, "None"),
        ({"pre": "unheard-of"}, "unheard-of"),
        ({"merges": None}, "merges"),
        ({"merges": ["nospace"]}, "nospace"),
        ({"merges": ["Q Z"]}, "Q Z"),
        ({"token_type": [1, 1]}, "token_type"),
        ({"token_type": "text"}, "token_type"),
        ({"bos_token_id": 10**6}, "bos_token_id"),
    ],
)
def test_bad_tokenizers_are_named(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        build(tmp_path, metadata(train("smollm"), **{"pre": "smollm"} | changes))
    assert "m.gguf" in str(caught.value)


def test_very_long_pieces_take_no_quadratic_time(tmp_path):
    tokens, scores, kinds = pieces()
    long = ["a" * 200_000 + str(i) for i in range(20)]
    changes = {
        "tokens": tokens + long,
        "scores": scores + [-1.0] * len(long),
        "token_type": kinds + [1] * len(long),
    }
    built = build(tmp_path, sentencepiece_metadata(**changes))
    assert built("the").input_ids == [1, *sentencepiece_ids("▁the")]


def test_token_types_default_to_normal(tmp_path):
    entries = metadata(train("smollm"), pre="smollm", token_type=None)
    assert np.all(np.array(build(tmp_path, entries)("abc").input_ids) >= 2)
