"""Compiled steps kept between starts: the second start compiles nothing and computes the same."""

import os
from pathlib import Path

import jax
import pytest

from jaxgen import Engine
from jaxgen.execution.programs import Programs
from jaxgen.execution.step_cache import StepCache

MODEL = Path(__file__).parent.parent / "golden" / "llama3"
GREEDY = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache that one start has filled, with the tokens of that start."""
    directory = tmp_path_factory.mktemp("cache")
    directory.chmod(0o700)
    return directory, tokens(directory)


def tokens(directory, **options) -> list[int]:
    small = {
        "max_running_requests": 2,
        "cuda_graph_bs_decode": [2],
        "chunked_prefill_size": 32,
        "cuda_graph_bs_prefill": [32],
        "max_total_tokens": 512,
        "context_length": 128,
    }
    with Engine(
        model_path=str(MODEL),
        skip_tokenizer_init=True,
        device="cpu",
        compilation_cache_dir=str(directory),
        **(small | options),
    ) as engine:
        return engine.generate(input_ids=[5, 6, 7], sampling_params=GREEDY)["output_ids"]


def count_compiles(monkeypatch) -> list:
    compiled = []
    compile_step = Programs.compile

    def counted(self, key, shapes):
        compiled.append(key)
        return compile_step(self, key, shapes)

    monkeypatch.setattr(Programs, "compile", counted)
    return compiled


def test_the_second_start_compiles_nothing(cache, monkeypatch):
    directory, expected = cache
    compiled = count_compiles(monkeypatch)
    assert tokens(directory) == expected
    assert compiled == []


@pytest.mark.parametrize(
    "options", [{"page_size": 8}, {"context_length": 64}, {"enable_return_hidden_states": True}], ids=str
)
def test_other_options_get_steps_of_their_own(cache, monkeypatch, options):
    directory, expected = cache
    compiled = count_compiles(monkeypatch)
    assert tokens(directory, **options) == expected
    assert compiled


def test_damaged_files_are_compiled_anew(cache, monkeypatch, caplog):
    directory, expected = cache
    files = sorted(directory.glob("*.step"))
    contents = [file.read_bytes() for file in files]
    files[0].write_bytes(contents[0][:-1])
    for file in files[1:]:
        file.write_bytes(b"")
    compiled = count_compiles(monkeypatch)
    assert tokens(directory, log_level="warning") == expected
    assert compiled
    assert "damaged" in caplog.text


def test_a_directory_others_can_write_to_is_refused(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(ValueError, match="chmod"):
        tokens(tmp_path)


def test_the_steps_used_longest_ago_go_first(tmp_path):
    for age, name in enumerate("abc"):
        file = tmp_path / f"{name}.step"
        file.write_bytes(bytes(100))
        os.utime(file, (1000 - age, 1000 - age))

    StepCache(tmp_path, jax.devices()).trim(max_bytes=150)
    assert [file.name for file in tmp_path.iterdir()] == ["a.step"]
