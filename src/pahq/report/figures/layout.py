"""Where the nodes of a circuit stand, and how its edges run. All lengths in points, from the lower left corner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

HEIGHT, ROUND = 8.6, 2.0
"""Of a node; and its corners' radius."""
APART = 1.6
"""Between two nodes side by side."""
GAPS = (13.0, 30.0)
"""From one line of nodes to the next: at least, at most."""
TALLEST = 590.0
"""Height at which lines move together."""
DIAMOND = 5.0
MARGIN = 10.0
"""At the left, for the layers' names."""


@dataclass(frozen=True)
class Node:
    """kind: embed, pos_embed, head, group (of keys and values), mlp or logits. index: of a head or group."""

    name: str
    kind: str
    layer: int
    index: int = 0

    @property
    def label(self) -> str:
        if self.kind == "head":
            return self.name[1:]
        return "" if self.kind == "group" else self.name.replace("_", " ")


@dataclass(frozen=True)
class Place:
    """A node's middle and size."""

    x: float
    y: float
    width: float
    height: float

    @property
    def top(self) -> float:
        return self.y + self.height / 2

    @property
    def bottom(self) -> float:
        return self.y - self.height / 2


@dataclass(frozen=True)
class Layout:
    """places: by node's name. layers: the height at which each layer's name stands. width, height: of the whole.

    column: between two heads side by side.
    """

    places: Mapping[str, Place]
    layers: Mapping[int, float]
    width: float
    height: float
    column: float


def layout(nodes: Sequence[Node], n_heads: int, n_groups: int, width: float, text: Mapping[str, float]) -> Layout:
    """Layers from bottom to top, heads side by side, each at the same place in every layer; MLPs at the right.

    n_heads, n_groups: of a layer. width: of the whole. text: each label's width, and that of ``layer``. Heads that do
    not fit side by side stand in several lines.
    """
    mlps = [text[node.label] for node in nodes if node.kind == "mlp"]
    room = max(mlps) + 4 if mlps else 0.0
    arcs = min(34.0, 0.13 * width) if len(mlps) > 2 else 4.0 if mlps else -5.0  # right of the MLPs, for edges between
    left, right = text["layer"] + 2.5, width - arcs - room - 6
    spine = width - arcs - room / 2
    sizes = {node.name: max(text[node.label] + 3.6, HEIGHT) for node in nodes}
    lines = _lines(nodes, right - left, sizes)
    steps = [_step(before[0], line[0]) for before, line in pairwise(lines)]
    gap = min(max((TALLEST - HEIGHT) / max(sum(steps), 1.0), GAPS[0]), GAPS[1])
    places: dict[str, Place] = {}
    layers: dict[int, float] = {}
    y = HEIGHT / 2 + 1
    for number, line in enumerate(lines):
        y += gap * steps[number - 1] if number else 0.0
        kind = line[0].kind
        if kind == "mlp":
            places[line[0].name] = Place(spine, y, room, HEIGHT)
        elif kind == "group":
            for node, x in zip(line, _slots(line, n_groups, left, right, dict.fromkeys(sizes, DIAMOND)), strict=True):
                places[node.name] = Place(x, y, DIAMOND, DIAMOND)
        elif kind == "head":
            for node, x in zip(line, _slots(line, n_heads, left, right, sizes), strict=True):
                places[node.name] = Place(x, y, sizes[node.name], HEIGHT)
        else:
            share = (right - left) / len(line)
            for at, node in enumerate(line):
                places[node.name] = Place(left + (at + 0.5) * share, y, share - 6, HEIGHT)
        if kind in ("head", "mlp"):
            layers.setdefault(line[0].layer, y)
    return Layout(places, layers, width, y + HEIGHT / 2 + 1, min((right - left) / n_heads, 60.0))


