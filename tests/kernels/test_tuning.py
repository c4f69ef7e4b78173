"""Tuning tables: what a kernel gets, what a damaged table says, and what the tuner writes."""

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import (
    decode_kernel,
    paged_decode,
    prefill_kernel,
    ragged_prefill,
    sample,
    sample_kernel,
    tune,
    tuning,
)
from kernels_pallas.tuning import TuningTableError, config_for, read_ops, read_table, table_path, trying

SHAPE = {"num_lanes": 64, "head_dim": 128}


@dataclass(frozen=True)
class Config:
    block: int
    stages: int = 2
    turns: bool = True


DEFAULT = Config(block=64)


def candidates(num_lanes: int, head_dim: int) -> list[Config]:
    return [DEFAULT, Config(block=num_lanes), Config(block=head_dim), Config(block=-1), Config(block=7)]


def ask(shape=SHAPE, op="attend"):
    return config_for(op, shape, DEFAULT, candidates)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes the table of the default device, anew for each call."""
    path = tmp_path / "this_device.json"
    monkeypatch.setattr(tuning, "table_path", lambda device_kind: path)

    def write(text):
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        read_table.cache_clear()
        return path

    read_table.cache_clear()
    yield write
    read_table.cache_clear()


def entry(config, shape=SHAPE):
    return {"shape": shape, "config": config, "us": 1.5}


def test_without_a_table_the_default(table):
    assert ask() == DEFAULT


def test_an_entry_counts_for_exactly_its_shape_and_op(table):
    table({"ops": {"attend": [entry({"block": 128, "turns": False})]}})
    assert ask() == Config(block=128, stages=2, turns=False)
    assert ask({"head_dim": 128, "num_lanes": 64}) == ask()
    assert ask(SHAPE | {"num_lanes": 65}) == DEFAULT
    assert ask({"num_lanes": 64}) == DEFAULT
    assert ask(op="other") == DEFAULT


def test_a_shape_keeps_its_configuration(table):
    path = table({"ops": {"attend": [entry({"block": 128})]}})
    first = ask()
    path.write_text(json.dumps({"ops": {"attend": [entry({"block": 256})]}}))
    assert ask() == first == Config(block=128)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read"),
        ("[]", '"ops"'),
        ({"ops": {"attend": {}}}, '"ops"'),
        ({"ops": {"attend": ["x"]}}, '"shape"'),
        ({"ops": {"attend": [{"shape": SHAPE}]}}, '"config"'),
        ({"ops": {"attend": [entry({"block": "64"})]}}, "integers"),
        ({"ops": {"attend": [entry({"block": 64}), entry({"block": 65})]}}, "two entries"),
        ({"ops": {"attend": [entry({"blocks": 64})]}}, "blocks"),
    ],
)
def test_a_malformed_table_is_named(table, content, words):
    path = table(content)
    with pytest.raises(TuningTableError) as raised:
        ask()
    assert str(path) in str(raised.value)
    assert words in str(raised.value)


def test_shipped_tables_are_where_kernels_look_and_well_formed():
    folder = table_path("x").parent
    assert folder == Path(__file__).parents[2] / "configs" / "kernels"
    assert folder.is_dir()
    for path in folder.glob("*.json"):
        assert read_ops(path)
        assert path == table_path(json.loads(path.read_text())["device"])


def test_tables_are_named_after_the_device():
    assert table_path("NVIDIA H100 80GB HBM3").name == "NVIDIA_H100_80GB_HBM3.json"
    assert table_path("../../etc").parent == table_path("x").parent


def test_a_trial_tells_what_the_op_asked_with_and_looks_into_no_table(table):
    table("damaged")
    with trying("attend") as trial:
        assert ask() == DEFAULT
        with pytest.raises(TuningTableError):
            ask(op="other")
    assert (trial.shape, trial.default, len(trial.candidates)) == (SHAPE, DEFAULT, 5)
    with trying("attend", Config(block=8)):
        assert ask() == Config(block=8)


def task(seconds, results=None):
    """A task that takes `seconds[block]` and gives `results[block]`."""

    def result():
        return jnp.asarray((results or {}).get(ask().block, [1.0, 2.0]))

    return tune.Task("attend", "a shape", lambda repeats: seconds[ask().block], result)


SECONDS = {64: 10e-6, 128: 8e-6, -1: 9e-6, 7: 7e-6}


def test_the_fastest_right_candidate_wins():
    found = tune.tune(task(SECONDS, {7: [1.0, 2.5]}), repeats=1)
    assert found.config == Config(block=128)
    assert (found.us, found.default_us) == (pytest.approx(8.0), pytest.approx(10.0))
    assert tune.tune(task(SECONDS, {7: [1.01, 2.01]}), repeats=1).config == Config(block=7)


def test_tokens_must_be_equal():
    results = {block: jnp.array([50_000 + (block == 7)]) for block in SECONDS}
    assert tune.tune(task(SECONDS, results), repeats=1).config == Config(block=128)


def test_what_does_not_compile_is_left_out(capsys):
    class Refusing(dict):
        def __missing__(self, block):
            raise ValueError(f"no shared memory for {block}")

    found = tune.tune(task(Refusing({64: 10e-6, 128: 11e-6})), repeats=1)
    assert found.config is None
    assert found.us == found.default_us
    assert "no shared memory for 7" in capsys.readouterr().out


def test_a_gain_within_the_noise_is_none():
    assert tune.tune(task(dict.fromkeys(SECONDS, 9.9e-6) | {64: 10e-6}), repeats=1).config is None


def test_an_op_that_cannot_be_tuned_says_so():
    with pytest.raises(RuntimeError, match="asks for no configuration"):
        tune.tune(tune.Task("attend", "a shape", lambda repeats: 1.0, lambda: jnp.zeros(())), repeats=1)


def test_results_are_read_back_and_replace_earlier_ones(table, tmp_path):
    path = table(
        {"ops": {"attend": [entry({"block": 1}), entry({"block": 2}, {"num_lanes": 8, "head_dim": 64})]}}
    )
    tune.save(path, "a device", [tune.Found("attend", SHAPE, Config(block=128), 8.0, 10.0)])
    read_table.cache_clear()
    assert ask() == Config(block=128)
    assert ask({"num_lanes": 8, "head_dim": 64}).block == 2
    written = json.loads(path.read_text())
    assert (written["device"], written["jax"]) == ("a device", jax.__version__)
    tune.save(path, "a device", [tune.Found("attend", SHAPE, None, 10.0, 10.0)])
    read_table.cache_clear()
    assert ask() == DEFAULT
    assert ask({"num_lanes": 8, "head_dim": 64}).block == 2
    assert list(tmp_path.iterdir()) == [path]


def test_the_command_needs_a_gpu(capsys):
    with pytest.raises(SystemExit):
        tune.main(["decode"])
    assert "run on a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_tasks_run_the_public_op(op):
    args = argparse.Namespace(heads=[(4, 2, 64)], lanes=[2], length=16, tokens=[48])
    (made,) = tune.TASKS[op](args)
    assert made.result().shape == {"decode": (2, 4, 64), "prefill": (48, 4, 64)}[op]
    assert "4/2 x 64" in made.name


def test_decode_asks_with_its_shape_and_runs_what_the_table_says(table, monkeypatch):
    q, pages = jnp.zeros((2, 8, 64), jnp.bfloat16), jnp.zeros((5, 4, 16, 64), jnp.bfloat16)
    operands = (q, pages, pages, jnp.zeros((2, 64), jnp.int32), jnp.zeros(2, jnp.int32))

    def run(deterministic=False):
        used = []
        monkeypatch.setattr(decode_kernel, "_decode", lambda *a, **_: used.append(a[-2]) or (q, pages, pages))
        paged_decode(*operands, implementation="mosaic", deterministic=deterministic)
        return used[0]

    with trying("paged_decode") as trial:
        default = run()
    assert trial.shape == {
        "num_lanes": 2, "num_kv_heads": 4, "group": 2, "head_dim": 64, "page_size": 16, "kv_bits": 16,
    }  # fmt: skip
    assert default in trial.candidates and len(set(trial.candidates)) > 10
    fixed = run(deterministic=True)
    table({"ops": {"paged_decode": [entry({"num_splits": default.num_splits + 3}, trial.shape)]}})
    assert run().num_splits == default.num_splits + 3
    assert run(deterministic=True) == fixed


def test_prefill_asks_with_its_shape_and_runs_what_the_table_says(table, monkeypatch):
    q, pages = jnp.zeros((24, 8, 64), jnp.bfloat16), jnp.zeros((5, 4, 16, 64), jnp.bfloat16)
    operands = (
        q,
        pages,
        pages,
        jnp.zeros((2, 4), jnp.int32),
        jnp.zeros(3, jnp.int32),
        jnp.zeros(2, jnp.int32),
    )

    def run():
        used = []
        monkeypatch.setattr(prefill_kernel, "_prefill", lambda *a: used.append(a[-2]) or q)
        ragged_prefill(*operands, implementation="mosaic")
        return used[0]

    with trying("ragged_prefill") as trial:
        default = run()
    assert trial.shape == {
        "num_tokens": 24, "num_kv_heads": 4, "group": 2, "head_dim": 64, "page_size": 16, "kv_bits": 16,
    }  # fmt: skip
    assert len(set(trial.candidates) - {default}) > 3
    table({"ops": {"ragged_prefill": [entry({"stages": 3, "turns": False}, trial.shape)]}})
    assert run() == dataclasses.replace(default, stages=3, turns=False)


def test_sample_asks_with_its_shape_and_runs_what_the_table_says(table, monkeypatch):
    lanes = jnp.zeros(3)

    def run():
        used = []
        monkeypatch.setattr(sample_kernel, "_sample", lambda *a: used.append(a[-2]) or lanes)
        integers = lanes.astype(jnp.int32)
        options = (lanes, integers, lanes, lanes, integers, integers)
        sample(jnp.zeros((3, 32_000)), *options, implementation="mosaic")
        return used[0]

    with trying("sample") as trial:
        default = run()
    assert trial.shape == {"num_lanes": 3, "vocab_size": 32_000}
    assert len(set(trial.candidates) - {default}) > 3
    table({"ops": {"sample": [entry({"most_parts": 4}, trial.shape)]}})
    assert run() == dataclasses.replace(default, most_parts=4)


def test_heads_are_read_from_the_command_line():
    assert tune._heads("32/8x128") == (32, 8, 128)
    with pytest.raises(argparse.ArgumentTypeError, match="32/8x128"):
        tune._heads("32x128")
