"""Who gives way when pages or rows run out."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from jaxgen.scheduling.estimate import NewTokenRatio, remaining_output
from jaxgen.scheduling.kv import KVManager
from jaxgen.scheduling.request import Request
from jaxgen.scheduling.waiting import WaitingQueue

type Urgency = Callable[[Request], float]


def retraction_order(running: Iterable[Request], policy: str, urgency: Urgency) -> list[Request]:
    """Running requests, first to go first: fewest output tokens, then longest prompt, then latest arrival.

    Under the `priority` policy the least urgent go before all others.
    """

    def key(request: Request) -> tuple[float, int, int, int]:
        rank = urgency(request) if policy == "priority" else 0.0
        return rank, len(request.output_ids), -len(request.prompt_ids), -request.sequence

    return sorted(running, key=key)


def preemption_victims(
    candidate: Request,
    running: Iterable[Request],
    needed_tokens: float,
    needed_rows: int,
    *,
    threshold: float,
    waiting: WaitingQueue,
    kv: KVManager,
    ratio: NewTokenRatio,
) -> list[Request]:
    """The fewest, least urgent running requests whose retraction makes room for a more urgent waiting one.

    Only requests that the candidate exceeds in urgency by more than `threshold` count. Empty if even all of
    them do not free `needed_tokens` and `needed_rows`.
    """
    urgency = waiting.urgency(candidate)
    weaker = [request for request in running if urgency - waiting.urgency(request) > threshold]
    victims: list[Request] = []
    for request in retraction_order(weaker, "priority", waiting.urgency):
        victims.append(request)
        needed_rows -= 1
        needed_tokens -= kv.held_alone(request) * kv.page_size
        needed_tokens -= remaining_output(request) * ratio.of(request)
        if needed_rows <= 0 and needed_tokens <= 0:
            return victims
    return []
