"""Completeness and minimality: what happens to a circuit, and to the model, when parts of the circuit are cut as well.

Source: Wang et al. 2022 (arXiv 2211.00593), section 4. With F the metric, M the model, C the circuit and K some of
C's parts:

* incompleteness for K is |F(C without K) - F(M without K)|. Large values say that the model has parts outside the
  circuit that step in for K. K empty gives faithfulness, |F(C) - F(M)|.
* minimality of a part v is the largest |F(C without K and v) - F(C without K)| over the K looked at, always the
  empty one among them. Small values say that v is not needed.

Parts are nodes (heads and MLPs: cut by cutting all edges that leave them) or single edges.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from pahq.errors import PahqError
from pahq.evaluation.examples import Examples
from pahq.graph import Graph

Unit = Literal["node", "edge"]


def parts_of(graph: Graph, mask: np.ndarray, unit: Unit) -> list[tuple[str, np.ndarray]]:
    """Names of a circuit's parts, and the edges that are cut with each: bool [n_receivers, n_senders + 1].

    Nodes: heads and MLPs that something in the circuit reads. Embeddings are input, and no part.
    """
    if unit == "edge":
        found = []
        for row, column in zip(*(axis.tolist() for axis in np.nonzero(mask)), strict=True):
            one = np.zeros(graph.shape, dtype=bool)
            one[row, column] = True
            found.append((graph.edge_name(row, column), one))
        return found
    if unit != "node":
        raise PahqError(f"knock-outs: '{unit}' is no kind of part; choose node or edge")
    found = []
    for column, sender in enumerate(graph.senders):
        if sender.kind in ("head", "mlp") and mask[:, column].any():
            leaving = np.zeros(graph.shape, dtype=bool)
            leaving[:, column] = graph.edges[:, column]
            found.append((sender.name, leaving))
    return found


def subsets(count: int, samples: int, rng: np.random.Generator) -> np.ndarray:
    """``samples`` subsets of ``count`` parts, each part in with chance 1/2, none empty: bool [samples, count]."""
    if not count:
        return np.zeros((0, 0), dtype=bool)
    drawn = rng.random((samples, count)) < 0.5
    empty = np.flatnonzero(~drawn.any(axis=1))
    drawn[empty, rng.integers(0, count, len(empty))] = True
    return drawn


def completeness(
    examples: Examples, mask: np.ndarray, samples: int = 10, seed: int = 0, unit: Unit = "node"
) -> dict[str, Any]:
    """JSON-ready: ``rows`` (knocked-out parts, metric of circuit and model, incompleteness), their mean and largest.

    The first row knocks nothing out. mask: the circuit. Raises PahqError for fewer than 0 samples.
    """
    if samples < 0:
        raise PahqError(f"knock-outs: {samples} samples make no sense; give at least 0")
    graph = examples.graph
    parts = parts_of(graph, mask, unit)
    chosen = subsets(len(parts), samples, np.random.default_rng(seed))
    rows: list[dict[str, Any]] = []
    for index in range(1 + len(chosen)):
        out = [] if not index else np.flatnonzero(chosen[index - 1]).tolist()
        cut = _union(graph, [parts[i][1] for i in out])
        circuit = examples.measure(mask & ~cut)
        model = examples.measure(graph.edges & ~cut) if out else examples.full.metric.mean
        rows.append(
            {
                "out": [parts[i][0] for i in out],
                "circuit": circuit,
                "model": model,
                "incompleteness": abs(circuit - model),
            }
        )
    scores = [row["incompleteness"] for row in rows[1:]]
    return {
        "unit": unit,
        "seed": seed,
        "parts": len(parts),
        "rows": rows,
        "mean": float(np.mean(scores)) if scores else None,
        "largest": max(scores) if scores else None,
    }


def minimality(
    examples: Examples,
    mask: np.ndarray,
    limit: int | None = None,
    samples: int = 0,
    seed: int = 0,
    unit: Unit = "node",
) -> dict[str, Any]:
    """JSON-ready: ``rows`` (part, minimality, share of the model's gap), least needed first, and a summary.

    limit: at most so many parts, drawn at random (None: all). samples: knock-outs K beside the empty one.
    unneeded: number of parts below 1 % of |F(M) - F(empty circuit)|, the paper's yardstick.
    """
    if samples < 0 or (limit is not None and limit < 0):
        raise PahqError(f"knock-outs: {min(samples, limit or 0)} makes no sense; give at least 0")
    graph = examples.graph
    rng = np.random.default_rng(seed)
    parts = parts_of(graph, mask, unit)
    which = np.arange(len(parts))
    if limit is not None and limit < len(parts):
        which = np.sort(rng.choice(len(parts), limit, replace=False))
    chosen = np.concatenate((np.zeros((1, len(parts)), dtype=bool), subsets(len(parts), samples, rng)))
    bases = [mask & ~_union(graph, [parts[i][1] for i in np.flatnonzero(out)]) for out in chosen]
    before = [examples.measure(base) for base in bases]
    gap = abs(examples.gap)
    rows: list[dict[str, Any]] = []
    for index in which.tolist():
        name, cut = parts[index]
        changes = [
            abs(examples.measure(base & ~cut) - metric)
            for out, base, metric in zip(chosen, bases, before, strict=True)
            if not out[index]
        ]
        rows.append({"part": name, "minimality": max(changes), "share": max(changes) / gap if gap else None})
    rows.sort(key=lambda row: (row["minimality"], row["part"]))
    scores = [row["minimality"] for row in rows]
    return {
        "unit": unit,
        "seed": seed,
        "parts": len(parts),
        "samples": samples,
        "rows": rows,
        "least": min(scores) if scores else None,
        "median": float(np.median(scores)) if scores else None,
        "unneeded": sum(score < 0.01 * gap for score in scores),
    }


def _union(graph: Graph, cuts: list[np.ndarray]) -> np.ndarray:
    out = np.zeros(graph.shape, dtype=bool)
    for cut in cuts:
        out |= cut
    return out
