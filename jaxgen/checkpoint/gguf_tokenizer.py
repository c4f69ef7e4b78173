"""Build a Hugging Face fast tokenizer from the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.checkpoint.errors import CheckpointError
from jaxgen.logs import torch_not_missed

# Token types of tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

MAX_PIECE = 256  # characters; longer pieces are never the result of a merge in published vocabularies

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

# tokenizer.ggml.pre -> kind of splitting. The names are llama.cpp's; the rules are those of the models' own
# tokenizer.json files.
_PRE_TOKENIZERS: Mapping[str, str] = {
    "default": "gpt2",
    "gpt-2": "gpt2",
    "gpt2": "gpt2",
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "command-r": "digits",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
}


def build_tokenizer(path: Path, metadata: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """Build the tokenizer.

    Args:
        path: The file, for messages.
        metadata: GGUF metadata (``tokenizer.*``).
        config: The model's ``config.json``, for its context length and architecture.

    Returns:
        A ``transformers.PreTrainedTokenizerFast`` with special tokens and chat template.

    Raises:
        CheckpointError: the metadata is incomplete or of an unknown kind.
    """
    with torch_not_missed():
        from transformers import PreTrainedTokenizerFast

    vocabulary = _Vocabulary(path, metadata)
    kind = metadata.get("tokenizer.ggml.model")
    try:
        if kind == "gpt2":
            tokenizer = _byte_level(vocabulary, _pre_tokenizer_kind(path, metadata, config))
        elif kind == "llama":
            tokenizer = _sentencepiece(vocabulary)
        else:
            raise CheckpointError(
                f"{path}: tokenizer model {kind!r} is not supported (known: gpt2, llama); give tokenizer_path"
            )
        _add_special_tokens(tokenizer, vocabulary, kind)
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception for a vocabulary it refuses
        raise CheckpointError(f"{path}: the tokenizer in the metadata is damaged: {error}") from error
    named = {
        f"{name}_token": vocabulary.special(key)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if vocabulary.special(key) is not None
    }
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        named["chat_template"] = template
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=config["max_position_embeddings"],
        **({"bos_token": None, "eos_token": None} | named),
    )


class _Vocabulary:
    """Checked access to the tokenizer metadata."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]):
        self.path = path
        self.metadata = metadata
        tokens = metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens:
            raise CheckpointError(f"{path}: has no tokenizer (tokenizer.ggml.tokens); give tokenizer_path")
        self.tokens: list[str] = tokens
        self.types = self._per_token("token_type", NORMAL)
        self.ids: dict[str, int] = {}
        for i, token in enumerate(tokens):
            self.ids.setdefault(token, i)

    def special(self, name: str) -> str | None:
        """Text of the special token ``name`` (bos, eos, unknown, padding), None when there is none."""
        value = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(self.tokens):
            raise CheckpointError(
                f"{self.path}: metadata tokenizer.ggml.{name}_token_id is {value!r}, "
                f"but there are {len(self.tokens)} tokens"
            )
        return self.tokens[value]

    def flag(self, name: str, default: bool) -> bool:
        """A boolean of the tokenizer."""
        return bool(self.metadata.get(f"tokenizer.ggml.{name}", default))

    def scores(self) -> np.ndarray:
        """SentencePiece scores, one per token."""
        return self._per_token("scores", None)

    def merges(self) -> list[tuple[str, str]]:
        """BPE merges in order of preference."""
        lines = self.metadata.get("tokenizer.ggml.merges")
        if not isinstance(lines, list):
            raise CheckpointError(f"{self.path}: metadata tokenizer.ggml.merges is missing")
        merges = []
        for line in lines:
            left, _, right = line.partition(" ")
            if not left or not right or left + right not in self.ids:
                raise CheckpointError(f"{self.path}: tokenizer.ggml.merges has the invalid entry {line!r}")
            merges.append((left, right))
        return merges

    def _per_token(self, key: str, default: int | None) -> np.ndarray:
        values = self.metadata.get(f"tokenizer.ggml.{key}")
        if values is None and default is not None:
            return np.full(len(self.tokens), default)
        if not isinstance(values, np.ndarray) or len(values) != len(self.tokens):
            raise CheckpointError(
                f"{self.path}: metadata tokenizer.ggml.{key} does not have one entry per token"
            )
        return values


