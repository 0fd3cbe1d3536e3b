"""What a reproduction leaves: its runs, and one record with tables and plots beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pahq.errors import PahqError
from pahq.files import naming, write_atomic, write_json
from pahq.inputs import timestamp
from pahq.report import machine
from pahq.report.figures.chart import draw
from pahq.report.results import Plot
from pahq.report.tables import Row, as_csv, as_json
from pahq.reproduction.cells import RUNS, Grid

FORMAT = "pahq-reproduction-1"


class Reproduction:
    """The folder of one table or figure. Runs appear as they are made; ``KIND.json`` is written last.

    Raises PahqError where the folder cannot be made or written, or holds anything else.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str) -> None:
        self.path, self.kind, self.started = Path(path), kind, timestamp()
        self._made = not self.path.exists()
        with naming(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            found = sorted(entry.name for entry in self.path.iterdir())
            if not os.access(self.path, os.W_OK):
                raise PermissionError(13, "", str(self.path))
        mine = (RUNS, f"{kind}.", f"{kind}-")
        strangers = [name for name in found if not name.startswith(mine) and not name.endswith(".tmp")]
        if strangers:
            raise PahqError(f"{self.path}: holds something else ('{strangers[0]}'); choose a new or empty folder")

    def write(
        self,
        record: dict[str, Any],
        grid: Grid | None,
        tables: Mapping[str, Sequence[Row]],
        drawn: Mapping[str, Plot] | None = None,
    ) -> dict[str, Any]:
        """Writes tables (name -> rows, ``""`` the main one), plots and the record, which is returned.

        Raises PahqError if cells were tried and not one of them was finished.
        """
        failures = {} if grid is None else dict(grid.failures)
        if failures and not any(tables.values()):
            reason = next(iter(failures.values()))
            hint = (
                ""
                if record.get("options", {}).get("offline", True)
                else " (--offline takes stand-ins, where there are)"
            )
            if self._made and not any(self.path.iterdir()):
                self.path.rmdir()
            raise PahqError(f"{self.kind}: none of the cells could be run; the first said: {reason}{hint}")
        found = {
            "format": FORMAT,
            "kind": self.kind,
            **record,
            **{name or "rows": list(rows) for name, rows in tables.items()},
            "failures": failures,
            "versions": machine.versions(),
            "commit": machine.commit(),
            "machine": machine.describe(torch.device(record.get("options", {}).get("device", "cpu"))),
            "started": self.started,
            "finished": timestamp(),
        }
        for name, rows in tables.items():
            if rows:
                write_atomic(self._file(name, "csv"), as_csv(rows))
        for name, (plot, rows) in (drawn or {}).items():
            image = draw(plot, rows) if rows else None
            if image is not None:
                write_atomic(self._file(name, "png"), image)
        write_json(self._file("", "json"), as_json(found))
        return found

    def _file(self, name: str, ending: str) -> Path:
        return self.path / (f"{self.kind}-{name}.{ending}" if name else f"{self.kind}.{ending}")
