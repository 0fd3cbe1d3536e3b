"""What finished runs are held against, a known circuit or another run, and the ROC of each group of runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike
from typing import Any

from pahq.errors import PahqError
from pahq.evaluation.agreement import check_same
from pahq.evaluation.reference import Reference, areas, is_ranking
from pahq.evaluation.truth.base import Truth, load_truth, moved
from pahq.report.finished import CircuitFolder, FinishedRun, circuit_in, group_names
from pahq.report.viewer.drawing import Overlay

RANKINGS = ("absolute", "signed")
"""Edges are ranked by the size of their scores, or by signed scores."""


def other_run(truth: str | None, against: str | PathLike[str] | None) -> CircuitFolder | None:
    """The run or circuit in ``against``, None without; raises PahqError where a truth is given as well."""
    if truth is not None and against is not None:
        raise PahqError("truth, against: only one can be beside a run; give one of them")
    return None if against is None else circuit_in(against)


def truths_of(runs: Sequence[FinishedRun], name: str | None) -> list[Truth | None]:
    """The truth for each run, read once for runs on one graph (only a file may need the graph to be read)."""
    found: dict[str, Truth] = {}
    truths: list[Truth | None] = []
    for run in runs:
        graph = run.circuit.graph
        key = (
            json.dumps([graph.config.to_dict(), graph.options()], sort_keys=True) if str(name).endswith(".json") else ""
        )
        if name is not None and key not in found:
            found[key] = load_truth(name, graph)
        truths.append(None if name is None else found[key])
    return truths


def reference_of(run: FinishedRun, truth: Truth | None, other: CircuitFolder | None) -> Reference | None:
    """What the run is held against, on its own graph; None without truth and other run."""
    graph = run.circuit.graph
    if truth is not None:
        return Reference(truth.name, graph, truth.on(graph))
    if other is None:
        return None
    check_same(graph, other.circuit.graph, (str(run.path), str(other.path)))
    return Reference(str(other.path), graph, other.circuit.mask)


def overlay_of(run: CircuitFolder, truth: str | None, against: str | PathLike[str] | None) -> Overlay | None:
    """The second circuit to lay over a run's, as edges of that one's graph; None without truth and other run."""
    graph, other = run.circuit.graph, other_run(truth, against)
    if other is not None:
        return Overlay(other.path.resolve().name, moved(other.circuit.graph, other.circuit.mask, graph, str(against)))
    if truth is not None:
        known = load_truth(truth, graph)
        return Overlay(known.name, known.on(graph))
    return None


def roc_of(runs: Sequence[FinishedRun], references: Sequence[Reference | None], absolute: bool) -> list[dict[str, Any]]:
    """One curve for each group of runs that has a reference, by its name; see ``evaluation.reference.areas``.

    Of a method that scores edges, the runs of a group share one ranking. absolute: rank by the size of scores.
    """
    names, found = group_names(runs), []
    groups: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        groups.setdefault(run.group, []).append(index)
    for group, members in groups.items():
        reference = references[members[0]]
        if reference is None:
            continue
        circuits = [runs[index].circuit for index in members]
        if is_ranking(circuits[0]):
            circuits = circuits[:1]  # the same scores, whatever circuit was chosen by them
        found.append({"name": names[group], "reference": reference.name} | areas(circuits, reference, absolute))
    return found
