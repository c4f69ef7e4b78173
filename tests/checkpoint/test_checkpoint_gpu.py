"""Loading onto a GPU, where buffers are handed over without an intermediate copy."""

import gguf_files
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny

from jaxgen.checkpoint import open_checkpoint

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("JAX finds no GPU")


def test_weights_arrive_and_stay(tmp_path):
    """Also when the file changes as soon as loading is over."""
    weights = {name: value.astype(ml_dtypes.bfloat16) for name, value in tiny.tensors().items()}
    tiny.write_model(tmp_path, weights, 2)
    arrays = open_checkpoint(tmp_path).load(tiny.targets(jnp.bfloat16), tiny.table(), tiny.ignore)
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(b"\xff" * file.stat().st_size)
    for path, value in tiny.expected(weights).items():
        assert {device.platform for device in arrays[path].devices()} == {jax.default_backend()} == {"gpu"}
        np.testing.assert_array_equal(np.asarray(arrays[path]), value)


def test_quantized_weights_arrive(tmp_path):
    read_back = gguf_files.write(tmp_path / "m.gguf", kind=gguf_files.Type.Q4_1)
    arrays = open_checkpoint(tmp_path).load(tiny.targets(jnp.bfloat16), tiny.table(), tiny.ignore)
    for path, value in tiny.expected(read_back).items():
        np.testing.assert_array_equal(np.asarray(arrays[path]), value.astype(jnp.bfloat16))


def test_random_weights_are_those_of_the_cpu(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path, "dummy")
    arrays = checkpoint.load(tiny.targets(), {}, tiny.ignore)
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    on_host = checkpoint.load(tiny.targets(shardings=dict.fromkeys(tiny.table(), host)), {}, tiny.ignore)
    for path, value in on_host.items():
        np.testing.assert_array_equal(np.asarray(arrays[path]), np.asarray(value))
