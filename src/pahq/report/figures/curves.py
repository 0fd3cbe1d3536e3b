"""Curves of runs: ROC against a known circuit, and faithfulness against size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from pahq.report.figures.chart import Draw
from pahq.report.figures.style import SMALL, SOFT, legend, looks, numeral, plain_ticks, wrapped
from pahq.report.tables import Row, decimals


def drawn(record: Row, kind: str) -> Mapping[str, tuple[Draw, Sequence[Row]]]:
    """The plots of an ``evaluation`` or a ``comparison``: file stem -> what draws it, and its rows."""
    found: dict[str, tuple[Draw, Sequence[Row]]] = {
        "faithfulness": (draw_faithfulness, faithfulness_rows(record["runs"])),
        "roc": (draw_roc, roc_rows(record["roc"])),
    }
    if kind == "comparison":
        found["cost"] = (draw_cost, cost_rows(record["runs"]))
    return found


LEFT, BELOW = 0.42, 0.42
"""Inches that the labels of axes take."""


def roc_rows(curves: Sequence[Row]) -> list[Row]:
    """One row a point, the ends included. curves: what ``report.references.roc_of`` gives."""
    found: list[Row] = []
    for curve in curves:
        for kind in ("edges", "nodes"):
            if curve[kind]["auc"] is None:  # every node is in the reference
                continue
            about = {"name": curve["name"], "reference": curve["reference"], "of": kind, "ranking": curve["ranking"]}
            about |= {name: float(curve[kind][name]) for name in ("auc", "pessimistic_auc")}
            points = sorted((float(x), float(y)) for x, y in curve[kind]["points"])
            ends = [(0.0, 0.0), *points, (1.0, 1.0)]
            found += [about | {"fpr": x, "tpr": y, "end": at in (0, len(ends) - 1)} for at, (x, y) in enumerate(ends)]
    return found


def draw_roc(figure: Any, rows: Sequence[Row]) -> None:
    """True-positive against false-positive rate, over edges and over nodes."""
    kinds = list(dict.fromkeys(row["of"] for row in rows))
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(row["name"] for row in rows))
    of, areas, handles = looks(names), {name: [] for name in names}, {}
    for axes, kind in zip(panels, kinds, strict=True):
        axes.plot([0, 1], [0, 1], color=SOFT, linewidth=0.7, linestyle=":")  # chance
        for name in reversed(names):  # the first one is the best, and lies on top
            mine = [row for row in rows if (row["name"], row["of"]) == (name, kind)]
            if not mine:
                continue
            look = of[name]
            axes.plot(
                [row["fpr"] for row in mine],
                [row["tpr"] for row in mine],
                color=look.colour,
                linestyle=look.line,
                marker=None if mine[0]["ranking"] else look.mark,
                markevery=[at for at, row in enumerate(mine) if not row["end"]],
                clip_on=False,
                zorder=3,
            )
            handles[name] = axes.get_lines()[-1]
            areas[name].append(decimals(3)(mine[0]["auc"]))
        axes.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), xlabel="false-positive rate")
        axes.set_xticklabels(("0", "0.5", "1"))
        axes.set_box_aspect(1)
        axes.grid()
        axes.set_title(f"{kind} of {rows[0]['reference']}" if len(kinds) == 1 else kind)
    panels[0].set_yticklabels(("0", "0.5", "1"))
    panels[0].set_ylabel("true-positive rate")
    labels = [f"{name}: {' | '.join(areas[name])}" for name in names]
    low = legend(figure, [handles[name] for name in names], labels, f"area under the curve: {' | '.join(kinds)}")
    side = min(2.6, (figure.get_figwidth() - LEFT - 0.15 * len(kinds)) / len(kinds))
    figure.set_figheight(side + BELOW + 0.15 + low)


def faithfulness_rows(runs: Sequence[Row]) -> list[Row]:
    """One row a circuit: each run's own, or those of each size that its ranking gives. runs: of an evaluation.

    Left out where the share recovered is undefined.
    """
    found: list[Row] = []
    for run in runs:
        about = {"name": run["name"], "group": run["group"], "metric": run["metric"]}
        for ranking, curve in (run["curves"] or {"": [run["circuit"]]}).items():
            for point in curve:
                if point["recovered"] is None or not point["edges"]:
                    continue
                interval = point.get("recovered_interval") or {}
                size = {"ranking": ranking, "edges": int(point["edges"]), "share": float(point["share"])}
                ends = {name: interval.get(name) for name in ("low", "high")}
                found.append(about | size | {"recovered": float(point["recovered"])} | ends)
    return found


def draw_faithfulness(figure: Any, rows: Sequence[Row]) -> None:
    """Share of the metric recovered against size: lines for rankings, and one for each sweep's thresholds."""
    axes = figure.subplots()
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        lines.setdefault((row["group"], row["ranking"]), []).append(row)
    of = looks([group for group, _ in lines])
    for height, style in ((1, "--"), (0, ":")):
        axes.axhline(height, color=SOFT, linewidth=0.7, linestyle=style)
    handles, labels = [], []
    for (group, ranking), points in lines.items():
        several = sum(other == group for other, _ in lines) > 1
        points = sorted(_once(points), key=lambda row: row["edges"])
        look = of[group]
        x, y = [row["edges"] for row in points], [row["recovered"] for row in points]
        (line,) = axes.plot(
            x,
            y,
            color=look.colour,
            marker=look.mark,
            markersize=2.6 if ranking else 4,
            linestyle="--" if several and ranking == "signed" else look.line,
            zorder=3,
        )
        known = [row for row in points if row["low"] is not None and row["high"] is not None]
        axes.vlines(
            [row["edges"] for row in known],
            [row["low"] for row in known],
            [row["high"] for row in known],
            color=look.colour,
            linewidth=0.7,
            alpha=0.6,
        )
        handles.append(line)
        labels.append(f"{group}, {ranking} scores" if several else group)
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    axes.set_xscale("log")
    sizes = [row["edges"] for row in rows]
    if max(sizes) < 4 * min(sizes):
        axes.set_xlim(min(sizes) / 2, max(sizes) * 2)
    plain_ticks(axes.xaxis, few=max(sizes) > 50 * min(sizes))
    axes.set(xlabel="edges in the circuit", ylabel=f"{metrics[0] if len(metrics) == 1 else 'metric'} recovered")
    axes.grid()
    low = legend(figure, handles, labels)
    figure.set_figheight(min(2.9, 0.62 * figure.get_figwidth()) + low)


