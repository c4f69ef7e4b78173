"""Reading Zarr arrays as TensorStore, the writer behind Orbax, stores them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from jaxgen.checkpoint import CheckpointError
from jaxgen.checkpoint.zarr import METADATA, read_array


def write(directory, values: np.ndarray, chunks: list[int], **metadata) -> None:
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{directory}/"},
        "metadata": {"chunks": chunks, "compressor": None} | metadata,
    }
    store = tensorstore.open(spec, create=True, dtype=values.dtype.name, shape=values.shape).result()
    store.write(values).result()


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [((), []), ((7,), [7]), ((6, 5), [2, 5]), ((6, 5), [4, 5]), ((6, 5), [6, 2]), ((3, 4, 5), [2, 3, 2])],
    ids=str,
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_chunks_of_any_grid_come_back(tmp_path, shape, chunks, dtype):
    values = np.random.default_rng(0).normal(size=shape).astype(dtype)
    write(tmp_path, values, chunks)
    found = read_array(tmp_path, shape)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


def test_what_cannot_be_read_is_named(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    write(tmp_path, values, [2, 3])
    with pytest.raises(CheckpointError, match="shape"):
        read_array(tmp_path, (3, 4))
    good = json.loads((tmp_path / METADATA).read_text())
    for change in (
        {"compressor": {"id": "zlib"}},
        {"order": "F"},
        {"chunks": [0, 3]},
        {"chunks": None},
        {"dtype": "|O"},
        {"dtype": None},
    ):
        (tmp_path / METADATA).write_text(json.dumps(good | change))
        with pytest.raises(CheckpointError, match=f"{METADATA}.*{next(iter(change))}"):
            read_array(tmp_path, (4, 3))
    (tmp_path / METADATA).write_text(json.dumps(good))
    (tmp_path / "1.0").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"1\.0: has 5 bytes, expected 24"):
        read_array(tmp_path, (4, 3))
    (tmp_path / "1.0").unlink()
    with pytest.raises(CheckpointError, match=r"1\.0"):
        read_array(tmp_path, (4, 3))
