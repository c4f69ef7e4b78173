"""The attention backend asked for is the one that runs."""

import jax.numpy as jnp
import pytest

from jaxgen.layers.attention import (
    AttentionBackends,
    DecodeBatch,
    PrefillBatch,
    attend_decode,
    attend_prefill,
)

PAGES = jnp.zeros((4, 1, 8, 64), jnp.float32)
TABLE = jnp.zeros((1, 4), jnp.int32)
ONE = jnp.ones((1,), jnp.int32)
ANGLES = jnp.ones((1, 32))
PHASES = {
    "decode": (attend_decode, DecodeBatch(page_table=TABLE, lengths=ONE)),
    "prefill": (
        attend_prefill,
        PrefillBatch(slots=ONE, page_table=TABLE, cu_seqlens=jnp.array([0, 1], jnp.int32), lengths=ONE),
    ),
}


def run(phase: str, backends: AttentionBackends):
    attend, batch = PHASES[phase]
    qkv = jnp.ones((1, 1, 4, 64))
    options = {"epsilon": 1e-6, "window": None, "backends": backends}
    return attend(qkv, ANGLES, ANGLES, None, PAGES, PAGES, batch, **options)[0]


@pytest.mark.parametrize("phase", PHASES)
def test_each_phase_runs_the_implementation_it_was_given(phase):
    other = {"decode": "prefill", "prefill": "decode"}[phase]
    assert run(phase, AttentionBackends(**{other: "mosaic"})).shape == (1, 1, 2, 64)
    with pytest.raises(ValueError, match="kernel cannot run"):  # float32 has no kernel
        run(phase, AttentionBackends(**{phase: "mosaic"}))


def test_option_values():
    assert AttentionBackends.named("xla", None) == AttentionBackends("reference", None)
    assert AttentionBackends.named("pallas", "flashinfer") == AttentionBackends()
