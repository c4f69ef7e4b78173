"""The least seconds that a device needs for a workload, whatever the engine."""

from __future__ import annotations

from jaxgen.bench.costs import ModelCosts, Rates, Work
from jaxgen.bench.workloads import Workload


def floor_seconds(workload: Workload, costs: ModelCosts, rates: Rates, devices: int) -> dict[str, float]:
    """Floors of a workload's figures, under the names of `runs.run_once`.

    Every request that still wants tokens has a lane, a prefix is computed once, and read once per step.
    """
    inputs, outputs = workload.lengths()
    prefix, requests = workload.prefix, workload.requests
    # The first token of a request comes out of its prefill, each of the others out of a decode step.
    steps = max(outputs) - 1
    decoded = Work(
        tokens=sum(outputs) - requests,
        keys=sum(
            costs.keys(prefix + length, prefix + length + new - 1) for length, new in zip(inputs, outputs)
        ),
    )
    shared = costs.keys(prefix - 1, prefix) if prefix else 0.0
    distinct = max(0.0, decoded.keys - (decoded.tokens - steps) * shared)
    decode = costs.decode_seconds(decoded, steps, rates, devices, distinct) if steps else 0.0
    if workload.measure == "decode":
        return {"decode": decode / steps}

    own = Work(tokens=sum(inputs), keys=sum(costs.keys(prefix, prefix + length) for length in inputs))
    ends = [prefix + length for length in inputs]
    last = Work(tokens=requests, keys=sum(costs.keys(end - 1, end) for end in ends))
    prefill = costs.prefill_seconds(own, last, rates, devices)
    if workload.measure != "prefix":
        return {workload.measure: prefill + decode}
    whole = Work(own.tokens + prefix, own.keys + costs.keys(0, prefix))
    cold = costs.prefill_seconds(whole, last, rates, devices)
    return {"cold": cold + decode, "warm": prefill + decode}
