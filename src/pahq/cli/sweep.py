"""``pahq sweep``: a grid of runs, side by side on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pahq.cli.codes import PARTLY
from pahq.cli.output import Json, Quiet, tell
from pahq.cli.running import guarded
from pahq.errors import PahqError

if TYPE_CHECKING:
    from rich.console import Console

    from pahq.report.tables import Row
    from pahq.sweeps.sweep import Plan

Words = list[str] | None


def _axis(help: str) -> Any:
    return typer.Option(help=help, metavar="A,B,…")


def sweep(
    grid: Annotated[str | None, typer.Argument(help="A .yaml file, or a grid that comes with pahq (--list).")] = None,
    tasks: Annotated[Words, _axis("Tasks or files of prompts. Lists: commas, or the flag again.")] = None,
    models: Annotated[Words, _axis("Models, as 'pahq discover' takes them.")] = None,
    thresholds: Annotated[Words, _axis("Thresholds.")] = None,
    edges: Annotated[Words, _axis("Sizes for methods that score edges, instead of thresholds.")] = None,
    metrics: Annotated[Words, _axis("Metrics; 'task' is the task's own (the default).")] = None,
    methods: Annotated[Words, _axis("Methods (default: acdc).")] = None,
    policies: Annotated[
        Words, _axis("Precision policies (default: fp32); a table of formats as a flag of its own.")
    ] = None,
    option: Annotated[
        Words, typer.Option(help="Option of 'pahq discover' for all runs, NAME=VALUE; repeat for more.")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", "-n", help="Number of prompts, for all runs.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed that draws the prompts, for all runs.")] = None,
    ablation: Annotated[str | None, typer.Option(help="resample, zero or mean, for all runs.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, … for all runs.")] = None,
    only: Annotated[str | None, typer.Option(help="Only runs whose names match, such as 'ioi_*'.")] = None,
    out: Annotated[
        str | None, typer.Option(help="Folder of runs, logs and index.html (default: runs/sweep-GRID).")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Processes at a time; they share the cores.")] = 1,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run again what failed before.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and their number; run nothing.")] = False,
    list_grids: Annotated[bool, typer.Option("--list", help="List the grids that come with pahq.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run a grid of tasks, models, methods and thresholds.

    Of metrics and policies, too. The same command goes on with it.
    """
    if list_grids:
        _list(quiet, as_json)
        return
    lists = {"tasks": tasks, "models": models, "thresholds": thresholds, "edges": edges}
    lists |= {"metrics": metrics, "methods": methods, "policies": policies}
    axes = {key: _split(given, key == "policies") for key, given in lists.items() if given}
    if grid is None and not axes:
        raise PahqError("sweep: no grid is given; name a .yaml file, one that comes with pahq (--list), or give lists")
    fixed = {"n": n, "seed": seed, "ablation": ablation, "device": device}
    options = _options(option or []) | {name: value for name, value in fixed.items() if value is not None}
    from pahq.sweeps.sweep import plan

    made = plan(grid, out, only, axes, options)
    if dry_run:
        _preview(made, retry_failed, quiet, as_json)
        return
    _run(made, jobs, retry_failed, quiet, as_json)


def _run(made: Plan, jobs: int, retry_failed: bool, quiet: bool, as_json: bool) -> None:
    from pahq.sweeps.status import PAGE_FILE
    from pahq.sweeps.sweep import run_sweep

    record = guarded(
        lambda how: run_sweep(made, jobs, retry_failed, **how),
        quiet,
        lambda: f"the same command goes on with the runs in {made.out}",
    )
    page = made.out / PAGE_FILE
    told = {"out": str(made.out), **record}
    tell(told, lambda console: _show(console, record), quiet=quiet, as_json=as_json, written=page)
    if record["counts"]["failed"]:
        raise typer.Exit(PARTLY)


def _show(console: Console, record: Row) -> None:
    """All runs, then why some failed."""
    from pahq.report.progress import as_time
    from pahq.report.tables import Column, decimals, known, screen

    columns = [
        Column("run", "run", left=True),
        Column("state", "state", left=True),
        Column("edges", "edges", known("{:,}".format)),
        Column("metric_circuit", "metric, used", decimals(3)),
        Column("recovered", "recovered, used", decimals(2)),
        Column("recovered_test", "recovered, held out", decimals(2)),
        Column("accuracy_test", "accuracy, held out", decimals(2)),
        Column("total_seconds", "time", known(as_time)),
    ]
    console.print(screen(record["runs"], columns))
    for row in record["runs"]:
        if row["state"] == "failed":
            console.print(f"failed: {row['run']}: {row['reason']}", soft_wrap=True)
    console.print(_counts(record["counts"]))


def _preview(made: Plan, retry_failed: bool, quiet: bool, as_json: bool) -> None:
    from pahq.report.tables import Column, screen
    from pahq.sweeps.status import counted
    from pahq.sweeps.sweep import preview

    rows = preview(made, retry_failed)
    counts = counted(rows)

    def show(console: Console) -> None:
        console.print(screen(rows, [Column("run", "run", left=True), Column("state", "state", left=True)]))
        console.print(f"{len(rows):,} {'run' if len(rows) == 1 else 'runs'}: {_counts(counts)}; {made.out}")

    tell({"out": str(made.out), "counts": counts, "runs": rows}, show, quiet=quiet, as_json=as_json)


def _list(quiet: bool, as_json: bool) -> None:
    from pahq.sweeps.grid import shipped

    grids = [{"grid": name, "about": about} for name, about in shipped().items()]

    def show(console: Console) -> None:
        for grid in grids:
            console.print(f"{grid['grid']}: {grid['about']}")

    tell({"grids": grids}, show, quiet=quiet, as_json=as_json)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {state}" for state, count in counts.items() if count)


def _split(given: list[str], policies: bool) -> list[str]:
    """Words between commas, but for a policy that is a table of formats, whose own commas they are."""
    return [word for item in given for word in ([item] if policies and "=" in item else item.split(",")) if word]


def _options(given: list[str]) -> dict[str, Any]:
    """``["n=8", "task_options.templates=8"]`` -> ``{"n": 8, "task_options": {"templates": 8}}``."""
    from pahq.cli.options import method_options

    found: dict[str, Any] = {}
    for name, value in method_options(given).items():
        outer, dot, inner = name.partition(".")
        if dot:
            found.setdefault(outer, {})[inner] = value
        else:
            found[outer] = value
    return found
