"""The order in which waiting requests are considered for prefill."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxgen.scheduling.kv import KVManager
from jaxgen.scheduling.prefix_cache import Node
from jaxgen.scheduling.request import Request
from jaxgen.scheduling.waiting import WaitingQueue

LPM_MAX_WAITING = 128
SHARED_PREFIX = 32


def order(policy: str, waiting: WaitingQueue, kv: KVManager) -> Iterable[Request]:
    """Waiting requests in the order of the policy, without those held back for this round.

    Cache-aware policies hold a request back while it shares 32 leading tokens with one ahead of it and has fewer
    in the cache: after that one's prefill they are there, with whatever else the two share.
    """
    if policy == "dfs-weight":
        return hold_back(depth_first(list(waiting), kv), kv)
    if policy == "lpm" and len(waiting) <= LPM_MAX_WAITING:  # looked up anew whenever the cache has changed
        return hold_back(sorted(waiting, key=lambda r: (-kv.match(r).length, r.sequence)), kv)
    return hold_back(waiting, kv) if policy == "lpm" else waiting


def hold_back(requests: Iterable[Request], kv: KVManager) -> Iterable[Request]:
    """Drop requests whose first tokens an earlier one of this round is about to compute.

    Nothing enters the cache meanwhile, so what holds for that one's first tokens holds for the others' too.
    """
    ahead: set[tuple[str, bytes]] = set()
    for request in requests:
        # A request that may not reuse more than this gains nothing by waiting.
        if request.match_limit > SHARED_PREFIX:
            prefix = (request.namespace, request.head_key(SHARED_PREFIX))
            if prefix in ahead:
                continue
            if kv.match(request).length < SHARED_PREFIX:
                ahead.add(prefix)
        yield request


def depth_first(requests: list[Request], kv: KVManager) -> list[Request]:
    """Requests in a depth-first walk of the prefix tree, subtrees with most waiting requests first."""
    at: dict[int, list[Request]] = {}
    weight: dict[int, int] = {}
    below: dict[int, dict[int, Node]] = {}
    roots: dict[bytes, Node] = {}
    for request in requests:
        match = kv.match(request)
        node = match.node
        if node.parent is None:
            node = roots.setdefault(node.key, node)  # an empty namespace has no root of its own yet
        at.setdefault(id(node), []).append(request)
        while True:
            weight[id(node)] = weight.get(id(node), 0) + 1
            if node.parent is None:
                roots[node.key] = node
                break
            below.setdefault(id(node.parent), {})[id(node)] = node
            node = node.parent
    ordered: list[Request] = []
    stack = _heaviest_last(roots, weight)
    while stack:
        node = stack.pop()
        ordered += at.get(id(node), ())
        stack += _heaviest_last(below.get(id(node), {}), weight)
    return ordered


def _heaviest_last(nodes: Mapping[Any, Node], weight: dict[int, int]) -> list[Node]:
    """Ascending weight; of equal weights the one met first comes last, hence is walked first."""
    nodes_met_last_first = list(nodes.values())[::-1]
    return sorted(nodes_met_last_first, key=lambda node: weight[id(node)])