def _lines(nodes: Sequence[Node], room: float, sizes: Mapping[str, float]) -> list[list[Node]]:
    """Nodes that stand side by side, from the bottom to the top."""
    found: list[list[Node]] = []
    for layer in sorted({node.layer for node in nodes}):
        for kinds in (("embed", "pos_embed"), ("group",), ("head",), ("mlp",), ("logits",)):
            some = sorted((n for n in nodes if n.layer == layer and n.kind in kinds), key=lambda n: (n.kind, n.index))
            while some:
                taken, length = 0, 0.0
                while taken < len(some) and (not taken or length + sizes[some[taken].name] <= room):
                    length += sizes[some[taken].name] + APART
                    taken += 1
                taken = -(-len(some) // -(-len(some) // taken))  # lines of equal length
                found.append(some[:taken])
                some = some[taken:]
    return found


def _step(below: Node, above: Node) -> float:
    """From one line to the next, as a share of the gap."""
    if below.kind == "group":
        return 0.62
    if above.kind == "group":
        return 0.78
    if below.kind == above.kind == "head" and below.layer == above.layer:
        return 0.62
    if above.kind == "mlp" and below.layer == above.layer:
        return 0.5  # they stand apart sideways
    return 1.0 if below.kind != "mlp" else 0.72


def _slots(line: Sequence[Node], count: int, left: float, right: float, sizes: Mapping[str, float]) -> list[float]:
    """Middles of the nodes of a line: each in the slot of its index, or as near as its neighbours let it.

    The nodes keep their order; the sum of squared distances from the slots is least (pool adjacent violators).
    """
    offsets, at = [], 0.0
    for before, node in zip([None, *line], line, strict=False):
        at += 0.0 if before is None else (sizes[before.name] + sizes[node.name]) / 2 + APART
        offsets.append(at)
    half = (sizes[line[0].name] / 2, sizes[line[-1].name] / 2)
    blocks: list[tuple[float, int]] = []  # mean of a block's wishes, less the offsets; and its length
    for node, offset in zip(line, offsets, strict=True):
        mean, size = left + (node.index + 0.5) * (right - left) / count - offset, 1
        while blocks and blocks[-1][0] > mean:
            other, more = blocks.pop()
            mean, size = (mean * size + other * more) / (size + more), size + more
        blocks.append((mean, size))
    low, high = left + half[0], right - half[1] - offsets[-1]
    bases = [min(max(mean, low), max(high, low)) for mean, size in blocks for _ in range(size)]
    return [base + offset for base, offset in zip(bases, offsets, strict=True)]


Curve = tuple[tuple[float, float], tuple[float, float], tuple[float, float], tuple[float, float]]
"""A cubic Bézier: start, two controls, end."""
BOWS = (0.0, 0.35, -0.35, 0.6, -0.6, 1.0, -1.0, 1.5, -1.5)
"""How far an edge may be bent aside, as shares of the distance between two columns of heads."""
_T = np.linspace(0.0, 1.0, 40)[:, None]
_WEIGHTS = np.concatenate([(1 - _T) ** 3, 3 * _T * (1 - _T) ** 2, 3 * _T**2 * (1 - _T), _T**3], axis=1)


def arc(start: tuple[float, float], end: tuple[float, float], out: float) -> Curve:
    """Between two MLPs, bowed to the right; out: how far its controls lie there."""
    (x0, y0), (x1, y1) = start, end
    up = y1 - y0
    return (start, (x0 + out, y0 + 0.25 * up), (x1 + out, y1 - 0.25 * up), end)


def curve(
    start: tuple[float, float], end: tuple[float, float], others: np.ndarray, column: float, width: float
) -> Curve:
    """From the top of a node to the bottom of another, around as many of the others as can be.

    others: float [n, 4], left, right, bottom and top of the nodes that are neither. column: between
    two heads side by side; width: of the whole, which is not left.
    """
    (x0, y0), (x1, y1) = start, end
    up = y1 - y0
    best, least = None, np.inf
    for bow in BOWS if up > 2 * HEIGHT else BOWS[:1]:
        aside = bow * column
        reach = max(4.0, min(0.45 * up, 20.0) if not bow else 0.3 * up)
        found = (start, (x0 + aside, y0 + reach), (x1 + aside, y1 - reach), end)
        x, y = (_WEIGHTS @ np.array(found)).T[:, :, None]
        hits = (x > others[:, 0]) & (x < others[:, 1]) & (y > others[:, 2]) & (y < others[:, 3])
        cost = hits.any(axis=0).sum() + 0.3 * abs(bow) + (3.0 if (x < MARGIN).any() or (x > width).any() else 0.0)
        if cost < least:
            best, least = found, cost
    assert best is not None
    return best
