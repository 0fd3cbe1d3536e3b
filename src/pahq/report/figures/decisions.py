"""A sweep's decisions in the order in which they were taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pahq.graph import Graph
from pahq.method.acdc import Decision
from pahq.report.figures.style import BLUE, FAINT, INK, SMALL, SOFT, STATUS, legend, numeral
from pahq.report.tables import Row

MANY = 3000
"""Points beyond which the removed edges become pixels: a file of lines would take megabytes."""


def timeline_rows(decisions: Sequence[Decision], graph: Graph, threshold: float, absolute: bool) -> list[Row]:
    """One row a decision. ``judged`` is what was held against the threshold: the effect, or its size."""
    return [
        {
            "order": one.order,
            "edge": graph.edge_name(one.row, one.column),
            "layer": graph.receivers[one.row].layer,
            "receiver": graph.receivers[one.row].kind,
            "before": one.before,
            "after": one.after,
            "effect": one.effect,
            "judged": abs(one.effect) if absolute else one.effect,
            "threshold": threshold,
            "kept": one.kept,
            "refined": one.refined,
        }
        for one in decisions
    ]


def draw_timeline(figure: Any, rows: Sequence[Row], metric: str = "metric") -> None:
    """Effects by order: what was kept, what removed, what was measured again in FP32; layers along the top."""
    axes = figure.subplots()
    threshold = float(rows[0]["threshold"])
    effects = [row["judged"] for row in rows]
    removed = [row for row in rows if not row["kept"]]
    kept = [row for row in rows if row["kept"]]
    refined = [row for row in rows if row["refined"]]
    _scale(axes, effects, threshold)
    handles, labels = [], []
    for some, name, look in (
        (removed, "removed", {"s": 3, "color": FAINT, "linewidths": 0, "rasterized": len(removed) > MANY}),
        (refined, "measured again in FP32", {"s": 16, "facecolors": "none", "edgecolors": STATUS["missed"],
                                              "linewidths": 0.7, "marker": "D", "rasterized": len(refined) > MANY}),
        (kept, "kept", {"s": 9, "color": BLUE, "linewidths": 0, "rasterized": len(kept) > MANY}),
    ):  # fmt: skip
        if some:
            x, y = [row["order"] for row in some], [row["judged"] for row in some]
            handles.append(axes.scatter(x, y, zorder=2 + len(handles), clip_on=False, **look))
            labels.append(f"{name}: {len(some):,}")
    handles.append(axes.axhline(threshold, color=INK, linewidth=0.8, linestyle="--", zorder=5))
    labels.append(f"threshold {threshold:g}")
    axes.axhline(0, color=SOFT, linewidth=0.5)
    sized = "size of the effect" if any(row["judged"] != row["effect"] for row in rows) else "effect"
    axes.set(xlabel="edges in the order of their tests", ylabel=f"{sized} on {metric}")
    axes.set_xlim(-0.01 * len(rows) - 0.5, 1.01 * len(rows))
    axes.xaxis.set_major_locator(_whole())
    axes.xaxis.set_major_formatter(lambda value, _: numeral(value))
    axes.grid(axis="y")
    _layers(axes, rows, figure.get_figwidth())
    low = legend(figure, handles, labels)
    figure.set_figheight(min(2.9, 0.72 * figure.get_figwidth()) + low)


def _whole() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4, integer=True, steps=[1, 2, 5, 10])


def _scale(axes: Any, effects: Sequence[float], threshold: float) -> None:
    """A logarithmic scale either side of zero, linear around it."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    top, bottom = max(*effects, threshold, 0.0), min(*effects, threshold, 0.0)
    largest = max(top, -bottom) or 1.0
    base = abs(threshold) if threshold else largest / 100
    low = math.floor(math.log10(base) - 1)
    high = max(math.ceil(math.log10(largest)), low + 1)
    linear = 10.0**low
    step = 1 if high - low <= 4 else 2
    decades = [10.0**power for power in range(low, high + 1, step)]
    ticks = (
        [-tick for tick in decades if tick <= -bottom * 1.2] + [0.0] + [tick for tick in decades if tick <= top * 1.2]
    )
    axes.set_yscale("symlog", linthresh=linear, linscale=0.6)
    axes.yaxis.set_major_locator(FixedLocator(sorted(ticks)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: numeral(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(1.6 * bottom if bottom < -linear else -0.6 * linear, 1.6 * top if top > linear else 1.6 * linear)


def _layers(axes: Any, rows: Sequence[Row], inches: float) -> None:
    """Which layer's inputs are under test, along the top; as many names as there is room for."""
    starts = [0] + [at for at in range(1, len(rows)) if rows[at]["layer"] != rows[at - 1]["layer"]]
    ends = [*starts[1:], len(rows)]
    room = 0.16 * len(rows) / max(inches - 0.6, 1)  # decisions in the width of a name
    last = -math.inf
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if number % 2:
            axes.axvspan(start - 0.5, end - 0.5, color="#f3f5f8", linewidth=0, zorder=0)
        middle = (start + end - 1) / 2
        if rows[start]["receiver"] == "logits":
            continue
        if end - start >= room or middle - last >= room:
            _above(axes, str(rows[start]["layer"]), ("data", middle), "center")
            last = middle
    _above(axes, "layer", ("axes fraction", -0.01), "right")


def _above(axes: Any, text: str, at: tuple[str, float], align: str) -> None:
    where = {"xycoords": (at[0], "axes fraction"), "textcoords": "offset points", "ha": align, "va": "bottom"}
    axes.annotate(text, (at[1], 1), (0, 1.5), fontsize=SMALL - 1, color=SOFT, **where)
