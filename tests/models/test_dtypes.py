"""Compute types of a half-precision model: weights and residual stream in it, logits in float32."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxgen.layers.attention import DecodeBatch
from jaxgen.models.registry import build_model
from kernels_pallas.reference import rms_norm
from tests.models.harness import FAMILIES, load_config


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_float32_and_the_rest_keeps_its_type(family):
    config = load_config(family)
    page = jax.ShapeDtypeStruct((4, config.num_kv_heads, 8, config.head_dim), jnp.bfloat16)
    ints = jax.ShapeDtypeStruct((2,), jnp.int32)
    batch = DecodeBatch(jax.ShapeDtypeStruct((2, 2), jnp.int32), ints)

    def step(tokens, positions, kv, batch):
        model = build_model(config, jnp.bfloat16)
        hidden, kv = model(tokens, positions, kv, batch)
        return hidden, model.logits(hidden), kv

    hidden, logits, kv = jax.eval_shape(step, ints, ints, [(page, page)] * config.num_layers, batch)
    assert (hidden.shape, hidden.dtype) == ((2, config.hidden_size), jnp.bfloat16)
    assert (logits.shape, logits.dtype) == ((2, config.vocab_size), jnp.float32)
    assert all(pages.shape == page.shape and pages.dtype == page.dtype for pair in kv for pages in pair)


def test_norm_is_computed_in_float32():
    x = jnp.full((1, 4), 300.0, jnp.float16)  # 300 squared does not fit float16
    result = rms_norm(x, jnp.ones(4, jnp.float16), 1e-6)
    assert result.dtype == jnp.float16 and jnp.all(result == 1.0)


def test_building_a_model_needs_no_memory_and_no_mesh():
    config = load_config("qwen2")
    model = nnx.eval_shape(lambda: build_model(config, jnp.bfloat16))
    values = [variable.get_value() for _, variable in nnx.to_flat_state(nnx.state(model))]
    assert values and all(isinstance(value, jax.ShapeDtypeStruct) for value in values)
