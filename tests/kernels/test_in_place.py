"""Writing KV and attending to it, on donated pages, never copies the pool: a step's time must not grow with it."""

import jax
import jax.numpy as jnp
import pytest

import kernels_pallas

PAGES, HEADS, PAGE, DIM = 4096, 2, 16, 8
POOL = jax.ShapeDtypeStruct((PAGES, HEADS, PAGE, DIM), jnp.float32)


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


# A table of few pages lets XLA do away with the loop over them, which is where it once copied.
@pytest.mark.parametrize("table", [4, 64])
@pytest.mark.parametrize("lanes", [1, 2, 8])
def test_decode(lanes, table):
    def step(k_pages, v_pages, q, kv, slots, page_table, lengths):
        k_pages, v_pages = kernels_pallas.write_kv(k_pages, v_pages, kv, kv, slots)
        out = kernels_pallas.paged_decode(q, k_pages, v_pages, page_table, lengths)
        return out, k_pages, v_pages

    q, kv = (jax.ShapeDtypeStruct((lanes, n, DIM), jnp.float32) for n in (4, HEADS))
    compiled = (
        jax.jit(step, donate_argnums=(0, 1))
        .lower(POOL, POOL, q, kv, ints(lanes), ints(lanes, table), ints(lanes))
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < POOL.size * 4 / 2


@pytest.mark.parametrize("lanes", [1, 8])
def test_decode_update(lanes):
    qkv, rope = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((lanes, HEADS, 4, DIM), (lanes, DIM // 2)))

    def step(k_pages, v_pages, qkv, page_table, lengths, cos, sin):
        return kernels_pallas.paged_decode_update(qkv, k_pages, v_pages, page_table, lengths, cos, sin)

    compiled = (
        jax.jit(step, donate_argnums=(0, 1))
        .lower(POOL, POOL, qkv, ints(lanes, 64), ints(lanes), rope, rope)
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < POOL.size * 4 / 2


@pytest.mark.parametrize("tokens", [1, 32])
def test_prefill(tokens):
    def step(k_pages, v_pages, q, kv, slots, page_table, cu_seqlens, lengths):
        k_pages, v_pages = kernels_pallas.write_kv(k_pages, v_pages, kv, kv, slots)
        out = kernels_pallas.ragged_prefill(q, k_pages, v_pages, page_table, cu_seqlens, lengths)
        return out, k_pages, v_pages

    q, kv = (jax.ShapeDtypeStruct((tokens, n, DIM), jnp.float32) for n in (4, HEADS))
    compiled = (
        jax.jit(step, donate_argnums=(0, 1))
        .lower(POOL, POOL, q, kv, ints(tokens), ints(1, 4), ints(2), ints(1))
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < POOL.size * 4 / 2
