"""Random operands of `paged_decode_update`, and what it makes of them in float64."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from tests.kernels import oracle


@dataclass(frozen=True)
class Update:
    """A decode step whose pages `kv` do not hold the last token of each row yet (poison is in its place)."""

    qkv: np.ndarray  # [B, K, G + 2, H]
    kv: oracle.Paged
    cos: np.ndarray  # [B, rotary_dim / 2]
    sin: np.ndarray
    norms: tuple[np.ndarray, np.ndarray] | None
    scales: tuple[np.ndarray, np.ndarray] | None = None  # of k_pages and v_pages
    epsilon: float = 1e-6

    def expected(self) -> tuple[np.ndarray, oracle.Paged]:
        """The queries [B, N, H] to attend with, and the KV with the last tokens in place."""
        num_lanes, num_kv_heads, rows, head_dim = self.qkv.shape
        group, dtype, page_size = rows - 2, self.qkv.dtype, self.kv.k_pages.shape[2]
        x = self.qkv[:, :, : group + 1].astype(np.float64)
        if self.norms is not None:
            weight = np.stack([self.norms[0]] * group + [self.norms[1]]).astype(np.float64)
            x = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon) * weight
            x = x.astype(dtype).astype(np.float64)
        half = self.cos.shape[1]
        cos, sin = self.cos[:, None, None].astype(np.float64), self.sin[:, None, None].astype(np.float64)
        first, second = x[..., :half], x[..., half : 2 * half]
        x = np.concatenate(
            [first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :]], axis=-1
        ).astype(dtype)
        k_scale, v_scale = (1.0, 1.0) if self.scales is None else self.scales
        k_pages, v_pages = self.kv.k_pages.copy(), self.kv.v_pages.copy()
        keys, values = [k * k_scale for k in self.kv.keys], [v * v_scale for v in self.kv.values]
        for lane, length in enumerate(self.kv.lengths):
            if length:
                page = self.kv.page_table[lane, (length - 1) // page_size]
                offset = (length - 1) % page_size
                k = saturated(x[lane, :, group] / k_scale, k_pages.dtype)
                v = saturated(self.qkv[lane, :, group + 1] / v_scale, v_pages.dtype)
                k_pages[page, :, offset], v_pages[page, :, offset] = k, v
                keys[lane][:, -1], values[lane][:, -1] = k * k_scale, v * v_scale
        q = x[:, :, :group].reshape(num_lanes, num_kv_heads * group, head_dim)
        return q, oracle.Paged(keys, values, k_pages, v_pages, self.kv.page_table, self.kv.lengths)


def random_update(
    lengths,
    num_heads,
    num_kv_heads,
    head_dim,
    page_size,
    *,
    rotary_dim=None,
    norms=False,
    dtype,
    page_dtype=None,
    scales=None,
    common=0,
    seed=0,
) -> Update:
    """`scales` (k, v) belong to 8-bit pages, of `page_dtype`; the pages are of `dtype` without it."""
    rng = np.random.default_rng(seed)
    kv = oracle.paged(
        rng, lengths, num_kv_heads, head_dim, page_size, common=common, dtype=page_dtype or dtype
    )
    for lane, length in enumerate(kv.lengths):
        if length:
            page, offset = kv.page_table[lane, (length - 1) // page_size], (length - 1) % page_size
            kv.k_pages[page, :, offset] = kv.v_pages[page, :, offset] = np.nan
    qkv = rng.normal(size=(len(lengths), num_kv_heads, num_heads // num_kv_heads + 2, head_dim))
    angles = rng.uniform(0, 6, size=(len(lengths), (rotary_dim or head_dim) // 2))
    weights = (1 + 0.3 * rng.normal(size=(2, head_dim))).astype(dtype)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    if scales is not None:
        scales = np.float32(scales[0]), np.float32(scales[1])
    return Update(qkv.astype(dtype), kv, cos, sin, (weights[0], weights[1]) if norms else None, scales)


def saturated(x: np.ndarray, dtype) -> np.ndarray:
    """x rounded to `dtype`, 8-bit types at most to their largest value."""
    if np.dtype(dtype).itemsize > 1:
        return x.astype(dtype)
    largest = float(ml_dtypes.finfo(dtype).max)
    return np.clip(x.astype(np.float32), -largest, largest).astype(dtype)
