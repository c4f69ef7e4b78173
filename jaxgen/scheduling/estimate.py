"""How many tokens running requests may still need: what admission keeps in reserve."""

from __future__ import annotations

import numpy as np

from jaxgen.scheduling.request import Request
from jaxgen.scheduling.rows import RowTable

MAX_NEW_TOKENS = 4096  # a longer allowed output counts as this much
INITIAL_RATIO = 0.7
FINAL_SHARE = 0.14
DECAY_STEPS = 600
RETRACT_DECODE_STEPS = 20  # decode steps that a retraction makes room for


class NewTokenRatio:
    """The share of its allowed output that a running request is expected to produce.

    It starts high and falls linearly with every decode step, because most requests stop early; a retraction,
    the sign of too much optimism, sets it to what the running requests have shown.
    """

    def __init__(self, conservativeness: float) -> None:
        self.initial = min(INITIAL_RATIO * conservativeness, 1.0)
        self._least = self.initial * FINAL_SHARE
        self._step = (self.initial - self._least) / DECAY_STEPS
        self.value = self.initial

    def decay(self, steps: int = 1) -> None:
        """Decode steps were launched."""
        self.value = max(self.value - steps * self._step, self._least)

    def after_retraction(self, running: list[Request]) -> None:
        """Start again from the progress of the requests that stay."""
        produced = sum(len(request.output_ids) + RETRACT_DECODE_STEPS for request in running)
        allowed = sum(request.max_new_tokens for request in running) + 1
        self.value = min(produced / allowed, 1.0)

    def of(self, request: Request) -> float:
        """The ratio for one request: one that cannot stop early is taken at its word."""
        return 1.0 if request.params.ignore_eos else self.value

    def reserved(self, table: RowTable, rows: np.ndarray) -> float:
        """Tokens that the requests in `rows` are expected to need still."""
        remaining = np.clip(table.limit[rows] - table.kv_len[rows], 0, MAX_NEW_TOKENS)
        return float(np.sum(np.where(table.full_reserve[rows], remaining, remaining * self.value)))


def remaining_output(request: Request) -> int:
    """Tokens that the request may still produce, as admission counts them."""
    return min(request.max_new_tokens - len(request.output_ids), MAX_NEW_TOKENS)
