"""Speed of the kernels on the GPU at hand: `python -m kernels_pallas.bench [op ...] [--repeats N]`.

Each figure is the median over repeats of a chain of calls inside one compiled program, the inputs rotated
over sets larger together than the L2 cache. Beside it stands the floor: bytes that must be read over the read
bandwidth measured in the same run, or floating-point operations over the measured matrix rate. A JSON line
with everything is printed last.
"""

import argparse
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import log_probabilities, ragged_prefill, sample
from kernels_pallas.bench_decode import bench_decode
from kernels_pallas.bench_linear import bench_linear
from kernels_pallas.timing import L2_BYTES, figure, matrix_rate, read_bandwidth, seconds_per_call


@dataclass(frozen=True)
class PrefillCase:
    """Rows of (new tokens, cached tokens); N query heads, K kv heads, head dim H, page size S."""

    name: str
    rows: tuple[tuple[int, int], ...]
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 64

    @property
    def flops(self) -> float:
        """Multiply-adds of the visible (query, key) pairs, two products, counted as two operations each."""
        pairs = sum(new * cached + new * (new + 1) / 2 for new, cached in self.rows)
        return 4 * pairs * self.num_heads * self.head_dim


LAYERS = 32  # calls that share a work list, as those of a model's layers do

PREFILL_CASES = (
    PrefillCase("1 x 8192", ((8192, 0),)),
    PrefillCase("4096 after 4096 cached", ((4096, 4096),)),
    PrefillCase("16 x 512", ((512, 0),) * 16),
    PrefillCase("1 x 8192, pages of 16", ((8192, 0),), page_size=16),
    PrefillCase("1 x 8192, 14/2 x 64", ((8192, 0),), 14, 2, 64),
    PrefillCase("1 x 8192, 32/32 x 96", ((8192, 0),), 32, 32, 96),
    PrefillCase("1 x 8192, 8/4 x 256", ((8192, 0),), 8, 4, 256),
    PrefillCase("64 rows of 1 after 2048, 1 x 2048", ((1, 2048),) * 64 + ((2048, 0),)),
)


def prefill_inputs(case: PrefillCase) -> list[jax.Array]:
    """Operands of `ragged_prefill`, the pages permuted."""
    counts = [-(-(new + cached) // case.page_size) for new, cached in case.rows]
    order = np.random.default_rng(1).permutation(sum(counts)).astype(np.int32)
    table: np.ndarray = np.zeros((len(counts), max(counts)), np.int32)
    for row, count in enumerate(counts):
        table[row, :count], order = order[:count], order[count:]
    cu_seqlens = np.concatenate([[0], np.cumsum([new for new, _ in case.rows])]).astype(np.int32)
    lengths: np.ndarray = np.asarray([new + cached for new, cached in case.rows], np.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (int(cu_seqlens[-1]), case.num_heads, case.head_dim), jnp.bfloat16)
    pages = (sum(counts), case.num_kv_heads, case.page_size, case.head_dim)
    k, v = (jax.random.normal(key, pages, jnp.bfloat16) for key in keys[1:])
    return [q, k, v, *map(jnp.asarray, (table, cu_seqlens, lengths))]


def time_prefill(case: PrefillCase, attend: Callable, repeats: int, calls: int = LAYERS) -> float:
    """Seconds of one call of `attend(q, k_pages, v_pages, page_table, cu_seqlens, lengths)`."""

    def chain(q, *operands):
        for _ in range(calls):
            q = attend(q, *operands)
        return q

    return seconds_per_call(chain, prefill_inputs(case), calls, repeats)


def time_cudnn(case: PrefillCase, repeats: int, calls: int = LAYERS) -> float:
    """Seconds of cuDNN's dense causal attention over rows of equal length and no cached prefix."""
    tokens = case.rows[0][0]
    shape = (len(case.rows), tokens, case.num_kv_heads, case.head_dim)
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (*shape[:2], case.num_heads, case.head_dim), jnp.bfloat16)
    k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[1:])

    def chain(q, k, v):
        for _ in range(calls):
            q = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        return q

    return seconds_per_call(chain, (q, k, v), calls, repeats)


def bench_prefill(repeats: int, rates: dict) -> list[dict]:
    rows = []
    for case in PREFILL_CASES:
        timings = {"ragged_prefill": functools.partial(time_prefill, case, ragged_prefill, repeats)}
        if len(set(case.rows)) == 1 and case.rows[0][1] == 0 and case.page_size == 64:
            timings["cuDNN dense"] = functools.partial(time_cudnn, case, repeats)
        for op, timing in timings.items():
            seconds, floor = timing(), case.flops / rates["matrix_flops"]
            rows.append(figure(op, case.name, seconds, floor, tflops=case.flops / seconds / 1e12))
    return rows


SAMPLE_CASES = (  # name, lanes, vocabulary, temperature, top_k, top_p, min_p
    ("greedy, 256 x 151936", 256, 151_936, 0.0, 2**30, 1.0, 0.0),
    ("temperature 1, 256 x 151936", 256, 151_936, 1.0, 2**30, 1.0, 0.0),
    ("top-p 0.95, 256 x 151936", 256, 151_936, 1.0, 2**30, 0.95, 0.0),
    ("top-k 50, top-p 0.9, 256 x 151936", 256, 151_936, 1.0, 50, 0.9, 0.0),
    ("min-p 0.05, 256 x 151936", 256, 151_936, 1.0, 2**30, 1.0, 0.05),
    ("top-p 0.95, 256 x 151936, flat", 256, 151_936, 8.0, 2**30, 0.95, 0.0),
    ("top-k 50, top-p 0.95, 256 x 151936, flat", 256, 151_936, 8.0, 50, 0.95, 0.0),  # as of random weights
    ("greedy, 1 x 151936", 1, 151_936, 0.0, 2**30, 1.0, 0.0),
    ("top-p 0.95, 1 x 151936", 1, 151_936, 1.0, 2**30, 0.95, 0.0),
    ("top-k 50, top-p 0.95, 1 x 151936, flat", 1, 151_936, 8.0, 50, 0.95, 0.0),
)


