"""A circuit as a graph: layers from bottom to top, edges coloured by what reads them and as wide as their effects."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pahq.evaluation.circuit import Circuit
from pahq.graph import DIRECT, Graph
from pahq.report.figures.bends import CLEAR, Curve, End, Point, arc, around, spread
from pahq.report.figures.layout import DIAMOND, ENDS, MARGIN, Layout, Node, Place, layout
from pahq.report.figures.style import DASHES, INK, KINDS, NODE, SMALL, SOFT, STATUS, legend
from pahq.report.tables import Row, number
from pahq.report.viewer.drawing import Overlay, reader

MOST = 300
"""Edges drawn unless more are asked for: beyond that a page is too small."""
THIN, THICK = 0.4, 2.4
"""Widths in points of an edge of no effect, and of the largest one; between them as the effect's square root.

Where there are many edges, the largest are thinner.
"""
LINK = "#9aa4af"
PORTS = {"q": -0.3, "k": 0.0, "v": 0.3}
"""Where edges enter a head, or a group of keys and values, as a share of its width."""
GROUP_PORTS = {"k": -0.28, "v": 0.28}
DOT = 2.3
"""A direct edge's."""


def graph_rows(circuit: Circuit, overlay: Overlay | None = None, most: int = MOST) -> list[Row]:
    """One row an edge of the circuit, or of either circuit, the largest effect first.

    ``drawn`` tells the ``most`` edges of largest effect (of an overlay's those that the first one never measured come
    last). ``status`` is there with an overlay: ``both``, ``extra`` (the first circuit alone) or ``missed``.
    """
    graph, other = circuit.graph, np.zeros(circuit.graph.shape, bool) if overlay is None else overlay.mask
    rows: list[Row] = []
    for row, column in np.argwhere(circuit.mask | other).tolist():
        receiver, effect = graph.receivers[row], float(circuit.effects[row, column])
        kept = bool(circuit.mask[row, column])
        found: Row = {
            "sender": graph.sender_name(column),
            "receiver": receiver.name,
            "kind": receiver.kind,
            "effect": effect if math.isfinite(effect) else None,
            "order": int(circuit.order[row, column]),
            "kept": kept,
        }
        if overlay is not None:
            found["status"] = "missed" if not kept else "both" if other[row, column] else "extra"
        rows.append(found)
    rows.sort(key=lambda row: -math.inf if row["effect"] is None else abs(row["effect"]), reverse=True)
    return [row | {"drawn": place < most} for place, row in enumerate(rows)]


def draw_graph(
    figure: Any, rows: Sequence[Row], graph: Graph, other: str | None = None, measure: str = "effect"
) -> None:
    """Fills ``figure`` with the drawn edges. other: name of the second circuit; measure: what an effect is called."""
    drawn = [row for row in rows if row["drawn"]]
    picture = _Picture(graph, drawn, figure.get_figwidth())
    axes = figure.add_subplot()
    axes.axis("off")
    axes.set(xlim=(0, picture.width), ylim=(0, picture.layout.height))
    picture.draw(axes)
    low = legend(figure, *picture.key(other, measure, rows))
    figure.set_figheight(picture.layout.height / 72 + low + 0.06)


@dataclass(frozen=True)
class _Line:
    """An edge on paper. head: the corners of its arrow head."""

    curve: Curve
    head: tuple[Point, Point, Point]
    colour: str
    width: float
    dash: Any


