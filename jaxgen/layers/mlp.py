"""Feed-forward block."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxgen.layers.linear import Linear


class GatedMLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))`, gate and up in one matrix product (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        dtype: jnp.dtype,
        *,
        bias: bool = False,
        mesh: Mesh | None = None,
    ):
        # The pair is its own axis, in front: a tensor-parallel cut of F leaves each half with its partner.
        self.gate_up = Linear(
            (2, intermediate_size), hidden_size, (None, "mlp", "embed"), dtype, bias=bias, mesh=mesh
        )
        self.down = Linear((hidden_size,), intermediate_size, ("embed", "mlp"), dtype, bias=bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` [T, D] -> [T, D]."""
        gate_up = self.gate_up(x)  # [T, 2, F]
        return self.down(jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1])
