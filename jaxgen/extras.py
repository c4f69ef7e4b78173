"""What a step leaves for requests beside their tokens."""

from __future__ import annotations

from jaxgen.execution.runner import StepResult
from jaxgen.execution.sampler import Logprobs
from jaxgen.logprobs import StepLogprobs
from jaxgen.scheduling.plan import Chunk, Plan


class Extras:
    """Files a step's log-probabilities and hidden states with the requests that asked for them."""

    def __init__(self, plan: Plan, result: StepResult):
        self._plan, self._result = plan, result
        self._logprobs, self._input_logprobs = _entries(result.logprobs), _entries(result.input_logprobs)
        self._empty = result.logprobs is None and result.hidden is None and result.input_logprobs is None
        # The lanes that go on, and how many tokens each had before this step.
        lanes = () if self._empty else enumerate(plan.lanes)
        self._lanes = [(i, r, len(r.output_ids)) for i, r in lanes if r.finish_reason is None]

    def record_chunks(self) -> None:
        """What prefill rows asked for; before the scheduler takes their tokens."""
        if self._empty:
            return
        offset = 0
        for row, chunk in enumerate(self._plan.chunks):
            if chunk.request.finish_reason is None:
                self._record_chunk(chunk, row, offset)
            offset += chunk.length

    def record_lanes(self) -> None:
        """What decode lanes asked for, for each token that the scheduler has taken from this step."""
        plan, hidden = self._plan, self._result.hidden
        num_lanes, first_row = len(plan.lanes), len(plan.chunks)
        first_token = sum(chunk.length for chunk in plan.chunks)
        for lane, request, before in self._lanes:
            stop = lane + (len(request.output_ids) - before) * num_lanes
            if request.return_logprob and self._logprobs is not None:
                rows = slice(first_row + lane, first_row + stop, num_lanes)
                request.sink.add_output_logprobs(self._logprobs, rows)
            if request.return_hidden and hidden is not None:
                for place in range(lane, stop, num_lanes):
                    request.sink.add_next_hidden(hidden[first_token + place])

    def _record_chunk(self, chunk: Chunk, row: int, offset: int) -> None:
        request, sink, hidden = chunk.request, chunk.request.sink, self._result.hidden
        if request.return_logprob and request.logprob_start >= 0 and self._input_logprobs is not None:
            span = slice(offset, offset + chunk.length)
            sink.add_input_logprobs(request, chunk.start, self._input_logprobs.rows(span))
        if not chunk.last:
            return
        if request.return_logprob and self._logprobs is not None:
            sink.add_output_logprobs(self._logprobs, slice(row, row + 1))
        if request.return_hidden and hidden is not None:
            vectors = hidden[offset : offset + chunk.length]
            # A retracted request prefills again; only the vector of its newest position is news.
            if request.output_ids:
                sink.add_next_hidden(vectors[-1])
            else:
                sink.add_hidden(vectors)


def _entries(found: Logprobs | None) -> StepLogprobs | None:
    if found is None:
        return None
    return StepLogprobs(found.chosen, found.top_values, found.top_ids, found.id_values)
