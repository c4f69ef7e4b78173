"""The host half of the engine: which requests advance in the next step, on which KV pages. No JAX."""

from jaxgen.scheduling.buckets import coarse, decode_buckets, decode_steps, prefill_buckets, sparse
from jaxgen.scheduling.page_pool import PageError
from jaxgen.scheduling.plan import NEED_COLLECT, Chunk, Plan, SchedulerConfig, Signal
from jaxgen.scheduling.request import Request, abort_reason
from jaxgen.scheduling.scheduler import Scheduler, SchedulerStats
from jaxgen.scheduling.waiting import QueueFull

__all__ = [
    "NEED_COLLECT",
    "Chunk",
    "PageError",
    "Plan",
    "QueueFull",
    "Request",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerStats",
    "Signal",
    "abort_reason",
    "coarse",
    "decode_buckets",
    "decode_steps",
    "prefill_buckets",
    "sparse",
]
