"""One event of a run, and what takes events in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from pahq.report.tables import as_json

Kind = Literal["started", "progress", "finished", "stopped"]


@dataclass(frozen=True)
class Table:
    """Rows of figures, a value a column. left_out: how many rows did not find room."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    left_out: int = 0


@dataclass(frozen=True)
class Event:
    """started: what the run is, once in each process that takes part. progress: how far it is, under ``phase``.
    finished: its figures. stopped: why it ended before that; a killed process leaves none.

    number: counts a run's events from 0, over all its processes. time: UTC, ISO 8601. facts: JSON-ready; numbers that
    JSON lacks (NaN, infinity) become null. tables, files: what belongs to the event beside its facts.
    """

    kind: Kind
    number: int
    time: str
    facts: Mapping[str, Any]
    tables: Mapping[str, Table] = field(default_factory=dict)
    files: Sequence[Path] = ()

    def to_json(self) -> dict[str, Any]:
        """The event as a JSON object. Tables and files are named; their content lies in the run's folder."""
        found = {"event": self.kind, "number": self.number, "time": self.time, **self.facts}
        if self.tables:
            found["tables"] = {
                name: {"columns": list(table.columns), "rows": len(table.rows), "left_out": table.left_out}
                for name, table in self.tables.items()
            }
        if self.files:
            found["files"] = [path.name for path in self.files]
        return as_json(found)


class Sink(Protocol):
    """Takes a run's events in, in their order."""

    def emit(self, event: Event) -> None:
        """Keeps or sends ``event``."""

    def close(self, code: int) -> None:
        """The run is over in this process; code: its exit code, 0 if it is finished."""


def flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a/b": 1}``, for whoever takes plain values alone; lists and None are left out."""
    found: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, bool | int | float | str):
            found[f"{prefix}{name}"] = value
    return found
