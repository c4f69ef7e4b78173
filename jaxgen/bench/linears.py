"""`jaxgen bench linears`: the matrix products of one decoder layer, in each quantisation beside none."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgen.bench import report
from jaxgen.execution.programs import most_triton_tokens
from jaxgen.layers.linear import linear_maker
from jaxgen.layers.mlp import GatedMLP
from jaxgen.layers.norm import RMSNorm
from jaxgen.layers.quantization import SCHEMES, UNQUANTIZED, quantize, scheme_named
from jaxgen.models.config import ModelConfig
from kernels_pallas import NormInput
from kernels_pallas.timing import L2_BYTES, compiled_seconds

CHAINED = 4  # layers in one program: a launch and the host's share weigh little


class LayerProducts(nnx.Module):
    """A decoder layer without its attention: norm, qkv, out, norm, gate and up, down, residuals.

    Its own first norm stands for that of the next layer.
    """

    def __init__(self, config: ModelConfig, dtype: Any, quantization: str):
        linear = linear_maker(scheme_named(quantization))
        hidden, head_dim = config.hidden_size, config.head_dim
        self.heads = config.num_heads * head_dim
        qkv = self.heads + 2 * config.num_kv_heads * head_dim
        self.attention_norm = RMSNorm(hidden, config.rms_norm_eps, dtype)
        self.qkv = linear((qkv,), hidden, (None, "embed"), dtype)
        self.out = linear((hidden,), self.heads, ("embed", None), dtype)
        self.mlp_norm = RMSNorm(hidden, config.rms_norm_eps, dtype)
        self.mlp = GatedMLP(hidden, config.intermediate_size, dtype, linear=linear)

    def __call__(self, x: NormInput) -> NormInput:
        heads = self.qkv(x, norm=self.attention_norm)[:, : self.heads]
        return self.mlp(self.out.to_norm(heads, self.mlp_norm, x.rows), self.mlp_norm, self.attention_norm)


def random_layer(config: ModelConfig, dtype: Any, quantization: str, key: jax.Array) -> Any:
    """The state of `LayerProducts` with normal weights, quantised as a checkpoint's would be."""
    state = nnx.state(LayerProducts(config, dtype, quantization))
    flat = dict(nnx.to_flat_state(state))
    for path, variable in flat.items():
        if path[-1] != "weight" or variable.ndim < 2:
            continue
        key, draw = jax.random.split(key)
        weight = jax.random.normal(draw, variable.shape, dtype) * variable.shape[-1] ** -0.5
        if quantization != UNQUANTIZED:
            weight, scale = quantize(weight, variable.dtype)
            flat[*path[:-1], "scale"].set_value(scale)
        variable.set_value(weight)
    return nnx.from_flat_state(flat)


@dataclass(frozen=True)
class Case:
    """A chain of layers for so many tokens, compiled, and its arguments."""

    quantization: str
    tokens: int
    compiled: Callable
    args: tuple

    @classmethod
    def of(cls, config: ModelConfig, dtype: Any, quantization: str, tokens: int, layers: list[Any]) -> Case:
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: LayerProducts(config, dtype, quantization)))

        def chain(x, *layers):
            x = NormInput(x)
            for i in range(CHAINED):
                x = nnx.merge(graphdef, layers[i % len(layers)])(x)
            return x.rows

        args = (jax.random.normal(jax.random.key(1), (tokens, config.hidden_size), dtype), *layers)
        options = None
        if jax.default_backend() == "gpu":
            most = most_triton_tokens(scheme_named(quantization))
            options = {"xla_gpu_enable_triton_gemm": tokens <= most}
        return cls(quantization, tokens, jax.jit(chain).lower(*args).compile(compiler_options=options), args)

    def row(self, repeats: int) -> dict[str, Any]:
        seconds = compiled_seconds(self.compiled, self.args, CHAINED, repeats)
        return {"quantization": self.quantization, "tokens": self.tokens, "us": seconds * 1e6}


def layers_of(config: ModelConfig, dtype: Any, quantization: str) -> list[Any]:
    """Layers that are larger together than the L2 cache."""
    make = jax.jit(lambda key: random_layer(config, dtype, quantization, key))
    first = make(jax.random.key(0))
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(first))
    return [first, *(make(jax.random.key(i)) for i in range(1, min(CHAINED, -(-2 * L2_BYTES // nbytes))))]


def measure(config: ModelConfig, dtype: Any, tokens: list[int], repeats: int) -> Iterator[dict[str, Any]]:
    """A row for each number of tokens and each quantisation; those compared are measured one after another."""
    names = [UNQUANTIZED, *SCHEMES]
    with ThreadPoolExecutor(len(names), thread_name_prefix="jaxgen-compile") as pool:
        layers = dict(zip(names, pool.map(partial(layers_of, config, dtype), names)))
        for count in tokens:
            build = partial(Case.of, config, dtype)
            cases = list(pool.map(lambda name: build(name, count, layers[name]), names))  # noqa: B023
            rows = [case.row(repeats) for case in cases]
            for row in rows:
                yield row | {"speedup": rows[0]["us"] / row["us"]}


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark; returns the exit status."""
    config = ModelConfig.from_hf(json.loads(Path(args.config).read_text(encoding="utf-8")))
    settings = {"config": args.config, "dtype": args.dtype, "tokens": args.tokens, "repeats": args.repeats}
    record = report.header("linears", settings)
    record["device"] = report.device()
    rows = []
    for row in measure(config, jnp.dtype(args.dtype), args.tokens, args.repeats):
        print(f"{row['quantization']}, {row['tokens']}: {row['us']:.1f} us", file=sys.stderr, flush=True)
        rows.append(row)
    report.table(["quantization", "tokens", "us", "speed-up"], [list(row.values()) for row in rows])
    return report.finish(record | {"results": rows})
