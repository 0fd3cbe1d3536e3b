"""The tables and figures themselves: what each runs, and what stands beside the paper's."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pahq.evaluation.agreement import agreement
from pahq.evaluation.reference import Reference, areas
from pahq.report.finished import FinishedRun
from pahq.report.progress import Watch
from pahq.report.tables import Row
from pahq.reproduction import paper
from pahq.reproduction.auc import PAPER_ROWS, check_rows, curve
from pahq.reproduction.cells import Cell, Grid, Setting
from pahq.reproduction.output import Reproduction
from pahq.reproduction.settings import TASKS, GridOptions

RUNTIME = {
    "acdc": {},
    "pahq": {"policy": "pahq"},
    "pahq-plain": {"policy": "pahq", "exact": False},
    "pahq-values": {"policy": "pahq-values"},
}
"""Rows of times: ACDC; our policy deciding as FP32 would, and without that; the method as published."""
RTN = {"acdc": {}, "pahq": {"policy": "pahq"}, "pahq-values": {"policy": "pahq-values"}, "rtn": {"policy": "rtn"}}
REGRESSION_EDGES, REGRESSION_KL = 0.25, 0.5
"""Tolerances beside the published sizes and KL: our prompts are of the same kind, but not the same."""


def table_auc(out: str | Path, how: GridOptions, watch: Watch, command: str | None = None) -> dict[str, Any]:
    """AUC of each method on each task and metric: the record, as in ``table-auc.json``. Raises PahqError."""
    rows_wanted = how.methods or (("acdc", "pahq", "rtn", "eap") if how.quick else PAPER_ROWS)
    check_rows(rows_wanted)
    settings = how.settings()
    folder = Reproduction(out, "table-auc")
    grid = Grid(folder.path, watch)
    rows, runs, points = list[Row](), list[Row](), list[Row]()
    for setting in settings:
        for kind in (kind for kind in how.kinds if kind in setting.metrics):
            metric = setting.metrics[kind]
            thresholds = how.sweep(setting.name, kind, (0.1, 0.01) if how.quick else paper.PAHQ_THRESHOLDS)
            for method in rows_wanted:
                summed, some = curve(grid, setting, method, metric, thresholds, how.method_options)
                if summed is None:
                    continue
                points.append({"name": f"{setting.name} {kind} {method}", "points": summed.pop("points")})
                rows.append(summed | _published(setting.name, kind, method))
                runs += some
    record = {"command": command, "options": asdict(how), "curves": points, "paper": paper.SOURCES}
    return folder.write(record, grid, {"": rows, "runs": runs})


def _published(task: str, kind: str, method: str) -> Row:
    """What is published of a task; beside a stand-in, of ioi on GPT-2 small."""
    edges, nodes = paper.ACDC_PESSIMISTIC.get((task, kind), (None, None)) if method == "acdc" else (None, None)
    found = paper.AUC.get((task, kind, method))
    if task not in TASKS and ("ioi", kind, method) in paper.AUC:
        found = f"{paper.AUC['ioi', kind, method]} (ioi, gpt2)"
    return {
        "paper_auc_edges": found,
        "paper_pessimistic_auc_edges": edges,
        "paper_pessimistic_auc_nodes": nodes,
    }


def table_runtime(
    out: str | Path, how: GridOptions, watch: Watch, command: str | None = None, separate: bool = True
) -> dict[str, Any]:
    """Minutes and memory of ACDC and PAHQ: the record, as in ``table-runtime.json``. Raises PahqError.

    separate: each run in a process of its own; otherwise a run's peak memory is that of all before it, too.
    """
    setting = how.single()
    folder = Reproduction(out, "table-runtime")
    grid = Grid(folder.path, watch, separate)
    (threshold,) = how.sweep("ioi", "kl", (0.05 if how.offline else 0.01,))[:1]
    cells = [
        Cell(setting, row, setting.metrics["kl"], {**options, "threshold": threshold})
        for row, options in RUNTIME.items()
    ]
    found = grid.run(cells)
    base = found.get(cells[0].name)
    rows = [_times(cell.row, found[cell.name], base) for cell in cells if cell.name in found]
    about = {"model": setting.model, "task": setting.task, "threshold": threshold, "separate": separate}
    record = {"command": command, "options": asdict(how), "about": about, "paper": paper.SOURCES}
    return folder.write(record, grid, {"": rows})


def _times(row: str, run: FinishedRun, base: FinishedRun | None) -> Row:
    seconds, cost = run.cost["seconds"], run.cost
    weights = run.record["precision"]["weight_bytes"]
    ratio = None if base is None else seconds / base.cost["seconds"]
    paper_minutes = paper.MINUTES.get(row)
    return {
        "method": row,
        "minutes": seconds / 60,
        "share_of_acdc": ratio,
        "paper_minutes": paper_minutes,
        "paper_share": None if paper_minutes is None else paper_minutes / paper.MINUTES["acdc"],
        "tests": run.record["search"]["tests"],
        "ms_per_test": 1e3 * seconds / max(1, run.record["search"]["tests"]),
        "edges": run.circuit.n_edges,
        "same_edges": None if base is None else bool(np.array_equal(run.circuit.mask, base.circuit.mask)),
        "weight_bytes": weights["device"] or weights["host"],
        "host_bytes": cost["host_bytes"],
        "device_bytes": cost["device_bytes"],
        "paper_memory_share": paper.MEMORY_SHARE if row == "pahq-values" else None,
    }


def figure_rtn(out: str | Path, how: GridOptions, watch: Watch, command: str | None = None) -> dict[str, Any]:
    """How rounding everything fares against FP32's circuit: the record, as in ``figure-rtn.json``. Raises PahqError.

    The reference is ACDC's circuit in FP32 at the least threshold of the sweep but one (or the only one).
    """
    from pahq.reproduction import figures

    setting = how.single()
    folder = Reproduction(out, "figure-rtn")
    grid = Grid(folder.path, watch)
    thresholds = sorted(how.sweep("ioi", "kl", (0.1, 0.05) if how.offline else paper.PAHQ_THRESHOLDS))
    middle = thresholds[min(1, len(thresholds) - 1)]
    metric, wanted = setting.metrics["kl"], how.methods or (("acdc", "rtn") if how.quick else tuple(RTN))
    rows_of = {name: RTN[name] for name in RTN if name in wanted or name == "acdc"}
    cells = {
        (row, t): Cell(setting, row, metric, {**options, "threshold": t})
        for row, options in rows_of.items()
        for t in reversed(thresholds)
    }
    found = grid.run(list(cells.values()))
    reference = found.get(cells["acdc", middle].name)
    rows, areas_of = list[Row](), list[Row]()
    for row in rows_of:
        runs = {t: found[cells[row, t].name] for t in thresholds if cells[row, t].name in found}
        rows += [_kept(row, t, run, found.get(cells["acdc", t].name)) for t, run in runs.items()]
        if runs and reference is not None and reference.circuit.n_edges:
            areas_of.append(_against(row, list(runs.values()), reference, setting))
    about = {"model": setting.model, "task": setting.task, "reference_threshold": middle}
    record = {"command": command, "options": asdict(how), "about": about, "paper": paper.SOURCES}
    flat = [{key: value for key, value in row.items() if key != "points"} for row in areas_of]
    record["curves"] = [{"name": row["method"], "points": row["points"]} for row in areas_of]
    drawn = {"": (lambda figure, of: figures.rtn(figure, of, areas_of), rows)}
    return folder.write(record, grid, {"": rows, "auc": flat}, drawn)


def _kept(row: str, threshold: float, run: FinishedRun, fp32: FinishedRun | None) -> Row:
    """A run beside FP32's at the same threshold; zero: share of the measured effects that are exactly zero."""
    effects = run.circuit.effects[np.isfinite(run.circuit.effects)]
    beside = None if fp32 is None else agreement(run.circuit, fp32.circuit)
    return {
        "method": row,
        "threshold": threshold,
        "edges": run.circuit.n_edges,
        "fp32_edges": None if fp32 is None else fp32.circuit.n_edges,
        "kept_of_fp32": beside and beside["recall"],
        "precision": beside and beside["precision"],
        "same_decisions": beside and beside["decisions"],
        "rank_correlation": beside and beside["spearman"],
        "zero_effects": float((effects == 0).mean()) if len(effects) else None,
        "tests": len(effects),
        "seconds": run.cost["seconds"],
    }


