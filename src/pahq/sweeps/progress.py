"""How far a run is, by its own state on the disk: its events, and before there are any the last line of its log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pahq.report.progress import TimeLeft, as_time
from pahq.report.tracking.jsonl import EVENTS_FILE

TAIL = 1 << 14
"""Bytes at the end of a file in which its last line is looked for."""


class Meter:
    """Looks at one process of a run. log: what it writes to, from ``start`` on. Made before the process is."""

    def __init__(self, folder: Path, log: Path, start: int) -> None:
        self.events, self.log, self.start = folder / EVENTS_FILE, log, start
        self._earlier = self.events.stat().st_size if self.events.exists() else 0  # events of earlier processes
        self._phase, self._clock = "", TimeLeft()

    def read(self) -> str:
        """One line."""
        event = self._last_event()
        if event is None or event.get("event") != "progress":
            lines = _tail(self.log, self.start)
            told = [line for line in lines if not line.startswith(("# ", "$ "))]
            return told[-1] if told else "starting"
        if event["phase"] != self._phase:
            self._phase, self._clock = event["phase"], TimeLeft()
        if "edges_left" in event:
            text = f"{event['tests']:,} edges tested, {event['kept']:,} kept, metric {event['metric']:.4f}"
            ahead = event["edges_left"]
        else:
            text, ahead = f"{self._phase}: {event['done']:,} of {event['of']:,}", event["of"] - event["done"]
        left = self._clock.left(ahead)
        return text if left is None else f"{text}, about {as_time(left)} left"

    def _last_event(self) -> dict[str, Any] | None:
        lines = _tail(self.events, self._earlier)
        try:
            event = json.loads(lines[-1]) if lines else None
        except ValueError:
            return None
        return event if isinstance(event, dict) else None


def _tail(path: Path, start: int) -> list[str]:
    """The last whole lines after byte ``start`` of a file that is being written; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(start, file.seek(0, 2) - TAIL))
            data = file.read()
    except OSError:
        return []
    return [line for line in data[: data.rfind(b"\n") + 1].decode("utf-8", "replace").splitlines() if line.strip()]
