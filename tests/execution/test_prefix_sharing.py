"""Which tokens decode lanes have in common, and when a step reads them once."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgen.execution.common_prefix import LEAST_BYTES, LEAST_LANES, PrefixSharing

PAGE = 16
# Of a prefix of one page it pays to know when 32 lanes have it.
CHEAP = PrefixSharing(page_size=PAGE, token_bytes=LEAST_BYTES // (LEAST_LANES * PAGE), most_tokens=1024)
NARROW = replace(CHEAP, token_bytes=CHEAP.token_bytes // 6)


@given(st.data())
def test_tokens_are_those_of_the_leading_pages_that_all_lanes_have(data):
    lanes = data.draw(st.integers(LEAST_LANES, LEAST_LANES + 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    common = data.draw(st.integers(0, 12))
    tables = np.concatenate(
        [np.tile(rng.integers(0, 9, common), (lanes, 1)), rng.integers(0, 3, (lanes, 4))], axis=1
    )
    lengths = data.draw(st.lists(st.integers(1, 16 * PAGE), min_size=lanes, max_size=lanes).map(np.array))

    whole = min(lengths) // PAGE
    expected = 0
    while expected < whole and len(set(tables[:, expected])) == 1:
        expected += 1
    rows = rng.permutation(lanes + 2)[:lanes]
    everything = rng.integers(0, 9, (lanes + 2, tables.shape[1]))
    everything[rows] = tables
    assert CHEAP.tokens(everything, rows, lengths) == expected * PAGE


@pytest.mark.parametrize(
    ("sharing", "lanes", "tokens"),
    [
        (CHEAP, LEAST_LANES - 1, 0),  # too few lanes
        (NARROW, LEAST_LANES, 0),  # too short a prefix
        (NARROW, 2 * LEAST_LANES, 4 * PAGE),
        (replace(CHEAP, most_tokens=0), LEAST_LANES, 0),  # the model or the device does not
        (CHEAP, LEAST_LANES, 4 * PAGE),
    ],
)
def test_a_prefix_counts_where_it_pays(sharing, lanes, tokens):
    tables = np.tile(np.arange(8), (lanes, 1))
    assert sharing.tokens(tables, np.arange(lanes), np.full(lanes, 4 * PAGE + 3)) == tokens


def test_buckets_are_few_and_such_that_a_prefix_may_pay():
    buckets = (1, 8, 16, 32, 48, 64, 96, 128, 256, 320)
    assert CHEAP.buckets(buckets) == (32, 64, 128, 256, 320)
    assert replace(CHEAP, most_tokens=0).buckets(buckets) == ()
    # 128 lanes would have to share more than fits the context.
    assert replace(NARROW, most_tokens=PAGE).buckets(buckets) == (256, 320)
