"""A circuit as a graph: layers from bottom to top, edges coloured by what reads them and as wide as their effects."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pahq.evaluation.circuit import Circuit
from pahq.graph import DIRECT, Graph
from pahq.report.figures.layout import DIAMOND, Curve, Layout, Node, Place, arc, curve, layout
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
"""Where edges enter a head, as a share of its width."""


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
    """An edge on paper."""

    curve: Curve
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
        self.largest = max((abs(row["effect"]) for row in rows if row["effect"] is not None), default=0.0)
        self.nodes = {node.name: node for node in _nodes(graph, rows)}
        labels = {"layer", *(node.label for node in self.nodes.values())}
        text = {label: _text_width(label, self.size) for label in labels}
        config = graph.config
        self.layout: Layout = layout(list(self.nodes.values()), config.n_heads, config.n_kv_heads, self.width, text)

    def draw(self, axes: Any) -> None:
        from matplotlib.collections import PathCollection
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
        for row in self.rows:
            if row["sender"] == DIRECT:
                continue
            target = self._reader(row)
            here, there = places[row["sender"]], places[target]
            start, end = (here.x, here.top), (self._port(row), there.bottom)
            kinds = self.nodes[row["sender"]].kind, self.nodes[target].kind
            if kinds[0] in ("embed", "pos_embed"):
                start = (_within(end[0], here), here.top)
            if kinds[1] == "logits":
                end = (_within(start[0], there), there.bottom)
            out = self._out(here, there) if kinds == ("mlp", "mlp") else None
            if out is not None:
                line = arc(start, end, out)
            else:
                others = [_box(places[name]) for name in places if name not in (row["sender"], target)]
                line = curve(start, end, np.array(others).reshape(-1, 4), self.layout.column, self.width)
            yield _Line(line, self._colour(row), self._thickness(row["effect"]), self._dash(row))

    def _out(self, source: Place, target: Place) -> float | None:
        """How far an edge between MLPs bows to the right of those between them; None where there are none."""
        spine = [place.y for name, place in self.layout.places.items() if self.nodes[name].kind == "mlp"]
        if not any(source.y < y < target.y for y in spine):
            return None
        room = (self.width - source.x - 2) / 0.75  # the middle of the curve is at three quarters of its controls
        return room * (0.62 + 0.38 * (target.y - source.y) / self.layout.height)

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
                place = self._target(row)
                look = {"markersize": 2.3, "markeredgewidth": 0.3, "markeredgecolor": "white", "zorder": 6}
                axes.plot([self._port(row)], [place.bottom], marker="o", color=self._colour(row), **look)

    def _reader(self, row: Row) -> str:
        return reader(self.graph, self.graph.receivers[self.graph.edge(f"{row['sender']}->{row['receiver']}")[0]])

    def _target(self, row: Row) -> Place:
        return self.layout.places[self._reader(row)]

    def _port(self, row: Row) -> float:
        place, share = self._target(row), PORTS.get(row["kind"], 0.0)
        if self.nodes[self._reader(row)].kind == "group":
            share = {"k": -0.35, "v": 0.35}.get(row["kind"], 0.0)
        return place.x + share * place.width

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
        if self.largest:
            for value in (self.largest, self.largest / 20):
                handles.append(Line2D([], [], color=INK, linewidth=self._thickness(value)))
                labels.append(f"{measure} {number(2)(value)}")
        omitted = len(every) - len(self.rows)
        return handles, labels, f"without the {omitted:,} smallest edges" if omitted else None


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


def _within(x: float, place: Place) -> float:
    half = place.width / 2 - 3
    return min(max(x, place.x - half), place.x + half)


def _box(place: Place) -> tuple[float, float, float, float]:
    return place.x - place.width / 2 - 1, place.x + place.width / 2 + 1, place.bottom - 1, place.top + 1


def _text_width(label: str, size: float) -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    if not label:
        return 0.0
    path = TextPath((0, 0), label, size=size, prop=FontProperties(family="DejaVu Sans"))
    return float(path.get_extents().width)
