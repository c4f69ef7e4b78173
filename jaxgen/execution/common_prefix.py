"""Decode lanes that begin with the same pages: how many tokens those hold, and when to read them once for all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxgen.execution.runner_config import RunnerConfig
from jaxgen.models.config import ModelConfig
from kernels_pallas.mosaic import device_without_kernels

# Bytes of a layer that lanes read of a common prefix together, each by itself, from which on two launches more a layer
# pay. On an H100, microseconds without and with them: 66 MB 16.7 / 19.4 and 15.7 / 19.5, 134 MB 29 / 30, 268 MB 34 /
# 24, 537 MB 73 / 36 and 97 / 66, 2.1 GB 307 / 77.
LEAST_BYTES = 192 << 20
# Fewer lanes hardly share so much, and steps take time to compile.
LEAST_LANES = 32


@dataclasses.dataclass(frozen=True)
class PrefixSharing:
    """When a model's decode steps read a common prefix once.

    token_bytes: keys and values of a token in a layer, on one device. most_tokens: of a prefix; 0 shares none.
    """

    page_size: int
    token_bytes: int
    most_tokens: int

    @classmethod
    def of(cls, config: RunnerConfig, model: ModelConfig, tensor_devices: int) -> PrefixSharing:
        """Where a kernel does it, and not all layers have a window; never where batches must not matter."""
        attention = config.attention
        is_possible = (
            device_without_kernels() is None
            and np.dtype(config.param_dtype).itemsize == 2
            and attention.decode != "reference"
            and not attention.deterministic
            and None in model.sliding_windows
        )
        itemsize = np.dtype(config.kv_dtype).itemsize
        return cls(
            page_size=config.page_size,
            token_bytes=2 * model.num_kv_heads * model.head_dim * itemsize // tensor_devices,
            most_tokens=config.context_length if is_possible else 0,
        )

    def buckets(self, lanes: Sequence[int]) -> tuple[int, ...]:
        """Those of the decode buckets for which steps are compiled: powers of two and the largest."""
        return tuple(
            b
            for b in lanes
            if b >= LEAST_LANES
            and (b.bit_count() == 1 or b == lanes[-1])
            and b * self.most_tokens * self.token_bytes >= LEAST_BYTES
        )

    def tokens(self, table: np.ndarray, rows: np.ndarray, lengths: np.ndarray) -> int:
        """Leading tokens that lanes have in the same whole pages; 0 where it does not pay to know.

        table: [R, MP] page ids, of which those that hold a lane's tokens count. rows, lengths: [B] row and KV tokens of
        each lane.
        """
        lanes = len(rows)
        if lanes < LEAST_LANES or not self.most_tokens:
            return 0
        pages = int(lengths.min()) // self.page_size
        least = -(-LEAST_BYTES // (lanes * self.token_bytes * self.page_size))  # pages
        if pages < least or not (table[rows, least - 1] == table[rows[0], least - 1]).all():
            return 0
        differ = (table[rows, :pages] != table[rows[0], :pages]).any(axis=0)  # [pages]
        common = int(differ.argmax()) if differ.any() else pages
        return common * self.page_size if common >= least else 0
