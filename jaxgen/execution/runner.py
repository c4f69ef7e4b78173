"""The device half: owns weights, KV pages and lane state, and launches compiled steps for plans."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgen.checkpoint.types import Checkpoint
from jaxgen.execution import kv_cache, lanes, layout
from jaxgen.execution.batch import RowMirror, needs_of, pack_decode, pack_prefill, wants_input_logprobs
from jaxgen.execution.compile import StepTable
from jaxgen.execution.kv_cache import KVShape
from jaxgen.execution.programs import (
    COPY,
    DECODE,
    NEWEST,
    PREFILL,
    REFILL,
    Programs,
    Shapes,
    StepKey,
    array_bytes,
    most_triton_tokens,
    shard_bytes,
    temporary_bytes,
)
from jaxgen.execution.runner_config import RunnerConfig
from jaxgen.execution.sampler import Logprobs, Variant
from jaxgen.execution.step import StepOutput, StepSpec
from jaxgen.execution.step_cache import StepCache
from jaxgen.execution.step_choice import (
    EDIT_WIDTH,
    LOGPROB_WIDTH,
    StepChoice,
    launch_steps,
    power_of_two,
    startup_variants,
)
from jaxgen.execution.weights import Weights
from jaxgen.layers.attention import KV_PAGE_AXES
from jaxgen.models.config import ModelConfig
from jaxgen.models.registry import ARCHITECTURES, build_model
from jaxgen.scheduling.plan import Plan
from jaxgen.scheduling.request import Request
from jaxgen.sharding import abstract_params, sharding_for
from jaxgen.startup import StartupReport

logger = logging.getLogger("jaxgen")

# Provisional page count for reading the temporary memory of the largest steps off the compiler.
PROBE_PAGES = 64


@dataclasses.dataclass(frozen=True)
class Launched:
    """A step on its way: the plan it serves, what it leaves on the device, and what of that is wanted."""

    plan: Plan
    tokens: jax.Array  # [N] int32 of a prefill step in the plan's order; [K, R] of a decode launch
    rows: np.ndarray | None  # of the lanes of a decode launch
    output: StepOutput
    top_logprobs: int
    wants_logprobs: bool
    wants_input_logprobs: bool
    wants_hidden: bool


@dataclasses.dataclass(frozen=True)
class StepResult:
    """The host's view of a finished step; arrays are NumPy, in the plan's order (chunks, then lanes).

    A decode launch of several steps has rows for all lanes step by step.
    """

    tokens: list[int]
    logprobs: Logprobs | None
    input_logprobs: Logprobs | None
    hidden: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class DecodeUpload:
    """What a decode step needs from the host; kept while the same lanes decode."""

    key: StepKey
    rows: np.ndarray  # rows of the lanes in the lane state
    packed: jax.Array | None
    wants_logprobs: bool
    wants_hidden: bool


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
        cache_directory: Path | None = None,
    ):
        """`cache_directory`: where compiled steps are kept for the next start; None keeps none."""
        self.config, self.model_config, self.mesh = config, model_config, mesh
        self.device = mesh.devices.flat[0]
        self._replicated = sharding_for(mesh, ())
        self._kv_sharding = sharding_for(mesh, KV_PAGE_AXES)
        with report.phase("build model"):
            self._programs, params = self._build_model(cache_directory)
            weights = Weights(params, config.param_dtype, config.quantization, self.device.platform)
        self.weight_bytes = sum(map(shard_bytes, params.values()))
        platform = self.device.platform
        self.decode_steps = launch_steps(config, self.weight_bytes, platform)
        variants = startup_variants(platform, model_config.vocab_size)
        self._choice = StepChoice(config, variants, self.decode_steps, model_config.vocab_size)
        self._cache = self._open_cache(cache_directory)
        self._uploads: dict[int, jax.Array] = {}
        self._steps: StepTable[StepKey] = StepTable(self._build_step, strict=config.strict_compile)
        with report.phase("plan memory"):
            self._shapes = self._plan_shapes()
        self.mirror = RowMirror(config.rows, self._shapes.max_pages, *self._shapes.widths)
        with report.phase("load weights"):
            self.weights = self._load(checkpoint, weights, report)
        with report.phase("allocate KV cache"):
            self.kv = self.kv_shape.allocate(self._kv_sharding)
            self.state = jax.jit(
                lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self._shapes.state),
                out_shardings=self._replicated,
            )()
        with report.phase("compile steps"):
            self._warm_up(report)
        self._steps.seal()
        self._decode: DecodeUpload | None = None

    # ---- start-up

    def _build_model(self, cache_directory: Path | None) -> tuple[Programs, dict[str, jax.ShapeDtypeStruct]]:
        """(steps of the model, parameter path -> shape, dtype and sharding), without allocating anything."""
        config, dtype = self.model_config, self.config.param_dtype
        model = nnx.eval_shape(
            lambda: build_model(
                config,
                dtype,
                mesh=self.mesh,
                backends=self.config.attention,
                quantization=self.config.quantization,
            )
        )
        params = abstract_params(model, self.mesh)
        graphdef, state = nnx.split(model)
        spec = StepSpec(
            graphdef=graphdef,
            treedef=jax.tree.structure(state),
            logits_sharding=self._replicated if self.mesh.size > 1 else None,
            page_size=self.config.page_size,
            return_hidden=self.config.return_hidden,
            original_logprobs=self.config.original_logprobs,
            skips=self.device.platform == "cpu",
        )
        programs = Programs(
            spec=spec,
            weights=tuple(params.values()),
            replicated=self._replicated,
            kv_sharding=self._kv_sharding,
            precise=jnp.dtype(dtype) == jnp.float32,
            triton_tokens=most_triton_tokens(self.config.quantization),
            tuning_directory=None if cache_directory is None else cache_directory / "autotune",
        )
        return programs, params

    def _open_cache(self, directory: Path | None) -> StepCache | None:
        if directory is None:
            return None
        config = self.config
        computed_from = (
            self.model_config,
            config.page_size,
            jnp.dtype(config.param_dtype),
            jnp.dtype(config.kv_dtype),
            config.quantization,
            config.attention,
            config.return_hidden,
            config.original_logprobs,
            tuple(self.mesh.shape.items()),
        )
        return StepCache(directory, list(self.mesh.devices.flat), *computed_from)

    def _build_step(self, key: StepKey) -> jax.stages.Compiled:
        name = f"{key!r} {self._shapes!r}"
        step = self._cache.load(name) if self._cache is not None else None
        if step is None:
            step = self._programs.compile(key, self._shapes)
            if self._cache is not None:
                self._cache.save(name, step)
        return step

    def _load(self, checkpoint: Checkpoint, weights: Weights, report: StartupReport) -> tuple[jax.Array, ...]:
        table = ARCHITECTURES[self.model_config.architecture].weight_table(self.model_config)
        total = sum(map(array_bytes, weights.read.values()))
        with report.progress("Loading weights", total, unit="B") as advance:
            return weights.load(checkpoint, table, advance)

    def _shapes_of(self, kv: KVShape, widths: tuple[int, int] = (EDIT_WIDTH, LOGPROB_WIDTH)) -> Shapes:
        config = self.config
        max_pages = min(-(-config.context_length // config.page_size), kv.num_pages)
        most_steps = max(steps for _, steps in self.decode_steps)
        state = lanes.lane_state_shapes(
            config.rows, max_pages, self.model_config.vocab_size, *widths, most_steps
        )
        return Shapes(
            kv,
            jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=self._replicated), state),
        )

    def _plan_shapes(self) -> Shapes:
        """The shapes of the whole engine, with as many KV pages as memory allows and the user wants."""
        config = self.config
        probe = KVShape.of(self.model_config, PROBE_PAGES, config.page_size, config.kv_dtype)
        limit = kv_cache.device_memory_bytes(self.device)
        if limit is None:
            budget = kv_cache.cpu_kv_budget()
        else:
            # Enough pages for one request at full context, so that every shape but the pool is the real one.
            self._shapes = self._shapes_of(
                dataclasses.replace(probe, num_pages=-(-config.context_length // config.page_size))
            )
            temp, state = self._largest_temporary(), lanes.lane_state_bytes(self._shapes.state)
            per_device = kv_cache.gpu_kv_budget(
                limit=limit,
                weights=self.weight_bytes,
                lane_state=state,
                temp=temp,
                fraction=config.mem_fraction_static,
            )
            logger.info(
                "Memory per device: %.2f GiB usable, weights %.2f, largest step %.2f, lane state %.2f, KV %.2f",
                *(x / 2**30 for x in (limit, self.weight_bytes, temp, state, max(0, per_device))),
            )
            budget = max(0, per_device) * self.mesh.shape["tensor"]
        pages = kv_cache.pages_within(
            budget, probe, max_total_tokens=config.max_total_tokens, weight_bytes=self.weight_bytes
        )
        return self._shapes_of(dataclasses.replace(probe, num_pages=pages))

    def _largest_temporary(self) -> int:
        """Bytes that the largest step needs beside its arguments, read off compiled steps."""
        keys = self._choice.largest_keys(self._shapes.widths)
        self._steps.warm_up(keys, lambda key: None)
        largest = max(temporary_bytes(self._steps.get(key)) for key in keys)
        self._steps.clear()
        return largest

    def _warm_up(self, report: StartupReport) -> None:
        keys = self._choice.startup_keys(self._shapes.widths)
        started = time.perf_counter()
        with report.progress("Compiling steps", len(keys), unit="step") as advance:

            def done(key: StepKey) -> None:
                report.add(f"step {key}", time.perf_counter() - started, nested=True)
                advance(1)

            self._steps.warm_up(keys, done)
        if self._cache is not None:
            self._cache.trim()
        if self.device.platform != "cpu":
            for key in keys:
                self._run_empty(key)
            jax.block_until_ready(self.state.token)

    def _run_empty(self, key: StepKey) -> None:
        """Runs a compiled step on padding only, so that the first request finds it loaded and captured."""
        if key.kind in (NEWEST, REFILL):
            return  # small, and run with every decode step
        if key.kind == COPY:
            self._copy_pages([(0, self.kv_shape.num_pages)])  # to a page out of range: dropped
            return
        assert key.variant is not None
        if key.kind == DECODE:
            packed = np.full(layout.decode_layout(key.size).size, self.config.rows, np.int32)
            self._run(key, self._upload(key.size, packed))
        else:
            nothing = Plan(kind=PREFILL)
            self._run(key, *pack_prefill(nothing, self.mirror, [], key.size, key.rows, key.variant))

    # ---- compiled steps

    def _run(self, key: StepKey, *uploads: np.ndarray | jax.Array) -> StepOutput:
        """Launches a decode or prefill step; KV pages and lane state are replaced by the step's."""
        arrays = [u if isinstance(u, jax.Array) else self._put(u) for u in uploads]
        output, self.kv, self.state = self._steps.get(key)(self.weights, self.kv, self.state, *arrays)
        return output

    @property
    def kv_shape(self) -> KVShape:
        return self._shapes.kv

    @property
    def compile_count(self) -> int:
        """Steps compiled while serving, since start-up."""
        return self._steps.miss_count

    def require_compiled(self, request: Request) -> None:
        """Raises ValueError if strict_compile forbids what serving `request` would have to compile.

        Called with every request before it is submitted: found out in the middle of a step, the same thing
        would end the engine.
        """
        if self.config.strict_compile:
            self._choice.require_compiled(request, self._shapes.widths)

    # ---- serving

    def launch(self, plan: Plan) -> Launched:
        """Starts the step that serves `plan` and the copy of its results to the host; does not wait."""
        if plan.copies:
            self._copy_pages(plan.copies)
        launched = self._launch_decode(plan) if plan.kind == "decode" else self._launch_prefill(plan)
        output = launched.output
        launched.tokens.copy_to_host_async()
        wanted = [
            (launched.wants_logprobs, output.logprobs),
            (launched.wants_input_logprobs, output.input_logprobs),
            (launched.wants_hidden, output.hidden),
        ]
        for is_wanted, arrays in wanted:
            if is_wanted and arrays is not None:
                arrays.copy_to_host_async()
        return launched

    def read(self, launched: Launched) -> StepResult:
        """Waits for a launched step and returns what its plan asked for as host arrays."""
        output, plan = launched.output, launched.plan
        tokens = np.asarray(launched.tokens)
        if launched.rows is not None:
            tokens = tokens[: plan.steps, launched.rows].ravel()

        def host(wanted: bool, array: jax.Array | None) -> np.ndarray | None:
            if not wanted or array is None:
                return None
            found = np.asarray(array)
            if found.ndim == 2:
                return found
            lanes = found[:, : len(plan.lanes)]  # [K, B, ...]
            return lanes.reshape(-1, found.shape[-1])

        def logprobs(wanted: bool, array: jax.Array | None) -> Logprobs | None:
            packed = host(wanted, array)
            return None if packed is None else Logprobs.unpacked(packed, launched.top_logprobs)

        return StepResult(
            tokens=tokens.tolist(),
            logprobs=logprobs(launched.wants_logprobs, output.logprobs),
            input_logprobs=logprobs(launched.wants_input_logprobs, output.input_logprobs),
            hidden=host(launched.wants_hidden, output.hidden),
        )

    def wait(self) -> None:
        """Waits until the device has done everything launched."""
        jax.block_until_ready((self.state, self.kv))

    def _launch_decode(self, plan: Plan) -> Launched:
        decode = self._decode
        if decode is None or plan.membership_changed:
            variant = self._variant(plan.lanes)
            decode = DecodeUpload(
                key=self._choice.decode(len(plan.lanes), plan.steps, variant, self._shapes.widths),
                rows=np.array([request.row for request in plan.lanes], np.int32),
                packed=None,
                wants_logprobs=any(r.return_logprob for r in plan.lanes),
                wants_hidden=self.config.return_hidden and any(r.return_hidden for r in plan.lanes),
            )
        if decode.packed is None or plan.page_updates:
            # Without news the upload of the step before serves again: its page updates are in place already.
            self.mirror.assign_pages(plan.page_updates)
            packed = pack_decode(plan, decode.key.size, self.config.rows)
            decode = dataclasses.replace(decode, packed=self._upload(decode.key.size, packed))
        self._decode = decode
        output = self._run(decode.key, decode.packed)
        tokens = self._steps.get(self._choice.newest_key)(self.state.drawn)
        top = _top_logprobs(decode.key)
        return Launched(
            plan, tokens, decode.rows, output, top, decode.wants_logprobs, False, decode.wants_hidden
        )

    def _launch_prefill(self, plan: Plan) -> Launched:
        self._decode = None
        self._widen(plan)
        fresh = [self.mirror.claim(chunk.request) for chunk in plan.chunks]
        self.mirror.assign_pages(plan.page_updates)
        requests = [chunk.request for chunk in plan.chunks] + list(plan.lanes)
        variant = self._variant(requests)
        key = self._choice.prefill(plan.num_tokens, len(requests), variant, self._shapes.widths)
        assert key.variant is not None
        uploads = pack_prefill(plan, self.mirror, fresh, key.size, key.rows, key.variant)
        output = self._run(key, *uploads)
        return Launched(
            plan,
            output.tokens,
            None,
            output,
            _top_logprobs(key),
            wants_logprobs=any(r.return_logprob for r in requests),
            wants_input_logprobs=any(map(wants_input_logprobs, plan.chunks)),
            wants_hidden=self.config.return_hidden and any(r.return_hidden for r in requests),
        )

    def _upload(self, lanes: int, packed: np.ndarray) -> jax.Array:
        """The packed array of a decode step on the device, at one address for each number of lanes."""
        buffer = self._uploads.pop(lanes, None)
        if buffer is None:
            buffer = self._put(packed)
        array = self._steps.get(self._choice.refill_key(lanes))(buffer, self._put(packed))
        self._uploads[lanes] = array
        return array

    def _copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        key = self._choice.copy_key
        for first in range(0, len(copies), key.size):
            part = np.array(copies[first : first + key.size], np.int32)
            packed = np.full((2, key.size), self.kv_shape.num_pages, np.int32)
            packed[0] = 0
            packed[:, : len(part)] = part.T
            self.kv = self._steps.get(key)(self.kv, self._put(packed))

    def _put(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, self._replicated)

    def _variant(self, requests: Sequence[Request]) -> Variant:
        return self._choice.variant(self.mirror.needs[request.row] for request in requests)

    def _widen(self, plan: Plan) -> None:
        """Grows the sparse fields of the lane state when a request needs more than they hold."""
        needs = [
            needs_of(chunk.request)
            for chunk in plan.chunks
            if chunk.request.return_logprob
            or chunk.request.params.logit_bias
            or chunk.request.params.min_new_tokens
        ]
        edit, ids = self._shapes.widths
        wanted = (
            max((n.edit_width for n in needs), default=0),
            max((n.logprob_width for n in needs), default=0),
        )
        if wanted[0] <= edit and wanted[1] <= ids:
            return
        widths = max(edit, power_of_two(wanted[0])), max(ids, power_of_two(wanted[1]))
        self.mirror.widen(*widths)
        self._shapes = self._shapes_of(self.kv_shape, widths)

        def pad(field: jax.Array, spec: jax.ShapeDtypeStruct, fill: int) -> jax.Array:
            extra = spec.shape[1] - field.shape[1]
            padded = jnp.pad(field, ((0, 0), (0, extra)), constant_values=fill)
            return jax.device_put(padded, self._replicated)

        shapes, state = self._shapes.state, self.state
        self.state = dataclasses.replace(
            state,
            edit_ids=pad(state.edit_ids, shapes.edit_ids, -1),
            edit_values=pad(state.edit_values, shapes.edit_values, 0),
            edit_until=pad(state.edit_until, shapes.edit_until, 0),
            logprob_ids=pad(state.logprob_ids, shapes.logprob_ids, -1),
        )

    def shutdown(self) -> None:
        """Returns every device buffer the runner owns."""
        self._decode = None
        self._steps.clear()
        for array in jax.tree.leaves((self.weights, self.kv, self.state, self._uploads)):
            array.delete()
        self._uploads = {}
        self.weights, self.kv, self.state = (), (), None


def _top_logprobs(key: StepKey) -> int:
    return 0 if key.variant is None else key.variant.top_logprobs
