"""Weights are quantised as they are loaded: from every format, on every mesh, and never all held in full."""

import shutil

import gguf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.checkpoint import open_checkpoint
from jaxgen.cli.convert import convert
from jaxgen.execution.weights import Weights, check_matrix
from jaxgen.layers.quantization import SCHEMES, quantize
from jaxgen.models.config import ModelConfig
from jaxgen.models.registry import build_model
from jaxgen.sharding import abstract_params, make_mesh

LINEARS = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")


def load(checkpoint, scheme=None, *, dtype=jnp.float32, tp_size=1, progress=lambda nbytes: None):
    """Parameter path -> array of the checkpoint's model, as the engine would have it."""
    config = ModelConfig.from_hf(checkpoint.config, checkpoint.generation_config)
    mesh = make_mesh(tp_size)
    model = nnx.eval_shape(lambda: build_model(config, dtype, mesh=mesh, quantization=scheme))
    params = abstract_params(model, mesh)
    loaded = Weights(params, dtype, scheme, "cpu").load(checkpoint, model.weight_table(config), progress)
    arrays = dict(zip(params, loaded, strict=True))
    for path, array in arrays.items():
        assert (array.shape, array.dtype) == (params[path].shape, params[path].dtype)
        assert array.sharding.is_equivalent_to(params[path].sharding, array.ndim)
    return arrays


def is_linear(path: str) -> bool:
    return any(f"{name}.weight" in path for name in LINEARS)


@pytest.fixture(scope="module")
def llama2(request, tmp_path_factory):
    """The golden model's directory, and the same model in the other formats."""
    directory = tmp_path_factory.mktemp("models")
    golden = request.config.rootpath / "tests" / "golden"
    shutil.copytree(golden / "llama2", directory / "safetensors")
    shutil.copytree(golden / "tokenizer", directory / "safetensors", dirs_exist_ok=True)
    convert(str(directory / "safetensors"), directory / "orbax")
    gguf_files.write(directory / "tiny.gguf")
    return directory


def opened(directory, kind):
    match kind:
        case "dummy":
            return open_checkpoint(directory / "safetensors", "dummy")
        case "gguf":
            return open_checkpoint(directory / "tiny.gguf")
        case _:
            return open_checkpoint(directory / kind)


@pytest.mark.parametrize("name", sorted(SCHEMES))
@pytest.mark.parametrize("kind", ["safetensors", "orbax", "gguf", "dummy"])
def test_every_format_gives_the_rounded_weights(llama2, kind, name):
    scheme = SCHEMES[name]
    plain = load(opened(llama2, kind))
    found = load(opened(llama2, kind), scheme)
    linears = {path for path in plain if is_linear(path)}
    assert linears and set(found) == set(plain) | {path.replace(".weight", ".scale") for path in linears}
    for path, value in plain.items():
        if path in linears:
            q, scale = quantize(value, scheme.dtype)
            assert found[path].dtype.itemsize == 1
            np.testing.assert_array_equal(found[path], q, path)
            # The fused and the unfused division may differ in the last bit.
            np.testing.assert_allclose(found[path.replace(".weight", ".scale")], scale, rtol=3e-7)
        else:
            np.testing.assert_array_equal(found[path], value, path)


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_several_devices_hold_what_one_holds(llama2, name, tp_size):
    """Also where a matrix is cut along its input: a channel's scale covers the parts on all devices."""
    alone = load(opened(llama2, "safetensors"), SCHEMES[name])
    split = load(opened(llama2, "safetensors"), SCHEMES[name], tp_size=tp_size)
    for path, value in alone.items():
        np.testing.assert_array_equal(split[path], value, path)
    down = split["layers.0.mlp.down.weight"]
    assert down.addressable_shards[0].data.size * tp_size == down.size


def test_the_weights_before_rounding_have_the_type_of_the_activations(llama2):
    scheme = SCHEMES["int8"]
    plain = load(opened(llama2, "safetensors"), dtype=jnp.bfloat16)
    found = load(opened(llama2, "safetensors"), scheme, dtype=jnp.bfloat16)
    path = "layers.1.mlp.gate_up.weight"
    np.testing.assert_array_equal(found[path], quantize(plain[path], scheme.dtype)[0])
    assert found["embed.weight"].dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", ["safetensors", "dummy"])
def test_few_matrices_are_held_in_full_at_a_time(llama2, kind):
    """Counted whenever a parameter has arrived: the one just loaded, and the one before it."""
    before = {id(array) for array in jax.live_arrays()}
    held = []

    def count(nbytes):
        matrices = [a for a in jax.live_arrays() if id(a) not in before and a.ndim > 1]
        held.append(sum(a.dtype == jnp.float32 and a.shape[0] != vocab for a in matrices))

    checkpoint = opened(llama2, kind)
    vocab = checkpoint.config["vocab_size"]
    arrays = load(checkpoint, SCHEMES["int8"], progress=count)
    scales = sum(path.endswith(".scale") and array.ndim > 1 for path, array in arrays.items())
    assert len(held) > 8
    assert max(held) <= scales + 2


def test_progress_counts_what_is_read(llama2):
    counted = []
    load(opened(llama2, "safetensors"), SCHEMES["int8"], progress=counted.append)
    plain = load(opened(llama2, "safetensors"))
    assert sorted(counted) == sorted(array.nbytes for array in plain.values())


@pytest.mark.parametrize(("shape", "axes"), [((24, 64), (None, None)), ((64, 24), (None, None))])
def test_a_matrix_that_tensor_cores_cannot_take_is_refused_by_name(shape, axes):
    target = jax.ShapeDtypeStruct(
        shape, jnp.int8, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    with pytest.raises(ValueError, match=r"layers\.3\.mlp\.down\.weight .*24.*multiple of 16.*'int8'"):
        check_matrix("layers.3.mlp.down.weight", target, SCHEMES["fp8"])


def test_the_limit_is_of_one_devices_part_and_of_8_bit_products_only(llama2):
    config = ModelConfig.from_hf(opened(llama2, "safetensors").config)

    def weights(name, tp_size, platform):
        mesh, scheme = make_mesh(tp_size), SCHEMES[name]
        model = nnx.eval_shape(lambda: build_model(config, jnp.float32, mesh=mesh, quantization=scheme))
        return Weights(abstract_params(model, mesh), jnp.float32, scheme, platform)

    smallest = min(config.intermediate_size // 4, config.hidden_size // 4)
    assert smallest % 16  # else the case below shows nothing
    with pytest.raises(ValueError, match="tp_size"):
        weights("w8a8_int8", 4, "gpu")
    weights("int8", 4, "gpu")
    weights("w8a8_int8", 4, "cpu")
