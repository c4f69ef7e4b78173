"""Small tokenizers of the usual kinds, trained or spelled out in memory."""

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

CORPUS = [
    "Hello world, the quick brown fox jumps over the lazy dog. Don't stop!\n",
    "Größe, café, naïve, Ærøskøbing; Привет, мир. 你好，世界。 สวัสดี 😊👍🏽🇩🇪 👨‍👩‍👧\n\n",
    "def main(argv):\n    return sum(int(x) for x in argv) ** 2  # sum\n",
] * 4


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE with special and other added tokens, one of them outside the byte alphabet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|bos|>", "<|eos|>", "<|eom_id|>"])
    tokenizer.add_tokens([AddedToken("<tool call>", special=False), AddedToken("☃ snow", special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        clean_up_tokenization_spaces=True,
    )


@cache
def byte_fallback(strip: bool = True) -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE: pieces with `▁` for spaces, and one token per byte for everything else."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += list("▁abcdefghijklmnopqrstuvwxyzHTD.,!'é好")
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a"), ("l", "l"), ("o", "r"), ("▁", "▁")]
    names += ["".join(pair) for pair in merges]
    model = models.BPE(
        vocab={name: index for index, name in enumerate(names)},
        merges=merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """A unigram model with a decoder that only the generic way understands."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@cache
def word_pieces() -> PreTrainedTokenizerFast:
    """WordPiece, whose decoder joins pieces and closes up punctuation."""
    words = ["[UNK]", "[SEP]", "the", "fox", "##es", "do", "n", "'", "t", ".", "##x", "é", "!", "s"]
    model = models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[SEP]"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", sep_token="[SEP]")


@cache
def plain_bytes() -> ByT5Tokenizer:
    """One token per byte, in pure Python: bytes that are no character vanish instead of showing as U+FFFD."""
    return ByT5Tokenizer()
