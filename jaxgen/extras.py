"""What a step leaves for requests beside their tokens."""

from __future__ import annotations

import itertools

from jaxgen.execution.runner import StepResult
from jaxgen.execution.sampler import Logprobs
from jaxgen.logprobs import StepLogprobs
from jaxgen.scheduling.plan import Chunk, Plan


class Extras:
    """Files a step's log-probabilities and hidden states with the requests that asked for them.

    Made before the scheduler takes the step's tokens: what has ended by then gets nothing any more.
    """

    def __init__(self, plan: Plan, result: StepResult):
        self._plan, self._result = plan, result
        self._logprobs, self._input_logprobs = _entries(result.logprobs), _entries(result.input_logprobs)
        empty = result.logprobs is None and result.hidden is None and result.input_logprobs is None
        # What goes on, and how many tokens each request had before this step.
        chunks, lanes = ((), ()) if empty else (enumerate(plan.chunks), enumerate(plan.lanes))
        self._chunks = [
            (i, c, len(c.request.output_ids)) for i, c in chunks if c.request.finish_reason is None
        ]
        self._lanes = [(i, r, len(r.output_ids)) for i, r in lanes if r.finish_reason is None]

    def record(self) -> None:
        """What was asked for, for each token that the scheduler has taken from this step."""
        offsets = [0, *itertools.accumulate(chunk.length for chunk in self._plan.chunks)]
        for row, chunk, before in self._chunks:
            self._record_chunk(chunk, row, offsets[row], before)
        self._record_lanes(offsets[-1])

    def _record_lanes(self, first_token: int) -> None:
        hidden = self._result.hidden
        num_lanes, first_row = len(self._plan.lanes), len(self._plan.chunks)
        for lane, request, before in self._lanes:
            places = range(lane, lane + (len(request.output_ids) - before) * num_lanes, num_lanes)
            if request.return_logprob and self._logprobs is not None:
                for i, place in enumerate(places, before):
                    request.sink.add_output_logprobs(self._logprobs, first_row + place, request.output_ids[i])
            if request.return_hidden and hidden is not None:
                for place in places:
                    request.sink.add_next_hidden(hidden[first_token + place])

    def _record_chunk(self, chunk: Chunk, row: int, offset: int, before: int) -> None:
        request, sink, hidden = chunk.request, chunk.request.sink, self._result.hidden
        if request.return_logprob and request.logprob_start >= 0 and self._input_logprobs is not None:
            span = slice(offset, offset + chunk.length)
            sink.add_input_logprobs(request, chunk.start, self._input_logprobs.rows(span))
        if not chunk.last:
            return
        if request.return_logprob and self._logprobs is not None:
            token = request.output_ids[before] if len(request.output_ids) > before else None
            sink.add_output_logprobs(self._logprobs, row, token)
        if request.return_hidden and hidden is not None:
            vectors = hidden[offset : offset + chunk.length]
            # A retracted request prefills again; only the vector of its newest position is news.
            if before:
                sink.add_next_hidden(vectors[-1])
            else:
                sink.add_hidden(vectors)


def _entries(found: Logprobs | None) -> StepLogprobs | None:
    if found is None:
        return None
    return StepLogprobs(found.chosen, found.top_values, found.top_ids, found.id_values)
