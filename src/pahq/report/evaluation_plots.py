"""Plots of evaluations and comparisons: faithfulness against size, ROC, and cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pahq.report.results import Plot
from pahq.report.tables import Row


def drawn(record: Row, kind: str) -> Mapping[str, Plot]:
    """The plots of an ``evaluation`` or a ``comparison``: file stem -> plot."""
    found: dict[str, Plot] = {"faithfulness": (faithfulness, _recovering(record)), "roc": (roc, record["roc"])}
    if kind == "comparison":
        found["cost"] = (cost, [run for run in record["runs"] if run["cost"]["seconds"]])
    return found


def _recovering(record: Row) -> list[Row]:
    return [run for run in record["runs"] if run["circuit"]["recovered"] is not None]


def faithfulness(figure: Any, rows: Sequence[Row]) -> None:
    """Share of the metric recovered against circuit size: lines for rankings, and one for each sweep's thresholds."""
    axes = figure.subplots()
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    for place, (name, runs) in enumerate(groups.items()):
        curves = runs[0]["curves"] or {"": [run["circuit"] for run in runs]}
        for ranking, curve in curves.items():
            points = sorted((point for point in curve if point["edges"]), key=lambda point: point["edges"])
            axes.plot(
                [point["edges"] for point in points],
                [point["recovered"] for point in points],
                marker="." if ranking else "o",
                linestyle="--" if len(curves) > 1 and ranking == "absolute" else "-",
                color=f"C{place}",
                label=f"{name}, {ranking} scores" if ranking else name,
            )
    if axes.get_lines():
        from matplotlib.ticker import LogFormatter

        axes.set_xscale("log")
        for which in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            which(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))  # plain numbers
        axes.legend(fontsize="small")
    for height, style in ((1, "--"), (0, ":")):
        axes.axhline(height, color="grey", linewidth=0.8, linestyle=style)
    axes.set(xlabel="edges in the circuit", ylabel=f"{rows[0]['metric']} recovered", title="faithfulness against size")
    axes.grid(alpha=0.3)


def roc(figure: Any, rows: Sequence[Row]) -> None:
    """True-positive against false-positive rate, over edges and over nodes."""
    for axes, kind in zip(figure.subplots(1, 2), ("edges", "nodes"), strict=True):
        for place, row in enumerate(rows):
            if row[kind]["auc"] is None:  # every node is in the reference
                continue
            points = [[0.0, 0.0], *sorted(row[kind]["points"]), [1.0, 1.0]]
            x, y = [point[0] for point in points], [point[1] for point in points]
            axes.plot(x, y, color=f"C{place}", label=f"{row['name']}: {row[kind]['auc']:.3f}")
            if not row["ranking"]:
                axes.plot(x[1:-1], y[1:-1], "o", color=f"C{place}")
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")  # chance
        axes.set(xlabel="false-positive rate", ylabel="true-positive rate", title=f"{kind} of {rows[0]['reference']}")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small", loc="lower right")


def cost(figure: Any, rows: Sequence[Row]) -> None:
    """Time and peak memory of each run; colours as in the other plots."""
    panels = figure.subplots(1, 2, sharey=True)
    names = [row["name"] for row in rows]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    colours = [f"C{groups.index(row['group'])}" for row in rows]
    memory = [max(row["cost"]["host_bytes"] or 0, row["cost"]["device_bytes"] or 0) / 2**30 for row in rows]
    for axes, values, title in zip(
        panels, ([row["cost"]["seconds"] for row in rows], memory), ("search, seconds", "peak memory, GiB"), strict=True
    ):
        bars = axes.barh(names, values, color=colours)
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize="small")
        axes.margins(x=0.15)
        axes.set(xlabel=title)
    panels[0].invert_yaxis()  # best run on top, as in the table
