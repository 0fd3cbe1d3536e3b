"""Events as JSON lines in a run's folder, ``events.jsonl``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pahq.files import encoded, naming, write_all
from pahq.report.tracking.event import Event
from pahq.report.tracking.settings import TRACKING_FILE, WANDB_FOLDER

EVENTS_FILE = "events.jsonl"
TRACES = (EVENTS_FILE, TRACKING_FILE, WANDB_FOLDER)
"""All that tracking leaves in a run's folder."""


class Jsonl:
    """Appends each event to ``path`` as it comes. The file is touched by the first event, not before.

    A killed process can leave a torn last line; it is cut off before the next event. Raises PahqError where the
    disk refuses, as the journal of decisions does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    @property
    def number(self) -> int:
        """The number that comes next."""
        events = read_events(self.path)
        return events[-1]["number"] + 1 if events else 0

    def emit(self, event: Event) -> None:
        line = json.dumps(event.to_json(), ensure_ascii=False, allow_nan=False) + "\n"
        with naming(self.path):
            if self._file is None:
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
                os.ftruncate(self._file, _whole(self.path.read_bytes()))
            write_all(self._file, encoded(line))

    def close(self, code: int) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events in ``path``, none if it is not there; a torn last line, or any other that is no event, is passed over.

    Nothing depends on events, so that a damaged file is no reason to refuse a run. Raises PahqError for a file that
    cannot be read.
    """
    if not path.exists():
        return []
    with naming(path):
        data = path.read_bytes()
    found = []
    for line in data[: _whole(data)].splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event and type(event.get("number")) is int:
            found.append(event)
    return found


def _whole(data: bytes) -> int:
    """How many bytes are whole lines."""
    return data.rfind(b"\n") + 1
