"""What ``pahq plot`` draws, a function for each kind: from folders to a ``Chart``.

All raise PahqError for folders that cannot serve, naming what makes such a folder.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from pahq.errors import PahqError, choices
from pahq.evaluation.circuit import Circuit
from pahq.report.figures import KINDS, circuit, curves, decisions, precision
from pahq.report.figures.chart import Chart, Draw
from pahq.report.figures.sources import (
    Folder,
    Folders,
    Source,
    costs_of_runs,
    only,
    reading,
    rows_of_results,
    sources,
    wrong,
)
from pahq.report.references import RANKINGS, other_run, overlay_of, reference_of, roc_of, truths_of
from pahq.report.tables import Row

_EVALUATE = "make them first: pahq evaluate RUN... --out DIR, or pahq compare RUN... --out DIR"


def graph(
    run: Folders | Circuit, *, truth: str | None = None, against: Folder | None = None, edges: int = circuit.MOST
) -> Chart:
    """The circuit of a run or folder, or a ``Circuit``: layers from bottom to top, heads in lanes, MLPs at the right.

    Colours tell what reads an edge (query, key, value, MLP, logits), widths its effect or score. truth: a known circuit
    (name or file), against: folder of another run; colours and dashes then tell the edges of both, of the first and of
    the second one alone. edges: how many are drawn at most, those of largest effect; the CSV has all.
    """
    if edges < 1:
        raise PahqError(f"edges: {edges} are too few to draw; give at least 1")
    if isinstance(run, Circuit):
        found, overlay, scored = run, None, _scored(run)
        if truth is not None or against is not None:
            raise PahqError("truth, against: a circuit alone can be laid over nothing; give the folder of its run")
    else:
        of = only("graph", run, "the folder of a run of pahq discover")
        if of.circuit is None:
            raise wrong("graph", of, "give the folder of a run of pahq discover")
        found, overlay = of.circuit.circuit, overlay_of(of.circuit, truth, against)
        scored = of.record.get("search", {}).get("selection") is not None if of.run is not None else _scored(found)
    rows = circuit.graph_rows(found, overlay, edges)
    if not rows:
        raise PahqError("plot graph: the circuit has no edge, so there is nothing to draw; lower its threshold")
    other = None if overlay is None else overlay.name
    draw = partial(circuit.draw_graph, graph=found.graph, other=other, measure="score" if scored else "effect")
    omitted = len(rows) - min(len(rows), edges)
    note = f"{omitted:,} of {len(rows):,} edges, the smallest, are not drawn (--edges sets how many are)"
    return Chart("graph", draw, rows, (note,) if omitted else ())


def _scored(circuit: Circuit) -> bool:
    """Whether scores stand in the place of effects, as far as a circuit alone can tell: nothing was tested."""
    return circuit.n_tested == 0


def roc(
    folders: Folders, *, truth: str | None = None, against: Folder | None = None, ranking: str | None = None
) -> Chart:
    """True- against false-positive rate over edges and nodes: a curve for each method.

    folders: evaluations or comparisons that had a reference; or runs, with ``truth`` (name or file of a known circuit)
    or ``against`` (folder of another run). ranking: whether edges are ranked by ``absolute`` (default) or ``signed``
    scores. Source: Conmy et al. 2023, section 4.
    """
    found = sources("roc", folders)
    runs = [one.run for one in found if one.run is not None]
    if ranking is not None and ranking not in RANKINGS:
        raise PahqError(f"ranking: '{ranking}' is unknown; known: {', '.join(RANKINGS)}")
    if len(runs) == len(found):
        if truth is None and against is None:
            raise wrong("roc", found[0], "name a known circuit with --truth, or another run with --against")
        other, truths = other_run(truth, against), truths_of(runs, truth)
        references = [reference_of(run, known, other) for run, known in zip(runs, truths, strict=True)]
        records = roc_of(runs, references, ranking != "signed")
        records.sort(key=lambda curve: -curve["edges"]["auc"])
    else:
        _all_results("roc", found, "name runs alone, or folders of pahq evaluate or compare alone")
        for name, given in (("truth", truth), ("against", against), ("ranking", ranking)):
            if given is not None:
                raise PahqError(f"plot roc: {found[0].about}, with a reference of its own; leave --{name} out")
        records = rows_of_results(found, "roc")
        if not records:
            raise wrong("roc", found[0], "no known circuit was beside it; repeat it with --truth or --against")
    with reading(found[0]):
        rows = curves.roc_rows(records)
    references = dict.fromkeys(row["reference"] for row in rows)
    if len(references) > 1:
        raise PahqError(f"plot roc: the curves are against different circuits ({', '.join(references)}); give one's")
    return Chart("roc", curves.draw_roc, rows)


def faithfulness(folders: Folders) -> Chart:
    """Share of the metric recovered against size: a line for each method, with intervals where there are.

    folders: evaluations or comparisons. Source: Mueller et al. 2025 (MIB), section 3.
    """
    found = sources("faithfulness", folders)
    _all_results("faithfulness", found, _EVALUATE)
    runs = rows_of_results(found, "runs")
    with reading(found[0]):
        rows = curves.faithfulness_rows(runs)
    if not rows:
        raise wrong("faithfulness", found[0], "no share recovered is defined there; evaluate with another --metric")
    return Chart("faithfulness", curves.draw_faithfulness, rows)


def cost(folders: Folders) -> Chart:
    """Time of the search and peak memory of each run. folders: runs, evaluations or comparisons."""
    found = sources("cost", folders)
    runs = costs_of_runs(found)
    results = [one for one in found if one.kind == "results"]
    for one in found:
        if one.kind in ("study", "circuit"):
            raise wrong("cost", one, "give runs of pahq discover, or folders of pahq evaluate or compare")
    with reading(found[0]):
        rows = curves.cost_rows([*runs, *rows_of_results(results, "runs")])
    if not rows:
        raise wrong("cost", found[0], "no time is recorded there; give runs of pahq discover")
    return Chart("cost", curves.draw_cost, rows)


def timeline(run: Folders) -> Chart:
    """ACDC's decisions in their order: effects, the threshold, what was kept, removed and measured again in FP32."""
    from pahq.report.journal import JOURNAL_FILE, read

    needs = "the folder of a run of pahq discover --method acdc"
    of = only("timeline", run, needs)
    if of.run is None:
        raise wrong("timeline", of, f"give {needs}")
    config = of.run.config
    if config.method != "acdc" or config.threshold is None:
        raise wrong("timeline", of, f"{config.method} scores edges and takes no decisions in turn; give {needs}")
    taken, _ = read(of.path / JOURNAL_FILE, finished=True)
    if not taken:
        raise PahqError(
            f"plot timeline: {of.path / JOURNAL_FILE} is missing or empty; give a run whose folder is whole"
        )
    with reading(of):
        rows = decisions.timeline_rows(taken, of.run.circuit.graph, config.threshold, bool(config.absolute))
    return Chart("timeline", partial(decisions.draw_timeline, metric=str(config.metric)), rows)


