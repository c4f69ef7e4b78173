"""What a call puts off of garbage collection does not come at its end, but comes."""

import gc

import pytest

from jaxgen.garbage import YOUNG, RareCollections

# Objects: more collections of new ones than the middle generation waits for outside.
MANY = 15 * YOUNG + YOUNG // 2


@pytest.fixture
def collected():
    """Generations that are collected, under the collector's own thresholds."""
    generations = []

    def note(phase, info):
        if phase == "start":
            generations.append(info["generation"])

    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    gc.collect()
    gc.callbacks.append(note)
    yield generations
    gc.callbacks.remove(note)
    gc.set_threshold(*before)


def test_the_end_brings_on_no_collection_but_of_new_objects(collected):
    with RareCollections():
        results = [[] for _ in range(MANY)]
        assert set(collected) == {0}
        collected.clear()
    results += [[] for _ in range(100)]
    assert collected == [0]
    results += [[] for _ in range(1000)]
    assert max(collected) > 0


def test_what_was_put_off_is_caught_up_with_once_and_under_way(collected):
    rare = RareCollections()
    with rare:
        results = [[] for _ in range(MANY)]
    collected.clear()
    rare.catch_up()
    assert collected == []
    with rare:
        rare.catch_up()
        rare.catch_up()
    assert collected == [1] and len(results) == MANY


@pytest.mark.parametrize("off", [gc.disable, lambda: gc.set_threshold(0)], ids=["disabled", "threshold 0"])
def test_collections_that_are_off_stay_off(collected, off):
    rare = RareCollections()
    with rare:
        results = [[] for _ in range(MANY)]
    collected.clear()
    off()
    try:
        with rare:
            results += [[] for _ in range(MANY)]
            rare.catch_up()
        assert collected == []
    finally:
        gc.enable()


def test_new_objects_seen_under_way_are_not_looked_at_in_the_end(collected):
    rare = RareCollections()
    with rare:
        prompts = [[] for _ in range(YOUNG // 2)]
        rare.catch_up()
        assert collected == [0]
    assert collected == [0] and len(prompts) == YOUNG // 2
