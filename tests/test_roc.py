"""F1 and areas under curves of edge sets, against sets made by hand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from pahq.errors import PahqError
from pahq.evaluation.roc import Point, auc, f1, pessimistic_auc, ranked, rates

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


def test_a_ranking_by_hand() -> None:
    scores = np.array([[5, 4, 3, 3, 0], [3, 1, 2, 99, 99]], dtype=float)  # the last two places are no edges
    # from the best score down: 5 and 4 are right; of the three 3s one is; 2 is wrong, 1 right, 0 wrong
    curve = [
        Point(0, 0),
        Point(0, 0.25),
        Point(0, 0.5),
        Point(0.5, 0.75),
        Point(0.75, 0.75),
        Point(0.75, 1),
        Point(1, 1),
    ]
    assert ranked(scores, REFERENCE, EDGES) == curve
    area = 0.5 * (0.5 + 0.75) / 2 + 0.25 * 0.75 + 0.25 * 1
    assert auc(curve) == pytest.approx(area)
    assert pessimistic_auc(curve) == pytest.approx(0.5 * 1 + 0.25 * 0.5 + 0.25 * 0.25)
    assert auc(ranked(scores, REFERENCE, EDGES, brief=True)) == pytest.approx(area)


def test_a_brief_ranking_has_the_same_area() -> None:
    draw = np.random.default_rng(0)
    reference = np.arange(200) < 40
    scores = draw.normal(size=200) + reference
    whole, brief = (ranked(scores, reference, reference | True, brief) for brief in (False, True))
    assert len(brief) < len(whole) / 2
    assert auc(brief) == pytest.approx(auc(whole))


def test_a_ranking_is_the_curve_of_its_circuits() -> None:
    """Every threshold among the scores, as a set of edges of its own."""
    draw = np.random.default_rng(0)
    for _ in range(5):
        edges = draw.random((6, 7)) < 0.8
        reference = edges & (draw.random((6, 7)) < 0.3)
        scores = draw.integers(0, 9, (6, 7)).astype(float)
        one_by_one = [rates(edges & (scores >= t), reference, edges) for t in sorted(set(scores[edges]), reverse=True)]
        assert ranked(scores, reference, edges)[1:] == one_by_one


def test_what_is_no_ranking_is_refused() -> None:
    scores = np.ones(REFERENCE.shape)
    scores[0, 2] = np.nan
    with pytest.raises(PahqError, match="no finite score"):
        ranked(scores, REFERENCE, EDGES)
    with pytest.raises(PahqError, match="keeps no edge"):
        ranked(scores, EDGES & False, EDGES)


def test_the_standard_area_is_that_of_trapezoids() -> None:
    draw = np.random.default_rng(0)
    for count in (1, 2, 5, 20):
        points = [Point(*map(float, pair)) for pair in draw.random((count, 2))]
        ends = sorted([(0.0, 0.0), *points, (1.0, 1.0)])
        trapezoids = [(b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(ends)]
        assert auc(points) == pytest.approx(sum(trapezoids))
        assert auc(points[::-1]) == auc(points)
        assert pessimistic_auc(points) <= _upper_step(points) + 1e-12


def _upper_step(points: list[Point]) -> float:
    """The area below the steps that take the best point at most so far to the right."""
    grid = np.linspace(0, 1, 20001)
    best = [max([0.0, *(p.tpr for p in points if p.fpr <= x)]) for x in grid[:: max(1, len(points))]]
    return float(np.mean(best)) + 2e-3
