"""Random circuits of the same size: what a circuit must be better than."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pahq.errors import PahqError
from pahq.evaluation.examples import Examples
from pahq.evaluation.faithfulness import point
from pahq.method.select import greedy

FIGURES = ("edges", "metric", "recovered", "kl", "accuracy")


def random_circuits(examples: Examples, size: int, count: int = 5, seed: int = 0) -> dict[str, Any]:
    """JSON-ready: ``rows`` of ``faithfulness.point``, and mean and standard deviation of each figure.

    Circuits of at most ``size`` edges and about that many, all on a path from the input to the output as any method's
    are: the i-th is grown from the logits by scores drawn evenly with seed ``seed + i``. std is None for fewer than
    two. Raises PahqError for a size or a count below 1.
    """
    if count < 1:
        raise PahqError(f"random circuits: {count} are too few; give at least 1")
    graph = examples.graph
    rows = []
    for index in range(count):
        scores = np.random.default_rng(seed + index).random(graph.shape)
        rows.append({"seed": seed + index} | point(examples, greedy(graph, scores, size)))
    return {"rows": rows, **_summary(rows)}


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, dict[str, float | None]] = {"mean": {}, "std": {}}
    for name in FIGURES:
        values = [row[name] for row in rows if row[name] is not None]
        found["mean"][name] = float(np.mean(values)) if values else None
        found["std"][name] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return found
