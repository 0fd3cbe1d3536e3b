"""What a person sees while a run goes on: a live bar on a terminal, a plain line now and then elsewhere.

For notebooks see ``notebook``.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from pahq.report.console import make_console, watched

if TYPE_CHECKING:
    from pahq.method.acdc import Progress

PLAIN_INTERVAL = 15.0
"""Seconds between two lines where nobody watches a terminal."""


class Watch:
    """Told about a run's course. This one keeps silent; the others print to a stream, never to stdout."""

    def say(self, text: str) -> None:
        """One line of news."""

    def begin(self, metric: str, resumed: int = 0) -> None:
        """The search starts, ``resumed`` decisions of an earlier process being known already."""

    def update(self, progress: Progress) -> None:
        """A batch of decisions was taken."""

    def end(self) -> None:
        """The search is over, for good or ill."""


def watch_for(stream: TextIO | None = None, quiet: bool = False) -> Watch:
    """The fitting kind of watch for ``stream`` (by default standard error, or a notebook's cell)."""
    if stream is None and not quiet and "IPython" in sys.modules:
        from pahq.report.notebook import NotebookWatch, in_notebook

        if in_notebook():
            return NotebookWatch(sys.stderr)
    stream = sys.stderr if stream is None else stream
    if quiet or stream is None:  # a process without a console has no standard error
        return Watch()
    return LiveWatch(stream) if watched(stream) else PlainWatch(stream)


class TimeLeft:
    """Estimates the time left from how fast the edges dwindle: by tests, and by receivers pruned untested."""

    def __init__(self) -> None:
        self.start: tuple[float, int] | None = None

    def left(self, ahead: int) -> float | None:
        """Seconds for the edges (or steps) that are ahead, None as long as too little is known."""
        if self.start is None:
            self.start = time.monotonic(), ahead
        elapsed, gone = time.monotonic() - self.start[0], self.start[1] - ahead
        return None if elapsed < 1 or gone < 1 else elapsed / gone * ahead


def as_time(seconds: float | None) -> str:
    """90 -> '1:30', None -> '-:--'."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class PlainWatch(Watch):
    """Plain lines, one every ``interval`` seconds at most."""

    def __init__(self, stream: TextIO, interval: float = PLAIN_INTERVAL) -> None:
        self.stream, self.interval = stream, interval

    def say(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def begin(self, metric: str, resumed: int = 0) -> None:
        self.metric, self.clock, self.last = metric, TimeLeft(), time.monotonic()

    def update(self, progress: Progress) -> None:
        left = self.clock.left(progress.edges_left)
        if time.monotonic() - self.last < self.interval:
            return
        self.last = time.monotonic()
        self.say(
            f"{progress.tested:,} edges tested, {progress.kept:,} kept, {self.metric} {progress.metric:.4f}, "
            f"about {as_time(left)} left"
        )


class LiveWatch(Watch):
    """A bar with edges tested, kept, the current metric and the time left."""

    def __init__(self, stream: TextIO) -> None:
        self.console = make_console(stream)
        self.bar: Any = None

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def begin(self, metric: str, resumed: int = 0) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.clock = TimeLeft()
        self.bar = Progress(
            BarColumn(bar_width=None),
            TextColumn("{task.fields[tested]:,} tested"),
            TextColumn("{task.fields[kept]:,} kept"),
            TextColumn(metric.replace("[", r"\[") + " {task.fields[metric]:.4f}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]} left"),
            console=self.console,
            transient=True,
            refresh_per_second=5,
        )
        self.task = self.bar.add_task("search", total=None, tested=resumed, kept=0, metric=0.0, left=as_time(None))
        self.bar.start()

    def update(self, progress: Progress) -> None:
        self.bar.update(
            self.task,
            completed=progress.tested,
            total=progress.tested + progress.edges_left,
            tested=progress.tested,
            kept=progress.kept,
            metric=progress.metric,
            left=as_time(self.clock.left(progress.edges_left)),
        )

    def end(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
