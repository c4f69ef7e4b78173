"""Any event loop and any thread: every situation a caller can be in."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_engine import check_idle, golden_cases, greedy, prompt_of, start

CASES = golden_cases()
ROOT = Path(__file__).parents[2]


def ask(case):
    return {"input_ids": case["prompt_ids"], "sampling_params": greedy(16)}


def right(output, case):
    return output["output_ids"] == case["greedy_ids"][:16]


def wait_until_idle(engine):
    """An abort takes effect by the next scheduler step; the engine is asked between steps."""
    for _ in range(200):
        state = engine.get_server_info()["internal_states"][0]
        if not state["running_batch_size"] and not state["waiting_queue_size"]:
            break
        time.sleep(0.005)
    check_idle(engine)


def test_sync_calls_inside_a_running_loop(engine):
    """As in a notebook cell; the calls block the loop, and need nothing patched."""

    async def cell():
        assert right(engine.generate(**ask(CASES[0])), CASES[0])
        *_, last = engine.generate(**ask(CASES[1]), stream=True)
        assert right(last, CASES[1])
        assert right(await engine.async_generate(**ask(CASES[2])), CASES[2])

    asyncio.run(cell())
    assert not hasattr(
        asyncio, "_nest_patched"
    )  # as nest_asyncio marks it; a dependency may import it unused


def test_a_new_loop_for_every_call_mixed_with_sync_calls(engine):
    async def whole(case):
        return await engine.async_generate(**ask(case))

    async def streaming(case):
        return [chunk async for chunk in await engine.async_generate(**ask(case), stream=True)][-1]

    for case in CASES:
        assert right(asyncio.run(whole(case)), case)
        assert right(engine.generate(**ask(case)), case)
        assert right(asyncio.run(streaming(case)), case)


def test_hundreds_of_tasks_at_once(engine):
    async def main():
        async def one(index):
            case = CASES[index % len(CASES)]
            if index % 3:
                return right(await engine.async_generate(**ask(case)), case)
            chunks = await engine.async_generate(**ask(case), stream=True)
            return right([chunk async for chunk in chunks][-1], case)

        return await asyncio.gather(*map(one, range(300)))

    assert asyncio.run(main()) == [True] * 300


def test_tasks_are_batched_together(engine):
    """Eight long requests: were they run one after the other, the first would end before the last began."""

    async def main():
        first_chunks = []

        async def one(index):
            async for _ in await engine.async_generate(
                input_ids=prompt_of(4, index), sampling_params=greedy(100), stream=True
            ):
                first_chunks.append(index)

        await asyncio.gather(*map(one, range(8)))
        return first_chunks

    seen = asyncio.run(main())
    last_of_first_to_end = min(len(seen) - 1 - seen[::-1].index(index) for index in range(8))
    assert set(seen[:last_of_first_to_end]) == set(range(8))


def test_other_tasks_run_while_the_engine_works(engine):
    async def main():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticker = asyncio.create_task(tick())
        await engine.async_generate(**ask(CASES[0]))
        ticker.cancel()
        return ticks

    assert asyncio.run(main()) > 1


def test_two_loops_in_two_threads_and_threads_without_loops(engine):
    results = []

    def with_loop():
        async def main():
            outputs = await asyncio.gather(*(engine.async_generate(**ask(case)) for case in CASES * 3))
            results.extend(right(output, case) for output, case in zip(outputs, CASES * 3))

        asyncio.run(main())

    def without_loop():
        for case in CASES:
            results.append(right(engine.generate(**ask(case)), case))
            *_, last = engine.generate(case["prompt"], greedy(16), stream=True)
            results.append(right(last, case))

    threads = [threading.Thread(target=target) for target in (with_loop, without_loop) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * (4 * (12 + 8))


def test_a_streaming_iterator_interleaved_with_other_calls(engine):
    first = engine.generate(**ask(CASES[0]), stream=True)
    second = engine.generate(**ask(CASES[1]), stream=True)
    next(first)
    next(second)
    assert right(engine.generate(**ask(CASES[2])), CASES[2])
    assert right([*first][-1], CASES[0])
    assert right([*second][-1], CASES[1])


def test_a_streaming_iterator_continued_in_another_thread(engine):
    chunks = engine.generate(**ask(CASES[0]), stream=True)
    next(chunks)
    results = []
    thread = threading.Thread(target=lambda: results.extend(chunks))
    thread.start()
    thread.join()
    assert right(results[-1], CASES[0])


def long_request(engine, **more):
    return {"input_ids": prompt_of(5), "sampling_params": greedy(240), **more}


def test_closed_dropped_and_cancelled_calls_give_their_pages_back(engine):
    chunks = engine.generate(**long_request(engine), stream=True)
    next(chunks)
    chunks.close()
    wait_until_idle(engine)
    chunks = engine.generate(**long_request(engine), stream=True)
    next(chunks)
    del chunks
    gc.collect()
    wait_until_idle(engine)

    async def main():
        chunks = await engine.async_generate(**long_request(engine), stream=True)
        async for _ in chunks:
            break
        await chunks.aclose()
        tasks = [asyncio.create_task(engine.async_generate(**long_request(engine))) for _ in range(20)]
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        assert all(
            isinstance(r, asyncio.CancelledError)
            for r in await asyncio.gather(*tasks, return_exceptions=True)
        )
        # A loop that is closed under a stream that nobody closed.
        return await anext(await engine.async_generate(**long_request(engine), stream=True))

    asyncio.run(main())
    wait_until_idle(engine)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # asyncio's, of the lost task
def test_a_loop_that_ends_while_a_call_runs_elsewhere(engine):
    """The engine outlives the loop it would have answered."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(engine.async_generate(**long_request(engine)))
    loop.run_until_complete(asyncio.sleep(0.01))
    task._log_destroy_pending = False
    loop.close()
    assert right(engine.generate(**ask(CASES[0])), CASES[0])
    engine.abort_request(abort_all=True)
    wait_until_idle(engine)
    del task
    gc.collect()


