"""What a person sees of a sweep: a live table on a terminal, one line an event elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from pahq.report.progress import LiveWatch, Watch, as_time
from pahq.report.tables import Row
from pahq.sweeps.status import STATES, counted

INTERVAL = 1.0
"""Seconds between two looks at how far runs are."""


class Board:
    """Told about a sweep's course; a context manager. rows: those of ``SweepFolder``, which go on changing.

    This one says a line for each event; ``board_for`` gives the fitting kind.
    """

    def __init__(self, rows: Mapping[str, Row], watch: Watch) -> None:
        self.rows, self.watch = rows, watch

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def started(self, row: Row) -> None:
        """A run was started."""
        self.watch.say(f"started {row['run']}")

    def ended(self, row: Row) -> None:
        """A run is done, or failed."""
        counts = counted(self.rows.values())
        place = f"{counts['done'] + counts['failed']} of {len(self.rows)}"
        self.watch.say(f"{row['state']} {row['run']}: {outcome(row)} ({place})")

    def refresh(self, running: Mapping[str, Callable[[], str]]) -> None:
        """Called often. running: run's name -> what says how far it is."""


def board_for(rows: Mapping[str, Row], watch: Watch) -> Board:
    """The kind of board that fits where ``watch`` shows its news."""
    return LiveBoard(rows, watch) if isinstance(watch, LiveWatch) else Board(rows, watch)


def outcome(row: Row) -> str:
    """What came of a run, in a few words."""
    if row["state"] == "failed":
        return str(row["reason"])
    share = "" if row["recovered_test"] is None else f", {row['recovered_test']:.2f} recovered on held-out prompts"
    return f"{row['edges']:,} edges{share}, {as_time(row['total_seconds'])}"


class LiveBoard(Board):
    """A table on a terminal: what runs and how far it is, what failed and why, what was last done, what is next."""

    def __init__(self, rows: Mapping[str, Row], watch: LiveWatch) -> None:
        super().__init__(rows, watch)
        self.console = watch.console
        self._running: dict[str, str] = {}
        self._began: dict[str, float] = {}
        self._recent: list[Row] = []
        self._due = 0.0
        self._live: Any = None

    def __enter__(self) -> Board:
        from rich.live import Live

        self._live = Live(self._table(), console=self.console, auto_refresh=False, transient=True)
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def started(self, row: Row) -> None:
        self._began[row["run"]] = time.monotonic()
        self._running[row["run"]] = ""
        self._due = 0.0

    def ended(self, row: Row) -> None:
        self._running.pop(row["run"], None)
        self._recent.append(row)
        self._due = 0.0

    def refresh(self, running: Mapping[str, Callable[[], str]]) -> None:
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + INTERVAL
        self._running = {name: progress() for name, progress in running.items()}
        self._live.update(self._table(), refresh=True)

    def _table(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        counts = counted(self.rows.values())
        told = ", ".join(f"{count:,} {state}" for state, count in counts.items() if count)
        ended = counts["done"] + counts["failed"]
        table = Table(box=None, pad_edge=False, show_header=False, expand=True)
        names = min(max(map(len, self.rows), default=0), max(self.console.width // 2 - 8, 20))
        table.add_column(no_wrap=True, width=max(map(len, STATES)))
        table.add_column(no_wrap=True, overflow="ellipsis", width=names)
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        table.add_column(no_wrap=True, justify="right", width=len("1:00:00"))
        room = max(4, self.console.height - len(self._running) - 4)
        failed = [row for row in self.rows.values() if row["state"] == "failed"][-(room // 3 or 1) :]
        done = [row for row in self._recent if row["state"] == "done"][-(room // 3 or 1) :]
        waiting = [row for row in self.rows.values() if row["state"] in ("waiting", "interrupted")][: room // 3 or 1]
        for row in failed:
            table.add_row(Text("failed", "red"), Text(row["run"]), Text(outcome(row)), "")
        for row in done:
            table.add_row(Text("done", "green"), Text(row["run"]), Text(outcome(row)), "")
        for name, progress in self._running.items():
            elapsed = as_time(time.monotonic() - self._began[name])
            table.add_row(Text("running", "yellow"), Text(name), Text(progress), elapsed)
        for row in waiting:
            table.add_row(Text(row["state"], "dim"), Text(row["run"], "dim"), "", "")
        bar = Table.grid(expand=True)  # a bar alone does not end its line
        bar.add_row(ProgressBar(max(len(self.rows), 1), ended))
        return Group(Text(told), bar, table)
