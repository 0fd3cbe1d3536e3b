"""Progress in a notebook: one bar of plain HTML that is replaced in place. Widgets are not needed.

A notebook's standard error is no terminal, and ``rich`` asks for widgets there.
"""

from __future__ import annotations

import sys
import time
from html import escape
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pahq.report.progress import PlainWatch, TimeLeft, as_time

if TYPE_CHECKING:
    from typing import TextIO

    from pahq.method.acdc import Progress

NOTEBOOK_INTERVAL = 0.5
"""Seconds between two drawings: each is a message to the browser, and is stored with the notebook."""


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel. IPython is asked only if it runs already."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None  # the shell in a terminal has none


class NotebookWatch(PlainWatch):
    """News on standard error; a bar as an output of the cell. After the end the last state stays."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._handle: Any = None
        self._drawn = 0.0
        self._page: str | None = None
        """The latest state, None once it is on display."""

    def begin(self, metric: str, resumed: int = 0) -> None:
        self.metric, self.clock = metric, TimeLeft()
        self.draw(resumed, None, f"{resumed:,} edges tested")

    def update(self, progress: Progress) -> None:
        left = as_time(self.clock.left(progress.edges_left))
        facts = f"{progress.tested:,} edges tested, {progress.kept:,} kept, {self.metric} {progress.metric:.4f}"
        self.draw(progress.tested, progress.tested + progress.edges_left, f"{facts}, {left} left")

    def draw(self, done: int, of: int | None, text: str) -> None:
        """Shows a bar, ``done`` of ``of`` (None: not known yet), if the last one is old enough."""
        share = "" if of is None else f' max="{of}" value="{done}"'
        self._page = f"<progress{share}></progress> {escape(text)}"
        if self._handle is None or time.monotonic() - self._drawn >= NOTEBOOK_INTERVAL:
            self._show()

    def end(self) -> None:
        self._show()
        self._handle = None  # what comes next has a bar of its own

    def _show(self) -> None:
        if self._page is None:
            return
        shown = import_module("IPython.display")  # there, as we run in a notebook; no dependency of ours
        if self._handle is None:
            self._handle = shown.display(shown.HTML(self._page), display_id=True)
        else:
            self._handle.update(shown.HTML(self._page))
        self._page, self._drawn = None, time.monotonic()
