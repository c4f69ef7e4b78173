"""A device made of numpy: it runs plans and fails when a step reads anything but its history.

The KV of a position is a hash of the namespace and of all ids up to it, so reading a wrong page, a stale
page, a page that was copied too early or a position that was never computed shows at once. The next token is
a function of the last hash, so the output of a request is known beforehand, whatever the scheduler does.
"""

from __future__ import annotations

import random
import zlib
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgen.scheduling import NEED_COLLECT, Plan, Request, Scheduler, SchedulerConfig

MASK = (1 << 61) - 1
VOCAB = 50
EOS = 1


@dataclass
class Params:
    ignore_eos: bool = False
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0


def step_hash(previous: int, token: int) -> int:
    return (previous * 1_000_003 + token + 7) * 2_654_435_761 % MASK


def hashes(namespace: str, ids: list[int]) -> list[int]:
    """The KV content of each position."""
    value, out = zlib.crc32(namespace.encode()), []
    for token in ids:
        value = step_hash(value, token)
        out.append(value)
    return out


def next_token(value: int) -> int:
    return (value >> 20) % VOCAB


def expected_output(request: Request) -> tuple[list[int], str]:
    """Output ids and finish type of a request that nothing disturbs."""
    value, output = hashes(request.namespace, request.prompt_ids)[-1], []
    while len(output) < request.max_new_tokens:
        token = next_token(value)
        output.append(token)
        if token in request.eos_ids:
            return output, "stop"
        value = step_hash(value, token)
    return output, "length"


