"""What ran on which stream and when, as a file that chrome://tracing and ui.perfetto.dev show."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pahq.files import write_atomic

if TYPE_CHECKING:
    import torch

MOST_SPANS = 200_000
"""Spans kept in memory (some hundred bytes each); later ones are counted only."""
_ROWS = ("load", "low", "high")


@dataclass(frozen=True)
class Span:
    """One piece of work. begin, end: nanoseconds on a clock common to the trace."""

    name: str
    stream: str
    begin: int
    end: int
    args: dict[str, Any] = field(default_factory=dict)


class Trace:
    """Collects spans, from any thread. limit: spans kept; ``dropped`` counts those beyond it."""

    def __init__(self, limit: int = MOST_SPANS) -> None:
        self.limit, self.dropped = limit, 0
        self._spans: list[Span] = []
        self._cuda: list[tuple[str, str, torch.cuda.Event, torch.cuda.Event, dict[str, Any]]] = []
        self._origin: torch.cuda.Event | None = None
        self._lock = threading.Lock()

    def add(self, name: str, stream: str, begin: int, end: int, args: dict[str, Any] | None = None) -> None:
        """One span from ``begin`` to ``end``, in nanoseconds."""
        with self._lock:
            if self._room():
                self._spans.append(Span(name, stream, begin, end, args or {}))

    def start_cuda(self, device: torch.device) -> None:
        """Sets the moment that times of CUDA events count from. Waits for that one event."""
        import torch

        if self._origin is None:
            self._origin = torch.cuda.Event(enable_timing=True)
            self._origin.record(torch.cuda.current_stream(device))
            self._origin.synchronize()

    def add_cuda(
        self, name: str, stream: str, begin: torch.cuda.Event, end: torch.cuda.Event, args: dict[str, Any] | None = None
    ) -> None:
        """One span between two timed events, which may not have passed yet: their times are asked for at the end."""
        with self._lock:
            if self._room():
                self._cuda.append((name, stream, begin, end, args or {}))

    def _room(self) -> bool:
        fits = len(self._spans) + len(self._cuda) < self.limit
        self.dropped += not fits
        return fits

    def spans(self) -> list[Span]:
        """All spans by their beginning. Waits for CUDA events that have not passed."""
        with self._lock:
            pending, self._cuda = self._cuda, []
            for name, stream, begin, end, args in pending:
                assert self._origin is not None, "start_cuda comes first"
                end.synchronize()
                # Milliseconds in single precision: the duration is asked for by itself, which keeps its digits.
                first = round(self._origin.elapsed_time(begin) * 1e6)
                self._spans.append(Span(name, stream, first, first + round(begin.elapsed_time(end) * 1e6), args))
            return sorted(self._spans, key=lambda span: (span.begin, span.end))

    def busy(self, stream: str) -> float:
        """Seconds during which a stream worked."""
        return sum(end - begin for begin, end in self._intervals(stream)) / 1e9

    def overlap(self, a: str, b: str) -> float:
        """Seconds during which both streams were busy."""
        one, other = self._intervals(a), self._intervals(b)
        total = i = j = 0
        while i < len(one) and j < len(other):
            total += max(0, min(one[i][1], other[j][1]) - max(one[i][0], other[j][0]))
            if one[i][1] < other[j][1]:
                i += 1
            else:
                j += 1
        return total / 1e9

    def _intervals(self, stream: str) -> list[tuple[int, int]]:
        """When a stream was busy, as intervals that neither touch nor overlap, in order."""
        merged: list[tuple[int, int]] = []
        for span in self.spans():
            if span.stream != stream:
                continue
            if merged and span.begin <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], span.end))
            else:
                merged.append((span.begin, span.end))
        return merged

    def write(self, path: Path) -> None:
        """Writes Chrome's trace format, a row a stream, times from the first span on. Raises PahqError naming path."""
        spans = self.spans()
        rows = {name: row for row, name in enumerate((*_ROWS, *sorted({s.stream for s in spans} - set(_ROWS))), 1)}
        origin = spans[0].begin if spans else 0
        events: list[dict[str, Any]] = [
            {"name": "process_name", "ph": "M", "pid": 1, "tid": 0, "args": {"name": "pahq"}}
        ]
        for name, row in rows.items():
            events.append({"name": "thread_name", "ph": "M", "pid": 1, "tid": row, "args": {"name": name}})
            events.append({"name": "thread_sort_index", "ph": "M", "pid": 1, "tid": row, "args": {"sort_index": row}})
        for span in spans:
            events.append(
                {
                    "name": span.name,
                    "ph": "X",
                    "pid": 1,
                    "tid": rows[span.stream],
                    "ts": (span.begin - origin) / 1e3,
                    "dur": (span.end - span.begin) / 1e3,
                    "args": span.args,
                }
            )
        notes: dict[str, Any] = {"spans": len(spans), "dropped": self.dropped}
        if self.dropped:
            notes["note"] = f"only the first {self.limit} spans were kept; {self.dropped} later ones were dropped"
        value = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": notes}
        write_atomic(path, (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode())
