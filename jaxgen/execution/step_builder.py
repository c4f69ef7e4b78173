"""From a model and the runner's options to compiled steps, out of the cache where they are in it."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgen.execution.programs import Programs, Shapes, StepKey, most_triton_tokens
from jaxgen.execution.runner_config import RunnerConfig
from jaxgen.execution.step import StepSpec
from jaxgen.execution.step_cache import StepCache
from jaxgen.layers.attention import KV_PAGE_AXES
from jaxgen.models.config import ModelConfig
from jaxgen.models.registry import build_model
from jaxgen.sharding import abstract_params, sharding_for


class StepBuilder:
    """Makes the steps of one model on one mesh. Thread-safe.

    params: parameter path -> shape, dtype and sharding; nothing is allocated.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        config: RunnerConfig,
        mesh: jax.sharding.Mesh,
        cache_directory: Path | None,
    ):
        """`cache_directory`: where compiled steps are kept for the next start; None keeps none."""
        dtype = config.param_dtype
        model = nnx.eval_shape(
            lambda: build_model(
                model_config,
                dtype,
                mesh=mesh,
                backends=config.attention,
                quantization=config.quantization,
            )
        )
        self.params: dict[str, jax.ShapeDtypeStruct] = abstract_params(model, mesh)
        graphdef, state = nnx.split(model)
        replicated = sharding_for(mesh, ())
        spec = StepSpec(
            graphdef=graphdef,
            treedef=jax.tree.structure(state),
            logits_sharding=replicated if mesh.size > 1 else None,
            page_size=config.page_size,
            return_hidden=config.return_hidden,
            original_logprobs=config.original_logprobs,
            skips=mesh.devices.flat[0].platform == "cpu",
        )
        self._programs = Programs(
            spec=spec,
            weights=tuple(self.params.values()),
            replicated=replicated,
            kv_sharding=sharding_for(mesh, KV_PAGE_AXES),
            precise=jnp.dtype(dtype) == jnp.float32,
            triton_tokens=most_triton_tokens(config.quantization),
            tuning_directory=None if cache_directory is None else cache_directory / "autotune",
        )
        self._cache = None
        if cache_directory is not None:
            self._cache = StepCache(
                cache_directory,
                list(mesh.devices.flat),
                model_config,
                config.page_size,
                jnp.dtype(config.param_dtype),
                jnp.dtype(config.kv_dtype),
                config.quantization,
                config.attention,
                config.return_hidden,
                config.original_logprobs,
                tuple(mesh.shape.items()),
            )

    def build(self, key: StepKey, shapes: Shapes) -> jax.stages.Compiled:
        """The step, loaded from the cache or compiled and put there."""
        name = _name(key, shapes)
        step = self._cache.load(name) if self._cache is not None else None
        if step is None:
            step = self._programs.compile(key, shapes)
            if self._cache is not None:
                self._cache.save(name, step)
        return step

    def is_cached(self, key: StepKey, shapes: Shapes) -> bool:
        return self._cache is not None and _name(key, shapes) in self._cache

    def trim_cache(self) -> None:
        """Keeps the cache within its size."""
        if self._cache is not None:
            self._cache.trim()


def _name(key: StepKey, shapes: Shapes) -> str:
    return f"{key!r} {shapes!r}"
