"""How the matrix product of a decode layer is cut into blocks of threads, and where its kernel is worth it."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from kernels_pallas import tuning
from kernels_pallas.mosaic import ROWS

MULTIPROCESSORS = 132
SHARED_BYTES = 225 << 10  # of a block of threads, a little less than there is
MAX_STAGES = 12
MAX_COLUMNS = 256  # of a wgmma
LEAST_TOKENS = 16  # that the kernel wins for
MOST_TOKENS = 256
MOST_WEIGHTS = 10 << 20  # larger ones have not been measured


@dataclass(frozen=True)
class GemmConfig:
    """A cut of a product.

    columns: of the output (gated: of each half), in a block of threads. warpgroups: that multiply, 64 tokens each.
    splits: blocks of a cluster that share the sum over K. column_peers, token_peers: blocks of a cluster that
    share the copies of their tokens, or of their weights. chunk: of K, in a slot. stages: slots, two or more.
    """

    columns: int
    warpgroups: int = 1
    splits: int = 1
    column_peers: int = 1
    token_peers: int = 1
    chunk: int = 64
    stages: int = 2


@dataclass(frozen=True)
class Product:
    """Sizes of x [M, K] times weight [P, N, K] (P = 2: gated)."""

    tokens: int
    parts: int
    rows: int
    size: int

    def blocks(self, config: GemmConfig) -> int:
        across = -(-self.rows // (config.columns * config.column_peers)) * config.column_peers
        tile = config.warpgroups * ROWS
        along = -(-self.tokens // (tile * config.token_peers)) * config.token_peers
        return across * along * config.splits

    def configs(self) -> Iterator[GemmConfig]:
        """Every cut with as many stages as fit; none shares copies."""
        for warpgroups in (1, 2) if self.tokens > ROWS else (1,):
            for splits in (1, 2, 4, 8):
                for columns in range(8 * splits, min(MAX_COLUMNS // self.parts, self.rows) + 1, 8 * splits):
                    for chunk in (128, 64):
                        stages = self._stages(warpgroups, splits, columns, chunk)
                        if stages >= (2 if chunk == 64 else 4):
                            yield GemmConfig(columns, warpgroups, splits, 1, 1, chunk, stages)
                            break

    def _stages(self, warpgroups: int, splits: int, columns: int, chunk: int) -> int:
        if self.size % chunk or self.size // chunk < splits:
            return 0
        tile, width = warpgroups * ROWS, self.parts * columns
        merged = tile * width * 4 if splits > 1 else 0
        left = SHARED_BYTES - merged - tile * (columns // splits) * 2
        trips = -(-(self.size // chunk) // splits)
        return min(left // ((tile + width) * chunk * 2), max(trips, 2), MAX_STAGES)

    def microseconds(self, config: GemmConfig) -> float:
        """Of an H100, roughly: measured times are 0.85 to 1.15 of it.

        A launch, the longest of what a multiprocessor is fed, what memory gives and what the tensor cores do, a
        part of the two others, and the merge of splits.
        """
        tile, width = config.warpgroups * ROWS, self.parts * config.columns
        waves = -(-self.blocks(config) // MULTIPROCESSORS)
        share = self.size / config.splits
        fed = waves * (min(self.tokens, tile) + width) * share * 2 / 100e3
        read = self.parts * self.rows * self.size * 2 / 2.9e6
        multiplied = waves * tile * width * share / (2048 * 1600)
        merge = 0.0 if config.splits == 1 else 1.3 + 0.3e-3 * tile * width * (1 - 1 / config.splits)
        longest = max(fed, read, multiplied)
        return 1.0 + waves + 0.7 * longest + 0.3 * (fed + read + multiplied) + merge


def unsupported(product: Product) -> str | None:
    """Why the kernel cannot take these sizes; None if it can."""
    if product.tokens % 8 or product.tokens > MOST_TOKENS:
        return f"there are {product.tokens} tokens, not a multiple of 8 up to {MOST_TOKENS}"
    if product.rows % 8 or product.size % 64:
        return f"the weight's rows of {product.size} are not a multiple of 64 long, or {product.rows} not one of 8"
    return None


def slower(product: Product) -> str | None:
    """Why XLA's product, with what XLA puts around it, is as fast; None where the kernel has been measured to win."""
    if product.tokens < LEAST_TOKENS or product.parts * product.rows * product.size > MOST_WEIGHTS:
        return f"XLA may be as fast for {product}"
    return None


def choose(product: Product) -> GemmConfig:
    """The tuning table's configuration, or else the one that promises most."""
    shape = dataclasses.asdict(product)
    return tuning.config_for(
        "fused_linear", shape, min(product.configs(), key=product.microseconds), candidates
    )


def candidates(tokens: int, parts: int, rows: int, size: int) -> list[GemmConfig]:
    """The configurations that promise most."""
    product = Product(tokens, parts, rows, size)
    return sorted(product.configs(), key=product.microseconds)[:8]
