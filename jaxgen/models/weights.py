"""Where each parameter comes from: the link between a model's parameters and Hugging Face tensor names."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One checkpoint tensor and the shape it takes inside a parameter.

    Args:
        name: Hugging Face tensor name, e.g. ``model.layers.0.self_attn.q_proj.weight``.
        shape: Shape the tensor is viewed as (row-major reshape of as many elements), e.g. ``[K, G, H, D]``.
    """

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightSource:
    """A parameter as the concatenation of checkpoint tensors along one axis.

    Args:
        parts: Tensors in order; their shapes agree on every axis but ``axis``.
        axis: Axis of the parameter along which the parts follow one another.

    Raises:
        ValueError: there are no parts, or their shapes cannot be concatenated.
    """

    parts: tuple[Part, ...]
    axis: int = 0

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("a weight source needs at least one part")
        first = self.parts[0].shape
        if not 0 <= self.axis < max(len(first), 1):
            raise ValueError(f"axis {self.axis} is outside the part shape {first}")
        for part in self.parts:
            if math.prod(part.shape) <= 0:
                raise ValueError(f"part {part.name} has no elements: shape {part.shape}")
            if len(part.shape) != len(first) or any(
                a != b for i, (a, b) in enumerate(zip(part.shape, first)) if i != self.axis
            ):
                raise ValueError(
                    f"parts {self.parts[0].name} {first} and {part.name} {part.shape} "
                    f"do not fit along axis {self.axis}"
                )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        first = self.parts[0].shape
        if not first:
            return first
        total = sum(part.shape[self.axis] for part in self.parts)
        return (*first[: self.axis], total, *first[self.axis + 1 :])
