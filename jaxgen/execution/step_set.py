"""The compiled steps of a runner: for what shapes, which, and when each of them is compiled."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

import jax

from jaxgen.execution import kv_cache, lanes
from jaxgen.execution.common_prefix import PrefixSharing
from jaxgen.execution.compile import BackgroundCompilation, StartupCompilation, StepTable
from jaxgen.execution.kv_cache import KVShape
from jaxgen.execution.memory_plan import MemoryPlanner
from jaxgen.execution.programs import NO_WIDTHS, Shapes, StepKey, shard_bytes, temporary_bytes
from jaxgen.execution.runner_config import RunnerConfig
from jaxgen.execution.step_builder import StepBuilder
from jaxgen.execution.step_choice import (
    EDIT_WIDTH,
    LOGPROB_WIDTH,
    StepChoice,
    launch_steps,
    startup_variants,
)
from jaxgen.models.config import ModelConfig
from jaxgen.sharding import sharding_for
from jaxgen.startup import StartupReport

logger = logging.getLogger("jaxgen")

# Threads that compile while the engine serves: few, for each of them takes the engine's thread its turns.
BACKGROUND_WORKERS = 3


class StepSet:
    """Steps by key, compiled at start-up, in the background or when they are wanted.

    weight_bytes: per device. decode_steps: (lanes, steps of one launch) of each decode bucket. choice: which
    step serves a batch. sharing: when a common prefix is read once. shapes: of KV pages and lane state, for which
    steps are compiled now.
    """

    def __init__(
        self, builder: StepBuilder, model_config: ModelConfig, config: RunnerConfig, mesh: jax.sharding.Mesh
    ):
        """Chooses the size of the KV pool by an estimate, which `confirm_memory` checks.

        Raises RuntimeError when memory does not suffice for any.
        """
        device = mesh.devices.flat[0]
        self.weight_bytes = sum(map(shard_bytes, builder.params.values()))
        self.decode_steps = launch_steps(config, self.weight_bytes, device.platform)
        variants = startup_variants(device.platform, model_config.vocab_size)
        self.sharing = PrefixSharing.of(config, model_config, mesh.shape["tensor"])
        self.choice = StepChoice(
            config,
            variants,
            self.decode_steps,
            model_config.vocab_size,
            self.sharing.buckets(config.decode_buckets),
            self._is_compiled,
        )
        self._builder, self._model_config, self._config = builder, model_config, config
        self._replicated = sharding_for(mesh, ())
        self._table: StepTable[StepKey] = StepTable(self._build, strict=config.strict_compile)
        self._compilation: StartupCompilation[StepKey] | None = None
        self._background: BackgroundCompilation[StepKey] | None = None
        self._planner = MemoryPlanner(
            model=model_config,
            config=config,
            tensor_devices=mesh.shape["tensor"],
            limit=kv_cache.device_memory_bytes(device),
            weights=self.weight_bytes,
            lane_state=lanes.lane_state_bytes(
                self._lane_state(-(-config.context_length // config.page_size))
            ),
            tuning=max(map(shard_bytes, builder.params.values())) if config.background else 0,
        )
        estimate = self._planner.estimated_temporary(variants[-1])
        self.shapes = self._shapes_of(self._planner.pool(estimate))

    # ---- what there is

    def __contains__(self, key: StepKey) -> bool:
        return key in self._table

    def __iter__(self) -> Iterator[StepKey]:
        return iter(self._table)

    def get(self, key: StepKey) -> Callable:
        """The step, compiled now if it is not there; CompileForbiddenError if it may not be."""
        return self._table.get(key)

    @property
    def miss_count(self) -> int:
        """Steps compiled while serving, since start-up."""
        return self._table.miss_count

    @property
    def is_complete(self) -> bool:
        """Whether every start-up step is compiled."""
        return not self._missing()

    def _missing(self) -> list[StepKey]:
        return [key for key in self.choice.rest_keys(self.shapes.widths) if key not in self._table]

    def _is_compiled(self, key: StepKey) -> bool:
        return key in self._table and key.refill in self._table

    def _build(self, key: StepKey) -> jax.stages.Compiled:
        shapes = self.shapes
        if key.widths not in (NO_WIDTHS, shapes.widths):  # asked for before the lane state was widened
            shapes = self._shapes_of(shapes.kv, key.widths)
        return self._builder.build(key, shapes)

    # ---- shapes

    def widen(self, widths: tuple[int, int]) -> None:
        """Steps from now on are for a lane state of these widths."""
        self.shapes = self._shapes_of(self.shapes.kv, widths)
        if self._background is not None:
            self._background.cancel()  # what it compiles does not fit the new widths

    def _shapes_of(self, kv: KVShape, widths: tuple[int, int] = (EDIT_WIDTH, LOGPROB_WIDTH)) -> Shapes:
        pages = min(-(-self._config.context_length // self._config.page_size), kv.num_pages)

        def replicated(spec: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=self._replicated)

        return Shapes(kv, jax.tree.map(replicated, self._lane_state(pages, widths)))

    def _lane_state(
        self, max_pages: int, widths: tuple[int, int] = (EDIT_WIDTH, LOGPROB_WIDTH)
    ) -> lanes.LaneState:
        most_steps = max(steps for _, steps in self.decode_steps)
        return lanes.lane_state_shapes(
            self._config.rows, max_pages, self._model_config.vocab_size, *widths, most_steps
        )

    # ---- start-up

    @contextlib.contextmanager
    def compiling(self, report: StartupReport) -> Iterator[None]:
        """Compiles in other threads, as long as it is entered, the steps without which there is no start."""
        self._compilation = self._compile_startup_steps(report)
        try:
            yield
        finally:
            self._compilation.stop()
            self._compilation = None

    def confirm_memory(self, report: StartupReport) -> None:
        """Waits for the largest steps and sees that the KV pool fits beside them; if not, begins anew.

        What a step needs beside its arguments is known when it is compiled, and to compile it the pool must
        have a size. So that comes from an estimate.
        """
        assert self._compilation is not None
        if self._planner.limit is None:
            return
        guess, largest = self.shapes.kv, self.choice.largest_keys(self.shapes.widths)
        self._compilation.wait(largest)
        temporary = max(temporary_bytes(self._table.get(key)) for key in largest)
        pool = self._planner.checked_pool(guess, temporary)
        if pool != guess:
            logger.info("The largest steps need other memory than estimated: compiling again")
            self._compilation.stop()
            self._table.clear()
            self.shapes = self._shapes_of(pool)
            self._compilation = self._compile_startup_steps(report)

    def wait(self, report: StartupReport) -> None:
        """Waits for all steps that are being compiled for the start."""
        assert self._compilation is not None
        with report.progress("Compiling steps", len(self._compilation), unit="step") as advance:
            self._compilation.wait(on_done=lambda: advance(1))

    def seal(self) -> None:
        """Ends start-up: a step compiled from now on, other than in the background, is a miss."""
        self._builder.trim_cache()
        self._table.seal()

    def _compile_startup_steps(self, report: StartupReport) -> StartupCompilation[StepKey]:
        widths = self.shapes.widths
        keys = self.choice.startup_keys(widths)
        if self._config.background:
            first = self.choice.first_keys(widths)
            cached = [key for key in keys if self._builder.is_cached(key, self.shapes)]
            keys = first + [key for key in cached if key not in first]
        if self._planner.limit is not None:  # what they need is to be known, even if start-up leaves them out
            largest = self.choice.largest_keys(widths)
            keys = [*largest, *(key for key in keys if key not in largest)]
        started = time.perf_counter()
        return StartupCompilation(
            self._table,
            keys,
            lambda key: report.add(f"step {key}", time.perf_counter() - started, nested=True),
        )

    # ---- afterwards

    def compile_rest(
        self, on_ready: Callable[[StepKey], None], on_end: Callable[[], None]
    ) -> BackgroundCompilation[StepKey]:
        """Begins to compile, in the background, the start-up steps that are not there yet.

        on_ready(key) is called, from another thread, with each step that is; on_end() when there are no more.
        """

        def end() -> None:
            self._builder.trim_cache()
            on_end()

        self._background = BackgroundCompilation(
            self._table, self._missing(), on_ready=on_ready, on_end=end, workers=BACKGROUND_WORKERS
        )
        return self._background

    def release(self) -> None:
        """Drops every step; waits for those that are being compiled."""
        if self._background is not None:
            self._background.stop()
            self._background = None
        self._table.clear()
