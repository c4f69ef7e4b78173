"""Whose log-probabilities a step's rows are."""

import numpy as np

from jaxgen.execution.runner import StepResult
from jaxgen.execution.sampler import Logprobs
from jaxgen.extras import Extras
from jaxgen.sampling_params import SamplingParams
from jaxgen.scheduling.plan import Chunk, Plan, SchedulerConfig
from jaxgen.scheduling.request import Request
from jaxgen.scheduling.scheduler import Scheduler

EOS, VOCABULARY, NAN = 1, 100, -1


class Sink:
    def __init__(self):
        self.rows = []

    def add_output_logprobs(self, logprobs, row, token):
        self.rows.append((row, token))


def request(rid, new_tokens=10, **options):
    params = SamplingParams()
    options |= {"eos_id": EOS, "return_logprob": True, "sink": Sink()}
    return Request(rid, [5, 6, 7], params, VOCABULARY, new_tokens, **options)


def take(plan, tokens):
    """What the engine thread does with a step's result."""
    rows = len(tokens)
    none = np.zeros((rows, 0), np.float32)
    found = Logprobs(np.zeros(rows, np.float32), none, none.astype(np.int32), none)
    extras = Extras(plan, StepResult(tokens, found, None, None))
    sampled = [t for t, chunk in zip(tokens, plan.chunks) if chunk.last] + tokens[len(plan.chunks) :]
    config = SchedulerConfig(num_pages=8, page_size=4, max_rows=8, context_length=64)
    Scheduler(config).collect(plan, sampled)
    extras.record()


def test_a_launch_of_several_steps():
    """Rows count step by step: an entry for each token that was taken, with the id that the result shows."""
    lanes = [request("goes on"), request("ends", new_tokens=1), request("NaN"), request("ended")]
    lanes[3].finish_reason = {"type": "abort"}
    take(Plan("decode", lanes=lanes, steps=2), [20, 21, 22, 23, 30, 31, NAN, 33])
    assert [lane.sink.rows for lane in lanes] == [[(0, 20), (4, 30)], [(1, 21)], [(2, 22), (6, EOS)], []]
    assert [lane.output_ids for lane in lanes] == [[20, 30], [21], [22, EOS], []]


def test_prompts_with_lanes_behind():
    prompts = [request("half"), request("whole"), request("scored", new_tokens=0), request("ended")]
    prompts[3].finish_reason = {"type": "abort"}
    lane = request("lane", output_ids=[9])
    chunks = [Chunk(prompt, 0, 2, last=prompt.rid != "half") for prompt in prompts]
    take(Plan("prefill", chunks=chunks, lanes=[lane]), [20, 21, 22, 23, 24])
    assert [prompt.sink.rows for prompt in prompts] == [[], [(1, 21)], [(2, None)], []]
    assert lane.sink.rows == [(4, 24)]
