"""Turns what a run does into events, progress once a second at most, and hands them to every sink."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from pahq.report.tracking.event import Event, Kind, Sink, Table

INTERVAL = 1.0
"""Seconds between two events of progress."""
INTERRUPTED, FAILED = 130, 1
"""Exit codes that sinks are told."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Tracker:
    """A context manager around a run: its end, for good or ill, closes the sinks.

    sinks: none for a run that nobody asks about. number: of the first event. measure: facts that every event of
    progress has, such as the memory held.
    """

    def __init__(
        self,
        sinks: Sequence[Sink] = (),
        number: int = 0,
        measure: Callable[[], Mapping[str, Any]] = dict,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.sinks, self.number, self.measure, self.clock = tuple(sinks), number, measure, clock
        self._began = self._over = False
        self._due = 0.0
        self._waiting: tuple[str, Mapping[str, Any]] | None = None

    def __bool__(self) -> bool:
        """Whether anybody takes the events."""
        return bool(self.sinks)

    def started(self, facts: Mapping[str, Any]) -> None:
        """The run, or a part of it, begins in this process. facts: what it is."""
        self._began = True
        self._emit("started", {"resumed": self.number > 0, **facts})

    def progress(self, phase: str, facts: Mapping[str, Any]) -> None:
        """How far the run is. phase: what it is at, such as the method's name.

        An event at once if the last one is old enough; else these facts wait, until newer ones take their place or
        the phase is over.
        """
        if self._waiting is not None and self._waiting[0] != phase:
            self._flush()
        self._waiting = phase, facts
        if self.clock() >= self._due:
            self._flush()

    def finished(
        self, facts: Mapping[str, Any], tables: Mapping[str, Table] | None = None, files: Sequence[Path] = ()
    ) -> None:
        """The run is finished. facts: its figures."""
        self._flush()
        self._over = True
        self._emit("finished", facts, tables or {}, files)

    def _flush(self) -> None:
        if self._waiting is not None and self._began:
            (phase, facts), self._waiting = self._waiting, None
            self._due = self.clock() + INTERVAL
            self._emit("progress", {"phase": phase, **facts, **self.measure()})

    def _emit(
        self,
        kind: Kind,
        facts: Mapping[str, Any],
        tables: Mapping[str, Table] | None = None,
        files: Sequence[Path] = (),
    ) -> None:
        event = Event(kind, self.number, _now(), facts, tables or {}, files)
        self.number += 1
        for sink in self.sinks:
            sink.emit(event)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        code = 0
        if error is not None:
            interrupted = isinstance(error, KeyboardInterrupt)
            code = INTERRUPTED if interrupted else FAILED
            if self._began and not self._over:
                # The disk that stopped the run may stop its last word, too: what happened first is what counts.
                with contextlib.suppress(Exception):
                    self._flush()
                    why = "interrupted" if interrupted else " ".join(str(error).split()) or type(error).__name__
                    self._emit("stopped", {"reason": why})
        for sink in self.sinks:
            sink.close(code)
