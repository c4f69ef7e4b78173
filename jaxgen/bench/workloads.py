"""The named workloads of `jaxgen bench latency` and `jaxgen bench offline`. Free of JAX: the parser reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Range = tuple[int, int]  # inclusive
Measure = Literal["decode", "prefill", "output", "prefix"]


@dataclass(frozen=True)
class Workload:
    """Requests with token ids in and out, greedy unless `sampling` says otherwise, end-of-sequence ignored.

    Attributes:
        measure: what is timed. "decode": a step after the first token of all; "prefill": prompt tokens;
            "output": output tokens of the whole run; "prefix": the run with `prefix` not in the prefix cache,
            and in it.
        input_len: tokens of a prompt, drawn uniformly, `prefix` not counted.
        output_len: new tokens, drawn uniformly; one number for "decode".
        prefix: tokens that all prompts share.
        sampling: sampling parameters other than greedy ones.
        top_logprobs: log-probabilities asked for at each new token.
        baseline: workload measured in turns with this one, against whose throughput this one's is held.
    """

    name: str
    measure: Measure
    requests: int
    input_len: Range
    output_len: Range
    prefix: int = 0
    sampling: Mapping[str, float] = dataclasses.field(default_factory=dict)
    top_logprobs: int = 0
    baseline: str | None = None

    def __post_init__(self) -> None:
        for low, high in (self.input_len, self.output_len):
            if not 1 <= low <= high:
                raise ValueError(f"Workload {self.name}: the lengths {low}..{high} are not a range from 1 up")
        low, high = self.output_len
        if self.measure == "decode" and (low != high or low < 2):
            raise ValueError(
                f"Workload {self.name}: decode steps are timed over one output length of at least 2 tokens, "
                f"not {low}..{high}"
            )

    def lengths(self) -> tuple[list[int], list[int]]:
        """Input and output lengths of all requests: the same in every run."""
        rng = np.random.default_rng(0)
        inputs, outputs = (
            rng.integers(low, high, self.requests, endpoint=True).tolist()
            for low, high in (self.input_len, self.output_len)
        )
        return inputs, outputs

    def sampling_params(self, new_tokens: int) -> dict[str, Any]:
        return {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True, **self.sampling}

    def scaled(self, factor: float) -> Workload:
        """The same with as much fewer and shorter requests, for a try on a small machine."""

        def scale(n: int, least: int = 1) -> int:
            return max(least, round(n * factor))

        least = 2 if self.measure == "decode" else 1
        return dataclasses.replace(
            self,
            requests=scale(self.requests),
            input_len=(scale(self.input_len[0]), scale(self.input_len[1])),
            output_len=(scale(self.output_len[0], least), scale(self.output_len[1], least)),
            prefix=scale(self.prefix, 0),
        )


def _fixed(name: str, requests: int, input_len: int, output_len: int, **options: Any) -> Workload:
    measure: Measure = "prefill" if output_len == 1 else "decode"
    return Workload(name, measure, requests, (input_len,) * 2, (output_len,) * 2, **options)


NUCLEUS = {"temperature": 0.8, "top_p": 0.95, "top_k": 50}
WORKLOADS = {
    workload.name: workload
    for workload in (
        _fixed("bs1", 1, 128, 256),
        _fixed("fixed64", 64, 1024, 128),
        _fixed("fixed256", 256, 1024, 128),
        _fixed("prefill", 32, 4096, 1),
        Workload("offline256", "output", 256, (100, 1024), (100, 1024)),
        Workload("offline1024", "output", 1024, (100, 1024), (100, 1024)),
        Workload("shared", "prefix", 256, (64, 64), (64, 64), prefix=2048),
        _fixed("sampled", 256, 1024, 128, sampling=NUCLEUS, baseline="fixed256"),
        _fixed("logprobs", 256, 1024, 128, top_logprobs=5, baseline="fixed256"),
    )
}
SUITES = {
    "latency": ("bs1", "fixed64", "fixed256", "prefill"),
    "offline": ("offline256", "offline1024", "shared", "sampled", "logprobs"),
}
CUSTOM = "custom"


def custom(suite: str, requests: int, input_len: Range, output_len: Range) -> Workload:
    """The workload given on the command line: decode steps (or prefill alone) for latency, output for offline."""
    measure: Measure = "output"
    if suite == "latency":
        measure = "prefill" if output_len == (1, 1) else "decode"
    return Workload(CUSTOM, measure, requests, input_len, output_len)


def groups(picked: Iterable[Workload], scale: float) -> list[list[Workload]]:
    """Workloads, scaled, by what is to be measured in turns: each with those held against it, and once."""
    found: dict[str, dict[str, Workload]] = {}
    for workload in picked:
        lead = WORKLOADS[workload.baseline] if workload.baseline else workload
        members = found.setdefault(lead.name, {lead.name: lead.scaled(scale)})
        members[workload.name] = workload.scaled(scale)
    return [list(members.values()) for members in found.values()]
