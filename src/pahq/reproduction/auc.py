"""Areas under the ROC of methods on models whose circuit is known.

ACDC and its policies give a point for each threshold; a method that scores edges is one run, whose ranking is a curve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pahq.errors import PahqError
from pahq.evaluation.reference import Reference, areas
from pahq.evaluation.truth.base import Truth
from pahq.method.registry import SCORING, get_method
from pahq.report.finished import FinishedRun
from pahq.reproduction.cells import Cell, Grid, Setting

SWEEPS: dict[str, dict[str, Any]] = {
    "acdc": {},
    "pahq": {"policy": "pahq"},
    "pahq-values": {"policy": "pahq-values"},
    "rtn": {"policy": "rtn"},
}
"""Rows that are sweeps. pahq decides as FP32 would; pahq-values is the method as published; rtn is RTN-Q."""
ROWS = (*SWEEPS, *SCORING)
PAPER_ROWS = ("acdc", "pahq", "pahq-values", "rtn", "eap", "hisp", "subnetwork-probing", "edge-pruning")
"""Those of the published comparison, and ``pahq``."""


def check_rows(rows: Sequence[str]) -> None:
    """Raises PahqError for a method that there is not."""
    for row in rows:
        if row not in ROWS:
            raise PahqError(f"methods: '{row}' is unknown; known: {', '.join(ROWS)}")


def cells_of(
    setting: Setting, row: str, metric: str, thresholds: Sequence[float], options: Mapping[str, Mapping[str, Any]]
) -> list[Cell]:
    """The runs that one curve needs: sweeps from the highest threshold, which is the shortest, down.

    options: row -> options of its method. Raises PahqError where the known circuit cannot be had.
    """
    if row in SWEEPS:
        order = sorted(thresholds, reverse=True)
        return [Cell(setting, row, metric, {**SWEEPS[row], "threshold": float(t)}) for t in order]
    chosen = dict(options.get(row, {}))
    size: dict[str, Any] = {"threshold": 0.0}  # the circuit is no part of a ranking, but a run has one
    if setting.known is not None:
        size = {"edges": max(1, setting.known.n_edges)}
    elif get_method(row).sets_threshold(chosen):
        size = {}
    return [Cell(setting, row, metric, {"method": row, "method_options": chosen, **size})]


def curve(
    grid: Grid,
    setting: Setting,
    row: str,
    metric: str,
    thresholds: Sequence[float],
    options: Mapping[str, Mapping[str, Any]],
    absolute: bool = True,
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The areas of one method, None without a run; and a row for each run.

    seconds: of the searches, all together.
    """
    try:
        cells = cells_of(setting, row, metric, thresholds, options)
        truth = setting.known
    except PahqError as error:
        grid.failures[f"{setting.name}-{metric}-{row}"] = str(error)
        return None, []
    found = grid.run(cells)
    if not found or truth is None:
        return None, []
    runs = list(found.values())
    reference = _reference(truth, runs[0])
    figures = areas([run.circuit for run in runs], reference, absolute)
    missing = len(cells) - len(runs)
    summed = {
        "setting": setting.name,
        "metric": metric,
        "method": row,
        **_flat(figures),
        "runs": len(runs),
        "missing": missing,
        "seconds": sum(run.cost["seconds"] for run in runs),
    }
    return summed | {"points": figures["edges"]["points"]}, [_run_row(run, setting, row, reference) for run in runs]


def _reference(truth: Truth, run: FinishedRun) -> Reference:
    graph = run.circuit.graph
    return Reference(truth.name, graph, truth.on(graph))


def _flat(figures: Mapping[str, Any]) -> dict[str, float | None]:
    return {f"{name}_{kind}": figures[kind][name] for kind in ("edges", "nodes") for name in ("auc", "pessimistic_auc")}


def _run_row(run: FinishedRun, setting: Setting, row: str, reference: Reference) -> dict[str, Any]:
    """One run: its own point's area, if it is a sweep, and what it took."""
    config = run.config
    sweep = row in SWEEPS
    alone = _flat(areas([run.circuit], reference)) if sweep else dict.fromkeys(("auc_edges", "auc_nodes"))
    return {
        "setting": setting.name,
        "metric": config.metric,
        "method": row,
        "threshold": config.threshold,
        "edges": run.circuit.n_edges,
        "auc_edges": alone["auc_edges"],
        "auc_nodes": alone["auc_nodes"],
        "seconds": run.cost["seconds"],
        "states": run.cost["states"],
        "notes": "; ".join(run.record.get("search", {}).get("notes", [])),
    }
