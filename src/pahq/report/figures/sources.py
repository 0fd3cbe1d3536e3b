"""What lies in the folders that figures are drawn from, and what each kind of figure takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from pahq.errors import PahqError
from pahq.files import read_json
from pahq.report.finished import CircuitFolder, FinishedRun, circuit_in, group_names, run_names
from pahq.report.folder import RUN_FILE
from pahq.report.results import COMMANDS
from pahq.report.results import FORMAT as RESULTS
from pahq.report.study import FORMAT as STUDY
from pahq.report.tables import Row

Folder = str | PathLike[str]
Folders = Folder | Sequence[Folder]
"""One folder or several."""
NAMES = ("name", "group")
"""What results call their rows by."""


@dataclass(frozen=True)
class Source:
    """kind: what made the folder, or lies there. record: of a run, a study or results.

    run: of ``pahq discover``, else None. circuit: the run's, or one that lies there without a run; else None.
    """

    path: Path
    kind: Literal["run", "circuit", "study", "results"]
    record: dict[str, Any]
    run: FinishedRun | None = None
    circuit: CircuitFolder | None = None

    @property
    def about(self) -> str:
        """What it is, for messages."""
        if self.kind == "study":
            return f"{self.path} is a study of pahq precision {self.record.get('study')}"
        if self.kind == "results":
            return f"{self.path} holds what pahq {COMMANDS.get(self.record.get('kind', ''), 'evaluate')} found"
        if self.kind == "circuit":
            return f"{self.path} holds a circuit but no run"
        return f"{self.path} is a run of pahq discover"


def source(path: Folder) -> Source:
    """What lies in a folder; raises PahqError where it is nothing that a figure can be drawn from."""
    folder = Path(path)
    for kind in COMMANDS:
        file = folder / f"{kind}.json"
        if file.is_file():
            record = read_json(file)
            if record.get("format") != RESULTS:
                raise PahqError(f"{file}: not written by pahq evaluate or compare; check the path")
            return Source(folder, "results", record)
    if (folder / RUN_FILE).is_file():
        record = read_json(folder / RUN_FILE)
        if record.get("format") == STUDY:
            return Source(folder, "study", record)
    found = circuit_in(path)
    if isinstance(found, FinishedRun):
        return Source(folder, "run", found.record, found, found)
    return Source(folder, "circuit", {}, circuit=found)


def sources(kind: str, paths: Folders) -> list[Source]:
    """What lies in each folder; raises PahqError for no folder at all."""
    if isinstance(paths, str | PathLike):
        paths = [paths]
    if not paths:
        raise PahqError(f"plot {kind}: no folder is given; name at least one")
    return [source(path) for path in paths]


def only(kind: str, paths: Folders, needs: str) -> Source:
    """The one folder of a figure that is about one. needs: what it takes, for the message."""
    found = sources(kind, paths)
    if len(found) > 1:
        raise PahqError(f"plot {kind}: {len(found)} folders are given, but it is about one; give {needs}")
    return found[0]


def wrong(kind: str, of: Source, mend: str) -> PahqError:
    """The error for a folder that cannot serve."""
    return PahqError(f"plot {kind}: {of.about}; {mend}")


@contextmanager
def reading(of: Source | Path) -> Iterator[None]:
    """Turns what damaged records lead to into a PahqError that names the folder."""
    path = of if isinstance(of, Path) else of.path
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        what = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) and error.args else str(error)
        raise PahqError(f"{path}: its record is damaged or of another version ({what}); make it anew") from error


def rows_of_results(found: Sequence[Source], part: str) -> list[Row]:
    """``runs`` or ``roc`` of several evaluations and comparisons, in their order.

    Where two folders call different things by one name, the folder's name comes after it; its path, and a number,
    where several folders are called alike.
    """
    rows, taken = list[Row](), set[Any]()
    for one in found:
        with reading(one):
            mine = [dict(row) for row in one.record[part]]
            twice = {row[key] for row in mine for key in NAMES if key in row} & taken
            tellers = chain((one.path.resolve().name, str(one.path)), (f"{one.path}, {i}" for i in count(2)))
            teller = next(teller for teller in tellers if taken.isdisjoint(f"{name} ({teller})" for name in twice))
            for row in mine:
                row |= {key: f"{row[key]} ({teller})" for key in NAMES if row.get(key) in twice}
                taken |= {row[key] for key in NAMES if key in row}
            rows += mine
    return rows


def costs_of_runs(found: Sequence[Source]) -> list[Row]:
    """name, group and cost of runs of ``pahq discover``."""
    runs = [one.run for one in found if one.run is not None]
    groups = group_names(runs)
    return [
        {"name": name, "group": groups[run.group], "cost": run.cost}
        for name, run in zip(run_names(runs), runs, strict=True)
    ]
