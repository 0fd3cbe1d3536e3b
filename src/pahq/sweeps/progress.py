"""How far a run is, in its own words: the last thing it told its log."""

from __future__ import annotations

from pathlib import Path

TAIL = 1 << 14
"""Bytes at the end of a file in which its last line is looked for."""


def progress_of(folder: Path, log: Path, start: int) -> str:
    """One line. folder: the run's; start: where in ``log`` what this process says begins."""
    lines = _tail(log, start)[2:] if _short(log, start) else _tail(log, start)
    return lines[-1] if lines else "starting"


def _short(log: Path, start: int) -> bool:
    """Whether the tail holds the two lines that say which command this is."""
    return log.stat().st_size - start <= TAIL if log.exists() else False


def _tail(path: Path, start: int = 0) -> list[str]:
    """The last whole lines of a file that something may be writing to; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(start, file.seek(0, 2) - TAIL))
            data = file.read()
    except OSError:
        return []
    return [line for line in data[: data.rfind(b"\n") + 1].decode("utf-8", "replace").splitlines() if line.strip()]
