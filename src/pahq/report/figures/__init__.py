"""Figures for papers, each a function of the folders it is drawn from.

>>> from pahq.report import figures
>>> figures.graph("runs/mine").save("circuit.pdf")  # doctest: +SKIP
>>> figures.roc(["runs/a", "runs/b"], truth="ioi-gpt2").save("roc.svg", width="page")  # doctest: +SKIP

Every function gives a ``Chart``: ``save`` writes the figure as SVG, PDF or PNG with its data as CSV beside it,
``figure`` gives the ``matplotlib.figure.Figure``, and a notebook shows it by itself. Names are looked up on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pahq.report.figures.chart import Chart
    from pahq.report.figures.kinds import cost, faithfulness, graph, groups, plot, roc, sensitivity, snr, timeline

__all__ = [
    "KINDS",
    "Chart",
    "cost",
    "faithfulness",
    "graph",
    "groups",
    "plot",
    "roc",
    "sensitivity",
    "snr",
    "timeline",
]

KINDS = {
    "graph": "the circuit of a run: layers from bottom to top, edges by what reads them and by effect",
    "roc": "found against a known circuit: evaluations, comparisons, or runs with --truth or --against",
    "faithfulness": "share of the metric recovered against size: evaluations or comparisons",
    "cost": "time and memory: runs, evaluations or comparisons",
    "timeline": "decisions of one ACDC run in their order: effect, threshold, kept, removed, measured again",
    "snr": "an edge's signal to noise, layer by layer: a folder of pahq precision snr",
    "sensitivity": "error by component and format: a folder of pahq precision sensitivity",
    "groups": "memory, time and agreement by heads in FP32: a folder of pahq precision groups",
}
"""Kinds of figures, and what each shows of which folders."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'chart' if name == 'Chart' else 'kinds'}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
