"""What one device step has to do, and how the scheduler is set up."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np

from jaxgen.scheduling.request import Request

POLICIES = ("fcfs", "lpm", "random", "dfs-weight", "lof")
CACHE_AWARE_POLICIES = ("lpm", "dfs-weight")
EVICTION_POLICIES = ("lru", "lfu", "slru", "priority")
RETRACTION_POLICIES = ("length", "priority")


class Signal(enum.Enum):
    """An answer of `Scheduler.schedule` that is not a plan."""

    NEED_COLLECT = enum.auto()


NEED_COLLECT = Signal.NEED_COLLECT
"""The scheduler must see every launched token first: collect all launched plans, then ask again."""


@dataclass(slots=True)
class Chunk:
    """Positions [start, start + length) of prompt + output ids, computed by one prefill step."""

    request: Request
    start: int
    length: int
    last: bool

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(slots=True)
class Plan:
    """One device step.

    Attributes:
        kind: "prefill" (chunks, and lanes riding along when mixed) or "decode" (lanes only).
        chunks: prefill rows; only those with `last` produce a token.
        lanes: rows that decode `steps` tokens each, fewer where a row reaches its last allowed token. The list is
            shared by successive plans: never change it.
        steps: tokens of each lane; 1 beside chunks.
        rows: [B] int32, `request.row` of each lane.
        lengths: [B] int32, KV tokens of each lane after the step (the last new position is lengths - 1).
        page_updates: (row, page index in the request, page id) of pages assigned to lanes by this plan.
        joined: lanes that were in no decode plan since their prefill; all their pages are in `request.pages`.
        copies: (source page, destination page), to be done before the step. No destination is also a source.
        membership_changed: the lanes differ from those of the previous decode plan.
    """

    kind: str
    chunks: list[Chunk] = field(default_factory=list)
    lanes: list[Request] = field(default_factory=list)
    steps: int = 1
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    lengths: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    page_updates: list[tuple[int, int, int]] = field(default_factory=list)
    joined: list[Request] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    membership_changed: bool = False

    @property
    def num_tokens(self) -> int:
        """Packed tokens of the step."""
        return sum(chunk.length for chunk in self.chunks) + len(self.lanes)


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits and policies; see `jaxgen.server_args` for the user's view of them.

    Attributes:
        num_pages, page_size: the KV pool.
        max_rows: rows of the device's lane state; a step never has more lanes.
        chunked_prefill_size: packed prefill tokens a step; None computes every prompt in one step.
        max_prefill_tokens: packed prefill tokens a step without chunking; a longer prompt runs alone.
        prefill_max_requests: most prefill rows a step.
        decode_steps: (lanes, steps) by lanes: a plan of up to so many lanes decodes so many tokens of each, at
            most a page. Beyond the last, and where empty: 1.
        schedule_conservativeness: scales the share of a request's allowed output that admission reserves.
        test_retract: retract a row every so many decode steps; None reads JAXGEN_TEST_RETRACT, 0 is never.
        waiting_timeout, running_timeout: seconds after which a request ends with 503, 0 is never; None reads
            JAXGEN_REQ_WAITING_TIMEOUT and JAXGEN_REQ_RUNNING_TIMEOUT.
        seed: of the `random` policy.
    """

    num_pages: int
    page_size: int
    max_rows: int
    context_length: int
    max_running_requests: int | None = None
    chunked_prefill_size: int | None = None
    max_prefill_tokens: int = 16384
    prefill_max_requests: int | None = None
    decode_steps: tuple[tuple[int, int], ...] = ()
    schedule_policy: str = "lpm"
    schedule_conservativeness: float = 1.0
    radix_cache: bool = True
    eviction_policy: str = "lru"
    mixed_chunk: bool = False
    max_queued_requests: int | None = None
    priority_scheduling: bool = False
    low_priority_values_first: bool = False
    priority_preemption_threshold: int = 10
    priority_preemption: bool = True
    default_priority: int | None = None
    retraction_policy: str = "length"
    test_retract: int | None = None
    waiting_timeout: float | None = None
    running_timeout: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_pages", "page_size", "max_rows", "context_length", "max_prefill_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_running_requests", "chunked_prefill_size", "prefill_max_requests"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be None or at least 1, got {value}")
        for _, steps in self.decode_steps:
            if not 1 <= steps <= self.page_size:
                raise ValueError(f"decode_steps must be 1 to page_size ({self.page_size}), got {steps}")
        for name, allowed in (
            ("schedule_policy", POLICIES),
            ("eviction_policy", EVICTION_POLICIES),
            ("retraction_policy", RETRACTION_POLICIES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        if self.schedule_conservativeness < 0:
            raise ValueError(f"schedule_conservativeness must be >= 0, got {self.schedule_conservativeness}")
        if self.priority_scheduling and self.schedule_policy not in ("fcfs", "lof"):
            raise ValueError(
                f"priority scheduling needs schedule_policy fcfs or lof, got {self.schedule_policy!r}"
            )
        if self.retraction_policy == "priority" and not self.priority_scheduling:
            raise ValueError("retraction_policy 'priority' needs priority scheduling")
