"""The engine's thread is woken by whoever has work for it."""

import sys
import threading

from jaxgen.wake import Wake


def test_a_set_is_seen_once_and_can_be_forgotten():
    wake = Wake()
    assert not wake.wait(0)
    wake.set()
    wake.set()
    assert wake.wait()
    assert not wake.wait(0)
    wake.set()
    wake.clear()
    assert not wake.wait(0)


def test_a_waiting_thread_is_woken():
    wake, woken = Wake(), []
    thread = threading.Thread(target=lambda: woken.append(wake.wait(30)))
    thread.start()
    wake.set()
    thread.join(30)
    assert woken == [True]


def test_it_may_be_set_while_it_is_being_set():
    """As a finaliser does that the garbage collector runs between two lines."""
    wake, depth = Wake(), [0]

    def set_again(frame, event, arg):
        if depth[0] < 3:
            depth[0] += 1
            wake.set()
            depth[0] -= 1

    def run():
        sys.setprofile(set_again)
        wake.set()
        sys.setprofile(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive() and wake.wait(0)
