"""The pre-norm decoder that the Llama lineage shares. Families differ by `ModelConfig` and by names."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxgen.layers.attention import AUTOMATIC, Attention, AttentionBackends, AttentionBatch, KVPages
from jaxgen.layers.embed import Embed
from jaxgen.layers.linear import LinearMaker, linear_maker
from jaxgen.layers.mlp import GatedMLP
from jaxgen.layers.norm import RMSNorm
from jaxgen.layers.quantization import Scheme
from jaxgen.layers.rope import rope_cos_sin
from jaxgen.models.config import ModelConfig
from jaxgen.models.hf_config import HFConfig
from jaxgen.models.weights import Part, WeightSource
from kernels_pallas import NormInput


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        dtype: jnp.dtype,
        mesh: Mesh | None,
        backends: AttentionBackends,
        linear: LinearMaker,
    ):
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.attention = Attention(
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=dtype,
            qkv_bias=config.attention_bias,
            out_bias=config.attention_out_bias,
            qk_norm_epsilon=config.rms_norm_eps if config.qk_norm else None,
            window=config.sliding_windows[index],
            kv_scale=None if config.kv_scales is None else config.kv_scales[index],
            mesh=mesh,
            backends=backends,
            linear=linear,
        )
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            dtype,
            bias=config.mlp_bias,
            mesh=mesh,
            linear=linear,
        )

    def __call__(
        self,
        x: NormInput,
        cos: jax.Array,
        sin: jax.Array,
        k_pages: jax.Array,
        v_pages: jax.Array,
        batch: AttentionBatch,
        next_norm: RMSNorm,
        last_only: bool,
    ) -> tuple[NormInput, jax.Array, jax.Array]:
        """x [T, D] -> [T, D], or [R, D] of each row's last token, for `next_norm` to read, and the updated pages."""
        norms, ahead = (self.attention_norm, self.mlp_norm), self.mlp.gate_up.ahead
        x, k_pages, v_pages = self.attention(
            x, cos, sin, k_pages, v_pages, batch, *norms, ahead, last_only=last_only
        )
        return self.mlp(x, self.mlp_norm, next_norm), k_pages, v_pages


@partial(jax.jit, static_argnums=(0, 1))
def _run_layer(graphdef, last_only, state, x, cos, sin, k_pages, v_pages, batch):
    """A decoder layer and the norm after it. Those of equal structure are traced and lowered once; XLA inlines them."""
    layer, next_norm = nnx.merge(graphdef, state)
    return layer(x, cos, sin, k_pages, v_pages, batch, next_norm, last_only)