def _once(points: Sequence[Row]) -> list[Row]:
    """The runs of a group share their ranking, and with it each circuit of a given size: one of each is enough."""
    return list({(row["edges"], row["recovered"]): row for row in points}.values())


def cost_rows(runs: Sequence[Row]) -> list[Row]:
    """One row a run with a known time. runs: name, group, and cost as ``FinishedRun.cost``."""
    found: list[Row] = []
    for run in runs:
        cost = run["cost"]
        if cost["seconds"]:
            memory = max(cost["host_bytes"] or 0, cost["device_bytes"] or 0) / 2**30
            about = {"name": run["name"], "group": run["group"], "seconds": float(cost["seconds"]), "gib": memory}
            found.append(about | {name: cost[name] for name in ("total_seconds", "host_bytes", "device_bytes")})
    return found


def draw_cost(figure: Any, rows: Sequence[Row]) -> None:
    """Time and peak memory of each run; colours as in the other figures."""
    from matplotlib.ticker import MaxNLocator

    panels = figure.subplots(1, 2, sharey=True)
    of = looks([row["group"] for row in rows])
    seconds, memory = [row["seconds"] for row in rows], [row["gib"] for row in rows]
    unit, size = _unit(max(seconds))
    times = [f"{time / _unit(time)[1]:.3g} {_unit(time)[0]}" for time in seconds]
    names = [wrapped(row["name"], 0.36 * figure.get_figwidth(), SMALL) for row in rows]
    for axes, values, texts, title in (
        (panels[0], [time / size for time in seconds], times, f"search, {unit}"),
        (panels[1], memory, [f"{value:.3g}" for value in memory], "peak memory, GiB"),
    ):
        bars = axes.barh(range(len(rows)), values, height=0.62, color=[of[row["group"]].colour for row in rows])
        axes.bar_label(bars, texts, padding=2, fontsize=SMALL)
        longest = max(map(len, texts)) * 0.62 * SMALL / 72 / (0.27 * figure.get_figwidth())  # of a panel
        end = max(values) / max(1 - longest, 0.3) or 1
        axes.set(xlabel=title, xlim=(0, end))
        for most in (3, 2, 1):  # as many numbers as there is room for
            ticks = [tick for tick in MaxNLocator(most).tick_values(0, max(values)) if 0 <= tick <= max(values)]
            apart = min((b - a for a, b in pairwise(ticks)), default=end) / end * 0.27 * figure.get_figwidth()
            if (max(len(numeral(tick)) for tick in ticks) + 1.5) * 0.62 * SMALL / 72 < apart:
                break
        axes.set_xticks(ticks)
        axes.xaxis.set_major_formatter(lambda value, _: numeral(value))
        axes.set_yticks(range(len(rows)), names)
        axes.tick_params(axis="y", length=0)
    panels[0].set_ylim(len(rows) - 0.4, -0.6)  # best run on top, as in the table
    tallest = max(name.count("\n") + 1 for name in names)
    figure.set_figheight(0.5 + len(rows) * max(0.17, tallest * 1.3 * SMALL / 72 + 0.03))


def _unit(seconds: float) -> tuple[str, int]:
    """The unit to give a time in, and its seconds."""
    return ("h", 3600) if seconds >= 7200 else ("min", 60) if seconds >= 120 else ("s", 1)
