"""How good finished runs are: what ``pahq evaluate``, ``pahq compare`` and their Python twins call."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from itertools import combinations
from os import PathLike
from typing import Any, get_args

import numpy as np

from pahq.errors import PahqError
from pahq.evaluation import faithfulness, mib
from pahq.evaluation.agreement import agreement
from pahq.evaluation.baseline import random_circuits
from pahq.evaluation.bootstrap import Bootstrap
from pahq.evaluation.circuit import Circuit
from pahq.evaluation.examples import Examples
from pahq.evaluation.knockouts import Unit, completeness, minimality, parts_of
from pahq.evaluation.reference import Reference, beside, is_ranking
from pahq.held_out import HeldOut
from pahq.inputs import task_options, timestamp
from pahq.report import machine
from pahq.report.evaluation import curve_rows, flat
from pahq.report.figures.chart import MISSING
from pahq.report.figures.curves import drawn
from pahq.report.finished import CircuitFolder, FinishedRun, finished_run, group_names, run_names
from pahq.report.progress import Watch
from pahq.report.references import RANKINGS, other_run, reference_of, roc_of, truths_of
from pahq.report.results import COMMANDS, ResultFolder
from pahq.report.tracking.event import Table
from pahq.report.tracking.opening import open_tracker, result_files
from pahq.report.tracking.settings import Tracking
from pahq.task import Task
from pahq.task.base import SPLITS

Folder = str | PathLike[str]
SPLIT_NAMES = (*SPLITS, "all")
RULES = ("top", "greedy")


@dataclass(frozen=True)
class EvaluationOptions:
    """split, n: examples to evaluate on, drawn with the run's own seed (n None: as many as the run used).

    metric: what is recovered; None: the run's own. truth: name or file of a known circuit; against: folder of another
    run or circuit. Either is the reference of rates and ROC. ranking: whether ROC ranks edges by the size of scores or
    by signed scores; select: rule by which scores give circuits of each size.
    knockouts: random knock-outs for completeness; removals: parts removed for minimality, at most; unit: what is
    knocked out, node or edge. random_circuits: how many of the circuit's size. Any of these can be 0.
    bootstrap: resamples for confidence intervals (0: none) of level ``level``. seed: draws all of these.
    device: None stands for the run's own.
    Raises PahqError for a value that cannot be.
    """

    split: str = "test"
    n: int | None = None
    metric: str | None = None
    truth: str | None = None
    against: str | None = None
    ranking: str = "absolute"
    select: str = "top"
    knockouts: int = 10
    removals: int = 50
    unit: Unit = "node"
    random_circuits: int = 5
    bootstrap: int = 1000
    level: float = 0.95
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        choices = {"split": SPLIT_NAMES, "ranking": RANKINGS, "select": RULES, "unit": get_args(Unit)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise PahqError(f"{name}: '{getattr(self, name)}' is unknown; known: {', '.join(known)}")
        for name in ("knockouts", "removals", "random_circuits", "bootstrap", "seed"):
            if getattr(self, name) < 0:
                raise PahqError(f"{name}: {getattr(self, name)} is below 0; give 0 or more")
        if self.n is not None and self.n < 1:
            raise PahqError(f"n: {self.n} prompts are too few; give at least 1")
        if self.truth is not None and self.against is not None:
            raise PahqError("truth, against: both would be the reference; give one of them")
        if self.bootstrap:
            Bootstrap(1, self.bootstrap, self.level, self.seed)  # judges them


def evaluate(
    runs: Sequence[Folder],
    out: Folder | None = None,
    *,
    model: Any = None,
    task: str | Task | None = None,
    watch: Watch | None = None,
    command: str | None = None,
    tracking: Tracking | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Every figure of each run: the record, as in ``evaluation.json``.

    runs: folders of finished runs. out: folder for JSON, CSV and plots, None to write nothing. model, task: in place
    of the runs' own (needed for runs on Python objects, unless these are the truth's). options: fields of
    ``EvaluationOptions``. watch: told about the course; command: what was typed, for the record. tracking: Weights &
    Biases, with the same events in ``events.jsonl``; None: as the evaluation that goes on in ``out`` was tracked.
    Raises PahqError for bad input.
    """
    how = _options(options)
    found = [finished_run(path) for path in runs]
    if not found:
        raise PahqError("evaluate: no run is given; name the folder of at least one finished run")
    return _assess("evaluation", found, how, out, model, task, watch, command, tracking)