class CausalLM(nnx.Module):
    """Embedding, decoder layers, final norm and language-model head.

    The layers are a Python loop: scanning over stacked weights makes XLA copy each layer's weights in every
    step, which costs more than the compile time it saves.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: jnp.dtype,
        *,
        mesh: Mesh | None = None,
        backends: AttentionBackends = AUTOMATIC,
        quantization: Scheme | None = None,
    ):
        linear = linear_maker(quantization)
        self.config = config
        self.embed = Embed(config.vocab_size, config.hidden_size, dtype)
        self.layers = nnx.List(
            [DecoderLayer(config, i, dtype, mesh, backends, linear) for i in range(config.num_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.lm_head = (
            None if config.tie_word_embeddings else Embed(config.vocab_size, config.hidden_size, dtype)
        )

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        kv: KVPages,
        batch: AttentionBatch,
        *,
        last_only: bool = False,
    ) -> tuple[jax.Array, KVPages]:
        """One forward pass over packed tokens.

        Args:
            tokens: [T] int32; -1 on padding.
            positions: [T] int32 position of each token in its own sequence; 0 on padding.
            kv: pages of every layer; the caller donates them.
            batch: where the tokens' keys and values go and what they attend to.
            last_only: of packed prompts, hidden vectors of the last token of each row: of the others, the last layer
                computes keys and values alone.

        Returns:
            hidden [T, D], or [R, D] if last_only, after the final norm, and the updated pages.
        """
        x = NormInput(self.embed(tokens))  # [T, D]
        next_norms = [*(layer.attention_norm for layer in self.layers[1:]), self.norm]
        cos, sin = rope_cos_sin(self.config.rope, positions)
        pages = []
        for layer, next_norm, (k_pages, v_pages) in zip(self.layers, next_norms, kv, strict=True):
            graphdef, state = nnx.split((layer, next_norm))
            only = last_only and next_norm is self.norm
            x, k_pages, v_pages = _run_layer(graphdef, only, state, x, cos, sin, k_pages, v_pages, batch)
            pages.append((k_pages, v_pages))
        return self.norm(x.rows), pages

    @property
    def head(self) -> Embed:
        """What makes logits of hidden vectors: the embedding, where both are tied."""
        return self.embed if self.lm_head is None else self.lm_head

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden rows [R, D] -> [R, V] float32."""
        return self.head.logits(hidden)

    @classmethod
    def family_fields(cls, config: HFConfig) -> dict[str, Any]:
        """The `ModelConfig` fields each family reads in its own way: biases, qk_norm, windows."""
        raise NotImplementedError(f"{cls.__name__} must define family_fields")

    @staticmethod
    def weight_table(config: ModelConfig) -> dict[str, WeightSource]:
        """Parameter path -> checkpoint tensors, in the names that all these families use."""
        vocab, hidden = config.vocab_size, config.hidden_size
        table = {
            "embed.weight": _whole("model.embed_tokens.weight", vocab, hidden),
            "norm.weight": _whole("model.norm.weight", hidden),
        }
        if not config.tie_word_embeddings:
            table["lm_head.weight"] = _whole("lm_head.weight", vocab, hidden)
        for i in range(config.num_layers):
            for path, source in _layer_table(config, f"model.layers.{i}").items():
                table[f"layers.{i}.{path}"] = source
        return table


def _whole(name: str, *shape: int) -> WeightSource:
    return WeightSource((Part(name, shape),))


def _layer_table(config: ModelConfig, prefix: str) -> dict[str, WeightSource]:
    hidden, ffn, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    kv_heads, group = config.num_kv_heads, config.num_heads // config.num_kv_heads
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"

    def qkv(kind: str, *rest: int) -> WeightSource:
        heads = (("q_proj", group), ("k_proj", 1), ("v_proj", 1))
        parts = [Part(f"{attention}.{name}.{kind}", (kv_heads, n, head_dim, *rest)) for name, n in heads]
        return WeightSource(tuple(parts), axis=1)

    def gate_up(kind: str, *rest: int) -> WeightSource:
        names = ("gate_proj", "up_proj")
        return WeightSource(tuple(Part(f"{mlp}.{name}.{kind}", (1, ffn, *rest)) for name in names))

    table = {
        "attention_norm.weight": _whole(f"{prefix}.input_layernorm.weight", hidden),
        "attention.qkv.weight": qkv("weight", hidden),
        "attention.out.weight": _whole(f"{attention}.o_proj.weight", hidden, config.num_heads * head_dim),
        "mlp_norm.weight": _whole(f"{prefix}.post_attention_layernorm.weight", hidden),
        "mlp.gate_up.weight": gate_up("weight", hidden),
        "mlp.down.weight": _whole(f"{mlp}.down_proj.weight", hidden, ffn),
    }
    if config.attention_bias:
        table["attention.qkv.bias"] = qkv("bias")
    if config.attention_out_bias:
        table["attention.out.bias"] = _whole(f"{attention}.o_proj.bias", hidden)
    if config.qk_norm:
        table["attention.q_norm.weight"] = _whole(f"{attention}.q_norm.weight", head_dim)
        table["attention.k_norm.weight"] = _whole(f"{attention}.k_norm.weight", head_dim)
    if config.mlp_bias:
        table["mlp.gate_up.bias"] = gate_up("bias")
        table["mlp.down.bias"] = _whole(f"{mlp}.down_proj.bias", hidden)
    return table
