"""Feed-forward block."""

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxgen.layers.linear import Linear, LinearMaker
from jaxgen.layers.norm import RMSNorm
from kernels_pallas import NormInput


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
        linear: LinearMaker = Linear,
    ):
        # The pair is its own axis, in front: a tensor-parallel cut of F leaves each half with its partner.
        self.gate_up = linear(
            (2, intermediate_size),
            hidden_size,
            (None, "mlp", "embed"),
            dtype,
            bias=bias,
            gated=True,
            mesh=mesh,
        )
        self.down = linear((hidden_size,), intermediate_size, ("embed", "mlp"), dtype, bias=bias, mesh=mesh)

    def __call__(self, x: NormInput, norm: RMSNorm, next_norm: RMSNorm) -> NormInput:
        """x [T, D] -> x + the block's output for norm(x), [T, D], for `next_norm` to read."""
        return self.down.to_norm(self.gate_up(x, norm=norm), next_norm, x.rows)
