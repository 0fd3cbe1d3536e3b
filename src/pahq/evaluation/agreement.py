"""How far two circuits of one graph agree: in what they keep, and in what they say about each edge."""

from __future__ import annotations

from typing import Any

import numpy as np

from pahq.errors import PahqError
from pahq.evaluation.circuit import Circuit
from pahq.evaluation.precision.agreement import spearman
from pahq.evaluation.roc import f1
from pahq.graph import Graph


def check_same(a: Graph, b: Graph, names: tuple[str, str]) -> None:
    """Raises PahqError if two graphs do not have the very same edges; names: what to call them."""
    same = [str(r) for r in a.receivers] == [str(r) for r in b.receivers]
    same = same and [str(s) for s in a.senders] == [str(s) for s in b.senders]
    if same and np.array_equal(a.edges, b.edges):
        return
    why = f"{a.config.name} has {a.n_edges:,} edges, {b.config.name} {b.n_edges:,}"
    for option, value in a.options().items():
        if b.options()[option] != value:
            why = f"{option} is {value} in one, {b.options()[option]} in the other"
            break
    raise PahqError(
        f"{names[0]} and {names[1]}: their graphs differ ({why}); take runs on the same model and graph options"
    )


def overlap(kept: np.ndarray, reference: np.ndarray) -> dict[str, float | None]:
    """Precision, recall, F1 and Jaccard of bool arrays of one shape.

    precision: share of what is kept that the reference keeps, too (None if nothing is kept); recall: share of the
    reference that is kept (None if it is empty); jaccard: what both keep by what either keeps (1 if both are empty).
    """
    both, kept_n, reference_n = int((kept & reference).sum()), int(kept.sum()), int(reference.sum())
    either = kept_n + reference_n - both
    return {
        "precision": both / kept_n if kept_n else None,
        "recall": both / reference_n if reference_n else None,
        "f1": f1(kept, reference),
        "jaccard": both / either if either else 1.0,
    }


def agreement(
    circuit: Circuit, reference: Circuit, names: tuple[str, str] = ("circuit", "reference")
) -> dict[str, Any]:
    """JSON-ready figures of a circuit beside a reference one.

    decisions: share of all edges about which both decide alike. precision, recall, f1, jaccard: see ``overlap``.
    spearman: rank correlation of the effects of edges that both measured (None if undefined); measured: their number.
    Raises PahqError if the graphs differ.
    """
    check_same(circuit.graph, reference.graph, names)
    edges = circuit.graph.edges
    both = edges & np.isfinite(circuit.effects) & np.isfinite(reference.effects)
    return {
        "decisions": float((circuit.mask == reference.mask)[edges].mean()),
        **overlap(circuit.mask, reference.mask),
        "spearman": spearman(circuit.effects[both], reference.effects[both]),
        "measured": int(both.sum()),
    }
