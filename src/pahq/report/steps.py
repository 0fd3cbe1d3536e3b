"""Progress of work that consists of a known number of steps: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Any

from pahq.report.notebook import NotebookWatch
from pahq.report.progress import PLAIN_INTERVAL, LiveWatch, PlainWatch, Watch, as_time


class Steps:
    """Shows steps wherever ``watch`` shows its news."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self._bar: Any = None
        self._began = self._last = time.monotonic()
        self._earlier: int | None = None  # steps of an earlier process, which went on here

    def step(self, what: str, done: int = 0, of: int = 0) -> None:
        """``what`` was finished, the ``done``-th of ``of`` steps; without numbers, it begins."""
        if not of:
            self.watch.say(what)
            return
        if self._earlier is None:
            self._earlier = done if done > 1 else 0
            self._began = time.monotonic() if done > 1 else self._began
        if isinstance(self.watch, LiveWatch):
            self._show(self.watch, what, done, of)
        elif isinstance(self.watch, NotebookWatch):
            self.watch.draw(done, of, f"{done} of {of}: {what}")
        elif isinstance(self.watch, PlainWatch) and time.monotonic() - self._last >= PLAIN_INTERVAL:
            self._last = time.monotonic()
            here = done - self._earlier
            left = (self._last - self._began) / here * (of - done) if here else None
            self.watch.say(f"{done} of {of}: {what}, about {as_time(left)} left")

    def _show(self, watch: LiveWatch, what: str, done: int, of: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self._bar is None:
            columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.fields[what]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=watch.console, transient=True)
            self._task = self._bar.add_task("steps", total=of, what=what, completed=self._earlier or 0)
            self._bar.start()
        self._bar.update(self._task, completed=done, what=what)

    def end(self) -> None:
        """The work is over, for good or ill."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if isinstance(self.watch, NotebookWatch):
            self.watch.end()
