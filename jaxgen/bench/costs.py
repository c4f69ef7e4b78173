"""What a model must at least read and multiply: the floor beside a measured time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.models.config import ModelConfig
from jaxgen.models.registry import ARCHITECTURES


@dataclass(frozen=True)
class Rates:
    """Measured speed of one device: bytes read per second, and operations per second of a matrix product."""

    read_bytes_per_s: float
    matrix_flops: float

    @classmethod
    def measure(cls, dtype: np.dtype, repeats: int = 3) -> Rates:
        """Rates of the default device, the product of operands in `dtype`, 8-bit types included."""
        on_cpu = jax.default_backend() == "cpu"
        side = 1 << (13 if on_cpu else 15)  # 256 MiB or 4 GiB: far more than any cache
        x = jnp.ones((side, side), jnp.float32)
        readers: tuple[Callable, ...] = (lambda x: x.sum(axis=1), lambda x: x @ jnp.ones((side,), x.dtype))
        read = max(x.nbytes / _seconds(jax.jit(reader), (x,), repeats) for reader in readers)
        del x
        side = 2048 if on_cpu else 8192
        a, b = jax.random.normal(jax.random.key(0), (2, side, side), jnp.float32).astype(dtype)
        return cls(read, 2 * side**3 / _seconds(jax.jit(_product), (a, b), repeats))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a` times the transpose of `b`, as a layer multiplies: the one layout of 8-bit products."""
    result = {jnp.dtype(jnp.int8): jnp.int32, jnp.dtype(jnp.float8_e4m3fn): jnp.bfloat16}.get(
        a.dtype, a.dtype
    )
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=result)


def _seconds(function: Callable, args: tuple, repeats: int) -> float:
    """Least seconds of a call: a rate is a ceiling."""
    jax.block_until_ready(function(*args))
    best = math.inf
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready([function(*args) for _ in range(4)])
        best = min(best, (time.perf_counter() - started) / 4)
    return best


@dataclass(frozen=True)
class ModelCosts:
    """Bytes and operations of a model; attention's operations included, those of norms and rope not.

    Attributes:
        weight_bytes: read by every step: all weights but an embedding table of its own (one row a token).
        layer_weights: weights that multiply every token.
        head_weights: weights that multiply only the tokens whose logits are needed: the head's, and those of the last
            layer but for keys and values.
        kv_bytes: of one token position, all layers.
        attention_flops: per pair of query and key, in one layer.
        num_layers: the last one's attention has the queries of the tokens whose logits are needed alone.
    """

    weight_bytes: int
    layer_weights: int
    head_weights: int
    kv_bytes: int
    attention_flops: int
    num_layers: int
    windows: tuple[int | None, ...]

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        param_dtype: np.dtype,
        kv_dtype: np.dtype,
        layer_dtype: np.dtype | None = None,
    ) -> ModelCosts:
        """Costs of `config` with weights of `param_dtype` and pages of `kv_dtype`.

        `layer_dtype`: of the layers' weights where they are quantised; their scales are left out.
        """
        table = ARCHITECTURES[config.architecture].weight_table(config)
        layers = sum(math.prod(s.shape) for path, s in table.items() if path.startswith("layers."))
        head = config.vocab_size * config.hidden_size
        kv = 2 * config.num_kv_heads * config.head_dim
        last = layers // config.num_layers - kv * config.hidden_size
        return cls(
            weight_bytes=layers * np.dtype(layer_dtype or param_dtype).itemsize
            + head * np.dtype(param_dtype).itemsize,
            layer_weights=layers - last,
            head_weights=head + last,
            kv_bytes=config.num_layers * kv * np.dtype(kv_dtype).itemsize,
            attention_flops=4 * config.num_heads * config.head_dim,
            num_layers=config.num_layers,
            windows=tuple(config.sliding_windows),
        )

    def keys(self, start: int, stop: int) -> float:
        """Keys seen by the queries at positions start .. stop - 1 together, the mean over layers."""
        windows = self.windows or (None,)
        return sum(_keys_until(stop, w) - _keys_until(start, w) for w in windows) / len(windows)

    def decode_seconds(
        self, work: Work, steps: int, rates: Rates, devices: int = 1, read_keys: float | None = None
    ) -> float:
        """Floor of decode steps that do this work together: the longer of reading and multiplying.

        `read_keys`: keys that must be read, where lanes share some; by default all that are seen.
        """
        keys = work.keys if read_keys is None else read_keys
        read = steps * self.weight_bytes + self.kv_bytes * keys
        flops = self._flops(work, needed=work)
        return max(read / rates.read_bytes_per_s, flops / rates.matrix_flops) / devices

    def prefill_seconds(self, work: Work, needed: Work, rates: Rates, devices: int = 1) -> float:
        """Floor of computing prompts, with the logits of the tokens `needed` among them."""
        flops = self._flops(work, needed)
        return max(flops / rates.matrix_flops, self.weight_bytes / rates.read_bytes_per_s) / devices

    def _flops(self, work: Work, needed: Work) -> float:
        return (
            2 * self.layer_weights * work.tokens
            + 2 * self.head_weights * needed.tokens
            + self.attention_flops * ((self.num_layers - 1) * work.keys + needed.keys)
        )


@dataclass(frozen=True)
class Work:
    """Tokens to compute, and the keys that they see together."""

    tokens: int
    keys: float


def _keys_until(stop: int, window: int | None) -> int:
    """Keys seen by the queries at positions 0 .. stop - 1 together."""
    if window is None or stop <= window:
        return stop * (stop + 1) // 2
    return window * (window + 1) // 2 + (stop - window) * window
