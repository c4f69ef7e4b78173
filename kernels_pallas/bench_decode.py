"""Speed of decode attention: cases, inputs and timings, alone and with the rope and the KV write."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import paged_decode, paged_decode_update
from kernels_pallas.timing import L2_BYTES, figure, seconds_per_call


@dataclass(frozen=True)
class DecodeCase:
    """One shape of decode, and the share of the floor aimed at."""

    name: str
    lengths: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int = 64
    target: float | None = None
    page_dtype: str = "bfloat16"
    common: int = 0  # tokens, of whole pages, that all lanes have in the same pages

    @property
    def kv_bytes(self) -> int:
        itemsize = jnp.dtype(self.page_dtype).itemsize
        tokens = sum(self.lengths) - (len(self.lengths) - 1) * self.common
        return 2 * tokens * self.num_kv_heads * self.head_dim * itemsize


def _ragged(count: int, low: int, high: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(0).integers(low, high + 1, count).tolist())


DECODE_CASES = (
    DecodeCase("64 x 4096, 32/8 x 128", (4096,) * 64, 32, 8, 128, target=0.95),
    DecodeCase("256 x 1024, 32/8 x 128", (1024,) * 256, 32, 8, 128, target=0.92),
    DecodeCase("8 x 16384, 32/8 x 128", (16384,) * 8, 32, 8, 128, target=0.92),
    DecodeCase("128 x 100..8000, 32/8 x 128", _ragged(128, 100, 8000), 32, 8, 128, target=0.88),
    DecodeCase("256 x 1024, 14/2 x 64", (1024,) * 256, 14, 2, 64, target=0.70),
    DecodeCase("256 x 1024, 9/3 x 64", (1024,) * 256, 9, 3, 64, target=0.70),
    DecodeCase("64 x 4096, 32/8 x 128, pages of 16", (4096,) * 64, 32, 8, 128, page_size=16),
    DecodeCase("64 x 8192, 32/8 x 128", (8192,) * 64, 32, 8, 128),
    DecodeCase("64 x 8192, 32/8 x 128, fp8", (8192,) * 64, 32, 8, 128, page_dtype="float8_e4m3fn"),
    DecodeCase("256 x 128, 32/8 x 128", (128,) * 256, 32, 8, 128),
    DecodeCase("1 x 32768, 32/8 x 128", (32768,), 32, 8, 128),
    DecodeCase("1 x 1024, 32/8 x 128", (1024,), 32, 8, 128),
    DecodeCase("16 x 8192, 16/8 x 256", (8192,) * 16, 16, 8, 256),
    DecodeCase("256 x 2048 common + 64..128, 32/8 x 128", _ragged(256, 2112, 2176), 32, 8, 128, common=2048),
)


def decode_inputs(case: DecodeCase) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
    """Operands of `paged_decode_update`: k_pages and v_pages; qkv, lengths, cos and sin; page tables.

    There are as many page tables, over distinct pages, as it takes to leave the L2 cache.
    """
    lanes, page = len(case.lengths), case.page_size
    max_pages = -(-max(case.lengths) // page)
    sets = max(1, min(64, -(-2 * L2_BYTES // case.kv_bytes)))
    shared = case.common // page
    counts = [-(-n // page) - shared for n in case.lengths]
    order = np.random.default_rng(1).permutation((shared + sum(counts)) * sets).astype(np.int32)
    tables: np.ndarray = np.zeros((sets, lanes, max_pages), np.int32)
    taken = 0
    for i in range(sets):
        tables[i, :, :shared] = order[taken : taken + shared]
        taken += shared
        for lane, count in enumerate(counts):
            tables[i, lane, shared : shared + count] = order[taken : taken + count]
            taken += count
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (len(order), case.num_kv_heads, page, case.head_dim)
    pages = [jax.random.normal(key, shape, jnp.bfloat16).astype(case.page_dtype) for key in keys[:2]]
    heads = (case.num_kv_heads, case.num_heads // case.num_kv_heads + 2)
    qkv = jax.random.normal(keys[2], (lanes, *heads, case.head_dim), jnp.bfloat16)
    angles = jax.random.uniform(keys[3], (lanes, case.head_dim // 2), jnp.float32, 0, 6)
    step = [qkv, jnp.asarray(np.asarray(case.lengths, np.int32)), jnp.cos(angles), jnp.sin(angles)]
    return pages, step, list(jnp.asarray(tables))


def time_decode(case: DecodeCase, attend: Callable, repeats: int) -> float:
    """Seconds of one call of `attend(q, k_pages, v_pages, page_table, lengths)`."""
    pages, (qkv, lengths, *_), tables = decode_inputs(case)
    calls = max(len(tables), 16)

    def chain(q, k_pages, v_pages, lengths, *tables):
        for i in range(calls):  # each call waits for the one before it, and nothing else is in between
            q = attend(q, k_pages, v_pages, tables[i % len(tables)], lengths)
        return q

    q = qkv[:, :, :-2].reshape(len(case.lengths), case.num_heads, case.head_dim)
    return seconds_per_call(chain, [q, *pages, lengths, *tables], calls, repeats)


def time_update(case: DecodeCase, update: Callable, repeats: int) -> float:
    """Seconds of one call of `update(qkv, k_pages, v_pages, page_table, lengths, cos, sin)`, in place."""
    pages, step, tables = decode_inputs(case)
    calls = max(len(tables), 24)

    def chain(k_pages, v_pages, qkv, lengths, cos, sin, *tables):
        for i in range(calls):  # the pages chain the calls
            table = tables[i % len(tables)]
            out, k_pages, v_pages = update(qkv, k_pages, v_pages, table, lengths, cos, sin)
        return k_pages, v_pages, out

    return seconds_per_call(chain, [*pages, *step, *tables], calls, repeats, donated=2)


def with_common_prefix(attend: Callable, common: int) -> Callable:
    """`attend`, told that its lanes, all longer, have their first `common` tokens in the same pages."""

    def call(q, k_pages, v_pages, page_table, lengths, *step):
        prefix = jnp.minimum(lengths[:1], common)  # no constant: an engine has none
        return attend(q, k_pages, v_pages, page_table, lengths, *step, common_prefix=prefix)

    return call


def bench_decode(repeats: int, rates: dict) -> Iterator[dict]:
    """The floor is one read of the keys and values; what lanes have in common is read without being told so, too."""
    ops: dict[str, tuple[Callable, Callable]] = {
        "paged_decode": (time_decode, paged_decode),
        "paged_decode_update": (time_update, paged_decode_update),
    }
    for op, (timing, function) in ops.items():
        for case in DECODE_CASES:
            seconds = timing(case, function, repeats)
            floor = case.kv_bytes / rates["read_bytes_per_s"]
            yield figure(op, case.name, seconds, floor, target=case.target)
            if case.common:
                seconds = timing(case, with_common_prefix(function, case.common), repeats)
                yield figure(op, f"{case.name}, told", seconds, floor)