class FakeDevice:
    """Pages [P, S] of hashes, a page table [max_rows, MP], last token and KV length of each row."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.page_size = config.page_size
        self.pages = np.full((config.num_pages, config.page_size), -1, np.int64)
        self.table = np.full((config.max_rows, config.num_pages), -1, np.int64)
        self.last = [-1] * config.max_rows
        self.length = [0] * config.max_rows
        self.limit = config.chunked_prefill_size
        self.lanes: list[Request] = []

    def launch(self, plan: Plan) -> list[int]:
        assert plan.kind == ("prefill" if plan.chunks else "decode")
        assert plan.chunks or plan.lanes
        sources = {source for source, _ in plan.copies}
        destinations = [destination for _, destination in plan.copies]
        assert len(set(destinations)) == len(destinations) and not sources & set(destinations)
        for source, destination in plan.copies:
            self.pages[destination] = self.pages[source]
        assert sum(not chunk.last for chunk in plan.chunks) <= 1
        if self.limit is not None and plan.chunks:
            assert plan.num_tokens <= self.limit
        tokens = []
        for chunk in plan.chunks:
            value = self._run_chunk(chunk)
            self.length[chunk.request.row] = chunk.stop
            if chunk.last:
                self.last[chunk.request.row] = next_token(value)
                tokens.append(self.last[chunk.request.row])
        self._update_table(plan)
        assert plan.steps == 1 or not plan.chunks
        for _ in range(plan.steps):
            for request, row in zip(plan.lanes, plan.rows.tolist()):
                assert request.row == row
                if self.length[row] < request.kv_limit:
                    self.length[row] += 1
                    self._run_lane(request, row, self.length[row])
                tokens.append(self.last[row])
        for request, row, length in zip(plan.lanes, plan.rows.tolist(), plan.lengths.tolist()):
            assert request.kv_len == length == self.length[row]
        return tokens

    def _run_chunk(self, chunk: Any) -> int:
        request = chunk.request
        content = hashes(request.namespace, request.token_ids(0, chunk.stop).tolist())
        slots = self._slots(np.array(request.pages), chunk.stop)
        flat = self.pages.reshape(-1)
        assert flat[slots[: chunk.start]].tolist() == content[: chunk.start], "a chunk reads a wrong history"
        assert chunk.length > 0 and chunk.last == (chunk.stop == request.num_tokens)
        flat[slots[chunk.start :]] = content[chunk.start :]
        return content[-1]

    def _update_table(self, plan: Plan) -> None:
        if plan.lanes:
            assert plan.membership_changed or plan.lanes == self.lanes
            self.lanes = list(plan.lanes)
        for request in plan.joined:
            self.table[request.row, : len(request.pages)] = request.pages
        for row, index, page in plan.page_updates:
            self.table[row, index] = page

    def _run_lane(self, request: Request, row: int, length: int) -> None:
        token = self.last[row]
        assert request.finish_reason is not None or len(request.output_ids) <= request.max_new_tokens
        assert length - len(request.prompt_ids) < request.max_new_tokens, "a lane runs past its limit"
        pages = self.table[row, : len(request.pages)]
        assert pages.tolist() == request.pages, "the device's page table is not the request's"
        slots = self._slots(pages, length)
        flat = self.pages.reshape(-1)
        known = request.output_ids[: length - 1 - len(request.prompt_ids)]
        content = hashes(request.namespace, request.prompt_ids + known)
        history = flat[slots[:-1]].tolist()
        assert history[: len(content)] == content, "a lane reads a wrong history"
        value = step_hash(history[-1], token)
        flat[slots[-1]] = value
        self.last[row] = next_token(value)

    def _slots(self, pages: np.ndarray, length: int) -> np.ndarray:
        assert len(pages) * self.page_size >= length, "a row has too few pages"
        return (pages[:, None] * self.page_size + np.arange(self.page_size)).reshape(-1)[:length]


class Harness:
    """Scheduler and device, driven like the engine's loop: with `overlap`, step k+1 is planned first."""

    def __init__(self, config: SchedulerConfig, overlap: bool = True, clock: Any = None) -> None:
        self.scheduler = Scheduler(config, clock) if clock else Scheduler(config)
        self.device = FakeDevice(config)
        self.depth = 1 if overlap else 0
        self.launched: deque[tuple[Plan, list[int]]] = deque()
        self.requests: dict[str, Request] = {}
        self.ended: list[Request] = []
        self.plans: list[Plan] = []
        self.keep_plans = False
        self.steps = 0

    def add(self, prompt: list[int], max_new_tokens: int = 8, **fields: Any) -> Request:
        ignore_eos = fields.pop("ignore_eos", True)
        params = Params(ignore_eos=ignore_eos, frequency_penalty=fields.pop("frequency_penalty", 0.0))
        request = Request(
            rid=fields.pop("rid", f"r{len(self.requests)}"),
            prompt_ids=prompt,
            params=params,
            vocab_size=VOCAB,
            max_new_tokens=max_new_tokens,
            eos_ids=frozenset() if ignore_eos else frozenset({EOS}),
            eos_id=EOS,
            **fields,
        )
        self.scheduler.add(request)
        self.requests[request.rid] = request
        return request

    def step(self) -> bool:
        """One iteration of the loop; False when nothing is left to launch or collect."""
        self.steps += 1
        outcome = self.scheduler.schedule()
        self.ended += self.scheduler.drain_ended()
        if isinstance(outcome, Plan):
            self.launched.append((outcome, self.device.launch(outcome)))
            if self.keep_plans:
                self.plans.append(outcome)
            while len(self.launched) > self.depth:
                self.collect_one()
            return True
        if outcome is NEED_COLLECT:
            assert self.launched, "NEED_COLLECT, but everything is collected"
        if not self.launched:
            return False
        while self.launched:
            self.collect_one()
        return True

    def collect_one(self) -> None:
        plan, tokens = self.launched.popleft()
        before = {id(r): r.finish_reason for r in [c.request for c in plan.chunks] + plan.lanes}
        for request in self.scheduler.collect(plan, tokens):
            assert before[id(request)] is None, "a finished request got a token"
        self.scheduler.retire()

    def run(self, max_steps: int = 100_000, full_check: bool = True) -> None:
        """Run until nothing is left; then no page may be missing and every output must be right."""
        for _ in range(max_steps):
            if not self.step():
                break
            self.scheduler.check_invariants(full_check)
        else:
            raise AssertionError(f"no end after {max_steps} steps: {self.scheduler.stats()}")
        assert not self.scheduler.has_unfinished, f"the scheduler is stuck: {self.scheduler.stats()}"
        self.check_idle()

    def check_idle(self) -> None:
        self.scheduler.check_invariants()
        stats = self.scheduler.stats()
        assert stats.running == 0 and stats.owned_pages == 0
        assert stats.free_pages + stats.cached_pages == stats.total_pages
        for request in self.requests.values():
            check_output(request)


def check_output(request: Request) -> None:
    """The output is what it is without a scheduler; that of an aborted request a part of it."""
    assert request.finish_reason is not None, f"{request.rid} never finished"
    output, reason = expected_output(request)
    if request.finish_reason["type"] == "abort":
        assert request.output_ids == output[: len(request.output_ids)]
    else:
        assert (request.output_ids, request.finish_reason["type"]) == (output, reason)
        if reason == "length":
            assert request.finish_reason["length"] == request.max_new_tokens
    assert request.row == -1 and request.pages == []


def random_prompt(rng: random.Random, max_length: int, earlier: list[Request]) -> list[int]:
    """Prompts that share prefixes of all lengths with each other and with what earlier requests generate."""
    kind = rng.random()
    if kind < 0.3 and earlier:
        request = rng.choice(earlier[-4:])
        ids = request.prompt_ids + expected_output(request)[0]
        return ids[: min(rng.randrange(len(request.prompt_ids), len(ids) + 1), max_length)]
    stem = random.Random(rng.randrange(3)).choices(range(VOCAB), k=max_length)
    if kind < 0.45:
        return stem[: rng.choice([max_length, max_length // 2])]
    cut = rng.randrange(0, max_length)
    return stem[:cut] + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, max_length - cut + 1))]
