"""Self-attention over a paged KV cache, for packed prompts and for one token per lane."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxgen.layers.linear import Linear, LinearMaker
from jaxgen.layers.norm import RMSNorm
from jaxgen.layers.param import TENSOR_AXIS, LogicalAxes
from kernels_pallas import (
    Implementation,
    NormInput,
    paged_decode,
    paged_decode_update,
    ragged_prefill,
    rope_and_write,
)

KVPages = list[tuple[jax.Array, jax.Array]]
"""Per layer (k_pages, v_pages), each [P, K, S, H]."""

KV_PAGE_AXES: LogicalAxes = (None, "kv_heads", None, None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillBatch:
    """Where the packed tokens of a prefill step belong; all int32."""

    slots: jax.Array  # [T] KV slot of each token; out of range for padding
    page_table: jax.Array  # [R, MP] page ids of each row
    cu_seqlens: jax.Array  # [R + 1] row r owns packed tokens cu_seqlens[r] .. cu_seqlens[r + 1]
    lengths: jax.Array  # [R] KV tokens of each row after this step

    @property
    def last(self) -> jax.Array:
        """[R] the packed token that is each row's last; of an empty row, any."""
        return jnp.maximum(self.cu_seqlens[1:] - 1, 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeBatch:
    """Where the single new token of each lane belongs; all int32."""

    page_table: jax.Array  # [B, MP]
    lengths: jax.Array  # [B] KV tokens including the new one; 0 for an empty lane
    common_prefix: jax.Array | None = None  # [1] tokens that all lanes have in the first one's pages


AttentionBatch = PrefillBatch | DecodeBatch


@dataclass(frozen=True)
class AttentionBackends:
    """`implementation` of `kernels_pallas` ops by phase: None is a kernel where one can run.

    deterministic: a lane's attention has the same bits in any batch.
    """

    prefill: Implementation | None = None
    decode: Implementation | None = None
    deterministic: bool = False

    @classmethod
    def named(
        cls, prefill: str | None, decode: str | None, deterministic: bool = False
    ) -> "AttentionBackends":
        """By option value: "xla" is the plain implementation; "pallas", and any other, what runs best."""

        def implementation(name: str | None) -> Implementation | None:
            return "reference" if name == "xla" else None

        return cls(implementation(prefill), implementation(decode), deterministic)


AUTOMATIC = AttentionBackends()


def attend_decode(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    norms: tuple[jax.Array, jax.Array] | None,
    k_pages: jax.Array,
    v_pages: jax.Array,
    batch: DecodeBatch,
    *,
    epsilon: float,
    window: int | None,
    kv_scale: float | None = None,
    backends: AttentionBackends = AUTOMATIC,
    ahead: tuple[jax.Array, ...] = (),
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Everything between the projections of a decode layer: head norms, rope, KV write and attention.

    qkv [B, K, G + 2, H], cos and sin [B, rotary_dim / 2], norms of q and k [H] each, pages [P, K, S, H], which
    hold keys and values divided by kv_scale, weights that are read next `ahead`; returns o [B, K, G, H] and the new
    pages.
    """
    q_norm, k_norm = norms or (None, None)
    o, k_pages, v_pages = paged_decode_update(
        qkv,
        k_pages,
        v_pages,
        batch.page_table,
        batch.lengths,
        cos,
        sin,
        q_norm=q_norm,
        k_norm=k_norm,
        epsilon=epsilon,
        window=window,
        k_scale=kv_scale,
        v_scale=kv_scale,
        deterministic=backends.deterministic,
        ahead=ahead,
        common_prefix=batch.common_prefix,
        implementation=backends.decode,
    )
    lanes, kv_heads, rows, head_dim = qkv.shape
    return o.reshape(lanes, kv_heads, rows - 2, head_dim), k_pages, v_pages


def attend_prefill(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    norms: tuple[jax.Array, jax.Array] | None,
    k_pages: jax.Array,
    v_pages: jax.Array,
    batch: PrefillBatch,
    *,
    epsilon: float,
    window: int | None,
    kv_scale: float | None = None,
    backends: AttentionBackends = AUTOMATIC,
    last_only: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `attend_decode`, for packed prompts: qkv [T, K, G + 2, H] gives o [T, K, G, H].

    `last_only`: only of the last token of each row, o [R, K, G, H]: what a decode step would attend to.
    """
    q_norm, k_norm = norms or (None, None)
    scales = {"k_scale": kv_scale, "v_scale": kv_scale}
    q, k_pages, v_pages = rope_and_write(
        qkv,
        k_pages,
        v_pages,
        batch.slots,
        cos,
        sin,
        q_norm=q_norm,
        k_norm=k_norm,
        epsilon=epsilon,
        **scales,
        implementation=backends.prefill,
    )
    attend: Callable
    if last_only:
        attend = partial(paged_decode, q[batch.last], deterministic=backends.deterministic)
    else:
        attend = partial(ragged_prefill, q, cu_seqlens=batch.cu_seqlens)
    o = attend(
        k_pages=k_pages,
        v_pages=v_pages,
        page_table=batch.page_table,
        lengths=batch.lengths,
        window=window,
        **scales,
        implementation=backends.prefill,
    )
    _, kv_heads, rows, head_dim = qkv.shape
    return o.reshape(o.shape[0], kv_heads, rows - 2, head_dim), k_pages, v_pages


class Attention(nnx.Module):
    """Grouped-query attention: qkv -> (per-head norm of q and k) -> rope -> KV write -> attention -> out.

    With a mesh whose tensor axis is wider than one, the KV write and the attention run per shard of the kv
    heads: a kernel is opaque to the partitioner, and no head needs anything of another.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: jnp.dtype,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm_epsilon: float | None = None,
        window: int | None = None,
        kv_scale: float | None = None,
        mesh: Mesh | None = None,
        backends: AttentionBackends = AUTOMATIC,
        linear: LinearMaker = Linear,
    ):
        """`qk_norm_epsilon`: None leaves q and k unnormalised. `window`: None sees the whole context.

        `kv_scale`: keys and values are stored divided by it (an 8-bit KV cache); None stores them as they are.
        """
        group = num_heads // num_kv_heads
        qkv_axes = ("kv_heads", None, None, "embed")
        self.qkv = linear(
            (num_kv_heads, group + 2, head_dim), hidden_size, qkv_axes, dtype, bias=qkv_bias, mesh=mesh
        )
        self.out = linear(
            (hidden_size,), num_heads * head_dim, ("embed", "heads"), dtype, bias=out_bias, mesh=mesh
        )
        if qk_norm_epsilon is None:
            self.q_norm = self.k_norm = None
        else:
            self.q_norm = RMSNorm(head_dim, qk_norm_epsilon, dtype, axis=None)
            self.k_norm = RMSNorm(head_dim, qk_norm_epsilon, dtype, axis=None)
        self.epsilon = qk_norm_epsilon or 0.0
        self.window = window
        self.kv_scale = kv_scale
        self.mesh = mesh
        self.backends = backends

    def __call__(
        self,
        x: NormInput,
        cos: jax.Array,
        sin: jax.Array,
        k_pages: jax.Array,
        v_pages: jax.Array,
        batch: AttentionBatch,
        norm: RMSNorm,
        next_norm: RMSNorm,
        ahead: tuple[jax.Array, ...],
        last_only: bool = False,
    ) -> tuple[NormInput, jax.Array, jax.Array]:
        """x [T, D], cos and sin [T, rotary_dim / 2]; returns x + attention(norm(x)) [T, D] and the updated pages.

        `next_norm` is the norm that reads the result, `ahead` the weights of the product that does. `last_only`: of
        packed prompts, the result for the last token of each row, [R, D].
        """
        qkv = self.qkv(x, norm=norm)  # [T, K, G + 2, H]
        attend: Callable
        rows = x.rows
        if isinstance(batch, DecodeBatch):
            attend = partial(attend_decode, ahead=(*self.out.ahead, *ahead))
        else:
            attend = partial(attend_prefill, last_only=last_only)
            rows = rows[batch.last] if last_only else rows
        o, k_pages, v_pages = self._attend(attend, qkv, cos, sin, k_pages, v_pages, batch)
        x = self.out.to_norm(o.reshape(o.shape[0], -1), next_norm, rows)
        return x, k_pages, v_pages

    def _attend(self, attend, qkv, cos, sin, k_pages, v_pages, batch):
        attention = partial(
            attend, epsilon=self.epsilon, window=self.window, kv_scale=self.kv_scale, backends=self.backends
        )
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = self.q_norm.weight[...], self.k_norm.weight[...]
        if self.mesh is not None and self.mesh.shape[TENSOR_AXIS] > 1:
            heads = P(None, TENSOR_AXIS)
            attention = jax.shard_map(
                attention,
                mesh=self.mesh,
                in_specs=(heads, P(), P(), P(), heads, heads, P()),
                out_specs=(heads, heads, heads),
                check_vma=False,  # kernels do not say how their results vary over the mesh
            )
        return attention(qkv, cos, sin, norms, k_pages, v_pages, batch)