def sample_inputs(lanes: int, vocab_size: int, options: Sequence[float]) -> tuple[list, list[jax.Array]]:
    """(temperature, top_k, top_p, min_p) of `sample`, each [lanes], and sets of logits."""
    sets = max(1, -(-2 * L2_BYTES // (lanes * vocab_size * 4)))
    logits = [
        3.0 * jax.random.normal(jax.random.key(i), (lanes, vocab_size), jnp.float32) for i in range(sets)
    ]
    dtypes = (jnp.float32, jnp.int32, jnp.float32, jnp.float32)
    return [jnp.full((lanes,), x, dtype) for x, dtype in zip(options, dtypes, strict=True)], logits


def time_sample(lanes: int, vocab_size: int, options: Sequence[float], draw: Callable, repeats: int) -> float:
    """Seconds of one call of `draw(logits, temperature, top_k, top_p, min_p, seeds, positions)`."""
    values, logits = sample_inputs(lanes, vocab_size, options)
    calls = max(len(logits), 8)

    def chain(seeds, *logits):
        positions = seeds
        for i in range(calls):
            positions = draw(logits[i % len(logits)], *values, seeds, positions)
        return positions

    operands = (jnp.arange(lanes, dtype=jnp.int32), *logits)
    return seconds_per_call(chain, operands, calls, repeats)


def bench_sample(repeats: int, rates: dict) -> list[dict]:
    """The floor is one read of the logits."""
    rows = []
    for name, lanes, vocab_size, *options in SAMPLE_CASES:
        seconds = time_sample(lanes, vocab_size, options, sample, repeats)
        floor = lanes * vocab_size * 4 / rates["read_bytes_per_s"]
        rows.append(figure("sample", name, seconds, floor))
    return rows


def bench_logprobs(repeats: int, rates: dict) -> list[dict]:
    """Beside the kernel, the reference by XLA; the floor is one read of the logits."""
    lanes, vocab_size = 256, 151_936
    logits = 3.0 * jax.random.normal(jax.random.key(0), (lanes, vocab_size), jnp.float32)
    tokens = jnp.arange(lanes, dtype=jnp.int32)
    rows = []
    for top_n, (op, implementation) in itertools.product(
        (5, 20), (("log_probabilities", None), ("the same by XLA", "reference"))
    ):

        def chain(tokens, logits, top_n=top_n, implementation=implementation):
            for _ in range(4):
                found = log_probabilities(
                    logits, tokens, jnp.ones(lanes), top_n, implementation=implementation
                )
                tokens = found.top_ids[:, 0]
            return tokens

        seconds = seconds_per_call(chain, (tokens, logits), 4, repeats)
        floor = lanes * vocab_size * 4 / rates["read_bytes_per_s"]
        rows.append(figure(op, f"top {top_n}, {lanes} x {vocab_size}", seconds, floor))
    return rows


BENCHES: dict[str, Callable[[int, dict], Iterable[dict]]] = {
    "decode": bench_decode,
    "prefill": bench_prefill,
    "sample": bench_sample,
    "logprobs": bench_logprobs,
    "linear": bench_linear,
}


def measure(ops: Sequence[str], repeats: int) -> dict:
    """Times the operations (none named: all), printing each figure as it comes.

    Returns:
        {"device", "jax", "rates": {"read_bytes_per_s", "matrix_flops"}, "rows": [{"op", "case", "us", ...}]}.

    Raises:
        RuntimeError: there is no GPU, and a figure of another device would say nothing about the kernels.
    """
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise RuntimeError(f"the kernels run on a GPU, and the device is a {device.platform}")
    rates = {"read_bytes_per_s": read_bandwidth(repeats), "matrix_flops": matrix_rate(repeats)}
    print(f"{device.device_kind}: reads {rates['read_bytes_per_s'] / 1e12:.2f} TB/s, ", end="")
    print(f"multiplies {rates['matrix_flops'] / 1e12:.0f} TFLOP/s (bfloat16)")
    rows = []
    for op in ops or BENCHES:
        for row in BENCHES[op](repeats, rates):
            note = f"   target {row['target']:.0%}" if row.get("target") else ""
            note += f"   {row['tflops']:.0f} TFLOP/s" if "tflops" in row else ""
            print(
                f"{row['op']:15} {row['case']:40} {row['us']:9.1f} us   floor {row['floor_us']:9.1f} us"
                f"   {row['of_floor']:6.1%}{note}",
                flush=True,
            )
            rows.append(row)
    return {"device": device.device_kind, "jax": jax.__version__, "rates": rates, "rows": rows}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels_pallas.bench", description=__doc__)
    parser.add_argument("ops", nargs="*", choices=[[], *BENCHES], help="operations to time (default: all)")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    try:
        print(json.dumps(measure(args.ops, args.repeats)))
    except RuntimeError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
