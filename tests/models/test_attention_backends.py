"""The attention backend asked for is the one that runs."""

import jax.numpy as jnp
import pytest

from jaxgen.layers.attention import AttentionBackends, DecodeBatch, PrefillBatch, attend

PAGES = jnp.zeros((4, 1, 8, 64), jnp.float32)
TABLE = jnp.zeros((1, 4), jnp.int32)
ONE = jnp.ones((1,), jnp.int32)
BATCHES = {
    "decode": DecodeBatch(slots=ONE, page_table=TABLE, lengths=ONE),
    "prefill": PrefillBatch(
        slots=ONE, page_table=TABLE, cu_seqlens=jnp.array([0, 1], jnp.int32), lengths=ONE
    ),
}


def run(phase: str, backends: AttentionBackends):
    q, kv = jnp.ones((1, 1, 2, 64)), jnp.ones((1, 1, 64))
    return attend(q, kv, kv, PAGES, PAGES, BATCHES[phase], window=None, backends=backends)[0]


@pytest.mark.parametrize("phase", BATCHES)
def test_each_phase_runs_the_implementation_it_was_given(phase):
    other = {"decode": "prefill", "prefill": "decode"}[phase]
    assert run(phase, AttentionBackends(**{other: "mosaic"})).shape == (1, 1, 2, 64)
    with pytest.raises(ValueError, match="kernel cannot run"):  # float32 has no kernel
        run(phase, AttentionBackends(**{phase: "mosaic"}))


def test_option_values():
    assert AttentionBackends.named("xla", None) == AttentionBackends("reference", None)
    assert AttentionBackends.named("pallas", "flashinfer") == AttentionBackends()