def compare(
    runs: Sequence[Folder],
    out: Folder | None = None,
    *,
    model: Any = None,
    task: str | Task | None = None,
    watch: Watch | None = None,
    command: str | None = None,
    tracking: Tracking | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Runs on one model and task side by side: the record, as in ``comparison.json``, best run first.

    Arguments as for ``evaluate``, without knock-outs and random circuits. Runs are sorted by the area under the ROC
    where there is a reference, else by how near to 1 the share of the metric is that they recover.
    Raises PahqError for bad input, and for runs that cannot be compared.
    """
    how = _options({"knockouts": 0, "removals": 0, "random_circuits": 0, **options})
    found = [finished_run(path) for path in runs]
    if len(found) < 2:
        raise PahqError("compare: fewer than two runs are given; name the folders of at least two finished runs")
    _comparable(found, how)
    return _assess("comparison", found, how, out, model, task, watch, command, tracking)


def _options(given: dict[str, Any]) -> EvaluationOptions:
    try:
        return EvaluationOptions(**given)
    except TypeError as error:
        raise PahqError(f"evaluate: {error}; see the options of EvaluationOptions") from None


def _comparable(runs: Sequence[FinishedRun], how: EvaluationOptions) -> None:
    """Raises PahqError for runs on different models, tasks or, unless one is asked for, metrics."""
    first = runs[0]
    for run in runs[1:]:
        weights = [r.record.get("identity", {}).get("weights") for r in (first, run)]
        if weights[0] != weights[1]:
            raise PahqError(
                f"{first.path} and {run.path}: they are runs on different models ({first.config.model}, "
                f"{run.config.model}); compare runs on one model"
            )
        names = [(r.config.task, task_options(r.config)) for r in (first, run)]
        if names[0] != names[1]:
            raise PahqError(
                f"{first.path} and {run.path}: their tasks or task options differ; compare runs on one task"
            )
        if how.metric is None and run.config.metric != first.config.metric:
            raise PahqError(
                f"{first.path} and {run.path}: their metrics differ ({first.config.metric}, {run.config.metric}); "
                "say with --metric which one counts"
            )


def _assess(
    kind: str,
    runs: Sequence[FinishedRun],
    how: EvaluationOptions,
    out: Folder | None,
    model: Any,
    task: str | Task | None,
    watch: Watch | None,
    command: str | None,
    tracking: Tracking | None,
) -> dict[str, Any]:
    watch = Watch() if watch is None else watch
    began, started = time.perf_counter(), timestamp()
    other = other_run(how.truth, how.against)
    truths = truths_of(runs, how.truth)
    references = [reference_of(run, truth, other) for run, truth in zip(runs, truths, strict=True)]
    truth = truths[0]
    if truth is not None and any(run.on_objects for run in runs):  # runs on a truth's own model and prompts
        model = truth.model() if model is None and truth.get_model is not None else model
        task = truth.task() if task is None and truth.get_task is not None else task
    names = run_names(runs)
    passes = sum(_passes(run.circuit, how) for run in runs)
    folder = None if out is None else ResultFolder(out, kind)
    place, kept = (None, None) if folder is None else (folder.path, folder.passes)
    how_tracked = {"always": False, "anew": folder is None or not folder.unfinished}
    with (
        nullcontext() if folder is None else folder.discarding(),
        open_tracker(tracking, place, COMMANDS[kind], asdict(how), watch.say, **how_tracked) as tracker,
        closing(HeldOut(how.split, how.n, how.metric, how.device, model, task, watch, passes, kept, tracker)) as bench,
    ):
        tracker.started({"command": command, "config": asdict(how), "runs": [str(run.path) for run in runs]})
        rows: list[dict[str, Any]] = []
        for name, run, reference in zip(names, runs, references, strict=True):
            bench.begin(name)
            rows.append({"name": name} | _figures(run, bench, how, reference, other))
        bench.close()
        curves, groups = roc_of(runs, references, how.ranking == "absolute"), group_names(runs)
        for row, run in zip(rows, runs, strict=True):
            row["group"] = groups[run.group]
        if kind == "comparison":
            rows.sort(key=lambda row: _merit(row, curves))
        order = list(dict.fromkeys(row["group"] for row in rows))
        record = {
            "command": command,
            "options": asdict(how),
            "runs": rows,
            "roc": sorted(curves, key=lambda curve: order.index(curve["name"])),
            "agreement": _pairs(runs, names) if kind == "comparison" else [],
            "notes": _notes(runs, rows, curves, how),
            "versions": machine.versions(),
            "commit": machine.commit(),
            "machine": bench.machine,
            "started": started,
            "finished": timestamp(),
            "total_seconds": time.perf_counter() - began,
        }
        table = flat(record)
        if folder is not None:
            tables = {kind: table, "curves": curve_rows(record)}
            if not folder.write(record, tables, drawn(record, kind)):
                watch.say(MISSING)
        sent = {kind: Table(list(table[0]), [list(row.values()) for row in table])}
        figures = {"results": {row["name"]: row for row in table}, "total_seconds": record["total_seconds"]}
        tracker.finished(figures, sent, result_files(place) if tracker else [])
    return record


def _scores(circuit: Circuit) -> dict[str, np.ndarray]:
    """The rankings that CPR and CMD ask for: both the same where no score is below 0."""
    if not is_ranking(circuit):
        return {}
    values = circuit.effects
    signed = bool((values[circuit.graph.edges] < 0).any())
    return {"signed": values, "absolute": np.abs(values)} if signed else {"absolute": values}


def _passes(circuit: Circuit, how: EvaluationOptions) -> int:
    """About how many passes the figures of a circuit take."""
    parts = len(parts_of(circuit.graph, circuit.mask, how.unit)) if how.knockouts or how.removals else 0
    removed = min(how.removals, parts)
    return 2 + how.random_circuits + 2 * how.knockouts + removed + len(_scores(circuit)) * len(mib.SHARES)


def _figures(
    run: FinishedRun, bench: HeldOut, how: EvaluationOptions, reference: Reference | None, other: CircuitFolder | None
) -> dict[str, Any]:
    """All figures of one run, JSON-ready."""
    circuit, config = run.circuit, run.config
    graph = circuit.graph
    examples = bench.examples(run)
    bootstrap = Bootstrap(len(examples), how.bootstrap, how.level, how.seed) if how.bootstrap else None
    found: dict[str, Any] = {
        "run": str(run.path),
        "config": config.to_dict(),
        "metric": examples.metric,
        "split": how.split,
        "prompts": len(examples),
        "size": {
            "edges": circuit.n_edges,
            "addition": circuit.n_addition,
            "direct": circuit.n_direct,
            "total": graph.n_edges,
            "share": circuit.n_edges / graph.n_edges,
        },
        "full": faithfulness.row(examples, examples.full, bootstrap),
        "empty": faithfulness.row(examples, examples.empty, bootstrap),
        "circuit": faithfulness.point(examples, circuit.mask, bootstrap),
        "cost": run.cost,
        "ranking": is_ranking(circuit),
        "curves": {},
        "areas": {},
        "cpr": None,
        "cmd": None,
        "random": None,
        "completeness": None,
        "minimality": None,
        "reference": None if reference is None else {"name": reference.name} | beside(circuit, reference),
        "agreement": None if other is None else agreement(circuit, other.circuit, (str(run.path), str(other.path))),
    }
    if found["ranking"]:
        found |= _over_sizes(circuit, examples, how.select)
    if how.random_circuits and circuit.n_edges:
        found["random"] = random_circuits(examples, circuit.n_edges, how.random_circuits, how.seed)
    if how.knockouts:
        found["completeness"] = completeness(examples, circuit.mask, how.knockouts, how.seed, how.unit)
    if how.removals:
        found["minimality"] = minimality(examples, circuit.mask, how.removals, 0, how.seed, how.unit)
    return found


def _over_sizes(circuit: Circuit, examples: Examples, rule: str) -> dict[str, Any]:
    """Faithfulness at MIB's sizes and both areas for each ranking; CPR and CMD by the ranking that is theirs."""
    sizes = mib.sizes(circuit.graph.n_edges)
    curves = {
        name: faithfulness.curve(examples, faithfulness.series(circuit.graph, values, sizes, rule))
        for name, values in _scores(circuit).items()
    }

    areas = {name: {"cpr": _area(mib.cpr, points), "cmd": _area(mib.cmd, points)} for name, points in curves.items()}
    best = areas.get("signed", areas["absolute"])
    return {"curves": curves, "areas": areas, "cpr": best["cpr"], "cmd": areas["absolute"]["cmd"]}


def _area(of: Callable[[Sequence[float]], float], points: Sequence[dict[str, Any]]) -> float | None:
    values = [point["recovered"] for point in points]
    return None if None in values else of(values)


def _merit(row: dict[str, Any], curves: Sequence[dict[str, Any]]) -> tuple[float, float, int, str]:
    """Sorts the best run first: by area, then by how near to 1 the share recovered is, then the smaller circuit."""
    area = next((curve["edges"]["auc"] for curve in curves if curve["name"] == row["group"]), 0.0)
    recovered = row["circuit"]["recovered"]
    distance = np.inf if recovered is None else abs(1 - recovered)
    return -area, distance, row["size"]["edges"], row["name"]


def _pairs(runs: Sequence[FinishedRun], names: Sequence[str]) -> list[dict[str, Any]]:
    """The agreement of every two runs whose graphs are the same."""
    found = []
    for (a, first), (b, second) in combinations(zip(runs, names, strict=True), 2):
        if a.circuit.graph.options() == b.circuit.graph.options():
            found.append({"a": first, "b": second} | agreement(a.circuit, b.circuit, (first, second)))
    return found


def _notes(
    runs: Sequence[FinishedRun],
    rows: Sequence[dict[str, Any]],
    curves: Sequence[dict[str, Any]],
    how: EvaluationOptions,
) -> list[str]:
    """What readers of the figures must know."""
    notes = [f"{row['name']}: {faithfulness.UNDEFINED}" for row in rows if row["circuit"]["recovered"] is None]
    if any(row["circuit"]["accuracy"] is None for row in rows):
        notes.append("accuracy is undefined: some prompts have no answers")
    if any(curve["nodes"]["auc"] is None for curve in curves):
        notes.append("AUC over nodes is undefined: the reference has every node")
    for name in ("seed", "ablation") + (("n",) if how.n is None else ()):
        values = dict.fromkeys(getattr(run.config, name) for run in runs)
        if len(values) > 1:
            notes.append(f"{name} differs between runs ({', '.join(map(str, values))}): each is evaluated with its own")
    return notes
