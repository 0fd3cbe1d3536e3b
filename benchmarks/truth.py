"""Area under the ROC of every method on every model whose circuit is known, with the time it took.

Models: the trained ones, and the compiled ones where tracr is installed. ACDC, its policies (``pahq`` decides as FP32
would, ``pahq-values`` is the method as published, ``rtn`` rounds everything) are swept over --thresholds, a run and a
point for each; the other methods are one run each, and every threshold of their ranking is a point.

Figures are means over the trained models of the standard area (trapezoids) over edges; the table has the pessimistic
area of the ACDC paper and both over nodes, too. A method's mean is a figure only if it ran on all trained models, at
all thresholds; on which it failed, and why, is told. ``same_pahq``: share of runs in which it kept the very edges that
ACDC kept. ``reasons`` in the file says why methods are below 1 on the trained models, with what mends them
(``benchmarks/reasons.py``), and how much of the residual stream's sums ``rtn`` loses on each.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import finish, header, parser
from pahq.errors import PahqError
from pahq.evaluation.circuit import Circuit
from pahq.evaluation.truth.base import truth_names
from pahq.report.console import make_console
from pahq.report.folder import RUN_FILE
from pahq.report.progress import Watch, watch_for
from pahq.report.tables import Column, Row, decimals, number, screen
from pahq.reproduction.auc import ROWS, cells_of, check_rows, curve
from pahq.reproduction.cells import RUNS, Grid, Setting, on_truth
from reasons import REASONS, examine, lost_additions, show, show_lost

TRAINED, ON_THE_HUB = "trained-", ("-gpt2", "-attn-only-4l")
MASKS = ("subnetwork-probing", "edge-pruning")
TARGETS = {"auc_acdc": 0.98, "auc_pahq": 0.98}
"""At least this much."""
QUICK = {"thresholds": "0.1,0.01", "n": 10, "steps": 20}
COLUMNS = [
    Column("setting", "model", left=True),
    Column("method", "method", left=True),
    Column("auc_edges", "AUC edges", decimals(3)),
    Column("pessimistic_auc_edges", "pess.", decimals(3)),
    Column("auc_nodes", "AUC nodes", decimals(3)),
    Column("pessimistic_auc_nodes", "pess.", decimals(3)),
    Column("runs", "runs"),
    Column("seconds", "time s", number(3)),
]


def options() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--quick", action="store_true", help="the first trained model, few prompts and thresholds")
    made.add_argument("--truths", help="known circuits by name, commas between (default: all that have a model)")
    made.add_argument("--methods", default=",".join(ROWS), help="rows of the table (default: all)")
    made.add_argument("--thresholds", default="1,0.3,0.1,0.03,0.01,0.003,0.001", help="of the sweeps (%(default)s)")
    made.add_argument("--n", type=int, help="prompts at most (default: as the circuit says)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--steps", type=int, help="of trained masks (default: the methods' own)")
    made.add_argument("--ranking", choices=("absolute", "signed"), default="absolute", help="how scores rank edges")
    made.add_argument("--runs", type=Path, help="keep the runs in this folder, and go on with those in there")
    made.add_argument("--verbose", action="store_true", help="show each run's progress")
    given = made.parse_args()
    if given.quick:
        for name, value in QUICK.items():
            if getattr(given, name) == made.get_default(name):
                setattr(given, name, value)
    given.methods = given.methods.split(",")
    try:
        check_rows(given.methods)
        given.thresholds = [float(word) for word in given.thresholds.split(",")]
    except (PahqError, ValueError) as error:
        made.error(str(error))
    return given


def settings(given: argparse.Namespace) -> tuple[list[Setting], dict[str, str]]:
    """The models, and why others were left out. Those whose weights are on the hub alone are not asked for."""
    names = [name for name in truth_names() if not name.endswith(ON_THE_HUB)]
    if given.truths is not None:
        names = given.truths.split(",")
    elif given.quick:
        names = [name for name in names if name.startswith(TRAINED)][:1]
    found, missing = list[Setting](), dict[str, str]()
    for name in names:
        try:
            found.append(on_truth(name, most=given.n, seed=given.seed))
        except PahqError as error:
            missing[name] = str(error)
    return found, missing


def measure(given: argparse.Namespace, grid: Grid, models: list[Setting]) -> tuple[list[Row], list[Row], list[Row]]:
    """A row for each model and method, one for each run, and the curves."""
    rows, runs, curves = list[Row](), list[Row](), list[Row]()
    method_options = {} if given.steps is None else {name: {"steps": given.steps} for name in MASKS}
    for setting in models:
        for method in given.methods:
            (metric,) = setting.metrics.values()
            summed, some = curve(
                grid, setting, method, metric, given.thresholds, method_options, given.ranking == "absolute"
            )
            if summed is None:
                continue
            curves.append({"model": setting.name, "method": method, "points": summed.pop("points")})
            rows.append(summed)
            runs += some
            print(
                f"  {setting.name} {method}: AUC {summed['auc_edges']:.3f}, pessimistic "
                f"{summed['pessimistic_auc_edges']:.3f}, {summed['seconds']:.1f} s",
                flush=True,
            )
    return rows, runs, curves


def same_circuits(given: argparse.Namespace, grid: Grid, models: list[Setting]) -> tuple[int, int]:
    """In how many runs ``pahq`` kept the very edges that ACDC kept, and of how many."""
    same = count = 0
    for setting in models:
        (metric,) = setting.metrics.values()
        two = [cells_of(setting, row, metric, given.thresholds, {}) for row in ("acdc", "pahq")]
        for pair in zip(*two, strict=True):
            folders = [grid.out / RUNS / cell.name for cell in pair]
            if all((folder / RUN_FILE).exists() for folder in folders):
                first, second = (Circuit.load(folder).mask for folder in folders)
                same, count = same + bool((first == second).all()), count + 1
    return same, count


def reasons(given: argparse.Namespace, models: list[Setting]) -> dict[str, Any]:
    """Why methods of the table are where they are on the trained models; prints it."""
    truths = [s.known for s in models if s.known is not None and s.name.startswith(TRAINED)]
    methods = [method for method in given.methods if method in REASONS]
    if not truths or not methods:
        return {}
    rows = [row for truth in truths for row in examine(truth, methods, given.n)]
    lost = {truth.name: lost_additions(truth, given.n) for truth in truths}
    show(rows)
    for method in methods:
        print(f"{method}: {REASONS[method]}")
    show_lost(lost)
    return {"reasons": {method: REASONS[method] for method in methods}, "table": rows, "lost_additions": lost}


def means(rows: list[Row], models: list[Setting]) -> dict[str, dict[str, float]]:
    """column -> method -> its mean, of methods that ran on all trained models, at all thresholds."""
    trained = {setting.name for setting in models if setting.name.startswith(TRAINED)}
    found: dict[str, dict[str, float]] = {column.key: {} for column in COLUMNS[2:]}
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method and row["setting"] in trained and not row["missing"]]
        if mine and {row["setting"] for row in mine} == trained:
            for key, column in found.items():
                column[method] = statistics.fmean(row[key] for row in mine)
    return found


def main() -> None:
    given, facts = options(), header()
    models, missing = settings(given)
    print(f"models: {', '.join(setting.name for setting in models)}")
    for name, reason in missing.items():
        print(f"left out: {name}: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        grid = Grid(given.runs or Path(folder), watch_for() if given.verbose else Watch())
        rows, runs, curves = measure(given, grid, models)
        same, pairs = same_circuits(given, grid, models)
    make_console().print(screen(rows, COLUMNS))
    for cell, reason in grid.failures.items():
        print(f"failed: {cell}: {reason}")
    average = means(rows, models)
    figures = {f"auc_{method.replace('-', '_')}": value for method, value in average["auc_edges"].items()}
    figures |= {f"seconds_{method.replace('-', '_')}": value for method, value in average["seconds"].items()}
    if pairs:
        figures["same_pahq"] = same / pairs
        print(f"pahq kept the very edges that ACDC kept in {same} of {pairs} runs")
    for name, least in TARGETS.items():
        if name in figures:
            print(f"{name}: {figures[name]:.4f}, target >= {least}: {'met' if figures[name] >= least else 'missed'}")
    why = reasons(given, models)
    details: dict[str, Any] = {
        "options": {key: str(value) for key, value in vars(given).items()},
        "models": [setting.name for setting in models],
        "left_out": missing,
        "table": rows,
        "means": average,
        "reasons": why,
        "runs": runs,
        "curves": curves,
        "failures": grid.failures,
    }
    finish(given.out, facts, figures, details)


if __name__ == "__main__":
    main()
