"""Engines over the tiny golden checkpoints, small enough to start in seconds, and a NumPy model to compare with."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from jaxgen import Engine

GOLDEN = Path(__file__).parent.parent / "golden"
TOKENIZER = GOLDEN / "tokenizer"
CONTEXT = 256  # of every golden checkpoint
PAGE = 16

OPTIONS = {
    "model_path": str(GOLDEN / "llama3"),
    "tokenizer_path": str(TOKENIZER),
    "dtype": "float32",
    "max_running_requests": 8,
    "max_total_tokens": 2048,
    "chunked_prefill_size": 64,
    # One bucket of each kind: three compiled steps in all.
    "cuda_graph_bs_decode": [8],
    "cuda_graph_bs_prefill": [64],
}


def start(**options) -> Engine:
    return Engine(**(OPTIONS | options))


def greedy(max_new_tokens: int = 8, **more) -> dict:
    """Greedy parameters under which every token counts: no early end."""
    return {"temperature": 0.0, "max_new_tokens": max_new_tokens, "ignore_eos": True, **more}


def golden_cases(family: str = "llama3") -> list[dict]:
    """What Hugging Face transformers gives: prompt ids, their logprobs, 32 greedy ids and their logprobs."""
    return json.loads((GOLDEN / family / "expected.json").read_text(encoding="utf-8"))["cases"]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Random ids, none of them special."""
    return np.random.default_rng(seed).integers(10, 380, length).tolist()


def values(entries: list[tuple]) -> np.ndarray:
    """Log-probabilities of a list of (logprob, id, text), without a first entry that has none."""
    return np.array([entry[0] for entry in entries if entry[0] is not None])


def check_idle(engine: Engine) -> None:
    """Nothing runs or waits, and every KV page is free or cached."""
    state = engine.get_server_info()["internal_states"][0]
    assert state["running_batch_size"] == 0
    assert state["waiting_queue_size"] == 0
    assert state["available_kv_tokens"] == state["memory_usage"]["token_capacity"]


class NumpyLlama:
    """The llama2 golden checkpoint in float64 NumPy, all positions at once: no cache, no chunks, no batch."""

    def __init__(self) -> None:
        directory = GOLDEN / "llama2"
        self.config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(directory / "model.safetensors")
        self.weights = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def hidden(self, ids: list[int]) -> np.ndarray:
        """[T, D] vectors after the final norm."""
        config, w = self.config, self.weights
        heads, width = config["num_attention_heads"], config["head_dim"]
        x = w["model.embed_tokens.weight"][ids]
        angles = np.outer(np.arange(len(ids)), 10000.0 ** (-np.arange(0, width, 2) / width))  # [T, H/2]
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        mask = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)

        def rotate(y: np.ndarray) -> np.ndarray:
            a, b = np.split(y, 2, axis=-1)
            return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

        for i in range(config["num_hidden_layers"]):
            layer = f"model.layers.{i}."
            y = self._norm(x, layer + "input_layernorm")
            q, k, v = (
                (y @ w[f"{layer}self_attn.{name}_proj.weight"].T).reshape(len(ids), heads, width)
                for name in "qkv"
            )
            scores = np.einsum("tnh,snh->nts", rotate(q), rotate(k)) / np.sqrt(width) + mask
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = np.einsum("nts,snh->tnh", scores / scores.sum(-1, keepdims=True), v)
            x = x + mixed.reshape(len(ids), -1) @ w[layer + "self_attn.o_proj.weight"].T
            y = self._norm(x, layer + "post_attention_layernorm")
            gate, up = (y @ w[f"{layer}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[layer + "mlp.down_proj.weight"].T
        return self._norm(x, "model.norm")

    def logprobs(self, ids: list[int]) -> np.ndarray:
        """[T, V] log-probabilities of the token after each position."""
        logits = self.hidden(ids) @ self.weights["lm_head.weight"].T
        logits = logits - logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"])
        return x / scale * self.weights[name + ".weight"]