def _pre_tokenizer_kind(path: Path, metadata: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    # Files from before the key existed: the architecture tells the Qwen family, the rest was GPT-2's.
    default = "qwen2" if config["model_type"].startswith("qwen") else "default"
    name = metadata.get("tokenizer.ggml.pre", default)
    if name not in _PRE_TOKENIZERS:
        raise CheckpointError(
            f"{path}: pre-tokenizer {name!r} is not supported (known: {', '.join(_PRE_TOKENIZERS)}); "
            "give tokenizer_path"
        )
    return _PRE_TOKENIZERS[name]


def _byte_level(vocabulary: _Vocabulary, kind: str) -> Any:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen 2 use it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    bpe = models.BPE(vocab=vocabulary.ids, merges=vocabulary.merges(), ignore_merges=kind == "llama3")
    tokenizer = Tokenizer(bpe)
    if pattern := {"llama3": _LLAMA3, "qwen2": _QWEN2}.get(kind):
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]  # with GPT-2's pattern
        if kind == "digits":
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _sentencepiece(vocabulary: _Vocabulary) -> Any:
    """SentencePiece BPE with byte fallback, as Llama 2 and Mistral use it."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = vocabulary.special("unknown")
    bpe = models.BPE(
        vocab=vocabulary.ids,
        merges=_merges_from_scores(vocabulary),
        unk_token=unknown if unknown is not None else vocabulary.tokens[0],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(bpe)
    prefix = vocabulary.flag("add_space_prefix", True)
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_from_scores(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """The merges that make each piece, best score first; ties by the ids of the halves.

    SentencePiece merges the neighbours whose joint piece scores highest; BPE by rank does the same when every
    way to split a piece has the rank of its score.
    """
    ids, scores, types = vocabulary.ids, vocabulary.scores(), vocabulary.types
    ranked = []
    for piece, i in ids.items():
        if types[i] not in (NORMAL, USER_DEFINED) or len(piece) > MAX_PIECE:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                ranked.append((-float(scores[i]), i, ids[left], ids[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _add_special_tokens(tokenizer: Any, vocabulary: _Vocabulary, kind: str) -> None:
    from tokenizers import AddedToken, processors

    for token, type in zip(vocabulary.tokens, vocabulary.types):
        if type in (CONTROL, USER_DEFINED, UNKNOWN):
            added = AddedToken(token, normalized=False, special=type != USER_DEFINED)
            (tokenizer.add_tokens if type == USER_DEFINED else tokenizer.add_special_tokens)([added])
    bos, eos = vocabulary.special("bos"), vocabulary.special("eos")
    llama3 = vocabulary.metadata.get("tokenizer.ggml.pre") in ("llama-bpe", "llama3", "llama-v3")
    add_bos = bos is not None and vocabulary.flag("add_bos_token", kind == "llama" or llama3)
    add_eos = eos is not None and vocabulary.flag("add_eos_token", False)
    if not add_bos and not add_eos:
        return
    # The template's parser splits at spaces, so tokens go in under plain names.
    first = ["bos:0"] if add_bos else []
    template = processors.TemplateProcessing(
        single=[*first, "$A:0", *(["eos:0"] if add_eos else [])],
        pair=[*first, "$A:0", *first, "$B:0", *(["eos:0"] if add_eos else [])],
        special_tokens=[
            {"id": name, "ids": [vocabulary.ids[token]], "tokens": [token]}
            for name, token in (("bos", bos), ("eos", eos))
            if token is not None
        ],
    )
    before = tokenizer.post_processor
    tokenizer.post_processor = template if before is None else processors.Sequence([before, template])
