"""How many KV pages the engine gets, before and after its largest steps are compiled."""

from __future__ import annotations

import dataclasses
import logging

import jax

from jaxgen.execution import kv_cache
from jaxgen.execution.kv_cache import MIB, KVShape
from jaxgen.execution.runner_config import RunnerConfig
from jaxgen.execution.sampler import Variant
from jaxgen.models.config import ModelConfig

logger = logging.getLogger("jaxgen")

# A pool smaller by this share than memory allows is kept: two compiles would cost more than it is worth.
TOLERATED_LOSS = 1 / 24
# Added to the estimate: matrix products get workspace by what the compiler finds out on the device.
MARGIN, MARGIN_BYTES = 1.1, 128 * MIB


@dataclasses.dataclass(frozen=True)
class MemoryPlanner:
    """Divides the memory of each device. Sizes in bytes per device.

    limit: what the process may use; None on a CPU, where temporary memory is the machine's affair.
    tuning: what the compiler needs beside a running step, to try out matrix products; 0 where nothing is
    compiled while serving.
    """

    model: ModelConfig
    config: RunnerConfig
    tensor_devices: int
    limit: int | None
    weights: int
    lane_state: int
    tuning: int

    def pool(self, temporary: int) -> KVShape:
        """The pages that fit beside steps with so much temporary memory, or what the user wants if less."""
        config = self.config
        page = KVShape.of(self.model, 1, config.page_size, config.kv_dtype)
        if self.limit is None:
            budget = kv_cache.cpu_kv_budget()
        else:
            per_device = kv_cache.gpu_kv_budget(
                limit=self.limit,
                weights=self.weights,
                lane_state=self.lane_state,
                temp=temporary + self.tuning,
                fraction=config.mem_fraction_static,
            )
            budget = max(0, per_device) * self.tensor_devices
        pages = kv_cache.pages_within(
            budget, page, max_total_tokens=config.max_total_tokens, weight_bytes=self.weights
        )
        return dataclasses.replace(page, num_pages=pages)

    def checked_pool(self, guess: KVShape, temporary: int) -> KVShape:
        """`guess` if it fits beside `temporary` and wastes little, else the pool that does."""
        pool = self.pool(temporary)
        keep = pool.num_pages * (1 - TOLERATED_LOSS) <= guess.num_pages <= pool.num_pages
        chosen = guess if keep else pool
        logger.info(
            "Memory per device: %.2f GiB usable, weights %.2f, largest step %.2f, lane state %.2f, KV %.2f",
            *(
                x / 2**30
                for x in (
                    self.limit or 0,
                    self.weights,
                    temporary,
                    self.lane_state,
                    chosen.page_bytes * chosen.num_pages // self.tensor_devices,
                )
            ),
        )
        return chosen

    def estimated_temporary(self, variant: Variant) -> int:
        """Temporary memory of the largest steps of a variant, from their shapes.

        Prefill: three activations each of the hidden and of the feed-forward width (of this device's shard).
        Either: the logits of its rows, and for a full step their edited and their normalised copy.
        """
        config, model = self.config, self.model
        tokens, rows = config.prefill_buckets[-1]
        itemsize = jax.numpy.dtype(config.param_dtype).itemsize
        width = 3 * model.hidden_size + 3 * model.intermediate_size // self.tensor_devices
        if config.return_hidden:
            width += model.hidden_size
        logits = 4 * model.vocab_size * (1 if variant.plain else 3 + config.original_logprobs)
        largest = max(tokens * width * itemsize + rows * logits, config.decode_buckets[-1] * logits)
        return int(MARGIN * largest) + MARGIN_BYTES
