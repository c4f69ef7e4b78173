"""Where the seconds of start-up went, by name, and the progress bars that show them passing."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Iterator

from tqdm.auto import tqdm

logger = logging.getLogger("jaxgen")


@dataclasses.dataclass(frozen=True)
class Phase:
    name: str
    seconds: float


class StartupReport:
    """Named phases of start-up in order; `show_progress` draws bars on stderr while they run.

    show_progress: None = only when stderr is a terminal.
    """

    def __init__(self, show_progress: bool | None = None):
        self.phases: list[Phase] = []
        self.details: list[Phase] = []
        self.started = time.perf_counter()
        self.total = 0.0
        self.complete = 0.0
        self._show = sys.stderr.isatty() if show_progress is None else show_progress

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - started)

    def add(self, name: str, seconds: float, *, nested: bool = False) -> None:
        """Records a phase, or with `nested` a detail inside one (not counted in the sum)."""
        (self.details if nested else self.phases).append(Phase(name, seconds))
        logger.log(logging.DEBUG if nested else logging.INFO, "start-up: %s %.2f s", name, seconds)

    @contextlib.contextmanager
    def progress(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """A progress bar that disappears when done; yields the function that advances it."""
        bar = tqdm(
            total=total, desc=label, unit=unit, unit_scale=unit == "B", leave=False, disable=not self._show
        )
        with bar:

            def advance(n: int) -> None:
                bar.update(n)

            yield advance

    def finish(self) -> None:
        self.total = time.perf_counter() - self.started
        logger.info("start-up: ready after %.2f s", self.total)

    def finish_background(self, steps: int) -> None:
        self.complete = time.perf_counter() - self.started
        if steps:
            logger.info("start-up: %d more steps compiled, complete after %.2f s", steps, self.complete)

    def as_dict(self) -> dict[str, float]:
        """Seconds by phase, with `total` until ready and `complete` until every start-up step is compiled (0.0:
        not yet); machine-readable."""
        return {phase.name: round(phase.seconds, 4) for phase in self.phases} | {
            "total": round(self.total, 4),
            "complete": round(self.complete, 4),
        }