class _Picture:
    """The drawn edges of one figure, placed."""

    def __init__(self, graph: Graph, rows: Sequence[Row], inches: float) -> None:
        self.graph, self.rows = graph, rows
        self.width = (inches - 0.06) * 72
        self.size = 5.5 if inches < 5 else SMALL
        self.thick = THICK * min(1.0, (80 / max(len(rows), 1)) ** 0.25)
        lines = [abs(row["effect"]) for row in rows if row["effect"] is not None and row["sender"] != DIRECT]
        self.smallest, self.largest = min(lines, default=0.0), max(lines, default=0.0)
        self.nodes = {node.name: node for node in _nodes(graph, rows)}
        labels = {"layer", *(node.label for node in self.nodes.values())}
        text = {label: _text_width(label, self.size) for label in labels}
        self._dots = {(self._reader(row), row["kind"]) for row in rows if row["sender"] == DIRECT}
        config = graph.config
        self.layout: Layout = layout(list(self.nodes.values()), config.n_heads, config.n_kv_heads, self.width, text)

    def draw(self, axes: Any) -> None:
        from matplotlib.collections import PathCollection, PolyCollection
        from matplotlib.path import Path

        codes = [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]
        lines = sorted(self._lines(), key=lambda line: -line.width)  # thin ones on top
        axes.add_collection(
            PathCollection(
                [Path(line.curve, codes) for line in lines],
                facecolors="none",
                edgecolors=[line.colour for line in lines],
                linewidths=[line.width for line in lines],
                linestyles=[line.dash for line in lines],
                alpha=0.8,
                zorder=2,
            ),
            autolim=False,
        )
        heads = PolyCollection([line.head for line in lines], facecolors=[line.colour for line in lines], zorder=3)
        axes.add_collection(heads, autolim=False)
        for x, y in self._links():
            axes.plot(x, y, color=LINK, linewidth=0.6, zorder=1)
        for name, place in self.layout.places.items():
            self._node(axes, self.nodes[name], place)
        self._direct(axes)
        axes.text(1, self.layout.places["logits"].y, "layer", va="center", fontsize=self.size, color=SOFT)
        for layer, y in self.layout.layers.items():
            axes.text(1, y, str(layer), va="center", fontsize=self.size, color=SOFT)

    def _node(self, axes: Any, node: Node, place: Place) -> None:
        from matplotlib.patches import FancyBboxPatch, RegularPolygon

        if node.kind == "group":
            axes.add_patch(
                RegularPolygon((place.x, place.y), 4, radius=DIAMOND / 2, fc="white", ec=SOFT, lw=0.6, zorder=4)
            )
            return
        corner = 2.0 if node.kind == "head" else 1.0
        box = FancyBboxPatch(
            (place.x - place.width / 2 + corner, place.bottom + corner),
            place.width - 2 * corner,
            place.height - 2 * corner,
            boxstyle=f"round,pad={corner}",
            fc="white" if node.kind == "head" else NODE,
            ec=SOFT,
            lw=0.6,
            zorder=4,
        )
        axes.add_patch(box)
        axes.text(
            place.x, place.y, node.label, ha="center", va="center_baseline", fontsize=self.size, zorder=5, color=INK
        )

    def _lines(self) -> Iterator[_Line]:
        places = self.layout.places
        names = list(places)
        boxes = np.array([_box(place) for place in places.values()])
        starts, ends = self._along("embed"), self._along("logits")
        for at, row in enumerate(self.rows):
            if row["sender"] == DIRECT:
                continue
            source, target = row["sender"], self._reader(row)
            start, end = self._ends(row, starts.get(at), ends.get(at))
            if self.nodes[source].kind == self.nodes[target].kind == "mlp":
                line = arc(start[:2], end[:2], self._out(places[source], places[target]))
            else:
                others = boxes.copy()
                for own in (source, target):  # the ends lie on their borders
                    others[names.index(own)] += np.array([1, -1, 1, -1]) * (CLEAR + 0.8)
                line = around(start, end, others, self.width, MARGIN)
            width = self._thickness(row["effect"])
            yield _Line(*_pointed(line, width), self._colour(row), width, self._dash(row))

    def _ends(self, row: Row, along: float | None, over: float | None) -> tuple[End, End]:
        """Where an edge leaves and enters. along, over: where on the embedding and on the logits, if there."""
        source, target = row["sender"], self._reader(row)
        here, there = self.layout.places[source], self.layout.places[target]
        kinds = self.nodes[source].kind, self.nodes[target].kind
        start, end = End(here.x, here.top), End(self._port(row), self._foot(row))
        if kinds[0] in ENDS:
            start = End(here.x if along is None else along, here.top)
        elif kinds[0] == "mlp" and kinds[1] in ("mlp", "logits"):
            if kinds[1] == "mlp" or self._between(here, there):
                start = End(self.layout.spine, here.y + 1.6, (1.0, 0.0))
        elif kinds[0] == "mlp":
            start = End(here.x - here.width / 2, here.y, (-1.0, 0.0))
        if kinds[1] == "logits":
            end = End(there.x if over is None else over, there.bottom)
        elif kinds[1] == "mlp" and kinds[0] == "head":
            end = End(there.x - there.width / 2, there.y, (1.0, 0.0))
        elif kinds[1] == "mlp" and (kinds[0] == "mlp" or self._between(here, there)):
            end = End(self.layout.spine, there.y - 1.6, (-1.0, 0.0))
        return start, end

    def _along(self, name: str) -> dict[int, float]:
        """Where each edge leaves the embedding, or enters the logits, by its row: apart, so that each can be seen."""
        places = self.layout.places
        found: dict[str, list[tuple[float, float, int]]] = {}
        for at, row in enumerate(self.rows):
            target = "" if row["sender"] == DIRECT else self._reader(row)
            if target == "logits" if name == "logits" else self.nodes.get(row["sender"], _NO).kind in ENDS and target:
                bar, far = (target, row["sender"]) if name == "logits" else (row["sender"], target)
                place = places[far]
                x = place.x if name == "logits" else self._port(row)
                near = place.width / 2 + 4
                if self.nodes[far].kind not in ENDS and self._between(place, places[bar]):
                    aside = x + near + (0.06 * abs(place.y - places[bar].y) if self.nodes[far].kind == "mlp" else 0)
                    x = aside if aside < self.width - 3 else x - near
                found.setdefault(bar, []).append((x, -place.y, at))
        result: dict[int, float] = {}
        for bar, some in found.items():
            some.sort()
            low, high = places[bar].x - places[bar].width / 2 + 2, places[bar].x + places[bar].width / 2 - 2
            sizes = [min(5.0, (high - low) / len(some))] * len(some)
            result |= dict(zip([at for *_, at in some], spread([x for x, *_ in some], sizes, low, high), strict=True))
        return result

    def _between(self, here: Place, there: Place) -> bool:
        """Whether another node stands straight above or below the first, before the second."""
        low, high = sorted((here.y, there.y))
        return any(
            low < place.y < high and abs(place.x - here.x) < place.width / 2 for place in self.layout.places.values()
        )

    def _out(self, source: Place, target: Place) -> float:
        """How far an edge between MLPs bows to the right: the longer, the further."""
        room = self.width - self.layout.spine - 3
        return room * (0.25 + 0.75 * math.sqrt((target.y - source.y) / self.layout.height))

    def _links(self) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
        """From a group's keys and values to its heads."""
        size = self.graph.config.group_size
        for name, node in self.nodes.items():
            if node.kind == "group":
                place = self.layout.places[name]
                for head in range(node.index * size, (node.index + 1) * size):
                    at = self.layout.places.get(f"a{node.layer}.{head}")
                    if at is not None:
                        yield (place.x, at.x), (place.top, at.bottom)

    def _direct(self, axes: Any) -> None:
        """A dot where a direct edge enters."""
        for row in self.rows:
            if row["sender"] == DIRECT:
                look = {"markersize": DOT, "markeredgewidth": 0.3, "markeredgecolor": "white", "zorder": 6}
                axes.plot([self._port(row)], [self._border(row)], marker="o", color=self._colour(row), **look)

    def _reader(self, row: Row) -> str:
        return reader(self.graph, self.graph.receivers[self.graph.edge(f"{row['sender']}->{row['receiver']}")[0]])

    def _target(self, row: Row) -> Place:
        return self.layout.places[self._reader(row)]

    def _port(self, row: Row) -> float:
        ports = GROUP_PORTS if self._is_group(row) else PORTS
        place = self._target(row)
        return place.x + ports.get(row["kind"], 0.0) * place.width

    def _border(self, row: Row) -> float:
        """The height at which an edge meets the border of what it enters from below."""
        place = self._target(row)
        return place.y - place.height / 2 + (abs(self._port(row) - place.x) if self._is_group(row) else 0.0)

    def _foot(self, row: Row) -> float:
        """The height of an arrow's point: below the dot of a direct edge into the same input."""
        dotted = (self._reader(row), row["kind"]) in self._dots
        return self._border(row) - (DOT / 2 + 0.2 if dotted else 0.3)

    def _is_group(self, row: Row) -> bool:
        return self.nodes[self._reader(row)].kind == "group"

    def _thickness(self, effect: float | None) -> float:
        share = abs(effect) / self.largest if effect is not None and self.largest else 0.0
        return THIN + (self.thick - THIN) * math.sqrt(share)

    def _colour(self, row: Row) -> str:
        return STATUS[row["status"]] if "status" in row else KINDS[row["kind"]]

    def _dash(self, row: Row) -> Any:
        return DASHES[row["status"]] if "status" in row else "-"

    def key(self, other: str | None, measure: str, every: Sequence[Row]) -> tuple[list[Any], list[str], str | None]:
        """Handles, labels and title of the legend. every: the rows, also those that are not drawn."""
        from matplotlib.lines import Line2D

        handles, labels = [], []
        if other is None:
            names = {"q": "into queries", "k": "into keys", "v": "into values", "qkv": "into heads"}
            for kind, name in (names | {"mlp": "into MLPs", "logits": "into logits"}).items():
                if any(row["kind"] == kind for row in self.rows):
                    handles.append(Line2D([], [], color=KINDS[kind], linewidth=1.6))
                    labels.append(name)
        else:
            names = {"both": "in both", "extra": "only here", "missed": f"only in {other}"}
            for status, name in names.items():
                count = sum(row["status"] == status for row in every)
                handles.append(Line2D([], [], color=STATUS[status], linewidth=1.6, linestyle=DASHES[status]))
                labels.append(f"{name}: {count:,}")
        if any(row["sender"] == DIRECT for row in self.rows):
            handles.append(Line2D([], [], color=SOFT, marker="o", markersize=2.6, linestyle="none"))
            labels.append("direct edge")
        if any(node.kind == "group" for node in self.nodes.values()):
            look = {"marker": "D", "markersize": 3.2, "markerfacecolor": "white", "markeredgewidth": 0.6}
            handles.append(Line2D([], [], color=SOFT, linestyle="none", **look))
            labels.append("group's keys, values")
        for value in legend_values(self.smallest, self.largest):
            handles.append(Line2D([], [], color=INK, linewidth=self._thickness(value)))
            labels.append(f"{measure} {number(2)(value)}")
        omitted = len(every) - len(self.rows)
        return handles, labels, f"without the {omitted:,} smallest edges" if omitted else None


