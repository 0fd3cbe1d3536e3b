"""The folder of an evaluation or a comparison: JSON, tables as CSV, plots."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pahq.errors import PahqError
from pahq.files import naming, read_json, write_atomic, write_json
from pahq.report.figures.chart import draw
from pahq.report.passes import PassesFile
from pahq.report.tables import Row, as_csv, as_json
from pahq.report.tracking.jsonl import TRACES

FORMAT = "pahq-evaluation-1"
COMMANDS = {"evaluation": "evaluate", "comparison": "compare"}
"""Kind of results, which ``KIND.json`` is called by -> the command that makes them."""
Plot = tuple[Callable[[Any, Sequence[Row]], None], Sequence[Row]]
"""What fills a matplotlib Figure, and the rows it fills it from."""


def passes_path(folder: str | os.PathLike[str], kind: str) -> Path:
    """Where an evaluation (kind: of which name) keeps what it has measured, until it is finished."""
    return Path(folder) / f"{kind}.passes.jsonl"


class ResultFolder:
    """Files appear whole and only once everything is computed; ``KIND.json`` is the last. Until then ``passes`` keeps
    what was measured.

    Made before anything is computed, so that a bad path is known at once. Results of the same kind in there are
    replaced. Raises PahqError where the folder cannot be made or written, or holds anything else.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str) -> None:
        self.path, self.kind = Path(path), kind
        self._made = not self.path.exists()
        with naming(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            mine = (passes_path(self.path, kind).name, *TRACES)
            found = sorted(e.name for e in self.path.iterdir() if not e.name.endswith(".tmp") and e.name not in mine)
            if not os.access(self.path, os.W_OK):
                raise PermissionError(13, "", str(self.path))
        self.passes = PassesFile(passes_path(self.path, kind))
        known = self._record in found and read_json(self.path / self._record).get("format") == FORMAT
        if found and not (known or self.unfinished):  # a process killed while it wrote leaves tables and its passes
            raise PahqError(f"{self.path}: holds something else ('{found[0]}'); choose a new or empty folder")

    @property
    def _record(self) -> str:
        return f"{self.kind}.json"

    @property
    def unfinished(self) -> bool:
        """Whether an earlier process was stopped while it measured, so that this one goes on."""
        return self.passes.path.exists()

    @contextlib.contextmanager
    def discarding(self) -> Iterator[None]:
        """Whatever ends the block early: after Ctrl-C, and where the disk refuses, there is something to go on with,
        else nothing is left of it.
        """
        try:
            yield
        except BaseException as error:
            self.discard(with_passes=isinstance(error, PahqError) and not isinstance(error.__cause__, OSError))
            raise

    def discard(self, with_passes: bool) -> None:
        """Takes an empty folder away again that was made for results which did not come about.

        with_passes: what this process has measured goes, too, and the same command begins anew.
        """
        self.passes.close()
        if with_passes:
            self.passes.remove(only_new=True)
        if self._made and self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def write(self, record: dict[str, Any], tables: Mapping[str, Sequence[Row]], drawn: Mapping[str, Plot]) -> bool:
        """Writes tables (name -> rows), plots (name -> plot) and the record. -> whether plots could be drawn.

        Empty tables, and plots without rows, are left out, and an earlier one of that name goes.
        """
        images = {name: draw(plot, rows) if rows else None for name, (plot, rows) in drawn.items()}
        with naming(self.path):
            (self.path / self._record).unlink(missing_ok=True)  # what it told about is being replaced
            for name in (*(f"{name}.csv" for name in tables), *(f"{name}.png" for name in drawn)):
                (self.path / name).unlink(missing_ok=True)
        for name, rows in tables.items():
            if rows:
                write_atomic(self.path / f"{name}.csv", as_csv(rows))
        for name, image in images.items():
            if image is not None:
                write_atomic(self.path / f"{name}.png", image)
        write_json(self.path / self._record, {"format": FORMAT, "kind": self.kind, **as_json(record)})
        self.passes.remove()
        return all(image is not None for name, image in images.items() if drawn[name][1])
