"""Where the nodes of a circuit stand. All lengths in points, from the lower left corner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pahq.report.figures.bends import spread

HEIGHT, ROUND = 8.6, 2.0
"""Of a node; and its corners' radius."""
APART = 1.6
"""Between two nodes side by side."""
LANE = 9.0
"""Between heads of neighbouring lanes: room for edges."""
SHAPE = 1.25
"""Height of the whole, as a share of its width, at which lines move together."""
NAME = 6.5
"""Of a layer: names of layers stand further apart."""
DIAMOND = 6.0
MARGIN = 10.0
"""At the left, for the layers' names."""
Range = tuple[float, float]
BESIDE: Range = (5.2, 13.0)
"""From a line of heads to that of an MLP, or back, at least and at most: they stand in columns of their own."""
STACKED: Range = (HEIGHT + 2.0, 15.0)
"""From one MLP to the next."""
ENDS = ("embed", "pos_embed", "logits")
"""Kinds of nodes that are as wide as the whole."""


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

    left, spine: where the heads' room begins, and the right side of the MLPs, beyond which edges between them run.
    """

    places: Mapping[str, Place]
    layers: Mapping[int, float]
    width: float
    height: float
    left: float
    spine: float


def layout(nodes: Sequence[Node], n_heads: int, n_groups: int, width: float, text: Mapping[str, float]) -> Layout:
    """Layers from bottom to top, heads in lanes by their index, groups below the heads they feed, MLPs at the right.

    n_heads, n_groups: of a layer. width: of the whole. text: each label's width, and that of ``layer``. Heads that do
    not fit side by side stand in several lines. Layers without a node take no room.
    """
    mlps = [text[node.label] for node in nodes if node.kind == "mlp"]
    room = max(mlps) + 4 if mlps else 0.0
    arcs = min(40.0, 0.15 * width) if len(mlps) > 2 else 12.0 if mlps else -5.0  # for edges at the MLPs' right
    left, right = text["layer"] + 2.5, width - arcs - room - 8
    sizes = {node.name: max(text[node.label] + 3.6, HEIGHT) for node in nodes}
    lines = _lines(nodes, right - left, sizes)
    wishes = _wishes(nodes, n_heads, left, right, sizes)
    heads: dict[str, float] = {}
    for line in lines:
        if line[0].kind == "head":
            xs = spread([wishes[n.index] for n in line], [sizes[n.name] + APART for n in line], left, right)
            heads |= {node.name: x for node, x in zip(line, xs, strict=True)}
    places: dict[str, Place] = {}
    layers: dict[int, float] = {}
    heights = _heights(lines, SHAPE * width)
    for line, y in zip(lines, heights, strict=True):
        kind = line[0].kind
        if kind == "mlp":
            places[line[0].name] = Place(width - arcs - room / 2, y, room, HEIGHT)
        elif kind == "group":
            below = [_below(node, heads, wishes, n_heads // n_groups) for node in line]
            for node, x in zip(line, spread(below, [DIAMOND + APART] * len(line), left, right), strict=True):
                places[node.name] = Place(x, y, DIAMOND, DIAMOND)
        elif kind == "head":
            for node in line:
                places[node.name] = Place(heads[node.name], y, sizes[node.name], HEIGHT)
        else:
            share = (width - left - 2) / len(line)
            for at, node in enumerate(line):
                places[node.name] = Place(left + (at + 0.5) * share, y, share - 4, HEIGHT)
    for kind in ("head", "mlp"):  # of layers close together those with heads are named: an MLP's label has its own
        for line, y in zip(lines, heights, strict=True):
            if line[0].kind == kind and line[0].layer not in layers and all(abs(y - o) > NAME for o in layers.values()):
                layers[line[0].layer] = y
    return Layout(places, layers, width, heights[-1] + HEIGHT / 2 + 1, left, width - arcs)


def _wishes(nodes: Sequence[Node], n_heads: int, left: float, right: float, sizes: Mapping[str, float]) -> np.ndarray:
    """Where a head of each index would stand: those of the circuit share lanes that are wide enough for edges between.

    Heads of one index stand in one lane, so that a head alone in its layer stands apart from those of other indices.
    """
    heads = [node for node in nodes if node.kind == "head"]
    found = sorted({node.index for node in heads})
    if not found:
        return np.full(n_heads, (left + right) / 2)
    wide = max(sizes[node.name] for node in heads) + LANE
    lanes = max(1, min(len(found), int((right - left) / wide)))
    rank = np.arange(len(found)) * (lanes - 1) / max(1, len(found) - 1)
    rank = np.floor(rank + 0.5) + 0.5
    return np.interp(np.arange(n_heads), found, left + rank * (right - left) / lanes)


def _below(group: Node, heads: Mapping[str, float], wishes: np.ndarray, size: int) -> float:
    """Where a group of keys and values stands: in the middle of the heads that it feeds."""
    fed = range(group.index * size, (group.index + 1) * size)
    drawn = [heads[name] for name in (f"a{group.layer}.{head}" for head in fed) if name in heads]
    return sum(drawn) / len(drawn) if drawn else float(np.mean(wishes[fed.start : fed.stop]))


def _heights(lines: Sequence[Sequence[Node]], goal: float) -> list[float]:
    """The height of each line: as far apart as may be, and together as far as they must to stay within ``goal``."""
    tight, loose = (_stacked(lines, share)[-1] for share in (0.0, 1.0))
    return _stacked(lines, min(max((goal - tight) / max(loose - tight, 1.0), 0.0), 1.0))


def _stacked(lines: Sequence[Sequence[Node]], share: float) -> list[float]:
    """Each line above the one before, and clear of the last one in the same column."""
    found: list[float] = []
    for at, line in enumerate(lines):
        y = HEIGHT / 2 + 1
        columns = set[bool]()
        for before in range(at - 1, -1, -1):
            column = lines[before][0].kind == "mlp"
            if column not in columns:
                columns.add(column)
                least, most = _step(lines[before][0], line[0])
                y = max(y, found[before] + least + share * (most - least))
            if len(columns) == 2 or lines[before][0].kind in ENDS:
                break
        found.append(y)
    return found


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


def _step(below: Node, above: Node) -> Range:
    """From one line to another, at least and at most."""
    if below.kind in ENDS or above.kind in ENDS:
        return 15.0, 26.0
    if (below.kind == "mlp") != (above.kind == "mlp"):
        return BESIDE
    if below.kind == "mlp":
        return STACKED
    if below.kind == "group":
        return 11.0, 17.0
    if below.layer == above.layer:
        return HEIGHT + APART, 13.0
    return (15.0, 24.0) if above.kind == "group" else (16.0, 30.0)
