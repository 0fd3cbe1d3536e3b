"""Plots of the precision studies as PNG. matplotlib is optional: it is imported when a plot is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

from pahq.report.tables import Row

MISSING = "no plot: matplotlib is not installed (pip install 'pahq[plot]')"
DPI = 120


def draw(plot: Callable[[Any, Sequence[Row]], None], rows: Sequence[Row]) -> bytes | None:
    """The plot as PNG, None without matplotlib. plot: fills a matplotlib Figure from the rows."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(9, 4.5), layout="constrained")  # not pyplot's, which keeps global state
    FigureCanvasAgg(figure)
    plot(figure, rows)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=DPI)
    return image.getvalue()


def snr(figure: Any, rows: Sequence[Row]) -> None:
    """Signal-to-noise ratio against depth, a line for each variant."""
    axes = figure.subplots()
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant and math.isfinite(row["snr_db"])]
        depth = [row["layer"] + (0.5 if row["point"].startswith("m") else 0.0) for row in mine]
        axes.plot(depth, [row["snr_db"] for row in mine], marker=".", label=variant)
    axes.set(xlabel="layer", ylabel="signal to noise, dB", title="an edge's signal in the residual stream")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def sensitivity(figure: Any, rows: Sequence[Row]) -> None:
    """Error of effects by component kind and format, a panel for each way of quantising."""
    modes = list(dict.fromkeys(row["quantised"] for row in rows))
    formats = list(dict.fromkeys(row["format"] for row in rows))
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    for axes, mode in zip(panels, modes, strict=True):
        mine = [row for row in rows if row["quantised"] == mode]
        kinds = list(dict.fromkeys(row["kind"] for row in mine))
        for place, name in enumerate(formats):
            some = [row for row in mine if row["format"] == name and row["error_rms"] > 0]
            where = [kinds.index(row["kind"]) + 0.8 * (place + 0.5) / len(formats) - 0.4 for row in some]
            axes.bar(where, [row["error_rms"] for row in some], 0.8 / len(formats), label=name, color=f"C{place}")
        axes.set_xticks(range(len(kinds)), kinds, rotation=45)
        axes.set(title=f"{mode} quantised")
        axes.grid(axis="y", alpha=0.3)
        if any(row["error_rms"] > 0 for row in mine):
            axes.set_yscale("log")
    panels[0].set_ylabel("error of an effect (root mean square)")
    panels[0].legend(fontsize="small")


def groups(figure: Any, rows: Sequence[Row]) -> None:
    """Memory, time and agreement against group size."""
    panels = figure.subplots(1, 3)
    sizes = sorted({row["group"] for row in rows})
    for mode in dict.fromkeys(row["quantised"] for row in rows):
        mine = [row for row in rows if row["quantised"] == mode]
        where = [sizes.index(row["group"]) for row in mine]
        agree = [math.nan if row["spearman"] is None else row["spearman"] for row in mine]
        for axes, values in zip(
            panels, ([row["bytes_high"] / 2**20 for row in mine], [row["seconds"] for row in mine], agree), strict=True
        ):
            axes.plot(where, values, marker="o", label=mode)
    titles = ("FP32 weights held, MiB", "time, seconds", "rank correlation with FP32")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.set(title=title, xlabel="heads in FP32 at a time")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
