"""Writes the golden fixtures beside this file: tiny checkpoints and what Hugging Face computes with them.

    python tests/golden/make_golden.py            # from the repository root; takes seconds on a CPU

Needs torch and transformers, which jaxgen's own environment does not have. A throwaway one:

    python3 -m venv hf-venv && hf-venv/bin/pip install torch transformers safetensors
    hf-venv/bin/python tests/golden/make_golden.py

Each `<family>/` gets config.json (in the form public checkpoints have), float32 safetensors with random
weights, and expected.json: for every prompt its ids, the log-probability of each id given those before it,
and the 32 ids of greedy decoding (end-of-sequence ignored). `tokenizer/` is one byte-level BPE tokenizer
whose vocabulary every family shares; `rope.json` has Hugging Face's inverse frequencies for real models'
rope settings. The fixtures are committed; run this again only to add a family.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

HERE = Path(__file__).parent
VOCAB = 384  # divisible by tensor-parallel sizes 2, 3 and 4
BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
GREEDY_TOKENS = 32
MIN_GAP = 1e-3  # between the best and the second logit, so that equal greedy ids mean something

CORPUS = [
    "The scheduler decides which requests advance and which pages they own.",
    "A page is a run of token positions; a request owns a list of pages.",
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox does not.",
    "def add(a, b):\n    return a + b\n",
    'for i in range(10):\n    print("step", i)\n',
    "Once upon a time there was a small model that liked to write long stories about the sea.",
    "Grüße aus Zürich! Ça va? 你好,世界。 こんにちは。 🙂🚀",
    "one two three four five six seven eight nine ten",
]
PROMPTS = [
    "The fox",
    "Once upon a time there was a page",
    'def step(i):\n    print("requests", i)\n    return i + 1\n',
    "Grüße! The scheduler of the small model decides which pages the quick requests own, and the lazy dog "
    "sleeps over a list of token positions. 你好 🙂 one two three",
]

COMMON = {
    "vocab_size": VOCAB,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
FAMILIES = {
    "llama2": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 12,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "rope_scaling": None,
        "tie_word_embeddings": False,
    },
    "llama3": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 36,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "rope_theta": 500.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "tie_word_embeddings": True,
    },
    "llama_yarn": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 256,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "sliding_window": 16,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 32,
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "use_sliding_window": True,
        "sliding_window": 12,
        "max_window_layers": 1,
        "attention_bias": False,
        "tie_word_embeddings": True,
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "sliding_window": 9,
        "tie_word_embeddings": False,
    },
}
SHARDED = {"qwen2"}

ROPES = {
    "default": {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 1.0}},
    "linear": {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 8.0}},
    "dynamic": {"rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama3": {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "yarn": {
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    },
    "yarn_mscale": {
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 0.707,
            "beta_fast": 32,
            "beta_slow": 1,
            "truncate": False,
        },
    },
}


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    assert tokenizer.get_vocab_size() == VOCAB, tokenizer.get_vocab_size()
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 256,
        },
    )


def fill_weights(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that attention is peaked and logits are far apart."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("bias"):
            noise *= 0.5
        elif "norm" in name:
            noise = 1 + 0.3 * noise
        elif "embed_tokens" in name or "lm_head" in name:
            noise *= 0.6
        else:
            noise *= 2.0 / weight.shape[-1] ** 0.5
        weight.data.copy_(noise)


@torch.no_grad()
def expected(model: torch.nn.Module, ids: list[int]) -> dict:
    """Log-probabilities of the prompt and the greedy continuation, each step a full forward pass."""
    tokens, gap = list(ids), float("inf")
    for _ in range(GREEDY_TOKENS):
        best = model(torch.tensor([tokens])).logits[0, -1].topk(2)
        gap = min(gap, float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
    assert gap > MIN_GAP, f"top-2 gap {gap}: greedy ids would depend on rounding; choose another seed"
    logprobs = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    chosen = logprobs[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])].tolist()
    return {
        "prompt_ids": ids,
        "prompt_logprobs": [round(x, 6) for x in chosen[: len(ids) - 1]],
        "greedy_ids": tokens[len(ids) :],
        "greedy_logprobs": [round(x, 6) for x in chosen[len(ids) - 1 :]],
    }


def write_family(name: str, tokenizer: Tokenizer, path: Path, seeds: range) -> None:
    path.mkdir()
    write_json(path / "config.json", FAMILIES[name] | COMMON)
    if name == "llama3":
        write_json(path / "generation_config.json", {"bos_token_id": 0, "eos_token_id": [1, 2]})
    config = AutoConfig.from_pretrained(path)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    for seed in seeds:
        fill_weights(model, seed)
        try:
            cases = [{"prompt": p} | expected(model, tokenizer.encode(p).ids) for p in PROMPTS]
        except AssertionError as error:
            print(f"{name}: seed {seed}: {error}")
            continue
        distinct = min(len(set(case["greedy_ids"])) for case in cases)
        if distinct >= 8:  # a model that repeats one token would hide a wrong position or mask
            break
        print(f"{name}: seed {seed}: only {distinct} distinct greedy tokens")
    else:
        raise RuntimeError(f"{name}: no seed gives distinct, clear greedy tokens")
    write_json(path / "expected.json", {"seed": seed, "cases": cases})
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, max_shard_size="60KB" if name in SHARDED else "1GB")
        for file in Path(scratch).glob("model*.safetensors*"):
            shutil.copy(file, path / file.name)
    print(
        f"{name}: seed {seed}, prompt lengths {[len(c['prompt_ids']) for c in cases]}, distinct >= {distinct}"
    )


def write_rope(path: Path) -> None:
    table = {}
    for name, rope in ROPES.items():
        raw = {
            "head_dim": 64,
            "hidden_size": 128,
            "num_attention_heads": 2,
            "max_position_embeddings": 4096,
            "model_type": "llama",
        } | rope
        config = AutoConfig.for_model(**raw)
        kind = config.rope_parameters["rope_type"]
        inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        table[name] = {"config": raw, "inv_freq": inv_freq.tolist(), "attention_factor": float(factor)}
        if kind == "dynamic":  # the frequencies of a token at position 8191
            inv_freq, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=8192)
            table[name]["inv_freq_at_8191"] = inv_freq.tolist()
    write_json(path, table)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    for name in ("tokenizer", *FAMILIES):
        shutil.rmtree(HERE / name, ignore_errors=True)
    tokenizer = make_tokenizer()
    write_tokenizer(tokenizer, HERE / "tokenizer")
    write_rope(HERE / "rope.json")
    for name in FAMILIES:
        write_family(name, tokenizer, HERE / name, seeds=range(40))


if __name__ == "__main__":
    main()
