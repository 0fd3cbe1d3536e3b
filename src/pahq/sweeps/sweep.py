"""A sweep from start to finish: what ``pahq sweep`` and ``pahq.sweep`` both call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from pahq.errors import PahqError
from pahq.report import machine
from pahq.report.progress import Watch, watch_for
from pahq.report.tables import Row
from pahq.sweeps.board import board_for
from pahq.sweeps.grid import changed, read_grid
from pahq.sweeps.runner import Runner
from pahq.sweeps.runs import Run, expand
from pahq.sweeps.status import PAGE_FILE, SweepFolder, counted, recorded, state_of

Grid = str | PathLike[str] | Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """The runs of a grid, the folder they go to, and what the sweep is called."""

    runs: list[Run]
    out: Path
    name: str


def plan(
    grid: Grid | None,
    out: str | PathLike[str] | None = None,
    only: str | None = None,
    axes: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """What ``sweep`` would run; nothing is written. axes, options: in the place of the grid's own, in all its parts.

    Raises PahqError that names the key for whatever is wrong in the grid.
    """
    named = isinstance(grid, str | PathLike)
    spec, where = ({}, "flags") if grid is None else read_grid(Path(grid) if isinstance(grid, PathLike) else grid)
    runs = expand(changed(spec, axes or {}, options or {}), where, only)
    folder = Path("runs", f"sweep-{Path(grid).stem}" if named else "sweep") if out is None else Path(out)
    name = Path(grid).stem if named else folder.resolve().name
    for place, run in enumerate(runs):
        if run.extras.get("wandb"):  # W&B shows a sweep as one group
            runs[place] = replace(run, extras={"wandb_group": name, **run.extras})
    return Plan(runs, folder, name)


def sweep(
    grid: Grid,
    out: str | PathLike[str] | None = None,
    *,
    jobs: int = 1,
    only: str | None = None,
    retry_failed: bool = False,
    progress: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Runs a grid of ``pahq discover``, each run in a process of its own -> the record, as in ``sweep.json``.

    grid: a YAML file, the name of one that is shipped (``paper``), or a mapping: ``tasks``, ``models``, ``thresholds``,
        ``metrics``, ``methods``, ``policies``, ``edges`` (lists or single values), ``options`` and ``grids`` (parts).
    out: folder of runs, logs and ``index.html`` (default: ``runs/sweep-NAME``). Runs that are done there are skipped,
        interrupted ones go on; failed ones are left alone but with ``retry_failed``.
    jobs: processes at a time; each has an equal share of the cores (or OMP_NUM_THREADS threads).
    only: a pattern such as ``ioi_*`` that runs' names must match. progress: show the sweep's course on standard error.
    options: of ``pahq discover``, in the place of the grid's own.
    A run that fails stops no other: ``record["counts"]["failed"]`` tells how many did, their rows why.
    Raises PahqError for a grid or folder that cannot be, before anything is run.
    """
    watch = watch_for(quiet=not progress)
    made = plan(grid, out, only, options=options)
    return run_sweep(made, jobs, retry_failed, watch, f"pahq.sweep({grid!r}, {str(made.out)!r}, jobs={jobs})")


def run_sweep(made: Plan, jobs: int, retry_failed: bool, watch: Watch, command: str) -> dict[str, Any]:
    """Runs what ``plan`` gave -> the record. command: what was typed. Raises PahqError as ``sweep`` does."""
    if type(jobs) is not int or jobs < 1:
        raise PahqError(f"jobs: {jobs!r} is no number of processes; give a whole number of at least 1")
    facts = {"name": made.name, "command": command, "versions": machine.versions(), "commit": machine.commit()}
    with SweepFolder(made.out) as folder:
        folder.begin(made.runs, {**facts, "jobs": jobs}, retry_failed)
        board = board_for(folder.rows, watch)
        runner = Runner(folder, made.runs, jobs, board)
        folder.facts["threads"] = runner.threads
        watch.say(_before(folder.rows, runner, made.out))
        with board:
            runner.run()
        return folder.write(finished=True)


def preview(made: Plan, retry_failed: bool = False) -> list[Row]:
    """The runs' rows as they stand; nothing is run or touched, so that a sweep may be at work there.

    Raises PahqError for a folder that holds another run.
    """
    record = recorded(made.out) or {}
    told = {row["run"]: row for row in record.get("runs", [])}
    return [state_of(run, made.out, told.get(run.name), retry_failed, hold=False) for run in made.runs]


def _before(rows: Mapping[str, Row], runner: Runner, out: Path) -> str:
    counts = counted(rows.values())
    known = [f"{counts['done']:,} done before"] if counts["done"] else []
    if counts["failed"]:
        known.append(f"{counts['failed']:,} failed before (--retry-failed runs them again)")
    todo = [*known, f"{len(runner.waiting):,} to do"]
    how = f"{runner.jobs} at a time, {runner.threads} thread{'s' if runner.threads > 1 else ''} each"
    runs = f"{len(rows):,} run{'s' if len(rows) != 1 else ''}"
    return f"{runs}: {', '.join(todo)}; {how}; see {out / PAGE_FILE}"
