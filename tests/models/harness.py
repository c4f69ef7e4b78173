"""Runs a golden checkpoint the way the engine does: chunked prefill, then decoding, over shuffled pages."""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from jaxgen.layers.attention import KV_PAGE_AXES, DecodeBatch, PrefillBatch
from jaxgen.models.config import ModelConfig
from jaxgen.models.registry import build_model
from jaxgen.sharding import abstract_params, make_mesh, sharding_for

GOLDEN = Path(__file__).parent.parent / "golden"
FAMILIES = ("llama2", "llama3", "llama_yarn", "qwen2", "qwen3", "mistral")
PAGE_SIZE = 8


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def load_config(family: str) -> ModelConfig:
    return ModelConfig.from_hf(read_json(GOLDEN / family / "config.json"))


def load_cases(family: str) -> list[dict]:
    return read_json(GOLDEN / family / "expected.json")["cases"]


def load_tensors(family: str) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for file in sorted((GOLDEN / family).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@dataclass
class Runner:
    """One model with its KV pages; requests are rows with fixed, shuffled pages of their own."""

    config: ModelConfig
    tp_size: int = 1
    max_pages: int = 16
    max_rows: int = 4

    def __post_init__(self):
        self.mesh = make_mesh(self.tp_size)
        model = nnx.eval_shape(lambda: build_model(self.config, jnp.float32, mesh=self.mesh))
        self.params = abstract_params(model, self.mesh)
        self.table = model.weight_table(self.config)
        self.graphdef, state = nnx.split(model)
        self.treedef = jax.tree.structure(state)
        self.kv_sharding = sharding_for(self.mesh, KV_PAGE_AXES)
        # No mesh context here: whatever the steps need to know about the mesh has to come with the model.
        self._prefill = jax.jit(self._forward, static_argnames="last_only")
        self._decode = jax.jit(self._forward)

        rng = np.random.default_rng(0)
        num_pages = self.max_rows * self.max_pages
        self.page_table = rng.permutation(num_pages).astype(np.int32).reshape(self.max_rows, self.max_pages)
        shape = (num_pages, self.config.num_kv_heads, PAGE_SIZE, self.config.head_dim)
        # NaN shows any read of a slot that was never written.
        self.kv = [
            tuple(jax.device_put(np.full(shape, np.nan, np.float32), self.kv_sharding) for _ in "kv")
            for _ in range(self.config.num_layers)
        ]

    def load(self, tensors: dict[str, np.ndarray]) -> "Runner":
        arrays = []
        for path, param in self.params.items():
            source = self.table[path]
            parts = [tensors[part.name].reshape(part.shape) for part in source.parts]
            value = np.concatenate(parts, axis=source.axis)
            assert value.shape == param.shape, path
            arrays.append(jax.device_put(value, param.sharding))
        self.leaves = arrays
        return self

    def _forward(self, leaves, tokens, positions, kv, batch, last_only=False):
        model = nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))
        hidden, kv = model(tokens, positions, kv, batch, last_only=last_only)
        return model.logits(hidden), kv

    def _slots(self, row: int, positions: np.ndarray) -> np.ndarray:
        return self.page_table[row, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE

    def prefill(
        self, chunks: list[tuple[int, list[int], int]], bucket: int, last_only: bool = False
    ) -> list[np.ndarray]:
        """Run chunks (row, ids, start position) padded to `bucket` tokens; logits [len or 1, V] of each chunk."""
        tokens, positions = np.full(bucket, -1, np.int32), np.zeros(bucket, np.int32)
        slots = np.full(bucket, self.max_rows * self.max_pages * PAGE_SIZE, np.int32)
        cu_seqlens = np.zeros(self.max_rows + 1, np.int32)
        page_table, lengths = np.zeros_like(self.page_table), np.zeros(self.max_rows, np.int32)
        end = 0
        for i, (row, ids, start) in enumerate(chunks):
            span, own = slice(end, end + len(ids)), np.arange(start, start + len(ids))
            tokens[span], positions[span], slots[span] = ids, own, self._slots(row, own)
            page_table[i], lengths[i] = self.page_table[row], start + len(ids)
            end += len(ids)
            cu_seqlens[i + 1 :] = end
        batch = PrefillBatch(slots, page_table, cu_seqlens, lengths)
        operands = self.leaves, tokens, positions, self.kv, batch
        logits, self.kv = self._prefill(*operands, last_only=last_only)
        logits = np.asarray(logits)
        if last_only:
            return [logits[i : i + 1] for i in range(len(chunks))]
        return [logits[cu_seqlens[i] : cu_seqlens[i + 1]] for i in range(len(chunks))]

    def decode(self, tokens: list[int | None], positions: list[int]) -> np.ndarray:
        """One token for every row (None: the lane is empty); logits [rows, V]."""
        live = np.array([token is not None for token in tokens])
        ids = np.array([-1 if token is None else token for token in tokens], np.int32)
        own = np.array(positions, np.int32)
        lengths = np.where(live, own + 1, 0).astype(np.int32)
        batch = DecodeBatch(self.page_table, lengths)
        logits, self.kv = self._decode(self.leaves, ids, np.where(live, own, 0), self.kv, batch)
        return np.asarray(logits)


def golden_runner(family: str, tp_size: int = 1, config: ModelConfig | None = None) -> Runner:
    return Runner(config or load_config(family), tp_size).load(load_tensors(family))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def run_cases(runner: Runner, prompts: list[list[int]], new_tokens: int, chunk: int = 7, bucket: int = 32):
    """Prefill all prompts together in chunks, then decode them together.

    Returns per prompt: log-probabilities of ids 1.. of the prompt, greedy ids, and their log-probabilities.
    """
    done, logits = [0] * len(prompts), [[] for _ in prompts]
    while any(n < len(p) for n, p in zip(done, prompts)):
        chunks = [
            (r, p[done[r] : done[r] + chunk], done[r]) for r, p in enumerate(prompts) if done[r] < len(p)
        ]
        for (row, ids, _), out in zip(chunks, runner.prefill(chunks, bucket)):
            logits[row].append(out)
            done[row] += len(ids)
    scores = [log_softmax(np.concatenate(rows)) for rows in logits]
    prompt_logprobs = [s[np.arange(len(p) - 1), p[1:]] for s, p in zip(scores, prompts)]
    greedy, greedy_logprobs = [[] for _ in prompts], [[] for _ in prompts]
    last = [s[-1] for s in scores]
    for step in range(new_tokens):
        for row, row_scores in enumerate(last):
            greedy[row].append(int(row_scores.argmax()))
            greedy_logprobs[row].append(float(row_scores.max()))
        if step + 1 < new_tokens:
            empty = runner.max_rows - len(prompts)
            tokens = [ids[-1] for ids in greedy] + [None] * empty
            out = runner.decode(tokens, [len(p) + step for p in prompts] + [0] * empty)
            last = list(log_softmax(out[: len(prompts)]))
    return prompt_logprobs, greedy, greedy_logprobs