def _against(row: str, runs: list[FinishedRun], reference: FinishedRun, setting: Setting) -> Row:
    """Areas against FP32's circuit, and against the known one where there is one."""
    circuits = [run.circuit for run in runs]
    mine = areas(circuits, Reference("fp32", reference.circuit.graph, reference.circuit.mask))
    known = None
    if setting.known is not None:
        graph = circuits[0].graph
        known = areas(circuits, Reference(setting.known.name, graph, setting.known.on(graph)))
    return {
        "method": row,
        "auc_against_fp32": mine["edges"]["auc"],
        "pessimistic_auc_against_fp32": mine["edges"]["pessimistic_auc"],
        "auc_against_truth": known and known["edges"]["auc"],
        "paper_auc": paper.RTN_AUC if row == "rtn" else None,
        "points": mine["edges"]["points"],
    }


def gpt2_ioi(out: str | Path, how: GridOptions, watch: Watch, command: str | None = None) -> dict[str, Any]:
    """ACDC on GPT-2 small, IOI, KL, beside the published circuits: the record, as in ``gpt2-ioi.json``.

    within: whether edges lie within ``REGRESSION_EDGES`` and test KL within ``REGRESSION_KL`` of what is published,
    and no more edges were tested than there by more than the former. Raises PahqError.
    """
    folder = Reproduction(out, "gpt2-ioi")
    grid = Grid(folder.path, watch)
    common = {"n": how.n or 100, "seed": how.seed, "device": how.device}
    setting = Setting("ioi", how.model or "gpt2", how.task or "ioi", None, {"kl": "kl_div"}, common)
    wanted = how.sweep("ioi", "kl", tuple(paper.GPT2_IOI)[: 2 if how.quick else None])
    cells = [Cell(setting, "acdc", "kl_div", {"threshold": t}) for t in sorted(wanted, reverse=True)]
    found = grid.run(cells)
    rows = [_regression(found[cell.name]) for cell in cells if cell.name in found]
    record = {"command": command, "options": asdict(how), "paper": "Conmy et al. 2023, its committed results"}
    record["tolerance"] = {"edges": REGRESSION_EDGES, "kl": REGRESSION_KL}
    return folder.write(record, grid, {"": rows})


def _regression(run: FinishedRun) -> Row:
    assert run.config.threshold is not None
    edges, kl, most = paper.GPT2_IOI.get(run.config.threshold, (None, None, None))
    test = run.circuit.metadata["figures"]["test"]
    found_kl = test["circuit"]["metric"] if "circuit" in test else None
    tests, within = run.record["search"]["tests"], None
    if edges is not None and kl is not None and found_kl is not None:
        within = abs(run.circuit.n_edges / edges - 1) <= REGRESSION_EDGES and abs(found_kl / kl - 1) <= REGRESSION_KL
        within = within and (most is None or tests <= most * (1 + REGRESSION_EDGES))
    return {
        "threshold": run.config.threshold,
        "edges": run.circuit.n_edges,
        "paper_edges": edges,
        "test_kl": found_kl,
        "paper_test_kl": kl,
        "tests": tests,
        "paper_most_tests": most,
        "within": within,
    }