_NO = Node("", "", -1)
"""Stands for a direct edge's sender."""


def _nodes(graph: Graph, rows: Sequence[Row]) -> list[Node]:
    """The nodes that the rows' edges touch, and the embedding and logits in any case."""
    names = {"embed", "logits", *(row["sender"] for row in rows if row["sender"] != DIRECT)}
    readers = {row["receiver"] for row in rows}
    found = [Node(s.name, s.kind, s.layer, s.index) for s in graph.senders]
    found.append(Node("logits", "logits", graph.config.n_layers))
    for receiver in graph.receivers:
        if receiver.name in readers:
            name = reader(graph, receiver)
            names.add(name)
            if name.endswith(".kv"):
                found.append(Node(name, "group", receiver.layer, receiver.index))
    return list({node.name: node for node in found if node.name in names}.values())


def legend_values(smallest: float, largest: float) -> list[float]:
    """Effects of two digits whose widths the legend shows, none beyond those that are drawn; the largest first."""
    if largest <= 0:
        return []
    found = []
    for value, ways in ((largest, math.floor), (smallest, math.ceil)):
        unit = 10.0 ** (math.floor(math.log10(value)) - 1) if value > 0 else 0.0
        rounded = ways(value / unit) * unit if unit else 0.0
        found.append(float(f"{rounded:.2g}"))
    top, bottom = found
    if not smallest <= bottom < top <= largest:  # all effects are much the same, or some are none
        return [top] if smallest <= top <= largest else [largest]
    return [top, bottom]


def _pointed(line: Curve, width: float) -> tuple[Curve, tuple[Point, Point, Point]]:
    """A line that ends where its arrow head begins, and the head's corners."""
    start, first, (x, y), (tip_x, tip_y) = line
    length, half = 2.6 + 0.8 * width, 1.0 + 0.6 * width
    away = math.hypot(tip_x - x, tip_y - y) or 1.0
    along_x, along_y = (tip_x - x) / away, (tip_y - y) / away
    foot = tip_x - length * along_x, tip_y - length * along_y
    left, right = ((foot[0] + side * half * -along_y, foot[1] + side * half * along_x) for side in (1, -1))
    base = tip_x - 0.8 * length * along_x, tip_y - 0.8 * length * along_y
    return (start, first, (x, y), base), ((tip_x, tip_y), left, right)


def _box(place: Place) -> tuple[float, float, float, float]:
    return place.x - place.width / 2, place.x + place.width / 2, place.bottom, place.top


def _text_width(label: str, size: float) -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    if not label:
        return 0.0
    path = TextPath((0, 0), label, size=size, prop=FontProperties(family="DejaVu Sans"))
    return float(path.get_extents().width)
