"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its context-extension variants.

Everything is computed from the positions of the step in float32: there is no table whose length would have
to be chosen, and a chunk in the middle of a prompt needs no offset of its own.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: all frequencies divided by `factor` (arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True)
class DynamicScaling:
    """NTK-aware scaling of theta that starts only at positions beyond `original_context`."""

    factor: float
    original_context: int


@dataclass(frozen=True)
class Llama3Scaling:
    """Low frequencies divided by `factor`, high ones kept, a linear blend between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class YarnScaling:
    """Interpolation by parts over the number of rotations in the original context (arXiv:2309.00071)."""

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True)
class RopeConfig:
    """The first `rotary_dim` dimensions of a head rotate; `attention_factor` multiplies cos and sin."""

    theta: float
    rotary_dim: int
    scaling: RopeScaling | None = None
    attention_factor: float = 1.0


def inverse_frequencies(config: RopeConfig) -> np.ndarray:
    """Radians per position of each rotated pair, float32 `[rotary_dim / 2]`.

    For `DynamicScaling` these are the frequencies inside the original context.
    """
    dim = config.rotary_dim
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    base = 1.0 / np.float32(config.theta) ** exponents
    match config.scaling:
        case None | DynamicScaling():
            return base
        case LinearScaling(factor):
            return base / np.float32(factor)
        case Llama3Scaling() as scaling:
            return _llama3(base, scaling)
        case YarnScaling() as scaling:
            return _yarn(base, config.theta, dim, scaling)


def _llama3(base: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    wavelength = 2 * math.pi / base
    turns = scaling.original_context / wavelength  # rotations over the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)  # 0: interpolate fully, 1: leave alone
    return ((1 - blend) * base / scaling.factor + blend * base).astype(np.float32)


def _yarn(base: np.ndarray, theta: float, dim: int, scaling: YarnScaling) -> np.ndarray:
    def pair_that_turns(rotations: float) -> float:
        return dim * math.log(scaling.original_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = (high - low) or 0.001
    interpolate = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / width, 0.0, 1.0)
    return (base / scaling.factor * interpolate + base * (1 - interpolate)).astype(np.float32)


def yarn_attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """Multiplier of cos and sin that the YaRN paper derives from the scaling factor."""

    def magnitude(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        return magnitude(mscale) / magnitude(mscale_all_dim)
    return magnitude(1.0)


def rope_cos_sin(config: RopeConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`positions` [T] int32 -> cos and sin, each [T, rotary_dim / 2] float32."""
    positions = positions.astype(jnp.float32)
    if isinstance(config.scaling, DynamicScaling):
        angles = positions[:, None] * _dynamic_frequencies(config, config.scaling, positions)
    else:
        angles = positions[:, None] * inverse_frequencies(config)
    return jnp.cos(angles) * config.attention_factor, jnp.sin(angles) * config.attention_factor


def _dynamic_frequencies(config: RopeConfig, scaling: DynamicScaling, positions: jax.Array) -> jax.Array:
    """[T, rotary_dim / 2]. The length that sets theta is the token's own position + 1.

    Taking each token's own length (what token-by-token decoding with a cache does anyway) keeps cached keys
    valid: they do not depend on how long their sequence became or on how its prompt was cut into chunks.
    """
    dim = config.rotary_dim
    length = jnp.maximum(positions + 1, scaling.original_context)
    stretch = scaling.factor * length / scaling.original_context - (scaling.factor - 1)
    theta = config.theta * stretch ** (dim / (dim - 2))
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return theta[:, None] ** -exponents
