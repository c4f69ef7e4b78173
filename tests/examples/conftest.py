import pytest
from example_harness import make_model


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """Path of a tiny model with its tokenizer."""
    return str(make_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Compiled steps, shared by the examples of a test session."""
    return tmp_path_factory.mktemp("xla")
