"""Progress of work that consists of a known number of steps: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Any

from pahq.report.progress import PLAIN_INTERVAL, LiveWatch, PlainWatch, Watch, as_time


class Steps:
    """Shows steps wherever ``watch`` shows its news."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self._bar: Any = None
        self._began = self._last = time.monotonic()

    def step(self, what: str, done: int = 0, of: int = 0) -> None:
        """``what`` was finished, the ``done``-th of ``of`` steps; without numbers, it begins."""
        if not of:
            self.watch.say(what)
        elif isinstance(self.watch, LiveWatch):
            self._show(self.watch, what, done, of)
        elif isinstance(self.watch, PlainWatch) and time.monotonic() - self._last >= PLAIN_INTERVAL:
            self._last = time.monotonic()
            left = (self._last - self._began) / done * (of - done)
            self.watch.say(f"{done} of {of}: {what}, about {as_time(left)} left")

    def _show(self, watch: LiveWatch, what: str, done: int, of: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self._bar is None:
            columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.fields[what]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=watch.console, transient=True)
            self._task = self._bar.add_task("steps", total=of, what=what)
            self._bar.start()
        self._bar.update(self._task, completed=done, what=what)

    def end(self) -> None:
        """The work is over, for good or ill."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
