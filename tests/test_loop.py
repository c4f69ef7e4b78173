"""The engine thread by itself: what wakes it is not forgotten."""

import threading
from types import SimpleNamespace

from jaxgen.execution.runner import StepResult
from jaxgen.loop import EngineLoop
from jaxgen.scheduling.plan import Plan


class OneStep:
    """A scheduler with a single step, whose end is the end of all requests."""

    has_unfinished, is_done = False, True

    def __init__(self):
        self._plans = [Plan(kind="decode")]

    def schedule(self):
        return self._plans.pop() if self._plans else None

    def drain_ended(self):
        return []

    def collect(self, plan, tokens):
        return []

    def retire(self):
        pass


class Device:
    """Runs `meanwhile` on the engine thread after its step has been launched, before that is collected."""

    def __init__(self, meanwhile):
        self.ready = threading.Event()
        self._meanwhile = meanwhile

    def launch(self, plan):
        self.ready.wait()
        self._meanwhile()
        return SimpleNamespace(plan=plan)

    def read(self, launched):
        return StepResult(tokens=[], logprobs=None, input_logprobs=None, hidden=None)


def test_a_stop_is_not_forgotten_when_a_call_collects_the_last_step():
    def stop_and_collect():
        loop._stopping = True  # as `stop` does on another thread
        loop._wake.set()
        loop._collect()

    device = Device(lambda: loop.post(stop_and_collect))
    loop = EngineLoop(OneStep(), device, overlap=True)
    device.ready.set()
    loop._thread.join(10)
    assert not loop._thread.is_alive() and loop.error is None
