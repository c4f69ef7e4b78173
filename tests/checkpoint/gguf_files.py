"""GGUF files written with the gguf library: the tiny model in any quantization, with a tokenizer."""

import gguf
import numpy as np
import tiny

Type = gguf.GGMLQuantizationType

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

ARCHITECTURE = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 2048,
    "llama.embedding_length": tiny.D,
    "llama.feed_forward_length": tiny.F,
    "llama.attention.head_count": tiny.N,
    "llama.attention.head_count_kv": tiny.K,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500000.0,
    "llama.rope.dimension_count": tiny.H,
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    if name in NAMES:
        return NAMES[name]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    kind, suffix = rest.rsplit(".", 1)
    return f"blk.{layer}.{NAMES[kind]}.{suffix}"


def rope_pairs(rows: int, heads: int) -> np.ndarray:
    """Row order in which llama.cpp stores q and k: the two halves of each head interleaved."""
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def quantize(values: np.ndarray, kind: Type) -> np.ndarray:
    """Stored form of a matrix; random valid blocks for the types the library can only read."""
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
        rng = np.random.default_rng(values.size)
        blocks = rng.integers(0, 256, (values.size // elements, nbytes), np.uint8)
        # The float16 scales are the first bytes of Q4_K and Q5_K blocks and the last of the other kinds.
        for at in (slice(0, 2), slice(2, 4), slice(nbytes - 4, nbytes - 2), slice(nbytes - 2, nbytes)):
            scale = rng.uniform(0.001, 0.01, len(blocks)).astype(np.float16)
            blocks[:, at] = scale[:, None].view(np.uint8)
        return blocks.reshape(values.shape[0], -1)


def write(
    path, metadata=None, weights=None, kind=Type.F32, extra_tensors=None, heads=(tiny.N, tiny.K)
) -> dict[str, np.ndarray]:
    """Write a file; returns the tensors that a reader must get, under Hugging Face names and in its layout.

    Args:
        path: File to create.
        metadata: Entries over those of ``ARCHITECTURE``; None removes one.
        weights: Tensors; the tiny model's when None.
        kind: Type of all matrices. Vectors are float32, as llama.cpp leaves them.
        extra_tensors: Tensors under GGUF names, stored as they are.
        heads: Number of query and of key heads.
    """
    weights = tiny.tensors() if weights is None else weights
    metadata = ARCHITECTURE | (metadata or {})
    architecture = metadata["general.architecture"]
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if value is not None and key != "general.architecture":
            add(writer, key, value)
    read_back = {}
    for name, value in weights.items():
        order = np.arange(len(value))
        for projection, count in zip(("q_proj", "k_proj"), heads):
            if architecture == "llama" and projection in name:
                order = rope_pairs(len(value), count)
        stored = quantize(value[order], kind) if value.ndim > 1 else value[order]
        stored_kind = kind if value.ndim > 1 else Type.F32
        is_raw = stored.dtype == np.uint8
        writer.add_tensor(gguf_name(name), stored, raw_dtype=stored_kind if is_raw else None)
        read_back[name] = np.empty(value.shape, np.float32)
        read_back[name][order] = gguf.quants.dequantize(stored, stored_kind)
    for name, value in (extra_tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_back


def add(writer: gguf.GGUFWriter, key: str, value) -> None:
    """Add a metadata entry of the type its Python value suggests."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)
