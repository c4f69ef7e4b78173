"""One engine with default options, shared by every test that leaves it as it found it."""

from collections.abc import Iterator

import pytest
from tiny_engine import check_idle, start

from jaxgen import Engine


@pytest.fixture(scope="session")
def shared_engine() -> Iterator[Engine]:
    with start(enable_return_hidden_states=True) as engine:
        yield engine


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    """The shared engine with an empty prefix cache; afterwards it must be idle, with no page lost."""
    assert shared_engine.flush_cache().success
    yield shared_engine
    check_idle(shared_engine)