def snr(folder: Folders) -> Chart:
    """An edge's signal to noise in the residual stream, layer by layer. folder: of ``pahq precision snr``."""
    from pahq.evaluation.precision.snr import decibels  # brings torch

    of, rows = _study("snr", folder)
    with reading(of):
        for row in rows:  # JSON has no infinity
            row |= {
                f"snr_db{which}": decibels(float(row[f"signal{which}"]), float(row[f"noise{which}"]))
                for which in ("", "_read")
            }
    exact = [name for name in dict.fromkeys(row["variant"] for row in rows) if not _noisy(rows, name)]
    return _precision("snr", of, precision.draw_snr, rows, *(f"{name}: no noise, so it has no line" for name in exact))


def _noisy(rows: Sequence[Row], variant: str) -> bool:
    return any(math.isfinite(row["snr_db"]) for row in rows if row["variant"] == variant)


def sensitivity(folder: Folders) -> Chart:
    """Error of effects by component and format. folder: of ``pahq precision sensitivity``."""
    of, rows = _study("sensitivity", folder)
    return _precision("sensitivity", of, precision.draw_sensitivity, rows)


def groups(folder: Folders) -> Chart:
    """Memory, time and agreement by the number of heads in FP32 at a time. folder: of ``pahq precision groups``."""
    of, rows = _study("groups", folder)
    return _precision("groups", of, precision.draw_groups, rows)


def plot(kind: str, folders: Sequence[Folder], **options: Any) -> Chart:
    """The figure of a kind by its name. options: of that kind's function; None is as if not given.

    Raises PahqError for an unknown kind, and for options that it does not have.
    """
    if kind not in KINDS:
        raise PahqError(f"plot: kind '{kind}' is unknown; {choices(kind, KINDS)}")
    make = globals()[kind]
    given = {name: value for name, value in options.items() if value is not None}
    known = inspect.signature(make).parameters
    for name in given:
        if name not in known:
            raise PahqError(f"plot {kind}: it has no option --{name}; leave it out")
    return make(folders, **given)


def _study(kind: str, folder: Folders) -> tuple[Source, list[Row]]:
    """The folder of a precision study, and its rows."""
    needs = f"the folder of pahq precision {kind} --out DIR"
    of = only(kind, folder, needs)
    if of.kind != "study" or of.record.get("study") != kind:
        raise wrong(kind, of, f"give {needs}")
    with reading(of):
        rows = [{name: row[name] for name in row} for row in of.record["figures"]["rows"]]
        for row in rows:
            for name in (*precision.COLUMNS[kind], *rows[0]):
                row[name]  # KeyError: told as damage
    if not rows:
        raise wrong(kind, of, "its table is empty; make it anew")
    return of, rows


def _precision(kind: str, of: Source, draw: Draw, rows: Sequence[Row], *notes: str) -> Chart:
    """A chart whose rows are a study's own: that they can be drawn is found out here, by drawing them."""

    def guarded(figure: Any, of_rows: Sequence[Row]) -> None:
        with reading(of):
            draw(figure, of_rows)

    return Chart(kind, guarded, rows, tuple(notes))


def _all_results(kind: str, found: Sequence[Source], mend: str) -> None:
    for one in found:
        if one.kind != "results":
            raise wrong(kind, one, mend)
