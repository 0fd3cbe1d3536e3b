"""A circuit beside a reference one (a truth, or another run's): rates, F1 and ROC over edges and over nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pahq.evaluation import roc
from pahq.evaluation.agreement import overlap
from pahq.evaluation.circuit import Circuit
from pahq.evaluation.truth.base import node_mask
from pahq.graph import Graph


@dataclass(frozen=True)
class Reference:
    """A reference circuit. mask: bool [n_receivers, n_senders + 1] over ``graph``.

    Raises PahqError where it keeps no edge, or every edge: nothing can be held against it then.
    """

    name: str
    graph: Graph
    mask: np.ndarray

    def __post_init__(self) -> None:
        roc.rates(self.mask, self.mask, self.graph.edges)


def node_scores(graph: Graph, scores: np.ndarray) -> np.ndarray:
    """float64 [n_senders + n_receivers], the order of ``truth.base.node_names``: the best score of a node's edges.

    So the nodes with a score of at least t are the end points of the edges with a score of at least t.
    """
    known = np.where(graph.edges, scores, -np.inf)
    return np.concatenate([known[:, : graph.direct].max(axis=0), known.max(axis=1)])


def is_ranking(circuit: Circuit) -> bool:
    """Whether every edge has a score: so do methods that score edges; a sweep measures some edges, one by one."""
    return bool((circuit.order < 0).all() and np.isfinite(circuit.effects[circuit.graph.edges]).all())


def beside(circuit: Circuit, reference: Reference) -> dict[str, Any]:
    """JSON-ready, for ``edges`` and ``nodes``: fpr, tpr, precision, recall, f1, jaccard.

    Rates over nodes are None where the reference has every node (with all or no edges, it is no reference: PahqError).
    """
    found = {}
    for kind, (kept, wanted, places) in _views(circuit, reference).items():
        point = None if kind == "nodes" and wanted.all() else roc.rates(kept, wanted, places)
        found[kind] = {"fpr": point and point.fpr, "tpr": point and point.tpr, **overlap(kept, wanted)}
    return found


def areas(circuits: Sequence[Circuit], reference: Reference, absolute: bool = True) -> dict[str, Any]:
    """JSON-ready, for ``edges`` and ``nodes``: the area under one curve, ``auc`` and ``pessimistic_auc``, its points.

    circuits: runs of one method, one point each; a single ranking gives a point for each of its thresholds.
    absolute: rank by the size of scores, whatever their sign. Areas over nodes are None where the reference has every
    node.
    """
    ranking = len(circuits) == 1 and is_ranking(circuits[0])
    found = {}
    for kind in ("edges", "nodes"):
        if kind == "nodes" and node_mask(reference.graph, reference.mask).all():
            found[kind] = {"auc": None, "pessimistic_auc": None, "points": []}
            continue
        if ranking:
            scores = np.abs(circuits[0].effects) if absolute else circuits[0].effects
            values = scores if kind == "edges" else node_scores(circuits[0].graph, scores)
            _, wanted, places = _views(circuits[0], reference)[kind]
            points = roc.ranked(values, wanted, places)
            shown = roc.ranked(values, wanted, places, brief=True)
        else:
            points = shown = sorted(roc.rates(*_views(circuit, reference)[kind]) for circuit in circuits)
        found[kind] = {
            "auc": roc.auc(points),
            "pessimistic_auc": roc.pessimistic_auc(points),
            "points": [list(point) for point in shown],
        }
    return {"ranking": ranking, "runs": len(circuits), **found}


def _views(circuit: Circuit, reference: Reference) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What is kept, what should be, and what there is at all: bool arrays over edges, and over nodes."""
    graph = circuit.graph
    nodes = node_mask(graph, circuit.mask)
    return {
        "edges": (circuit.mask, reference.mask, graph.edges),
        "nodes": (nodes, node_mask(graph, reference.mask), np.ones_like(nodes)),
    }
