"""Random circuits of the same size: what a circuit must be better than.

They are made of random paths from an embedding to the logits, so that all their edges do something, as in any
method's circuit. Source: Shi et al. 2024 (arXiv 2410.13032), where circuits are tested against such ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pahq.errors import PahqError
from pahq.evaluation.examples import Examples
from pahq.evaluation.faithfulness import point
from pahq.graph import Graph
from pahq.method.select import feeds

FIGURES = ("edges", "metric", "recovered", "kl", "accuracy")
PATIENCE = 1000
"""Paths in a row that no longer fit after which a circuit is as large as it gets."""


def random_circuits(examples: Examples, size: int, count: int = 5, seed: int = 0) -> dict[str, Any]:
    """JSON-ready: ``rows`` of ``faithfulness.point``, and mean and standard deviation of each figure.

    The i-th of the ``count`` circuits is drawn with seed ``seed + i``. std is None for fewer than two.
    Raises PahqError for a size or a count below 1.
    """
    if count < 1:
        raise PahqError(f"random circuits: {count} are too few; give at least 1")
    rows = []
    for index in range(count):
        mask = random_circuit(examples.graph, size, np.random.default_rng(seed + index))
        rows.append({"seed": seed + index} | point(examples, mask))
    return {"rows": rows, **_summary(rows)}


def random_circuit(graph: Graph, size: int, rng: np.random.Generator) -> np.ndarray:
    """Random paths until ``size`` edges are reached, or nearly: bool [n_receivers, n_senders + 1].

    Never more than ``size`` edges, and fewer only where no drawn path fits what is left.
    Raises PahqError for a size below 1 or above the number of edges.
    """
    if not 1 <= size <= graph.n_edges:
        raise PahqError(f"random circuits: {size} edges lie outside 1 … {graph.n_edges:,}; give a size inside")
    rows_of: dict[int, list[int]] = {}
    for row in range(len(graph.receivers)):
        for column in feeds(graph, row):
            rows_of.setdefault(column, []).append(row)
    mask = np.zeros(graph.shape, dtype=bool)
    left, misses = size, 0
    while left and misses < PATIENCE:
        path = [place for place in _path(graph, rows_of, rng) if not mask[place]]
        if path and len(path) <= left:
            mask[tuple(np.array(path).T)] = True
            left, misses = left - len(path), 0
        else:
            misses += 1
    return mask


def _path(graph: Graph, rows_of: dict[int, list[int]], rng: np.random.Generator) -> list[tuple[int, int]]:
    """(row, column) of the edges of a path, drawn from the logits back: any sender, then any input of its node."""
    path = []
    row = len(graph.receivers) - 1
    while True:
        column = int(rng.integers(graph.n_upstream(graph.receivers[row])))
        path.append((row, column))
        if column not in rows_of:  # an embedding
            return path
        row = int(rng.choice(rows_of[column]))
        if graph.edges[row, graph.direct]:
            path.append((row, graph.direct))


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, dict[str, float | None]] = {"mean": {}, "std": {}}
    for name in FIGURES:
        values = [row[name] for row in rows if row[name] is not None]
        found["mean"][name] = float(np.mean(values)) if values else None
        found["std"][name] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return found
