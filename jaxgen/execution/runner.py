"""The device half: owns weights, KV pages and lane state, and launches compiled steps for plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.checkpoint.types import Checkpoint
from jaxgen.execution.batch import RowMirror, needs_of, pack_decode, pack_prefill, wants_input_logprobs
from jaxgen.execution.kv_cache import KVShape
from jaxgen.execution.programs import COPY, DECODE, NEWEST, NO_WIDTHS, PREFILL, REFILL, StepKey, array_bytes
from jaxgen.execution.runner_config import RunnerConfig
from jaxgen.execution.sampler import Logprobs, Variant
from jaxgen.execution.step import StepOutput
from jaxgen.execution.step_builder import StepBuilder
from jaxgen.execution.step_choice import power_of_two
from jaxgen.execution.step_set import StepSet
from jaxgen.execution.weights import Weights
from jaxgen.layers.attention import KV_PAGE_AXES
from jaxgen.models.config import ModelConfig
from jaxgen.models.registry import ARCHITECTURES
from jaxgen.scheduling.plan import Plan
from jaxgen.scheduling.request import Request
from jaxgen.sharding import sharding_for
from jaxgen.startup import StartupReport


@dataclasses.dataclass(frozen=True)
class Launched:
    """A step on its way: the plan it serves, what it leaves on the device, and what of that is wanted."""

    plan: Plan
    tokens: jax.Array  # [K, R] int32
    rows: np.ndarray  # of chunks and lanes in the lane state
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
    common: int  # tokens that all lanes have in the same pages
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
        self._uploads: dict[StepKey, jax.Array] = {}  # by refill
        self._decode: DecodeUpload | None = None
        with report.phase("build model"):
            builder = StepBuilder(model_config, config, mesh, cache_directory)
            weights = Weights(builder.params, config.param_dtype, config.quantization, self.device.platform)
        with report.phase("plan memory"):
            self.steps = StepSet(builder, model_config, config, mesh)
        with self.steps.compiling(report):
            with report.phase("load weights"):
                self.weights = self._load(checkpoint, weights, report)
            with report.phase("compile largest steps"):
                self.steps.confirm_memory(report)
            shapes = self.steps.shapes
            self.mirror = RowMirror(config.rows, shapes.max_pages, *shapes.widths)
            with report.phase("allocate KV cache"):
                self._allocate()
            with report.phase("compile steps"):
                self.steps.wait(report)
        with report.phase("run steps once"):
            self._run_steps_once()
        self.steps.seal()

    # ---- start-up

    def _load(self, checkpoint: Checkpoint, weights: Weights, report: StartupReport) -> tuple[jax.Array, ...]:
        table = ARCHITECTURES[self.model_config.architecture].weight_table(self.model_config)
        total = sum(map(array_bytes, weights.read.values()))
        with report.progress("Loading weights", total, unit="B") as advance:
            return weights.load(checkpoint, table, advance)

    def _allocate(self) -> None:
        self.kv = self.kv_shape.allocate(self._kv_sharding)
        shapes = self.steps.shapes.state  # JAX remembers the function, which must not hold the runner
        self.state = jax.jit(
            lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
            out_shardings=self._replicated,
        )()

    def _run_steps_once(self) -> None:
        """Lets a GPU load and capture the compiled steps before the first request comes."""
        if self.device.platform == "cpu":
            return
        for key in self.steps:
            self.run_empty(key)
        jax.block_until_ready(self.state.token)

    def run_empty(self, key: StepKey) -> None:
        """Runs a compiled step on padding only, so that the first request finds it loaded and captured.

        On the engine's thread once that runs: the step's KV pages and lane state replace those of the last.
        """
        if key.widths not in (NO_WIDTHS, self.steps.shapes.widths):
            return  # made for a lane state that has been widened since
        if key.kind in (NEWEST, REFILL):
            return  # small, and run with every step
        if key.kind == COPY:
            self._copy_pages([(0, self.kv_shape.num_pages)])  # to a page out of range: dropped
            return
        assert key.variant is not None
        if key.kind == DECODE:
            packed = pack_decode(Plan(kind=DECODE), key.size, self.config.rows)
        else:
            packed = pack_prefill(Plan(kind=PREFILL), self.mirror, [], key.size, key.rows, key.variant)
        self._run(key, self._upload(key, packed))

    # ---- compiled steps

    def _run(self, key: StepKey, packed: jax.Array) -> StepOutput:
        """Launches a decode or prefill step; KV pages and lane state are replaced by the step's."""
        output, self.kv, self.state = self.steps.get(key)(self.weights, self.kv, self.state, packed)
        return output

    @property
    def kv_shape(self) -> KVShape:
        return self.steps.shapes.kv

    def require_compiled(self, request: Request) -> None:
        """Raises ValueError if strict_compile forbids what serving `request` would have to compile.

        Called with every request before it is submitted: found out in the middle of a step, the same thing
        would end the engine.
        """
        if self.config.strict_compile:
            self.steps.choice.require_compiled(request, self.steps.shapes.widths)

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
        tokens = np.asarray(launched.tokens)[: plan.steps, launched.rows].ravel()

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
            variant, rows = self._variant(plan.lanes), np.array([r.row for r in plan.lanes], np.int32)
            common = self.steps.sharing.tokens(self.mirror.table, rows, plan.lengths - plan.steps)
            widths = self.steps.shapes.widths
            decode = DecodeUpload(
                key=self.steps.choice.decode(len(rows), plan.steps, variant, widths, common > 0),
                rows=rows,
                common=common,
                packed=None,
                wants_logprobs=any(r.return_logprob for r in plan.lanes),
                wants_hidden=self.config.return_hidden and any(r.return_hidden for r in plan.lanes),
            )
        if decode.packed is None or plan.page_updates:
            # Without news the upload of the step before serves again: its page updates are in place already.
            self.mirror.assign_pages(plan.page_updates)
            packed = pack_decode(plan, decode.key.size, self.config.rows, decode.common)
            decode = dataclasses.replace(decode, packed=self._upload(decode.key, packed))
        self._decode = decode
        assert decode.packed is not None
        output = self._run(decode.key, decode.packed)
        tokens, top = self._newest_tokens(), _top_logprobs(decode.key)
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
        key = self.steps.choice.prefill(plan.num_tokens, len(requests), variant, self.steps.shapes.widths)
        assert key.variant is not None
        packed = pack_prefill(plan, self.mirror, fresh, key.size, key.rows, key.variant)
        output = self._run(key, self._upload(key, packed))
        return Launched(
            plan,
            self._newest_tokens(),
            np.array([request.row for request in requests], np.int32),
            output,
            _top_logprobs(key),
            wants_logprobs=any(r.return_logprob for r in requests),
            wants_input_logprobs=any(map(wants_input_logprobs, plan.chunks)),
            wants_hidden=self.config.return_hidden and any(r.return_hidden for r in requests),
        )

    def _newest_tokens(self) -> jax.Array:
        """A copy [K, R] of the tokens of the last launch."""
        return self.steps.get(self.steps.choice.newest_key)(self.state.drawn)

    def _upload(self, key: StepKey, packed: np.ndarray) -> jax.Array:
        """The packed array of a step on the device, at one address for each step.

        The refill uploads the NumPy array itself, for less than `device_put` takes.
        """
        buffer = self._uploads.pop(key.refill, None)
        if buffer is None:
            buffer = jax.device_put(packed, self._replicated)
        array = self.steps.get(key.refill)(buffer, packed)
        self._uploads[key.refill] = array
        return array

    def _copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        key = self.steps.choice.copy_key
        for first in range(0, len(copies), key.size):
            part = np.array(copies[first : first + key.size], np.int32)
            packed = np.full((2, key.size), self.kv_shape.num_pages, np.int32)
            packed[0] = 0
            packed[:, : len(part)] = part.T
            self.kv = self.steps.get(key)(self.kv, packed)

    def _variant(self, requests: Sequence[Request]) -> Variant:
        return self.steps.choice.variant(self.mirror.needs[request.row] for request in requests)

    def _widen(self, plan: Plan) -> None:
        """Grows the sparse fields of the lane state when a request needs more than they hold."""
        needs = [
            needs_of(chunk.request)
            for chunk in plan.chunks
            if chunk.request.return_logprob
            or chunk.request.params.logit_bias
            or chunk.request.params.min_new_tokens
        ]
        edit, ids = self.steps.shapes.widths
        wanted = (
            max((n.edit_width for n in needs), default=0),
            max((n.logprob_width for n in needs), default=0),
        )
        if wanted[0] <= edit and wanted[1] <= ids:
            return
        widths = max(edit, power_of_two(wanted[0])), max(ids, power_of_two(wanted[1]))
        self.mirror.widen(*widths)
        self.steps.widen(widths)

        def pad(field: jax.Array, spec: jax.ShapeDtypeStruct, fill: int) -> jax.Array:
            extra = spec.shape[1] - field.shape[1]
            padded = jnp.pad(field, ((0, 0), (0, extra)), constant_values=fill)
            return jax.device_put(padded, self._replicated)

        shapes, state = self.steps.shapes.state, self.state
        self.state = dataclasses.replace(
            state,
            edit_ids=pad(state.edit_ids, shapes.edit_ids, -1),
            edit_values=pad(state.edit_values, shapes.edit_values, 0),
            edit_until=pad(state.edit_until, shapes.edit_until, 0),
            logprob_ids=pad(state.logprob_ids, shapes.logprob_ids, -1),
        )

    def shutdown(self) -> None:
        """Returns every device buffer the runner owns; waits for the steps that are being compiled."""
        self.steps.release()
        self._decode = None
        for array in jax.tree.leaves((self.weights, self.kv, self.state, *self._uploads.values())):
            array.delete()
        self._uploads = {}
        self.weights, self.kv, self.state = (), (), None


def _top_logprobs(key: StepKey) -> int:
    return 0 if key.variant is None else key.variant.top_logprobs
