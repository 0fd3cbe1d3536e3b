"""F1 and areas under curves of edge sets, against sets made by hand and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest

from pahq.errors import PahqError
from pahq.evaluation.roc import Point, auc, f1, pessimistic_auc, rates

REFERENCE = np.array([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0]], dtype=bool)
EDGES = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=bool)
"""Four edges in the reference, four others; two places are none."""


def test_rates_and_f1_by_hand() -> None:
    kept = np.array([[1, 0, 1, 0, 0], [1, 1, 0, 0, 0]], dtype=bool)  # three of the four, one other
    assert rates(kept, REFERENCE, EDGES) == Point(0.25, 0.75)
    assert f1(kept, REFERENCE) == pytest.approx(0.75)
    assert rates(EDGES, REFERENCE, EDGES) == Point(1.0, 1.0)
    assert f1(EDGES, REFERENCE) == pytest.approx(8 / 12)
    assert f1(REFERENCE, REFERENCE) == 1
    assert f1(~EDGES, REFERENCE) == 0
    assert f1(np.zeros(3, dtype=bool), np.zeros(3, dtype=bool)) == 1


@pytest.mark.parametrize(("reference", "word"), [(EDGES, "every edge"), (EDGES & False, "no edge")])
def test_a_reference_without_two_sides_is_refused(reference: np.ndarray, word: str) -> None:
    with pytest.raises(PahqError, match=f"keeps {word}"):
        rates(EDGES, reference, EDGES)


def test_areas_by_hand() -> None:
    assert auc([]) == pytest.approx(0.5)
    assert pessimistic_auc([]) == 0
    assert auc([Point(0, 1)]) == pessimistic_auc([Point(0, 1)]) == 1
    one = [Point(0.1, 0.9)]
    assert auc(one) == pytest.approx(0.9)
    assert pessimistic_auc(one) == pytest.approx(0.9 * 0.9)
    # (0.5, 0.6) is dominated: only the standard area has it
    two = [Point(0.5, 0.6), *one]
    assert auc(two) == pytest.approx(0.1 * 0.45 + 0.4 * 0.75 + 0.5 * 0.8)
    assert pessimistic_auc(two) == pytest.approx(0.9 * 0.9)
    three = [Point(0.3, 1.0), *two]
    assert pessimistic_auc(three) == pytest.approx(0.9 * 0.9 + 0.7 * 0.1)


def test_the_standard_area_is_scikit_learns() -> None:
    from sklearn import metrics

    draw = np.random.default_rng(0)
    for count in (1, 2, 5, 20):
        points = [Point(*map(float, pair)) for pair in draw.random((count, 2))]
        ends = sorted([(0.0, 0.0), *points, (1.0, 1.0)])
        assert auc(points) == pytest.approx(metrics.auc([x for x, _ in ends], [y for _, y in ends]))
        assert auc(points[::-1]) == auc(points)
        assert pessimistic_auc(points) <= _upper_step(points) + 1e-12


def _upper_step(points: list[Point]) -> float:
    """The area below the steps that take the best point at most so far to the right."""
    grid = np.linspace(0, 1, 20001)
    best = [max([0.0, *(p.tpr for p in points if p.fpr <= x)]) for x in grid[:: max(1, len(points))]]
    return float(np.mean(best)) + 2e-3
