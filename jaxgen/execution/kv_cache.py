"""The paged KV cache: its arrays, and how many pages fit in memory."""

from __future__ import annotations

import dataclasses
import logging
import os

import jax
import jax.numpy as jnp

from jaxgen.models.config import ModelConfig

logger = logging.getLogger("jaxgen")

MIB = 1 << 20
LEAST_PAGES = 2


@dataclasses.dataclass(frozen=True)
class KVShape:
    """One layer's k_pages and v_pages are both [P, K, S, H] of `dtype`."""

    num_layers: int
    num_pages: int
    num_kv_heads: int
    page_size: int
    head_dim: int
    dtype: jnp.dtype

    @classmethod
    def of(cls, config: ModelConfig, num_pages: int, page_size: int, dtype) -> KVShape:
        return cls(
            num_layers=config.num_layers,
            num_pages=num_pages,
            num_kv_heads=config.num_kv_heads,
            page_size=page_size,
            head_dim=config.head_dim,
            dtype=jnp.dtype(dtype),
        )

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers, keys and values."""
        per_layer = self.num_kv_heads * self.page_size * self.head_dim * self.dtype.itemsize
        return 2 * self.num_layers * per_layer

    @property
    def num_tokens(self) -> int:
        return self.num_pages * self.page_size

    def abstract(self, sharding: jax.sharding.Sharding) -> tuple[jax.ShapeDtypeStruct, ...]:
        """[k0, v0, k1, v1, ...] as shapes."""
        shape = (self.num_pages, self.num_kv_heads, self.page_size, self.head_dim)
        page = jax.ShapeDtypeStruct(shape, self.dtype, sharding=sharding)
        return (page,) * (2 * self.num_layers)

    def allocate(self, sharding: jax.sharding.Sharding) -> tuple[jax.Array, ...]:
        """Zeroed pages, created on their devices."""
        (spec, *_) = self.abstract(sharding)

        def zeros():
            return tuple(jnp.zeros(spec.shape, spec.dtype) for _ in range(2 * self.num_layers))

        return jax.jit(zeros, out_shardings=sharding)()


def device_memory_bytes(device: jax.Device) -> int | None:
    """The bytes this process may use on `device`; None on a CPU."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    return None if stats is None else int(stats["bytes_limit"])


def host_memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cpu_kv_budget() -> int:
    """KV bytes on a CPU: a sixteenth of the machine's memory, 1 GiB at most, so that a laptop stays usable."""
    return min(1024 * MIB, host_memory_bytes() // 16)


def gpu_kv_budget(*, limit: int, weights: int, lane_state: int, temp: int, fraction: float | None) -> int:
    """KV bytes per GPU.

    With an explicit fraction (mem_fraction_static) weights + KV fill that share of `limit`. Otherwise KV gets
    what weights, lane state and the largest step's temporary memory (`temp`, as the compiler reports it)
    leave, less a reserve of 2 % and 256 MiB for fragmentation and transfers.
    """
    if fraction is not None:
        return int(limit * fraction) - weights
    reserve = limit // 50 + 256 * MIB
    return limit - weights - lane_state - temp - reserve


def pages_within(budget: int, page: KVShape, *, max_total_tokens: int | None, weight_bytes: int) -> int:
    """Pages of the pool: what fits in `budget` bytes over all devices, or the user's smaller number.

    `page` gives the size of a page. Raises ValueError for a max_total_tokens that holds no request, and
    RuntimeError when memory does not.
    """
    size = page.page_size
    pages = round_pages(budget // page.page_bytes)
    if max_total_tokens is not None:
        wanted = max_total_tokens // size
        if wanted < LEAST_PAGES:
            raise ValueError(
                f"max_total_tokens={max_total_tokens} is too small for one request: it must be at least two "
                f"pages of {size} tokens"
            )
        if wanted > pages:
            logger.warning(
                "max_total_tokens=%d does not fit in memory; lowered to %d", max_total_tokens, pages * size
            )
        pages = min(pages, wanted)
    if pages < LEAST_PAGES:
        raise RuntimeError(
            f"Not enough memory for the KV cache: {pages} pages of {size} tokens "
            f"({page.page_bytes / MIB:.2f} MiB each) fit beside {weight_bytes / 2**30:.2f} GiB of weights. Lower "
            "max_running_requests or chunked_prefill_size, raise mem_fraction_static, or use more devices "
            "(tp_size)."
        )
    return pages


def round_pages(num_pages: int) -> int:
    """Rounds a derived page count down to five significant binary digits.

    The page count is part of every compiled step's shape. A few bytes more or less of free memory must not
    change it, or the persistent compilation cache would miss.
    """
    unit = 1 << max(0, num_pages.bit_length() - 5)
    return num_pages // unit * unit
