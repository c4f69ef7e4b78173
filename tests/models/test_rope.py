"""Rope frequencies equal Hugging Face's for real models' settings, and the rotation is a rotation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.layers.rope import RopeConfig, inverse_frequencies, rope_cos_sin
from jaxgen.models.hf_config import HFConfig, read_rope
from kernels_pallas.reference import rotate as rotate_by
from tests.models.harness import GOLDEN, read_json

TABLE = read_json(GOLDEN / "rope.json")


def golden_rope(name: str) -> RopeConfig:
    raw = TABLE[name]["config"]
    return read_rope(HFConfig(raw), raw["head_dim"], raw["max_position_embeddings"])


@pytest.mark.parametrize("name", TABLE)
def test_frequencies_match_hugging_face(name):
    rope = golden_rope(name)
    np.testing.assert_allclose(inverse_frequencies(rope), TABLE[name]["inv_freq"], rtol=1e-5)
    assert rope.attention_factor == pytest.approx(TABLE[name]["attention_factor"], rel=1e-6)


def test_dynamic_scaling_starts_beyond_the_original_context():
    rope = golden_rope("dynamic")
    cos, sin = rope_cos_sin(rope, jnp.array([100, 4095, 8191]))
    angles = np.array([100, 4095])[:, None] * np.array(TABLE["dynamic"]["inv_freq"])
    np.testing.assert_allclose(cos[:2], np.cos(angles), atol=2e-3)  # float32 angles of thousands of radians
    late = 8191 * np.array(TABLE["dynamic"]["inv_freq_at_8191"])
    np.testing.assert_allclose(cos[2], np.cos(late), atol=2e-3)
    np.testing.assert_allclose(sin[2], np.sin(late), atol=2e-3)


def test_attention_factor_multiplies_cos_and_sin():
    cos, sin = rope_cos_sin(RopeConfig(10000.0, 8, attention_factor=1.5), jnp.arange(5))
    np.testing.assert_allclose(np.square(cos) + np.square(sin), 2.25, rtol=1e-5)


def test_scores_depend_on_distance_only_and_the_rest_of_the_head_passes_through():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 3, 12))
    rope = RopeConfig(10000.0, rotary_dim=8)

    def rotate(x, position):
        return rotate_by(x, *rope_cos_sin(rope, jnp.array([position])))

    def score(q_position, k_position):
        return jnp.sum(rotate(q, q_position)[..., :8] * rotate(k, k_position)[..., :8], -1)

    np.testing.assert_allclose(score(7, 3), score(104, 100), atol=1e-4)
    assert np.abs(score(7, 3) - score(7, 4)).max() > 1e-2
    np.testing.assert_array_equal(rotate(q, 9)[..., 8:], q[..., 8:])


def test_result_keeps_the_compute_dtype():
    cos, sin = rope_cos_sin(RopeConfig(10000.0, 8), jnp.arange(4))
    assert cos.dtype == sin.dtype == jnp.float32
    assert rotate_by(jnp.ones((4, 2, 3, 8), jnp.bfloat16), cos, sin).dtype == jnp.bfloat16
