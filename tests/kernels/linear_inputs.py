"""Operands of `fused_linear`, its product in float64, and the products of a decoder layer."""

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

EPSILON = 1e-5
SHAPES = {  # D, F, A, rows of q, k and v
    "Qwen2.5-0.5B": (896, 4864, 896, 1152),
    "Llama-3-8B": (4096, 14336, 4096, 6144),
    "Llama-3.2-1B": (2048, 8192, 2048, 3072),
}
flags = st.fixed_dictionaries({name: st.booleans() for name in ("gated", "norm", "bias", "residual")})


def operands_of(
    tokens, size, out, *, gated=False, norm=True, bias=True, residual=True, dtype=ml_dtypes.bfloat16
):
    """x, weight and keyword operands, of size 1 where the product keeps it."""
    rng = np.random.default_rng(size + out)

    def draw(*shape, scale=1.0):
        return (rng.normal(size=shape) * scale).astype(dtype)

    shape = (2, out) if gated else (out,)
    x, weight = draw(tokens, size), draw(*shape, size, scale=size**-0.5)
    wanted = {"norm": norm and draw(size), "bias": bias and draw(*shape), "residual": residual}
    wanted["residual"] = residual and draw(tokens, out)
    keywords = {name: value for name, value in wanted.items() if value is not False}
    return x, weight, keywords | {"gated": gated, "epsilon": EPSILON}


def expected(x, weight, *, gated, epsilon, norm=None, bias=None, residual=None):
    """In float64."""
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    if norm is not None:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * norm.astype(np.float64)
    y = np.einsum("td,...d->t...", x, weight)
    if bias is not None:
        y = y + bias.astype(np.float64)
    if gated:
        y = y[:, 0] / (1 + np.exp(-y[:, 0])) * y[:, 1]
    return y if residual is None else y + residual.astype(np.float64)


def products(name):
    """A layer's four products: (D, N, flags)."""
    size, inner, heads, qkv = SHAPES[name]
    return (
        (size, qkv, {"residual": False, "bias": name.startswith("Qwen")}),
        (heads, size, {"norm": False, "bias": False}),
        (size, inner, {"gated": True, "bias": False, "residual": False}),
        (inner, size, {"norm": False, "bias": False}),
    )
