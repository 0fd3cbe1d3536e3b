"""How close sets of kept edges (or nodes) come to a reference set: F1, and the area under a curve of such sets.

Two curves. Of several runs (the ACDC paper's, Conmy et al. 2023): one point for each threshold of a method, the
false-positive rate against the true-positive rate over all edges of the graph, and the end points (0, 0) and (1, 1).
Of one ranking: a point for each threshold that its scores allow.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from pahq.errors import PahqError


class Point(NamedTuple):
    """False-positive and true-positive rate of one set of edges, each in [0, 1]."""

    fpr: float
    tpr: float


def rates(kept: np.ndarray, reference: np.ndarray, edges: np.ndarray) -> Point:
    """Where a set of edges lies. kept, reference, edges: bool, one shape; edges: which places are edges at all.

    Raises PahqError if the reference keeps no edge or every edge: one of the rates is undefined then.
    """
    positives, negatives = _sides(reference, edges)
    found = kept[edges]
    return Point(float(found[negatives].mean()), float(found[positives].mean()))


def ranked(scores: np.ndarray, reference: np.ndarray, edges: np.ndarray, brief: bool = False) -> list[Point]:
    """The curve of a ranking: the sets ``scores >= t`` for every t among the scores, from the largest down.

    scores: float, finite where ``edges`` is True; the other arguments as for ``rates``. brief: leaves points out that
    lie on a straight line between their neighbours (for plots: the standard area stays, the pessimistic one may not).
    Raises PahqError as ``rates`` does, and for scores that are not finite.
    """
    positives, _ = _sides(reference, edges)
    values = scores[edges]
    if not np.isfinite(values).all():
        raise PahqError("roc: some edges have no finite score, so there is no ranking; take a method that scores all")
    from sklearn.metrics import roc_curve  # takes a second to import

    fpr, tpr, _ = roc_curve(positives, values, drop_intermediate=brief)
    return [Point(float(x), float(y)) for x, y in zip(fpr, tpr, strict=True)]


def f1(kept: np.ndarray, reference: np.ndarray) -> float:
    """Harmonic mean of precision and recall of bool arrays of one shape; 1 where both are empty."""
    sizes = int(kept.sum()) + int(reference.sum())
    return 2 * int((kept & reference).sum()) / sizes if sizes else 1.0


def auc(points: Iterable[Point]) -> float:
    """Standard area under the curve: trapezoids over all points in the order of their false-positive rates."""
    from sklearn import metrics

    x, y = _ends(points)
    return float(metrics.auc(x, y))


def pessimistic_auc(points: Iterable[Point]) -> float:
    """The ACDC paper's area: points that another one dominates are dropped, the rest joined by a lower step function.

    A point is dominated by one that finds at least as many true positives at no more false ones.
    """
    x, y = _ends(points)
    best = np.maximum.accumulate(y)
    above = np.concatenate(([True], y[1:] > best[:-1]))
    x, y = x[above], y[above]
    return float(((1 - x[1:]) * np.diff(y)).sum())


def _sides(reference: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of the edges the reference keeps and which not: bool [edges.sum()] each, neither without any."""
    positives, negatives = reference[edges], ~reference[edges]
    if not positives.any() or not negatives.any():
        which = "no edge" if not positives.any() else "every edge"
        raise PahqError(f"roc: the reference circuit keeps {which}; choose another threshold for it")
    return positives, negatives


def _ends(points: Iterable[Point]) -> tuple[np.ndarray, np.ndarray]:
    """Rates of the points and both ends, float64 [n], sorted by false-positive, then by true-positive rate."""
    ordered = sorted([Point(0.0, 0.0), *points, Point(1.0, 1.0)])
    table = np.array(ordered, dtype=np.float64)
    return table[:, 0], table[:, 1]
