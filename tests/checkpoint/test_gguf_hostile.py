"""Damaged and hostile GGUF files: always a CheckpointError, quickly, in little memory."""

import struct
import subprocess
import sys

import gguf_files
import numpy as np
import pytest
import tiny

from jaxgen.checkpoint import CheckpointError, open_checkpoint

STRING, ARRAY, UINT8, UINT32 = 8, 9, 0, 4


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def array(kind: int, length: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, length) + items


def tensor(name: bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file(*parts: bytes, tensors: int = 0, entries: int = 0, version: int = 3, tail: int = 4096) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + b"".join(parts) + bytes(tail)


U32 = struct.pack("<I", 32)

HOSTILE = {
    "empty": b"",
    "other magic": b"GGML" + bytes(100),
    "magic only": b"GGUF",
    "version 1": file(version=1),
    "version 99": file(version=99),
    "big endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(100),
    "2^32 tensors": file(tensors=1 << 32),
    "2^60 tensors": file(tensors=1 << 60),
    "2^60 entries": file(entries=1 << 60),
    "key of 2^62 bytes": file(string(b"k", 1 << 62), entries=1),
    "string of 2^62 bytes": file(string(b"k") + struct.pack("<I", STRING) + string(b"v", 1 << 62), entries=1),
    "array of 2^60 bytes": file(entry(b"k", ARRAY, array(UINT8, 1 << 60)), entries=1),
    "array of 2^60 strings": file(entry(b"k", ARRAY, array(STRING, 1 << 60)), entries=1),
    "array of 2^61 words": file(entry(b"k", ARRAY, array(UINT32, 1 << 61)), entries=1),
    "nested arrays": file(entry(b"k", ARRAY, array(ARRAY, 1, array(ARRAY, 1) * 200)), entries=1),
    "unknown value type": file(entry(b"k", 77, bytes(8)), entries=1),
    "unknown array type": file(entry(b"k", ARRAY, array(77, 1)), entries=1),
    "key that is not UTF-8": file(entry(b"\xff\xfe", UINT32, U32), entries=1),
    "duplicate key": file(entry(b"k", UINT32, U32), entry(b"k", UINT32, U32), entries=2),
    "alignment 0": file(entry(b"general.alignment", UINT32, bytes(4)), entries=1),
    "alignment 3": file(entry(b"general.alignment", UINT32, struct.pack("<I", 3)), entries=1),
    "alignment text": file(entry(b"general.alignment", STRING, string(b"32")), entries=1),
    "no dimensions": file(tensor(b"t", []), tensors=1),
    "2^31 dimensions": file(string(b"t") + struct.pack("<I", 1 << 31), tensors=1),
    "dimension 0": file(tensor(b"t", [4, 0]), tensors=1),
    "huge dimensions": file(tensor(b"t", [1 << 62] * 4), tensors=1),
    "product of dimensions wraps around": file(tensor(b"t", [1 << 32, 1 << 32]), tensors=1),
    "unknown tensor type": file(tensor(b"t", [4], kind=99), tensors=1),
    "partial block": file(tensor(b"t", [33], kind=8), tensors=1),
    "offset past the end": file(tensor(b"t", [4], offset=1 << 40), tensors=1),
    "offset wraps around": file(tensor(b"t", [4], offset=(1 << 64) - 64), tensors=1),
    "data past the end": file(tensor(b"t", [4096]), tensors=1),
    "duplicate tensor": file(tensor(b"t", [4]), tensor(b"t", [4]), tensors=2),
    "no metadata": file(tensor(b"t", [4]), tensors=1),
}


@pytest.mark.timeout(5)
@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in HOSTILE.items()])
def test_hostile_headers_are_refused(tmp_path, data):
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"m\.gguf"):
        open_checkpoint(path)


def test_truncations_are_refused(tmp_path):
    gguf_files.write(tmp_path / "m.gguf", kind=gguf_files.Type.Q8_0)
    data = (tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for keep in [*range(0, 2000, 37), len(data) // 2, len(data) - 1000]:
        path.write_bytes(data[:keep])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            open_checkpoint(path)


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_random_mutations_load_or_are_refused(tmp_path):
    """Flipped bytes either do not matter or raise the one documented error; nothing else gets out."""
    tokens = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "c"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 3,
    }
    gguf_files.write(tmp_path / "m.gguf", tokens, kind=gguf_files.Type.Q8_0)
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    header = data.index(b"blk.0.ffn_down.weight") + 200
    rng = np.random.default_rng(0)
    path = tmp_path / "mutated.gguf"
    refused = 0
    for _ in range(2000):
        mutated = bytearray(data)
        for at in rng.integers(0, header, rng.integers(1, 5)):
            mutated[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(256)])
        path.write_bytes(mutated)
        try:
            checkpoint = open_checkpoint(path)
            checkpoint.load_tokenizer()
            checkpoint.load(tiny.targets(), tiny.table(), tiny.ignore)
        except CheckpointError:
            refused += 1
    assert refused > 500


def test_hostile_files_need_little_memory(tmp_path):
    paths = []
    for i, data in enumerate(HOSTILE.values()):
        paths.append(tmp_path / f"{i}.gguf")
        paths[-1].write_bytes(data)
    script = (
        "import resource, sys\n"
        "from jaxgen.checkpoint import CheckpointError, open_checkpoint\n"
        "import gguf\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        open_checkpoint(path)\n"
        "    except CheckpointError:\n"
        "        pass\n"
        "    else:\n"
        "        sys.exit(path + ' was accepted')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 100 << 10  # KiB more than the imports took
