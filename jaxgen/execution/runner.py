"""The device half: owns weights, KV pages and lane state, and launches compiled steps for plans."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgen.checkpoint.resolve import Checkpoint
from jaxgen.execution import kv_cache, lanes, layout
from jaxgen.execution.batch import (
    RowMirror,
    needs_of,
    pack_decode,
    pack_prefill,
    wants_input_logprobs,
)
from jaxgen.execution.compile import StepTable
from jaxgen.execution.sampler import GREEDY, SAMPLE, Logprobs, Variant
from jaxgen.execution.step import StepOutput, StepSpec, copy_step, decode_step, prefill_step
from jaxgen.models.config import ModelConfig
from jaxgen.models.registry import ARCHITECTURES, build_model
from jaxgen.scheduling.buckets import pick
from jaxgen.scheduling.plan import Plan
from jaxgen.sharding import abstract_params, sharding_for
from jaxgen.startup import StartupReport

logger = logging.getLogger("jaxgen")

# Widths a full step is compiled for at start-up; larger requests widen them at the price of a compile.
EDIT_WIDTH = 256
LOGPROB_WIDTH = 16
TOP_LOGPROBS = 20
# Provisional page count for reading the temporary memory of the largest steps off the compiler.
PROBE_PAGES = 64


@dataclasses.dataclass(frozen=True)
class RunnerConfig:
    """Resolved once by the engine, then frozen. Sizes in tokens unless said."""

    page_size: int
    context_length: int
    rows: int  # R: rows of lane state, the most requests that can run at once
    decode_buckets: tuple[int, ...]  # lanes
    prefill_buckets: tuple[tuple[int, int], ...]  # (packed tokens, rows)
    param_dtype: Any
    kv_dtype: Any
    max_total_tokens: int | None
    mem_fraction_static: float | None
    return_hidden: bool
    original_logprobs: bool
    precompile_decode: bool
    precompile_prefill: bool
    strict_compile: bool


@dataclasses.dataclass(frozen=True)
class Launched:
    """A step on its way: the plan it serves and its outputs on the device."""

    plan: Plan
    output: StepOutput
    wants_logprobs: bool
    wants_input_logprobs: bool
    wants_hidden: bool


@dataclasses.dataclass(frozen=True)
class StepResult:
    """The host's view of a finished step; arrays are NumPy, in the plan's order (chunks, then lanes)."""

    tokens: list[int]
    logprobs: Logprobs | None
    input_logprobs: Logprobs | None
    hidden: np.ndarray | None


class Runner:
    """Loads a checkpoint onto a mesh, compiles the start-up buckets, then launches plans.

    Raises RuntimeError when memory does not suffice, ValueError for a configuration the model cannot serve.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model_config: ModelConfig,
        config: RunnerConfig,
        mesh: jax.sharding.Mesh,
        report: StartupReport,
    ):
        self.config, self.model_config, self.mesh = config, model_config, mesh
        self.device = mesh.devices.flat[0]
        self._replicated = sharding_for(mesh, ())
        self._kv_sharding = sharding_for(mesh, (None, "kv_heads", None, None))
        self._lane_variants = self._startup_variants()
        with report.phase("build model"):
            self._spec, params = self._build_model()
        self._abstract_weights = tuple(params.values())
        self.weight_bytes = sum(_shard_bytes(w) for w in self._abstract_weights)
        self._steps = StepTable(self._build_step, strict=config.strict_compile)
        with report.phase("plan memory"):
            self.kv_shape = self._plan_kv()
        self.max_pages = min(-(-config.context_length // config.page_size), self.kv_shape.num_pages)
        self._state_shapes = self._lane_shapes(EDIT_WIDTH, LOGPROB_WIDTH)
        self.mirror = RowMirror(config.rows, self.max_pages, EDIT_WIDTH, LOGPROB_WIDTH)
        with report.phase("load weights"):
            self.weights = self._load(checkpoint, params, report)
        with report.phase("allocate KV cache"):
            self.kv = self.kv_shape.allocate(self._kv_sharding)
            self.state = jax.jit(
                lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self._state_shapes),
                out_shardings=self._replicated,
            )()
        with report.phase("compile steps"):
            self._warm_up(report)
        self._steps.seal()
        self._decode_cache: tuple[Variant, int, jax.Array] | None = None

    # ---- start-up

    def _build_model(self):
        """(step spec, parameter path -> shape, dtype and sharding), without allocating anything."""
        config = self.model_config
        model = nnx.eval_shape(lambda: build_model(config, self.config.param_dtype, mesh=self.mesh))
        params = abstract_params(model, self.mesh)
        graphdef, state = nnx.split(model)
        spec = StepSpec(
            graphdef=graphdef,
            treedef=jax.tree.structure(state),
            logits_sharding=self._replicated if self.mesh.size > 1 else None,
            page_size=self.config.page_size,
            return_hidden=self.config.return_hidden,
            original_logprobs=self.config.original_logprobs,
        )
        return spec, params

    def _load(
        self, checkpoint: Checkpoint, params: dict[str, jax.ShapeDtypeStruct], report: StartupReport
    ) -> tuple[jax.Array, ...]:
        table = ARCHITECTURES[self.model_config.architecture].weight_table(self.model_config)
        total = sum(_bytes(w) for w in params.values())
        with report.progress("Loading weights", total, unit="B") as advance:
            loaded = checkpoint.load(params, table, advance)
        return tuple(loaded[path] for path in params)

    def _lane_shapes(self, edit_width: int, logprob_width: int) -> lanes.LaneState:
        shapes = lanes.lane_state_shapes(
            self.config.rows, self.max_pages, self.model_config.vocab_size, edit_width, logprob_width
        )
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=self._replicated), shapes
        )

    def _plan_kv(self) -> kv_cache.KVShape:
        """How many pages the pool gets: the least of what memory allows and what the user asked for."""
        config = self.config
        probe = kv_cache.KVShape.of(self.model_config, PROBE_PAGES, config.page_size, config.kv_dtype)
        tensor = self.mesh.shape["tensor"]
        limit = kv_cache.device_memory_bytes(self.device)
        if limit is None:
            pages = kv_cache.cpu_kv_budget() // probe.page_bytes
        else:
            temp, state = self._probe_memory(probe)
            budget = kv_cache.gpu_kv_budget(
                limit=limit,
                weights=self.weight_bytes,
                lane_state=state,
                temp=temp,
                fraction=config.mem_fraction_static,
            )
            pages = max(0, budget * tensor // probe.page_bytes)
            logger.info(
                "Memory per device: %.2f GiB usable, weights %.2f, largest step %.2f, lane state %.2f, KV %.2f",
                *(x / 2**30 for x in (limit, self.weight_bytes, temp, state, max(0, budget))),
            )
        pages = kv_cache.round_pages(pages)
        if config.max_total_tokens is not None:
            wanted = config.max_total_tokens // config.page_size
            if wanted < 2:
                raise ValueError(
                    f"max_total_tokens={config.max_total_tokens} is too small for one request: it must be at "
                    f"least two pages of {config.page_size} tokens"
                )
            if wanted > pages:
                logger.warning(
                    "max_total_tokens=%d does not fit in memory; lowered to %d",
                    config.max_total_tokens,
                    pages * config.page_size,
                )
            pages = min(pages, wanted)
        if pages < 2:
            raise RuntimeError(
                f"Not enough memory for the KV cache: {pages} pages of {config.page_size} tokens "
                f"({probe.page_bytes / 2**20:.2f} MiB each) fit beside {self.weight_bytes / 2**30:.2f} GiB of "
                "weights. Lower max_running_requests or chunked_prefill_size, raise mem_fraction_static or "
                "max_total_tokens, or use more devices (tp_size)."
            )
        return dataclasses.replace(probe, num_pages=int(pages))

    def _probe_memory(self, probe: kv_cache.KVShape) -> tuple[int, int]:
        """(largest step's temporary bytes, lane state bytes), read off compiled steps over a tiny pool."""
        self.kv_shape = probe
        self.max_pages = -(-self.config.context_length // self.config.page_size)
        self._state_shapes = self._lane_shapes(EDIT_WIDTH, LOGPROB_WIDTH)
        variant = self._lane_variants[-1]
        keys = [self._prefill_key(self.config.prefill_buckets[-1], variant)]
        if self.config.decode_buckets:
            keys.append(self._decode_key(self.config.decode_buckets[-1], variant))
        self._steps.warm_up(keys, lambda key: None)
        temp = max(_temp_bytes(self._steps.get(key)) for key in keys)
        self._steps.clear()
        return temp, lanes.lane_state_bytes(self._state_shapes)

    def _startup_variants(self) -> tuple[Variant, ...]:
        """The variants compiled per bucket, least first.

        On a CPU one full step does it all: what no row wants is skipped at run time at no cost. On a GPU a
        run-time branch would break the command buffer, so the common cases get programs of their own.
        """
        full = Variant(True, True, min(TOP_LOGPROBS, self.model_config.vocab_size))
        return (full,) if self.device.platform == "cpu" else (GREEDY, SAMPLE, full)

    def _warm_up(self, report: StartupReport) -> None:
        config = self.config
        keys: list[tuple] = [self._copy_key()]
        for variant in self._lane_variants:
            if config.precompile_prefill:
                keys += [self._prefill_key(bucket, variant) for bucket in config.prefill_buckets]
            if config.precompile_decode:
                keys += [self._decode_key(bucket, variant) for bucket in config.decode_buckets]
        # The largest first: they take longest.
        keys.sort(key=lambda key: -key[1])
        started = time.perf_counter()
        with report.progress("Compiling steps", len(keys), unit="step") as advance:

            def done(key: tuple) -> None:
                report.add(f"  step {key}", time.perf_counter() - started, nested=True)
                advance(1)

            self._steps.warm_up(keys, done)
        if self.device.platform != "cpu":
            for key in keys:
                self._run_empty(key)
            jax.block_until_ready(self.state.token)

    def _run_empty(self, key) -> None:
        """Runs a compiled step on padding only, so that the first request finds it loaded and captured."""
        nobody = self.config.rows
        if key[0] == "copy":
            packed = np.full((2, key[1]), self.kv_shape.num_pages, np.int32)
            packed[0] = 0
            self.kv = self._steps.get(key)(self.kv, self._put(packed))
        elif key[0] == "decode":
            packed = np.full(layout.decode_layout(key[1]).size, nobody, np.int32)
            _, self.kv, self.state = self._steps.get(key)(
                self.weights, self.kv, self.state, self._put(packed)
            )
        else:
            _, tokens, rows, variant, *_ = key
            plan = Plan(kind="prefill", chunks=[], lanes=[], page_updates=[], copies=[])
            uploads = pack_prefill(plan, self.mirror, [], tokens, rows, variant)
            _, self.kv, self.state = self._steps.get(key)(
                self.weights, self.kv, self.state, *map(self._put, uploads)
            )

    # ---- compiled steps

    def _decode_key(self, bucket: int, variant: Variant):
        return ("decode", bucket, variant, *self._widths())

    def _prefill_key(self, bucket: tuple[int, int], variant: Variant):
        return ("prefill", *bucket, variant, *self._widths())

    def _copy_key(self):
        return ("copy", self.config.prefill_buckets[-1][1])

    def _widths(self) -> tuple[int, int]:
        return self._state_shapes.edit_width, self._state_shapes.logprob_width

    def _build_step(self, key) -> Callable:
        """Lowers and compiles the step of `key` for the current shapes.

        float32 parameters mean float32 arithmetic: on a GPU the default would be tf32.
        """
        precise = jnp.dtype(self.config.param_dtype) == jnp.float32
        with jax.default_matmul_precision("highest" if precise else "default"):
            return self._lower(key).compile()

    def _lower(self, key) -> jax.stages.Lowered:
        kv, put = self.kv_shape.abstract(self._kv_sharding), self._replicated

        def packed(size, dtype=jnp.int32):
            return jax.ShapeDtypeStruct(size if isinstance(size, tuple) else (size,), dtype, sharding=put)

        kv_out = (self._kv_sharding,) * len(kv)
        if key[0] == "copy":
            jitted = jax.jit(copy_step, donate_argnums=(0,), out_shardings=kv_out)
            return jitted.lower(kv, packed((2, key[1])))
        if key[0] == "decode":
            _, bucket, variant, *_ = key
            function = decode_step(self._spec, bucket, variant)
            uploads = [packed(layout.decode_layout(bucket).size)]
        else:
            _, tokens, rows, variant, *widths = key
            function = prefill_step(self._spec, tokens, rows, variant)
            ints, floats = layout.prefill_layouts(tokens, rows, self.max_pages, *widths, full=variant.full)
            uploads = [packed(ints.size), packed(floats.size, jnp.float32)]
        state_out = jax.tree.map(lambda _: put, self._state_shapes)
        jitted = jax.jit(function, donate_argnums=(1, 2), out_shardings=(put, kv_out, state_out))
        return jitted.lower(self._abstract_weights, kv, self._state_shapes, *uploads)

    @property
    def compile_count(self) -> int:
        """Steps compiled while serving, since start-up."""
        return self._steps.miss_count

    # ---- serving

    def launch(self, plan: Plan) -> Launched:
        """Starts the step that serves `plan` and the copy of its results to the host; does not wait."""
        if plan.copies:
            self._copy_pages(plan.copies)
        launched = self._launch_decode(plan) if plan.kind == "decode" else self._launch_prefill(plan)
        output = launched.output
        output.tokens.copy_to_host_async()
        wanted = [
            (launched.wants_logprobs, output.logprobs),
            (launched.wants_input_logprobs, output.input_logprobs),
            (launched.wants_hidden, output.hidden),
        ]
        for is_wanted, arrays in wanted:
            if is_wanted:
                for array in jax.tree.leaves(arrays):
                    array.copy_to_host_async()
        return launched

    def read(self, launched: Launched) -> StepResult:
        """Waits for a launched step and returns what its plan asked for as host arrays."""
        output = launched.output

        def host(wanted: bool, arrays):
            return jax.tree.map(np.asarray, arrays) if wanted else None

        return StepResult(
            tokens=np.asarray(output.tokens).tolist(),
            logprobs=host(launched.wants_logprobs, output.logprobs),
            input_logprobs=host(launched.wants_input_logprobs, output.input_logprobs),
            hidden=host(launched.wants_hidden, output.hidden),
        )

    def _launch_decode(self, plan: Plan) -> Launched:
        cached = self._decode_cache
        if cached is None or plan.membership_changed or plan.page_updates:
            self.mirror.assign_pages(plan.page_updates)
            if cached is None or plan.membership_changed:
                variant = self._variant(request.row for request in plan.lanes)
                bucket = self._decode_bucket(len(plan.lanes))
            else:
                variant, bucket, _ = cached
            packed = self._put(pack_decode(plan, bucket, self.config.rows))
            cached = self._decode_cache = (variant, bucket, packed)
        variant, bucket, packed = cached
        step = self._steps.get(self._decode_key(bucket, variant))
        output, self.kv, self.state = step(self.weights, self.kv, self.state, packed)
        return Launched(
            plan,
            output,
            wants_logprobs=variant.full and any(r.return_logprob for r in plan.lanes),
            wants_input_logprobs=False,
            wants_hidden=self.config.return_hidden and any(r.return_hidden for r in plan.lanes),
        )

    def _launch_prefill(self, plan: Plan) -> Launched:
        self._decode_cache = None
        self._widen(plan)
        fresh = [self.mirror.claim(chunk.request) for chunk in plan.chunks]
        self.mirror.assign_pages(plan.page_updates)
        requests = [chunk.request for chunk in plan.chunks] + list(plan.lanes)
        variant = self._variant(request.row for request in requests)
        tokens = sum(chunk.length for chunk in plan.chunks) + len(plan.lanes)
        bucket = self._prefill_bucket(tokens, len(requests))
        uploads = pack_prefill(plan, self.mirror, fresh, *bucket, variant)
        step = self._steps.get(self._prefill_key(bucket, variant))
        output, self.kv, self.state = step(self.weights, self.kv, self.state, *map(self._put, uploads))
        return Launched(
            plan,
            output,
            wants_logprobs=variant.full and any(r.return_logprob for r in requests),
            wants_input_logprobs=variant.full and any(map(wants_input_logprobs, plan.chunks)),
            wants_hidden=self.config.return_hidden and any(r.return_hidden for r in requests),
        )

    def _copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        key = self._copy_key()
        for first in range(0, len(copies), key[1]):
            part = np.array(copies[first : first + key[1]], np.int32)
            packed = np.full((2, key[1]), self.kv_shape.num_pages, np.int32)
            packed[0] = 0
            packed[:, : len(part)] = part.T
            self.kv = self._steps.get(key)(self.kv, self._put(packed))

    def _put(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, self._replicated)

    def _variant(self, rows) -> Variant:
        """The least start-up variant that covers the rows (a wider one where a row wants more)."""
        needs = [self.mirror.needs[row] for row in rows]
        sample = any(n.sample for n in needs)
        full = any(n.full for n in needs)
        top = max((n.top_logprobs for n in needs), default=0)
        for variant in self._lane_variants:
            if variant.sample >= sample and variant.full >= full and variant.top_logprobs >= top:
                return variant
        return Variant(
            sample=True, full=True, top_logprobs=min(_power_of_two(top), self.model_config.vocab_size)
        )

    def _decode_bucket(self, lanes_needed: int) -> int:
        buckets = self.config.decode_buckets
        if lanes_needed > buckets[-1]:
            return min(_power_of_two(lanes_needed), self.config.rows)
        return pick(buckets, lanes_needed)

    def _prefill_bucket(self, tokens: int, rows: int) -> tuple[int, int]:
        for bucket in self.config.prefill_buckets:
            if bucket[0] >= tokens and bucket[1] >= rows:
                return bucket
        return _power_of_two(tokens), max(_power_of_two(rows), self.config.prefill_buckets[-1][1])

    def _widen(self, plan: Plan) -> None:
        """Grows the sparse fields of the lane state when a request needs more than they hold."""
        needs = [
            needs_of(chunk.request)
            for chunk in plan.chunks
            if chunk.request.return_logprob
            or chunk.request.params.logit_bias
            or chunk.request.params.min_new_tokens
        ]
        edit, ids = self._widths()
        wanted = (
            max((n.edit_width for n in needs), default=0),
            max((n.logprob_width for n in needs), default=0),
        )
        if wanted[0] <= edit and wanted[1] <= ids:
            return
        widths = max(edit, _power_of_two(wanted[0])), max(ids, _power_of_two(wanted[1]))
        self.mirror.widen(*widths)
        self._state_shapes = self._lane_shapes(*widths)

        def pad(field: jax.Array, spec: jax.ShapeDtypeStruct, fill: int) -> jax.Array:
            extra = spec.shape[1] - field.shape[1]
            padded = jnp.pad(field, ((0, 0), (0, extra)), constant_values=fill)
            return jax.device_put(padded, self._replicated)

        shapes, state = self._state_shapes, self.state
        self.state = dataclasses.replace(
            state,
            edit_ids=pad(state.edit_ids, shapes.edit_ids, -1),
            edit_values=pad(state.edit_values, shapes.edit_values, 0),
            edit_until=pad(state.edit_until, shapes.edit_until, 0),
            logprob_ids=pad(state.logprob_ids, shapes.logprob_ids, -1),
        )

    def shutdown(self) -> None:
        """Returns every device buffer the runner owns."""
        self._decode_cache = None
        self._steps.clear()
        for array in jax.tree.leaves((self.weights, self.kv, self.state)):
            array.delete()
        self.weights, self.kv, self.state = (), (), None


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _bytes(spec) -> int:
    return int(np.prod(spec.shape)) * spec.dtype.itemsize


def _shard_bytes(spec: jax.ShapeDtypeStruct) -> int:
    """Bytes of one device's shard."""
    shape = spec.sharding.shard_shape(spec.shape)
    return int(np.prod(shape)) * spec.dtype.itemsize


def _temp_bytes(step) -> int:
    """Temporary and output memory of a compiled step, as the compiler planned it."""
    analysis = step.memory_analysis()
    return int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
