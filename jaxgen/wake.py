"""What an idle thread waits on."""

from __future__ import annotations

import queue


class Wake:
    """An event for one waiting thread that may be set from anywhere, even from within `set`.

    The garbage collector runs finalisers between any two lines, those of `threading.Event.set` included, which holds
    a lock there: a finaliser that sets the same event waits for that lock for ever.
    """

    def __init__(self) -> None:
        self._signals: queue.SimpleQueue[None] = queue.SimpleQueue()

    def set(self) -> None:
        self._signals.put(None)

    def clear(self) -> None:
        """Forgets that it was set."""
        while True:
            try:
                self._signals.get_nowait()
            except queue.Empty:
                return

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until it is set, and clears it; False if `timeout` seconds pass first."""
        try:
            self._signals.get(timeout=timeout)
        except queue.Empty:
            return False
        self.clear()
        return True
