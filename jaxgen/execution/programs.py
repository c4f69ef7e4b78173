"""Compiled steps by key: what a key means, and how its step is lowered for the shapes in force."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.execution import layout
from jaxgen.execution.kv_cache import KVShape
from jaxgen.execution.lanes import LaneState
from jaxgen.execution.sampler import Variant
from jaxgen.execution.step import StepSpec, copy_step, decode_step, newest_tokens, prefill_step, refill
from jaxgen.layers.quantization import Scheme

logger = logging.getLogger("jaxgen")

COPY, DECODE, PREFILL, NEWEST, REFILL = "copy", "decode", "prefill", "newest", "refill"

NO_WIDTHS = (0, 0)

# XLA's Triton matrix products win for a few tokens; beyond, cuBLAS is as fast or faster (8B shapes on an H100:
# 189 us a layer against 205 at 64 tokens, 229 against 236 at 256) and is tuned in a tenth of the time.
MOST_TRITON_TOKENS = 16
# Only Triton widens 8-bit weights inside the product; before cuBLAS, a pass of its own writes them out.
# (An int8 layer of those shapes: 195 us against 292 at 128 tokens, 351 against 334 at 256.)
MOST_TRITON_TOKENS_WIDENED = 128


class StepKey(NamedTuple):
    """One compiled step.

    size: pages (copy), lanes (decode), packed tokens (prefill) or rows of the lane state (newest tokens). rows:
    prefill only. widths: of the sparse edits and of the requested log-probabilities in the lane state. Of decode
    alone are steps, tokens of each lane in one launch, and shared: a common prefix is read once. A refill has the
    fields of its step that its upload depends on.
    """

    kind: str
    size: int
    rows: int = 0
    variant: Variant | None = None
    widths: tuple[int, int] = NO_WIDTHS
    steps: int = 1
    shared: bool = False

    @property
    def refill(self) -> StepKey:
        """What brings the upload of this decode or prefill step to its place."""
        if self.kind == DECODE:
            return StepKey(REFILL, self.size)
        return self._replace(kind=REFILL)

    def upload(self, max_pages: int) -> layout.Layout:
        """The layout of the upload of a decode or prefill step, or of its refill."""
        if not self.rows:
            return layout.decode_layout(self.size)
        assert self.variant is not None
        return layout.prefill_layout(
            self.size, self.rows, max_pages, *self.widths, full=not self.variant.plain
        )

    def __str__(self) -> str:
        second = self.rows or self.steps
        shape = str(self.size) if not self.rows and second == 1 else f"{self.size} x {second}"
        variant = f" {tuple(self.variant)}" if self.variant else ""
        return f"{self.kind} {shape}{variant}{' shared' if self.shared else ''}"


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The abstract arguments that all steps share."""

    kv: KVShape
    state: LaneState  # jax.ShapeDtypeStruct leaves

    @property
    def max_pages(self) -> int:
        return self.state.page_table.shape[1]

    @property
    def widths(self) -> tuple[int, int]:
        return self.state.edit_width, self.state.logprob_width


@dataclasses.dataclass(frozen=True)
class Programs:
    """Lowers and compiles steps of one model on one mesh.

    weights: abstract leaves with shardings. precise: float32 arithmetic; on a GPU the default would be tf32.
    triton_tokens: up to how many tokens (lanes, packed tokens) a step's matrix products are Triton's.
    tuning_directory: where a GPU's choice of matrix-product kernels is kept; None keeps it nowhere.
    """

    spec: StepSpec
    weights: tuple[jax.ShapeDtypeStruct, ...]
    replicated: jax.sharding.NamedSharding
    kv_sharding: jax.sharding.NamedSharding
    precise: bool
    triton_tokens: int
    tuning_directory: Path | None
    _lowering: threading.Lock = dataclasses.field(default_factory=threading.Lock, repr=False, compare=False)

    def compile(self, key: StepKey, shapes: Shapes) -> jax.stages.Compiled:
        """Thread-safe. Lowering is Python, so threads take turns at it and the first compiles meanwhile."""
        with jax.default_matmul_precision("highest" if self.precise else "default"):
            with self._lowering:
                started = time.perf_counter()
                lowered = self._lower(key, shapes)
            lowered_at = time.perf_counter()
            compiled = lowered.compile(compiler_options=self._compiler_options(key))
        seconds = lowered_at - started, time.perf_counter() - lowered_at
        logger.debug("step %s: lowered in %.2f s, compiled in %.2f s", key, *seconds)
        return compiled

    def _compiler_options(self, key: StepKey) -> dict[str, Any]:
        if self.replicated.mesh.devices.flat[0].platform == "cpu":
            return {}
        options: dict[str, Any] = {"xla_gpu_enable_triton_gemm": key.size <= self.triton_tokens}
        if self.tuning_directory is not None:
            self.tuning_directory.mkdir(mode=0o700, exist_ok=True)
            options["xla_gpu_per_fusion_autotune_cache_dir"] = str(self.tuning_directory)
        return options

    def _lower(self, key: StepKey, shapes: Shapes) -> jax.stages.Lowered:
        kv = shapes.kv.abstract(self.kv_sharding)
        kv_out = (self.kv_sharding,) * len(kv)
        if key.kind == COPY:
            jitted = jax.jit(copy_step, donate_argnums=(0,), out_shardings=kv_out)
            return jitted.lower(kv, self._upload((2, key.size)))
        if key.kind == NEWEST:
            return jax.jit(newest_tokens, out_shardings=self.replicated).lower(shapes.state.drawn)
        packed = self._upload((key.upload(shapes.max_pages).size,))
        if key.kind == REFILL:
            jitted = jax.jit(refill, donate_argnums=(0,), keep_unused=True, out_shardings=self.replicated)
            return jitted.lower(packed, packed)
        assert key.variant is not None
        if key.kind == DECODE:
            function = decode_step(self.spec, key.size, key.steps, key.variant, key.shared)
        else:
            function = prefill_step(self.spec, key.size, key.rows, key.variant)
        state_out = jax.tree.map(lambda _: self.replicated, shapes.state)
        jitted = jax.jit(function, donate_argnums=(1, 2), out_shardings=(self.replicated, kv_out, state_out))
        return jitted.lower(self.weights, kv, shapes.state, packed)

    def _upload(self, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.replicated)


def most_triton_tokens(scheme: Scheme | None) -> int:
    """Tokens up to which matrix products over weights of this scheme are Triton's."""
    widened = scheme is not None and not scheme.activations
    return MOST_TRITON_TOKENS_WIDENED if widened else MOST_TRITON_TOKENS


def temporary_bytes(step: jax.stages.Compiled) -> int:
    """Temporary and fresh output memory of a compiled step per device, as the compiler planned it."""
    analysis: Any = step.memory_analysis()
    return int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes)


def array_bytes(spec: jax.ShapeDtypeStruct) -> int:
    return int(np.prod(spec.shape)) * spec.dtype.itemsize


def shard_bytes(spec: jax.ShapeDtypeStruct) -> int:
    """Bytes of one device's shard."""
    return int(np.prod(spec.sharding.shard_shape(spec.shape))) * spec.dtype.itemsize
