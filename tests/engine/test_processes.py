"""Whole programs, as a user would run them: without main guard, from anywhere, silent, and with a clean exit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_engine import OPTIONS, golden_cases, greedy

ROOT = Path(__file__).parent.parent.parent
CASE = golden_cases()[1]
REQUEST = {"input_ids": CASE["prompt_ids"], "sampling_params": greedy(8)}
EXPECTED = f"{CASE['greedy_ids'][:8]}\n"

# `-I` ignores PYTHONPATH, so every program finds the source tree by itself.
PREAMBLE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import jaxgen
options = {OPTIONS!r}
request = {REQUEST!r}
"""


def command(program: str, how: str, tmp_path: Path) -> tuple[list[str], str | None]:
    """(arguments, standard input)."""
    if how == "stdin":
        return [sys.executable, "-"], program
    if how == "file":
        path = tmp_path / "program.py"
        path.write_text(program, encoding="utf-8")
        return [sys.executable, str(path)], None
    flags = how.split()
    return [sys.executable, *flags[:-1], "-c", program], None


def run(program: str, tmp_path: Path, how: str = "-c") -> subprocess.CompletedProcess:
    arguments, stdin = command(PREAMBLE + program, how, tmp_path)
    return subprocess.run(
        arguments,
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=240,
    )


def check(result: subprocess.CompletedProcess, stdout: str) -> None:
    """Exit status 0, exactly this output, and not a byte on stderr."""
    assert (result.returncode, result.stdout, result.stderr) == (0, stdout, "")


PLAIN = """
engine = jaxgen.Engine(**options)
print(engine.generate(**request)["output_ids"])
"""

IN_A_THREAD = """
import threading
engine = None

def work():
    global engine
    engine = jaxgen.Engine(**options)
    print(engine.generate(**request)["output_ids"])

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""

BUSY_AT_EXIT = """
import asyncio, threading, time
engine = jaxgen.Engine(**options)
endless = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 240, "ignore_eos": True}}
chunks = engine.generate(**endless, stream=True)
next(chunks)

async def main():
    chunks = await engine.async_generate(**endless, stream=True)
    task = asyncio.create_task(engine.async_generate(**endless))
    await anext(chunks)

asyncio.run(main())
print(engine.generate(**request)["output_ids"])
"""

WITH_SHUTDOWN = """
with jaxgen.Engine(**options) as engine:
    print(engine.generate(**request)["output_ids"])
"""


@pytest.mark.parametrize(
    ("program", "how"),
    [
        (PLAIN, "-I -O -c"),
        (PLAIN, "stdin"),
        (IN_A_THREAD, "file"),
        (BUSY_AT_EXIT, "-c"),
        (WITH_SHUTDOWN, "-W error -c"),
    ],
    ids=["isolated and optimised", "standard input", "in a thread", "busy at exit", "warnings are errors"],
)
def test_programs_without_main_guard_or_shutdown_exit_cleanly(program, how, tmp_path):
    check(run(program, tmp_path, how), EXPECTED)
    assert [path.name for path in tmp_path.iterdir()] == (["program.py"] if how == "file" else [])


def test_importing_starts_nothing(tmp_path):
    program = """
assert "jax" not in sys.modules and "numpy" not in sys.modules and "transformers" not in sys.modules
from jaxgen import RequestError, SamplingParams, ServerArgs
from jaxgen.utils import stream_and_merge, trim_overlap
assert "jax" not in sys.modules
import threading
from jaxgen import Engine, GenerateReqInput
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
assert threading.active_count() == 1
assert set(jaxgen.__all__) <= set(dir(jaxgen)) and jaxgen.__version__
try:
    jaxgen.Engin
except AttributeError as error:
    print(error)
"""
    check(run(program, tmp_path), "module 'jaxgen' has no attribute 'Engin'\n")


def test_at_level_error_nothing_is_printed_and_logging_is_left_alone(tmp_path):
    program = """
import logging
logging.basicConfig(level=logging.WARNING)

def configuration():
    root, other = logging.getLogger(), logging.getLogger("transformers")
    return root.level, root.handlers[:], root.filters[:], root.manager.disable, other.filters[:]

before = configuration()
engine = jaxgen.Engine(**options | {"max_total_tokens": 1 << 40, "allow_auto_truncate": True, "sampling_backend": "x"})
engine.generate(**request)
engine.generate(input_ids=[5] * 1000, sampling_params={"max_new_tokens": 1000})
for chunk in engine.generate(["The fox", "a dog"], {"n": 2}, stream=True, return_logprob=True):
    pass
try:
    engine.generate(input_ids=[])
except ValueError:
    pass
engine.flush_cache()
engine.shutdown()
assert configuration() == before
"""
    check(run(program, tmp_path), "")


def test_an_unhandled_exception_shows_only_itself(tmp_path):
    result = run(PLAIN + "raise SystemExit('the end')", tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (1, EXPECTED, "the end\n")


def test_ctrl_c_ends_a_program_at_once(tmp_path):
    program = """
engine = jaxgen.Engine(**options)
print("ready", flush=True)
while True:
    engine.generate(input_ids=[[5, 6, 7]] * 20, sampling_params={"max_new_tokens": 240, "ignore_eos": True})
"""
    arguments, _ = command(PREAMBLE + program, "-c", tmp_path)
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert stdout == ""
    assert stderr.startswith("Traceback") and stderr.endswith("KeyboardInterrupt\n")
    assert stderr.count("Traceback") == 1


# Programs written for SGLang's offline engine, with jaxgen for sglang.
DROP_IN = """
import asyncio
import jaxgen as sgl
from jaxgen.utils import async_stream_and_merge, stream_and_merge


def main():
    prompts = [
        "Hello, my name is",
        "The president of the United States is",
        "The capital of France is",
        "The future of AI is",
    ]
    sampling_params = {"temperature": 0.8, "top_p": 0.95}
    llm = sgl.Engine(**options)
    outputs = llm.generate(prompts, sampling_params)
    for prompt, output in zip(prompts, outputs):
        assert isinstance(output["text"], str)
        assert output["meta_info"]["completion_tokens"] == len(output["output_ids"]) > 0

    for prompt in prompts[:2]:
        assert isinstance(stream_and_merge(llm, prompt, sampling_params), str)
    greedy = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    expected = [output["text"] for output in llm.generate(prompts, greedy)]

    for prompt, text in zip(prompts, expected):
        offset, printed = 0, ""
        for chunk in llm.generate(prompt, greedy, stream=True):
            printed += chunk["text"][offset:]
            offset = len(chunk["text"])
        assert printed == text
        assert stream_and_merge(llm, prompt, greedy) == text

    async def non_streaming():
        outputs = await llm.async_generate(prompts, sampling_params)
        assert len(outputs) == 4

    asyncio.run(non_streaming())

    async def streaming():
        for prompt, text in zip(prompts, expected):
            pieces = [piece async for piece in async_stream_and_merge(llm, prompt, greedy)]
            assert "".join(pieces) == text
        generator = await llm.async_generate(prompts[0], greedy, stream=True)
        async for chunk in generator:
            text = chunk["text"]
        assert text == expected[0]

    asyncio.run(streaming())
    llm.shutdown()
    print("done")


if __name__ == "__main__":
    main()
"""


def test_programs_written_for_sglang_run_as_they_are(tmp_path):
    check(run(DROP_IN, tmp_path, "file"), "done\n")
