"""``pahq plot``: figures for papers, with their data beside them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pahq.cli.output import Json, Quiet, tell
from pahq.report.figures import KINDS


def _kinds(incomplete: str) -> list[tuple[str, str]]:
    return [(name, about) for name, about in KINDS.items() if name.startswith(incomplete)]


def plot(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help=f"What to draw: {', '.join(KINDS)}.", autocompletion=_kinds)
    ],
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folders of runs, evaluations, comparisons or studies.")
    ],
    out: Annotated[Path, typer.Option(help="The figure: a .svg, .pdf or .png file; its data go beside it as .csv.")],
    width: Annotated[
        str, typer.Option(metavar="column|page|INCHES", help="Width: column (3.25 inches), page (6.75) or inches.")
    ] = "column",
    title: Annotated[str | None, typer.Option(help="A title above the figure (default: none).")] = None,
    truth: Annotated[
        str | None,
        typer.Option(help="graph, roc: a known circuit (see 'pahq truth') or a .json file of edges beside the runs."),
    ] = None,
    against: Annotated[str | None, typer.Option(help="graph, roc: folder of another run or circuit.")] = None,
    edges: Annotated[int | None, typer.Option(help="graph: edges drawn at most, the largest (default: 300).")] = None,
    ranking: Annotated[
        str | None, typer.Option(help="roc: rank edges by absolute or signed scores (default: absolute).")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Draw a figure for a paper, with its data as CSV.

    \b
    graph         a circuit (--truth, --against: over another)
    roc           evaluations, comparisons; runs with --truth or --against
    faithfulness  metric recovered by size: evaluations, comparisons
    cost          time and memory: runs, evaluations, comparisons
    timeline      decisions of an ACDC run, in their order
    snr, sensitivity, groups
                  folders of pahq precision snr, sensitivity, groups
    """
    from pahq.report.figures.chart import check_place, data_file, inches_of
    from pahq.report.figures.kinds import plot as chart_of

    check_place(out)
    inches_of(width)
    chart = chart_of(kind, runs, truth=truth, against=against, edges=edges, ranking=ranking)
    path = chart.save(out, width, title)
    if not (quiet or as_json):
        for note in chart.notes:
            print(f"note: {note}", file=sys.stderr)
    record = {
        "file": str(path),
        "data": str(data_file(path)),
        "kind": kind,
        "rows": len(chart.rows),
        "notes": list(chart.notes),
    }
    tell(
        record,
        lambda console: console.print(f"written: {path} ({data_file(path).name} beside it)", soft_wrap=True),
        quiet=quiet,
        as_json=as_json,
    )
