"""The folder of a precision study: a CSV, a plot, and a record that says how they came about."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pahq.errors import PahqError
from pahq.files import naming, read_json, write_atomic, write_json
from pahq.report.figures.chart import draw
from pahq.report.folder import LOCK_FILE, RUN_FILE
from pahq.report.tables import Row, as_csv, as_json

FORMAT = "pahq-study-1"


class StudyFolder:
    """Where a study goes. Files appear whole and only once the study is finished; ``run.json`` is the last.

    Made before anything is computed, so that a bad path is known at once. A study of the same kind in there is
    replaced. Raises PahqError where the folder cannot be made, or holds anything else.
    """

    def __init__(self, path: str | os.PathLike[str], study: str) -> None:
        self.path, self.study = Path(path), study
        self._made = not self.path.exists()
        with naming(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            found = sorted(entry.name for entry in self.path.iterdir())
            if not os.access(self.path, os.W_OK):
                raise PermissionError(13, "", str(self.path))
        mine = RUN_FILE in found and read_json(self.path / RUN_FILE).get("study") == study
        strangers = [name for name in found if name not in (LOCK_FILE, *self._names) and not name.endswith(".tmp")]
        if found and not mine and (strangers or RUN_FILE in found):
            raise PahqError(
                f"{self.path}: holds something else than a study of {study} ('{(strangers or found)[0]}'); "
                "choose a new or empty folder"
            )

    @property
    def _names(self) -> tuple[str, str]:
        return f"{self.study}.csv", f"{self.study}.png"

    def discard(self) -> None:
        """Takes an empty folder away again that was made for a study which did not come about."""
        if self._made and not any(self.path.iterdir()):
            self.path.rmdir()

    def write(
        self, rows: Sequence[Row], plot: Callable[[Any, Sequence[Row]], None], record: dict[str, Any]
    ) -> list[str]:
        """Writes CSV, plot and record; -> the files' names (no plot without matplotlib)."""
        csv, png = self._names
        image = draw(plot, rows)
        with naming(self.path):
            (self.path / RUN_FILE).unlink(missing_ok=True)  # what it told about is being replaced
            (self.path / png).unlink(missing_ok=True)
        write_atomic(self.path / csv, as_csv(rows))
        if image is not None:
            write_atomic(self.path / png, image)
        write_json(self.path / RUN_FILE, {"format": FORMAT, "study": self.study, **as_json(record)})
        return [csv, *([png] if image is not None else []), RUN_FILE]
