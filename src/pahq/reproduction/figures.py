"""Plots of the reproduction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pahq.report.figures.style import plain_ticks
from pahq.report.tables import Row


def rtn(figure: Any, rows: Sequence[Row], curves: Sequence[Row]) -> None:
    """ROC against FP32's circuit, and the share of effects that are exactly zero, by policy and threshold."""
    roc, zero = figure.subplots(1, 2)
    for place, curve in enumerate(curves):
        points = sorted([(0.0, 0.0), *map(tuple, curve["points"]), (1.0, 1.0)])
        label = f"{curve['method']}, AUC {curve['auc_against_fp32']:.3f}"
        roc.plot([x for x, _ in points], [y for _, y in points], marker="o", color=f"C{place}", label=label)
    roc.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    roc.set(xlabel="false-positive rate", ylabel="true-positive rate", title="edges, against FP32's circuit")
    if curves:
        roc.legend(fontsize="small")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for place, method in enumerate(methods):
        mine = [row for row in rows if row["method"] == method and row["zero_effects"] is not None]
        zero.plot(
            [row["threshold"] for row in mine],
            [row["zero_effects"] for row in mine],
            marker="o",
            color=f"C{place}",
            label=method,
        )
    zero.set(xlabel="threshold", xscale="log", ylim=(-0.02, 1.02), title="share of effects that are exactly zero")
    plain_ticks(zero.xaxis)
    zero.legend(fontsize="small")
    for axes in (roc, zero):
        axes.grid()
    figure.set_figheight(0.45 * figure.get_figwidth())
