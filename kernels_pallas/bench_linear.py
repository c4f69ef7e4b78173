"""Speed of `fused_linear` on the GPU at hand: the products of a decoder layer with what stands around them."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels_pallas.layer_ops import fused_linear
from kernels_pallas.timing import L2_BYTES, device_seconds, figure

MOST_TRITON_TOKENS = 16  # XLA is faster by cuBLAS beyond


@dataclass(frozen=True)
class LayerCase:
    """A decoder layer without its attention: D hidden, A attention heads together, Q of q, k and v, F inner."""

    name: str
    hidden: int
    heads: int
    qkv: int
    inner: int
    bias: bool = False

    @property
    def weight_bytes(self) -> int:
        return 2 * self.hidden * (self.qkv + self.heads + 3 * self.inner)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "qkv": (self.qkv, self.hidden),
            "out": (self.hidden, self.heads),
            "gate_up": (2, self.inner, self.hidden),
            "down": (self.hidden, self.inner),
        }

    def operands(self, product: str, norm: jax.Array, bias: jax.Array, residual: jax.Array) -> dict:
        """Keywords of a product of this layer."""
        if product in ("out", "down"):
            return {"residual": residual}
        keywords = {"norm": norm, "epsilon": 1e-6, "gated": product == "gate_up"}
        return keywords | ({"bias": bias} if self.bias and product == "qkv" else {})


LAYERS = (
    LayerCase("Qwen2.5-0.5B", 896, 896, 1152, 4864, bias=True),
    LayerCase("Llama-3-8B", 4096, 4096, 6144, 14336),
)
TOKENS = (16, 64, 128, 256)


@functools.lru_cache(maxsize=1)  # a tuner asks for the same ones again and again
def random_weights(**shapes: tuple[int, ...]) -> list[dict[str, jax.Array]]:
    """Sets of weights of these shapes, together larger than the L2 cache."""
    nbytes = sum(2 * functools.reduce(int.__mul__, shape) for shape in shapes.values())
    keys = jax.random.split(jax.random.key(0), max(2, -(-2 * L2_BYTES // nbytes)))

    def draw(key):
        split = jax.random.split(key, len(shapes))
        normal = (
            jax.random.normal(k, s, jnp.bfloat16) * s[-1] ** -0.5 for k, s in zip(split, shapes.values())
        )
        return dict(zip(shapes, normal))

    return [jax.jit(draw)(key) for key in keys]


def seconds_of(program: Callable, tokens: int, width: int, weights: list, repeats: int) -> float:
    """Seconds in the kernels of `program(x [tokens, width], *weights)`, for each of the weights.

    XLA multiplies as in an engine.
    """
    x = jax.random.normal(jax.random.key(1), (tokens, width), jnp.bfloat16)
    options = {"xla_gpu_enable_triton_gemm": tokens <= MOST_TRITON_TOKENS}
    compiled = jax.jit(program).lower(x, *weights).compile(compiler_options=options)
    return device_seconds(compiled, (x, *weights), len(weights), repeats)


def time_layer(case: LayerCase, tokens: int, repeats: int, implementation=None) -> float:
    """Seconds in the kernels of a layer's four products, a slice in the place of attention."""
    norm, bias = jnp.ones(case.hidden, jnp.bfloat16), jnp.ones(case.qkv, jnp.bfloat16)

    def layer(x, weights):
        def product(name, x, residual=None):
            keywords = case.operands(name, norm, bias, residual)
            return fused_linear(x, weights[name], **keywords, implementation=implementation)

        x = product("out", product("qkv", x)[:, : case.heads], x)
        return product("down", product("gate_up", x), x)

    def chain(x, *layers):
        return functools.reduce(layer, layers, x)

    return seconds_of(chain, tokens, case.hidden, random_weights(**case.shapes()), repeats)


def product_call(case: LayerCase, name: str, tokens: int) -> Callable:
    """`call(x [tokens, K], weights)`: one product of a layer, [tokens, N]."""
    norm, bias = jnp.ones(case.hidden, jnp.bfloat16), jnp.ones(case.qkv, jnp.bfloat16)
    keywords = case.operands(name, norm, bias, jnp.ones((tokens, case.hidden), jnp.bfloat16))
    return lambda x, weights: fused_linear(x, weights[name], **keywords, implementation="mosaic")


def time_product(case: LayerCase, name: str, tokens: int, repeats: int) -> float:
    """Seconds of one product of a layer; a norm in front is the same for all that are timed, and hardly counts."""
    call, shape = product_call(case, name, tokens), case.shapes()[name]

    def calls(x, *sets):
        return [call(x, weights) for weights in sets]

    return seconds_of(calls, tokens, shape[-1], random_weights(**{name: shape}), repeats)


def product_result(case: LayerCase, name: str, tokens: int) -> jax.Array:
    weights = random_weights(**{name: case.shapes()[name]})[0]
    x = jax.random.normal(jax.random.key(1), (tokens, case.shapes()[name][-1]), jnp.bfloat16)
    return jax.jit(product_call(case, name, tokens))(x, weights)


def bench_linear(repeats: int, rates: dict) -> Iterator[dict]:
    """The floor is one read of the weights, or the multiplications where they take longer."""
    for case in LAYERS:
        for tokens in TOKENS:
            flops = tokens * case.weight_bytes  # two for each weight, which has two bytes
            floor = max(case.weight_bytes / rates["read_bytes_per_s"], flops / rates["matrix_flops"])
            for op, implementation in (("fused_linear", None), ("the same by XLA", "reference")):
                seconds = time_layer(case, tokens, repeats, implementation)
                yield figure(op, f"{case.name}, {tokens} tokens", seconds, floor)
