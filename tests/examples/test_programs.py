"""Every example runs and prints what its description promises."""

import re

from example_harness import EXAMPLES, SMALL, run_program


def run(name, cache, model, *args):
    return run_program(EXAMPLES / name, cache, "--model-path", model, *args)


def test_launch_engine(model, cache):
    text = run("launch_engine.py", cache, model)
    assert len(text) > 1
    assert text.endswith("\n")


def test_offline_batch(model, cache):
    text = run("offline_batch.py", cache, model, *SMALL)
    assert text.count("Prompt: ") == text.count("Generated: ") == 4


def test_offline_batch_async(model, cache):
    text = run("offline_batch_async.py", cache, model, *SMALL, "--num-tasks", "100")
    tasks, tokens = map(int, re.search(r"(\d+) tasks, (\d+) tokens", text).groups())
    assert tasks == 100
    assert 100 <= tokens <= 1600


def test_streaming(model, cache):
    text = run("streaming.py", cache, model, *SMALL)
    _, sync, _, merged, merged_async = re.split(r"=== .*\n", text)
    assert len(sync) > 1
    assert sync == merged == merged_async


def test_streaming_of_deltas(model, cache):
    text = run("streaming.py", cache, model, *SMALL, "--incremental-streaming-output")
    _, merged, merged_async = re.split(r"=== .*\n", text)
    assert len(merged) > 1
    assert merged == merged_async


def test_token_in_token_out(model, cache):
    text = run("token_in_token_out.py", cache, model, *SMALL)
    ids = re.findall(r"Generated: .*?\[([\d, ]+)\]$", text, re.MULTILINE | re.DOTALL)
    assert len(ids) == 2
    assert all(0 < len(line.split(",")) <= 16 for line in ids)


def test_hidden_states(model, cache):
    text = run("hidden_states.py", cache, model, *SMALL)
    counts = re.findall(
        r"Prompt tokens: (\d+), completion tokens: (\d+)\nHidden states: \((\d+), (\d+)\)", text
    )
    assert len(counts) == 8  # two prompts, two samples each, two ways of asking
    for prompt, completion, rows, width in (map(int, row) for row in counts):
        assert rows == prompt + completion - 1
        assert width == 36
