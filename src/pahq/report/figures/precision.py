"""Figures of the precision studies; the rows are those of the studies' tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pahq.report.figures.style import MARKS, METHODS, SOFT, legend, numeral, plain_ticks, shown
from pahq.report.tables import Row

COLUMNS = {
    "snr": ("variant", "point", "layer", "signal", "noise", "signal_read", "noise_read"),
    "sensitivity": ("kind", "format", "quantised", "error_rms"),
    "groups": ("quantised", "group", "bytes_high", "seconds", "spearman"),
}
"""What a study's rows must have."""
COLOURS = list(METHODS.values())


def draw_snr(figure: Any, rows: Sequence[Row]) -> None:
    """Signal-to-noise ratio of an edge against depth, a line for each variant of the policy."""
    axes = figure.subplots()
    handles, labels = [], []
    for place, variant in enumerate(dict.fromkeys(row["variant"] for row in rows)):
        mine = [row for row in rows if row["variant"] == variant and _finite(row["snr_db"])]
        if not mine:  # without noise its ratio is infinite
            continue
        depth = [row["layer"] + (0.5 if row["point"].startswith("m") else 0.0) for row in mine]
        colour, mark = COLOURS[place % len(COLOURS)], MARKS[place % len(MARKS)]
        every = max(1, len(mine) // 12)
        handles += axes.plot(depth, [row["snr_db"] for row in mine], color=colour, marker=mark, markevery=every)
        labels.append(variant)
    axes.axhline(0, color=SOFT, linewidth=0.7, linestyle="--")  # as much noise as signal
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter(lambda value, _: numeral(value))
    axes.set(xlabel="layer", ylabel="signal to noise, dB")
    axes.grid()
    low = legend(figure, handles, labels)
    figure.set_figheight(min(2.7, 0.62 * figure.get_figwidth()) + low)


def draw_sensitivity(figure: Any, rows: Sequence[Row]) -> None:
    """Error of effects by component and format, a panel for each way of quantising.

    Where there is no error at all, which has no place on a logarithmic axis, a hollow mark stands at the bottom.
    """
    modes = list(dict.fromkeys(row["quantised"] for row in rows))
    formats = list(dict.fromkeys(row["format"] for row in rows))
    kinds = {mode: list(dict.fromkeys(row["kind"] for row in rows if row["quantised"] == mode)) for mode in modes}
    wide = figure.get_figwidth() > 5
    shape = (
        {"ncols": len(modes), "width_ratios": [len(kinds[mode]) for mode in modes]} if wide else {"nrows": len(modes)}
    )
    panels = figure.subplots(**shape, sharey=True, squeeze=False).ravel()
    seen: dict[str, Any] = {}
    hollow = False
    for axes, mode in zip(panels, modes, strict=True):
        for place, name in enumerate(formats):
            some = [row for row in rows if (row["quantised"], row["format"]) == (mode, name)]
            at = {
                row["kind"]: kinds[mode].index(row["kind"]) + 0.7 * ((place + 0.5) / len(formats) - 0.5) for row in some
            }
            look = {"color": COLOURS[place % len(COLOURS)], "marker": MARKS[place % len(MARKS)], "linestyle": "none"}
            errors = {
                row["kind"]: row["error_rms"] for row in some if _finite(row["error_rms"]) and row["error_rms"] > 0
            }
            (seen[name],) = axes.plot([at[kind] for kind in errors], list(errors.values()), **look)
            none = [at[row["kind"]] for row in some if row["error_rms"] == 0]
            hollow |= bool(none)
            look |= {"markerfacecolor": "white", "markeredgewidth": 0.7, "transform": axes.get_xaxis_transform()}
            axes.plot(none, [0.035] * len(none), **look)
        for at in range(len(kinds[mode]) - 1):
            axes.axvline(at + 0.5, color="#e3e7ec", linewidth=0.5)
        axes.set_xlim(-0.5, len(kinds[mode]) - 0.5)
        axes.set_xticks(range(len(kinds[mode])), [shown(kind) for kind in kinds[mode]], rotation=35, ha="right",
                        rotation_mode="anchor")  # fmt: skip
        axes.tick_params(axis="x", length=0)
        axes.set_title(f"{mode} quantised")
        axes.grid(axis="y")
    if any(_finite(row["error_rms"]) and row["error_rms"] > 0 for row in rows):
        panels[0].set_yscale("log")
        low_end, high_end = panels[0].get_ylim()
        panels[0].set_ylim(low_end / (high_end / low_end) ** 0.08, high_end)  # room for the hollow marks
        plain_ticks(panels[0].yaxis, few=True)
    figure.supylabel("error of an effect (root mean square)", fontsize="medium")
    low = legend(figure, list(seen.values()), list(seen), "hollow, at the bottom: no error" if hollow else None)
    figure.set_figheight((2.1 if wide else 1.7 * len(modes)) + 0.3 + low)


def draw_groups(figure: Any, rows: Sequence[Row]) -> None:
    """Memory, time and agreement against the number of heads in FP32 at a time."""
    wide = figure.get_figwidth() > 5
    panels = figure.subplots(1, 3) if wide else figure.subplots(3, 1, sharex=True)
    sizes = sorted({row["group"] for row in rows})
    handles, labels = [], []
    for place, mode in enumerate(dict.fromkeys(row["quantised"] for row in rows)):
        mine = [row for row in rows if row["quantised"] == mode]
        where = [sizes.index(row["group"]) for row in mine]
        agree = [math.nan if row["spearman"] is None else row["spearman"] for row in mine]
        lines = ([row["bytes_high"] / 2**20 for row in mine], [row["seconds"] for row in mine], agree)
        drawn = [
            axes.plot(where, values, color=COLOURS[place], marker=MARKS[place])
            for axes, values in zip(panels, lines, strict=True)
        ]
        handles += drawn[0]
        labels.append(f"{mode} quantised")
    titles = ("FP32 weights held, MiB", "time, seconds", "rank correlation with FP32")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.set_title(title)
        axes.yaxis.set_major_formatter(lambda value, _: numeral(value))
        axes.locator_params(axis="y", nbins=4)
        axes.grid()
    for axes in panels if wide else panels[-1:]:
        axes.set_xlabel("heads in FP32 at a time")
    low = legend(figure, handles, labels)
    figure.set_figheight((1.9 if wide else 3.9) + low)


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)
