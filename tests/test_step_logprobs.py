"""From a step's arrays to the entries of results."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxgen.logprobs import StepLogprobs


@given(rows=st.integers(0, 6), top=st.integers(1, 5), width=st.integers(0, 3), data=st.data())
def test_entries_hold_what_the_arrays_hold_as_plain_floats_and_ints(rows, top, width, data):
    rng = np.random.default_rng(0)
    chosen, values, of_ids = (
        rng.normal(size=shape).astype(np.float32) for shape in (rows, (rows, top), (rows, width))
    )
    ids = rng.integers(0, 1 << 31, (rows, top)).astype(np.int32)
    start, count = data.draw(st.integers(0, rows)), data.draw(st.integers(0, top))
    asked = list(range(100, 100 + data.draw(st.integers(0, width))))

    found = StepLogprobs(chosen, values, ids, of_ids)
    assert len(found) == rows
    assert found.chosen == chosen.tolist()
    for row in range(rows):
        largest, of_asked = found.top(row, count), found.of_ids(row, asked)
        assert largest == list(zip(values[row, :count].tolist(), ids[row].tolist(), [None] * count))
        assert of_asked == list(zip(of_ids[row].tolist(), asked, [None] * width))
        assert all(type(value) is float and type(token) is int for value, token, _ in largest + of_asked)
    part = found.rows(slice(start, rows))
    assert part.chosen == chosen[start:].tolist()
    assert [part.top(row, top) for row in range(len(part))] == [
        found.top(row, top) for row in range(start, rows)
    ]