@pytest.mark.parametrize("stream", [False, True])
def test_interrupt_during_generate(engine, stream):
    """Ctrl-C aborts the requests, is raised, and the engine goes on."""

    def interrupt_when_running():
        while not engine.get_server_info()["internal_states"][0]["running_batch_size"]:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    prompts = [prompt_of(5, i) for i in range(40)]
    thread = threading.Thread(target=interrupt_when_running)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        result = engine.generate(input_ids=prompts, sampling_params=greedy(240), stream=stream)
        for _ in result:
            pass
        thread.join()  # not reached
    thread.join()
    wait_until_idle(engine)
    assert right(engine.generate(**ask(CASES[0])), CASES[0])


def test_interrupt_during_async_generate(engine):
    async def main():
        await engine.async_generate(
            input_ids=[prompt_of(5, i) for i in range(40)], sampling_params=greedy(240)
        )

    def interrupt_when_running():
        while not engine.get_server_info()["internal_states"][0]["running_batch_size"]:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt_when_running)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    thread.join()
    wait_until_idle(engine)
    assert right(engine.generate(**ask(CASES[0])), CASES[0])


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_calls_in_a_forked_child_are_refused(engine):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # no assertion may escape from here: the child would go on with pytest's work
        refused = 0
        for call in (
            lambda: engine.generate("x"),
            lambda: engine.generate("x", stream=True),
            lambda: asyncio.run(engine.async_generate("x")),
            lambda: engine.flush_cache(),
            lambda: engine.abort_request(abort_all=True),
            lambda: engine.get_server_info(),
        ):
            try:
                call()
            except RuntimeError as error:
                refused += "fork" in str(error)
            except BaseException:
                break
        engine.shutdown()  # a no-op: the engine is the parent's
        os.write(writer, bytes([refused]))
        os._exit(0)
    assert os.read(reader, 1) == bytes([6])
    assert os.waitpid(child, 0)[1] == 0
    os.close(reader)
    os.close(writer)
    assert right(engine.generate(**ask(CASES[0])), CASES[0])


def test_an_engine_made_inside_a_running_loop_and_one_made_in_a_thread():
    made = []

    async def main():
        with start() as inside:
            assert right(inside.generate(**ask(CASES[0])), CASES[0])
            assert right(await inside.async_generate(**ask(CASES[1])), CASES[1])
            thread = threading.Thread(target=lambda: made.append(start()))
            thread.start()
            await asyncio.to_thread(thread.join)
            # Two engines side by side.
            outputs = await asyncio.gather(
                *(e.async_generate(**ask(CASES[2])) for e in (inside, made[0]) * 3)
            )
            assert all(right(output, CASES[2]) for output in outputs)

    asyncio.run(main())
    with made[0] as engine:
        assert right(engine.generate(**ask(CASES[3])), CASES[3])


NESTED = """
import asyncio, sys
import nest_asyncio

nest_asyncio.apply()
sys.path.insert(0, "tests/engine")
from tiny_engine import golden_cases, greedy, start

case = golden_cases()[0]
call = {"input_ids": case["prompt_ids"], "sampling_params": greedy(16)}


async def main(engine):
    outputs = [engine.generate(**call), await engine.async_generate(**call)]
    # The nested run that nest_asyncio exists for.
    outputs.append(asyncio.get_event_loop().run_until_complete(engine.async_generate(**call)))
    outputs.append([chunk async for chunk in await engine.async_generate(**call, stream=True)][-1])
    return outputs


with start() as engine:
    for output in asyncio.run(main(engine)):
        assert output["output_ids"] == case["greedy_ids"][:16]
print("nested loops work")
"""


def test_under_nest_asyncio():
    """It is neither needed nor broken; in a process of its own, since it patches asyncio for good."""
    done = subprocess.run([sys.executable, "-c", NESTED], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "nested loops work\n", done.stderr
