"""How the edges of a circuit run on paper: round the nodes between their ends. All lengths in points.

An edge that ran behind a node would look like two, into it and out of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

Point = tuple[float, float]
Curve = tuple[Point, Point, Point, Point]
"""A cubic Bézier: start, two controls, end."""
CLEAR = 1.3
"""That an edge keeps from a node."""
SHIFTS = (0.0, 8.0, -8.0, 16.0, -16.0, 28.0, -28.0, 44.0, -44.0, 66.0, -66.0)
"""How far aside the control points may go, the nearest first."""
REACHES = (1.0, 1.8, 0.5, 0.15, 3.2)
"""How far ahead of its end a control point lies, as shares of what is usual."""
_T = np.linspace(0.0, 1.0, 48)[:, None]
_WEIGHTS = np.concatenate([(1 - _T) ** 3, 3 * _T * (1 - _T) ** 2, 3 * _T**2 * (1 - _T), _T**3], axis=1)


class End(NamedTuple):
    """A point on a node's border, and the way an edge takes there: up (0, 1), or (-1, 0) to the left."""

    x: float
    y: float
    way: Point = (0.0, 1.0)


def around(start: End, end: End, nodes: np.ndarray, width: float, left: float = 0.0) -> Curve:
    """From one node to another, past as many of the others as can be; of the ways that touch none the shortest.

    nodes: float [n, 4], left, right, bottom and top of all that are neither. width: of the whole; an edge stays
    between ``left`` and it.
    """
    for reaches, shifts in ((REACHES[:1], SHIFTS[:1]), (REACHES[:3], SHIFTS), (REACHES, SHIFTS)):
        found = _controls(start, end, reaches, shifts)
        touched = _touched(found, _near(nodes, found), width, left)
        if not touched.min():
            break
    best = np.flatnonzero(touched == touched.min())
    steps = np.diff(points(found[best]), axis=1)
    lengths = np.hypot(steps[..., 0], steps[..., 1]).sum(axis=1)
    return _curve(found[best[np.argmin(lengths.round(3))]])  # of equals the first: the same edge runs the same way


def arc(start: Point, end: Point, out: float) -> Curve:
    """Between the right sides of two nodes of one column; out: how far it bows to the right."""
    (x0, y0), (x1, y1) = start, end
    right = max(x0, x1) + out / 0.75  # the middle of the curve is at three quarters of its controls
    lean = min(0.12 * (y1 - y0), 6.0)
    return (start, (right, y0 + lean), (right, y1 - lean), end)


def spread(wishes: Sequence[float], sizes: Sequence[float], low: float, high: float) -> list[float]:
    """Middles of things of these sizes side by side: each where it wishes, or as near as its neighbours let it.

    They keep their order; the sum of squared distances from the wishes is least (pool adjacent violators).
    """
    if not sizes:
        return []
    offsets = [0.0]
    for before, size in pairwise(sizes):
        offsets.append(offsets[-1] + (before + size) / 2)
    blocks: list[tuple[float, int]] = []  # mean of a block's wishes, less the offsets; and its length
    for wish, offset in zip(wishes, offsets, strict=True):
        mean, length = wish - offset, 1
        while blocks and blocks[-1][0] > mean:
            other, more = blocks.pop()
            mean, length = (mean * length + other * more) / (length + more), length + more
        blocks.append((mean, length))
    low, high = low + sizes[0] / 2, high - sizes[-1] / 2 - offsets[-1]
    bases = [min(max(mean, low), max(high, low)) for mean, length in blocks for _ in range(length)]
    return [base + offset for base, offset in zip(bases, offsets, strict=True)]


def points(curves: np.ndarray) -> np.ndarray:
    """Points along curves: float [n, 4, 2] -> [n, samples, 2]."""
    return np.einsum("sc,ncd->nsd", _WEIGHTS, curves)


def touches(curve: Curve, nodes: np.ndarray, clear: float = 0.0) -> int:
    """How many nodes an edge touches, or comes nearer to than ``clear``."""
    return int(_hits(np.array([curve]), nodes, clear)[0])


def _controls(start: End, end: End, reaches: Sequence[float], shifts: Sequence[float]) -> np.ndarray:
    """Curves with each end's control ahead of it by each reach, and aside by each shift: float [n, 4, 2]."""
    ends = []
    for at, other, sign in ((start, end, 1.0), (end, start, -1.0)):
        way = np.array(at.way) * sign
        ahead = abs((other.x - at.x) * way[0] + (other.y - at.y) * way[1])
        side = abs((other.x - at.x) * way[1]) + abs((other.y - at.y) * way[0])
        usual = max(5.0, min(0.45 * ahead + 0.04 * side, 60.0 if way[0] else 24.0))
        ends.append(
            np.array(
                [
                    (
                        at.x + reach * usual * way[0] + shift * abs(way[1]),
                        at.y + reach * usual * way[1] + shift * abs(way[0]),
                    )
                    for reach in reaches
                    for shift in shifts
                ]
            )
        )
    first, second = (grid.ravel() for grid in np.meshgrid(*(np.arange(len(some)) for some in ends), indexing="ij"))
    found = np.empty((len(first), 4, 2))
    found[:, 0], found[:, 1] = start[:2], ends[0][first]
    found[:, 2], found[:, 3] = ends[1][second], end[:2]
    return found


def _near(nodes: np.ndarray, curves: np.ndarray) -> np.ndarray:
    """The nodes that any of the curves could touch."""
    low, high = curves.min(axis=(0, 1)) - CLEAR, curves.max(axis=(0, 1)) + CLEAR
    within = (nodes[:, 1] > low[0]) & (nodes[:, 0] < high[0]) & (nodes[:, 3] > low[1]) & (nodes[:, 2] < high[1])
    return nodes[within]


def _touched(curves: np.ndarray, nodes: np.ndarray, width: float, left: float) -> np.ndarray:
    """int [n]: nodes that each curve touches; one that leaves the paper counts as if it touched many."""
    x = points(curves)[..., 0]
    outside = (x.min(axis=1) < left) | (x.max(axis=1) > width)
    return _hits(curves, nodes, CLEAR) + 1000 * outside


def _hits(curves: np.ndarray, nodes: np.ndarray, clear: float) -> np.ndarray:
    x, y = np.moveaxis(points(curves), -1, 0)[..., None]
    hits = (x > nodes[:, 0] - clear) & (x < nodes[:, 1] + clear) & (y > nodes[:, 2] - clear) & (y < nodes[:, 3] + clear)
    return hits.any(axis=1).sum(axis=1)


def _curve(of: np.ndarray) -> Curve:
    a, b, c, d = ((float(x), float(y)) for x, y in of)
    return a, b, c, d
