"""Every way of calling and of walking away, from many threads at once; what is left must be exact."""

import asyncio
import random
import threading

import pytest
from tiny_engine import golden_cases, greedy, prompt_of, start

from jaxgen import RequestError
from jaxgen.io import RequestInput
from jaxgen.responses import Response
from jaxgen.sampling_params import SamplingParams
from jaxgen.scheduling.request import Request

CASES = golden_cases()
THREADS, CALLS = 8, 60


class Caller:
    """Makes random calls; each checks its own result against Hugging Face's greedy ids."""

    def __init__(self, engine, seed):
        self.engine, self.seed, self.random = engine, seed, random.Random(seed)

    def make_calls(self):
        ways = [
            self.whole,
            self.stream,
            self.batch,
            self.close,
            self.tasks,
            self.cancel,
            self.samples,
            self.abort,
        ]
        for number in range(CALLS):
            case, tokens = self.random.choice(CASES), self.random.randint(0, 32)
            options = {}
            if self.random.random() < 0.3:
                start_len = self.random.choice([-1, 0, len(case["prompt_ids"])])
                options |= {"return_logprob": True, "logprob_start_len": start_len, "top_logprobs_num": 2}
            if self.random.random() < 0.2:
                options["return_hidden_states"] = self.random.choice([True, "last"])
            self.expected, self.number = case["greedy_ids"][:tokens], number
            self.request = {"input_ids": case["prompt_ids"], "sampling_params": greedy(tokens), **options}
            self.random.choice(ways)()

    def whole(self):
        assert self.engine.generate(**self.request)["output_ids"] == self.expected

    def stream(self):
        *middle, last = self.engine.generate(**self.request, stream=True)
        assert last["output_ids"] == self.expected
        assert all(chunk["meta_info"]["finish_reason"] is None for chunk in middle)

    def batch(self):
        request = self.request | {"input_ids": [self.request["input_ids"]] * 3}
        chunks = self.engine.generate(**request, stream=True)
        last = [chunk for chunk in chunks if chunk["meta_info"]["finish_reason"] is not None]
        assert sorted(chunk["index"] for chunk in last) == [0, 1, 2]
        assert all(chunk["output_ids"] == self.expected for chunk in last)

    def close(self):
        chunks = self.engine.generate(**self.request, stream=True)
        next(chunks)
        chunks.close()

    def tasks(self):
        async def main():
            return await asyncio.gather(*(self.engine.async_generate(**self.request) for _ in range(3)))

        assert all(output["output_ids"] == self.expected for output in asyncio.run(main()))

    def cancel(self):
        async def main():
            tasks = [asyncio.create_task(self.engine.async_generate(**self.request)) for _ in range(3)]
            await asyncio.sleep(self.random.random() * 0.02)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(main())

    def samples(self):
        tokens = len(self.expected)
        request = self.request | {"sampling_params": {"n": 3, "max_new_tokens": tokens, "ignore_eos": True}}
        outputs = self.engine.generate(**request)
        assert [len(output["output_ids"]) for output in outputs] == [tokens] * 3

    def abort(self):
        rid = f"{self.seed}-{self.number}"
        timer = threading.Timer(self.random.random() * 0.01, self.engine.abort_request, (rid,))
        timer.start()
        output = self.engine.generate(**self.request, rid=rid)
        timer.join()
        assert output["output_ids"] == self.expected[: len(output["output_ids"])]
        assert output["meta_info"]["finish_reason"]["type"] in ("length", "abort")


def test_mixed_calls_from_many_threads(engine):
    failures = []

    def work(seed):
        try:
            Caller(engine, seed).make_calls()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    while not engine.flush_cache().success:  # aborts take effect by the next step
        pass


def test_news_that_arrive_while_a_chunk_is_read_are_delivered_once():
    """The reader marks a response as looked at, then looks: news in between are in that look already."""
    rings = []

    class Bell:
        stream = True

        def ring(self, response):
            if not response.queued:
                rings.append(response)
                response.queued = True

    class Interrupted(Response):
        """Ends its request at the very moment at which a reader marks it as looked at."""

        interrupt = False

        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "queued" and not value and self.interrupt:
                self.interrupt = False
                self.request.append(7)
                self.update(self.request)

    params = SamplingParams(max_new_tokens=2).normalized()
    spec = RequestInput("r", None, 0, 0, 0, None, [5], params, 2)
    request = Request("r", [5], params, vocab_size=10, max_new_tokens=2)
    response = Interrupted(
        Bell(),
        spec,
        request,
        index=0,
        stream_interval=1,
        incremental=True,
        weight_version="",
        new_text=None,
        token_text=None,
        compile_count=lambda: 0,
        on_end=lambda ended: None,
    )
    request.append(6)
    response.update(request)
    response.interrupt = True
    chunks = []
    while rings:
        if taken := rings.pop(0).take():
            chunks.append(taken)
    assert [chunk["output_ids"] for chunk, _ in chunks] == [[6, 7]]
    assert [last for _, last in chunks] == [True]


@pytest.fixture(scope="module")
def small():
    with start(max_running_requests=2, max_queued_requests=3, cuda_graph_bs_decode=[2]) as engine:
        yield engine


def test_a_full_queue_fails_the_call_and_serves_the_next(small):
    prompts = [prompt_of(5, i) for i in range(20)]
    with pytest.raises(RequestError, match="The request queue is full") as failure:
        small.generate(input_ids=prompts, sampling_params=greedy(50))
    assert failure.value.status_code == 503
    assert failure.value.detail
    assert isinstance(failure.value, RuntimeError)
    small.abort_request(abort_all=True)
    while not small.flush_cache().success:
        pass
    reasons = {}
    for chunk in small.generate(input_ids=prompts, sampling_params=greedy(20), stream=True):
        reasons[chunk["index"]] = chunk["meta_info"]["finish_reason"]
    assert set(reasons) == set(range(20))
    refused = [reason for reason in reasons.values() if reason["type"] == "abort"]
    assert 0 < len(refused) < 20
    assert {reason["status_code"] for reason in refused} == {503}
    assert small.generate(**{"input_ids": CASES[0]["prompt_ids"], "sampling_params": greedy(4)})["output_ids"]
