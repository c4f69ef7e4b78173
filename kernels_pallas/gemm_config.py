"""How the matrix product of a decode layer is cut into blocks of threads, and where its kernel is worth it.

Microseconds of kernels on one H100 (JAX 0.11.2, weights beyond the L2 cache, the device's own clock), ours / XLA's with
its split-K reduction, activation and residual; norms are XLA's in both:

| tokens | qkv | out | gate and up | down | Llama-3-8B: qkv | out | gate and up | down |
|---|---|---|---|---|---|---|---|---|
| 8 | 3.1 / 3.8 | 2.7 / 3.0 | 8.3 / 9.7 | 6.1 / 7.5 | | | | |
| 16 | 3.0 / 3.5 | 2.7 / 3.2 | 8.3 / 10.2 | 6.2 / 8.1 | 19.3 / 22.0 | 13.8 / 15.6 | 84.0 / 84.0 | 41.2 / 44.8 |
| 64 | 3.3 / 4.2 | 3.2 / 4.2 | 8.7 / 10.5 | 6.2 / 8.1 | 19.8 / 21.2 | 14.5 / 15.4 | 86.0 / 88.4 | 43.0 / 44.2 |
| 128 | 3.6 / 4.6 | 3.3 / 4.4 | 9.6 / 11.5 | 7.7 / 8.9 | 20.4 / 21.0 | 15.4 / 16.2 | 89.8 / 93.2 | 44.8 / 44.8 |
| 256 | 4.0 / 4.7 | 3.6 / 4.8 | 11.5 / 13.5 | 9.8 / 10.4 | 23.4 / 23.9 | 20.2 / 19.4 | 97.9 / 107.8 | 58.6 / 54.6 |

The four columns in front are Qwen2.5-0.5B's; between these numbers of tokens its products win by as much. Eight tokens
cost XLA and the kernel what sixteen do, in larger models, too, where they have not been measured.

Since then slots of 64 columns are asked for in pairs where the weight is large, and a gated product has a slot more,
for its results take the ring's memory. Gate and up of Llama-3-8B, now and before in the same run: 80.9 / 84.6 us at
16 tokens, 81.7 / 85.7 at 64, 84.6 / 89.2 at 128 and 97.2 / 98.5 at 256 (there without pairs, which take 98.4). Copies
alone of that weight take 82.3 us in pieces of 128 bytes of a row, 77.9 of 256 or 512, 76.7 of whole tiles in one
piece, and one sum 75.3. And cuts are chosen by what 384 times of these products at 16 to 256 tokens say, which are
wider for the small ones: qkv and out of Qwen2.5-0.5B 2.8 and 2.7 us at 16 tokens where they took 3.3, 3.05 and 2.8 at
64, 3.05 and 3.05 at 128 (3.5 and 3.3 before in the same run). Llama-3-8B without attention, a layer with all four
products the kernel's, and with `down`, at 160 and 192 tokens also qkv, XLA's: 170.8 / 175.3 us at 96 tokens, 171.2 /
171.7 at 128, 188.5 / 199.8 at 160, 190.7 / 210.8 at 192. Of 224 and 256 tokens XLA's large products are as fast
(202.9 / 202.0).

What did not help: blocks of a cluster that share the copies of their tokens or of their weights (equal in pairs;
clusters of four do not fill all multiprocessors). A norm whose scale is applied to the tokens inside the product costs
1.0 to 2.1 us, where XLA's own takes 1.6 to 2.1: the product before scales them instead. Nor did pairs of slots of 128
columns or slots of 256 (42.8 and 43.2 us instead of 43.7 for `down` of Llama-3-8B at 64 tokens, 20.1 and 20.5 instead
of 19.9 for qkv).
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from kernels_pallas import tuning
from kernels_pallas.mosaic import MULTIPROCESSORS, ROWS

IN_LARGE_CLUSTERS = 112  # of them, for certain, where clusters have four or eight blocks
SHARED_BYTES = 225 << 10  # of a block of threads, a little less than there is
LEAST_STAGES, MOST_STAGES = 4, 12
MAX_COLUMNS = 256  # of a wgmma
LEAST_TOKENS = 8  # that the kernel wins for
MOST_TOKENS = 256
# Of a product without gate, that it wins for: up to three tiles of tokens, and of more.
FEW_TOKENS, MOST_MULTIPLICATIONS, MOST_OF_MANY = 3 * ROWS, 12e9, 4e9


@dataclass(frozen=True)
class GemmConfig:
    """A cut of a product.

    columns: of the output (gated: of each half), in a block of threads. warpgroups: that multiply, 64 tokens each.
    splits: blocks of a cluster that share the sum over K. chunk: of K, in a slot. stages: slots, two or more.
    together: slots that are asked for at once.
    """

    columns: int
    warpgroups: int = 1
    splits: int = 1
    chunk: int = 64
    stages: int = 2
    together: int = 1


@dataclass(frozen=True)
class Product:
    """Sizes of x [M, K] times weight [P, N, K] (P = 2: gated)."""

    tokens: int
    parts: int
    rows: int
    size: int

    def configs(self) -> Iterator[GemmConfig]:
        """Every cut with as many stages as fit, in which enough is in flight; of equals the better first."""
        for warpgroups in (2, 1) if self.tokens > ROWS else (1,):
            for splits in (1, 2, 4, 8):
                for columns in range(8 * splits, min(MAX_COLUMNS // self.parts, self.rows) + 1, 8 * splits):
                    for chunk in (128, 64):
                        if self.size % chunk or self.size // chunk < splits:
                            continue
                        trips = -(-(self.size // chunk) // splits)
                        stages = self._most_stages(warpgroups, splits, columns, chunk)
                        if stages >= min(trips, LEAST_STAGES):
                            stages = max(min(stages, trips, MOST_STAGES), 2)
                            together = self._together(columns, chunk, stages)
                            yield GemmConfig(columns, warpgroups, splits, chunk, stages, together)
                            break

    def _together(self, columns: int, chunk: int, stages: int) -> int:
        """Two, where memory is what limits and would be read in pieces of 128 bytes, which it delivers more slowly."""
        is_long = self.parts == 2 and self.tokens <= 2 * ROWS and columns > 64
        return 2 if is_long and chunk == 64 and stages > LEAST_STAGES else 1

    def _most_stages(self, warpgroups: int, splits: int, columns: int, chunk: int) -> int:
        tile, width = warpgroups * ROWS, self.parts * columns
        merged = tile * width * 4 if splits > 1 else 0
        results = 2 if self.parts == 1 else 0  # one for the next norm; gated ones take the ring's memory
        written = results * tile * (columns // splits) * 2
        return (SHARED_BYTES - merged - written) // ((tile + width) * chunk * 2)

    def microseconds(self, config: GemmConfig) -> float:
        """Of an H100, roughly: of 384 measured times three quarters are within 7 % of it.

        The launch and further waves of blocks of threads, and the longest of: feeding a multiprocessor, and all of them
        from the L2 cache, reading the weight, multiplying, and starting copies; a part of the others, and the merge of
        splits.
        """
        tile, width = config.warpgroups * ROWS, self.parts * config.columns
        blocks = -(-self.rows // config.columns) * -(-self.tokens // tile) * config.splits
        waves = -(-blocks // (MULTIPROCESSORS if config.splits <= 2 else IN_LARGE_CLUSTERS))
        block_bytes = (min(self.tokens, tile) + width) * self.size / config.splits * 2
        share = waves * self.size / config.splits
        times = (
            waves * block_bytes / 250e3,
            blocks * block_bytes / 18e6,
            self.parts * self.rows * self.size * 2 / 3.4e6,
            tile * width * share / (2048 * 1700),
            share / config.chunk * 0.08,
        )
        launch = 1.8 + 0.0025 * min(blocks, MULTIPROCESSORS) + 2.0 * (waves - 1)
        launch += 0.3 * (config.warpgroups - 1)
        merge = 0.0 if config.splits == 1 else 0.6 + 0.22e-3 * tile * width * (1 - 1 / config.splits)
        return launch + max(times) + 0.2 * (sum(times) - max(times)) + merge


def unsupported(product: Product) -> str | None:
    """Why the kernel cannot take these sizes; None if it can."""
    if product.tokens % 8 or product.tokens > MOST_TOKENS:
        return f"there are {product.tokens} tokens, not a multiple of 8 up to {MOST_TOKENS}"
    if product.rows % 8 or product.size % 64:
        return f"the weight's rows of {product.size} are not a multiple of 64 long, or {product.rows} not one of 8"
    return None


def slower(product: Product) -> str | None:
    """Why XLA's product, with what XLA puts around it, is as fast; None where the kernel wins (figures above)."""
    if product.tokens < LEAST_TOKENS:
        return f"XLA is as fast for {product.tokens} tokens"
    most = MOST_MULTIPLICATIONS if product.tokens <= FEW_TOKENS else MOST_OF_MANY
    if product.parts == 1 and product.tokens * product.rows * product.size > most:
        return f"XLA is as fast where there is as much to multiply as in {product}"
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
