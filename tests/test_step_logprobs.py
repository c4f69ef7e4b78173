"""From a step's arrays to the entries of results."""

import itertools

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
    start, step = data.draw(st.integers(0, rows)), data.draw(st.integers(1, 3))
    count, picked = data.draw(st.integers(0, top)), slice(start, rows, step)
    asked = list(range(100, 100 + data.draw(st.integers(0, width))))

    found = StepLogprobs(chosen, values, ids, of_ids)
    assert len(found) == rows
    assert found.chosen == chosen.tolist()
    assert found.top(picked, count) == [
        [(value, token, None) for value, token in zip(v[:count].tolist(), i[:count].tolist())]
        for v, i in zip(values[picked], ids[picked])
    ]
    assert found.of_ids(picked, asked) == [
        list(zip(row.tolist(), asked, [None] * width)) for row in of_ids[picked]
    ]
    for value, token, _ in itertools.chain(*found.top(picked, count), *found.of_ids(picked, asked)):
        assert type(value) is float and type(token) is int
    part = found.rows(slice(start, rows))
    assert part.chosen == chosen[start:].tolist()
    assert part.top(slice(None), top) == found.top(slice(start, rows), top)
