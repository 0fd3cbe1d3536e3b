"""What the page says about the run as a whole."""

from __future__ import annotations

from typing import Any

from pahq.evaluation.circuit import Circuit
from pahq.report.viewer.drawing import Overlay, drawing, kept_nodes
from pahq.report.viewer.page import FORMAT

_OPTIONS = ("model", "task", "method", "metric", "threshold", "edges", "ablation", "policy", "absolute", "n", "seed")


def page_data(
    circuit: Circuit,
    record: dict[str, Any],
    shown: dict[str, Any] | None,
    overlay: Overlay | None = None,
    missing: str = "",
) -> dict[str, Any]:
    """Everything ``page`` takes. shown: what ``evidence`` gave; None where there is none, ``missing`` telling why."""
    config = record["config"]
    graph = circuit.graph
    return {
        "format": FORMAT,
        "run": {name: config.get(name) for name in _OPTIONS},
        "threshold": threshold_of(circuit, record),
        "scored": record.get("search", {}).get("selection") is not None,
        "identity": record.get("identity", {}),
        "command": record.get("command"),
        "version": record.get("versions", {}).get("pahq"),
        "size": {
            "addition": circuit.n_addition,
            "addition_total": graph.n_addition,
            "direct": circuit.n_direct,
            "direct_total": graph.n_direct,
            "tested": circuit.n_tested,
        },
        "figures": circuit.metadata.get("figures", {}),
        "graph": drawing(circuit, bool(config.get("absolute")), overlay),
        "nodes_kept": sorted(kept_nodes(circuit)),
        "evidence": shown,
        "missing": missing,
    }


def threshold_of(circuit: Circuit, record: dict[str, Any]) -> float | None:
    """By which effect edges stay: the run's threshold, or the method's own; None where a number of edges was asked."""
    selection = record.get("search", {}).get("selection")
    if selection is not None and selection.get("rule") != "threshold":
        return None
    chosen = record["config"].get("threshold")
    return chosen if chosen is not None or selection is None else selection.get("threshold")
