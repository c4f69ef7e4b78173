"""Which tensors may stand for a parameter, and how a shard is cut from several of them."""

import numpy as np
import pytest

from jaxgen.checkpoint.assemble import _shard, can_view
from jaxgen.models.weights import Part, WeightSource


@pytest.mark.parametrize(
    "found, view, expected",
    [
        ((8, 4), (8, 4), True),
        ((8, 4), (2, 4, 4), True),
        ((8, 4), (1, 2, 1, 4, 4, 1), True),
        ((8,), (2, 2, 2), True),
        ((1, 8), (8,), True),
        ((), (), True),
        ((), (1,), True),
        ((4, 8), (8, 4), False),
        ((8, 4), (4, 2, 2), False),
        ((8, 4), (32,), False),
        ((8, 4), (8, 5), False),
        ((8, 4), (8,), False),
        ((8,), (8, 4), False),
    ],
)
def test_axes_may_be_split_but_not_moved_or_merged(found, view, expected):
    assert can_view(found, view) is expected


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_any_window_of_a_concatenation(axis, copy):
    """Both ways: into a new buffer, and as a view of the file where the device copies it anyway."""
    rng = np.random.default_rng(axis)
    sizes = [3, 1, 4]
    views = [
        rng.standard_normal([size if i == axis else n for i, n in enumerate((4, 5, 6))]) for size in sizes
    ]
    whole = np.concatenate(views, axis)
    for _ in range(200):
        spans = tuple(tuple(sorted(rng.choice(n + 1, 2, replace=False).tolist())) for n in whole.shape)
        window = _shard(views, axis, spans, np.dtype(np.float64), copy=copy)
        np.testing.assert_array_equal(window, whole[tuple(slice(*span) for span in spans)])
        single = _shard([whole], axis, spans, np.dtype(np.float64), copy=copy)
        np.testing.assert_array_equal(single, window)
        assert not (copy and np.shares_memory(single, whole))


@pytest.mark.parametrize(
    "shapes, axis, message",
    [
        ([(2, 3), (2, 4)], 0, "do not fit"),
        ([(2, 3), (2, 3, 1)], 0, "do not fit"),
        ([(2, 3)], 2, "axis 2"),
        ([(2, 0)], 0, "no elements"),
        ([], 0, "at least one"),
    ],
)
def test_impossible_tables_are_refused(shapes, axis, message):
    with pytest.raises(ValueError, match=message):
        WeightSource(tuple(Part(f"t{i}", shape) for i, shape in enumerate(shapes)), axis)
