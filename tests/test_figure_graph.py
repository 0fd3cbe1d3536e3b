"""The figure of a circuit: which edges it shows and how, and that its nodes stand clear of each other."""

from __future__ import annotations

import math
import re
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex

from pahq.errors import PahqError
from pahq.evaluation.circuit import Circuit
from pahq.graph import DIRECT, Graph
from pahq.model import ModelConfig
from pahq.report import figures
from pahq.report.figures import bends
from pahq.report.figures import circuit as drawing
from pahq.report.figures import layout as placing
from pahq.report.figures.circuit import THICK, THIN, draw_graph, graph_rows, legend_values
from pahq.report.figures.style import DASHES, KINDS, METHODS, STATUS, looks
from pahq.report.viewer.drawing import Overlay
from random_models import drawn

ROOT = Path(__file__).parent.parent


def config(layers: int, heads: int, groups: int, mlp: bool = True, parallel: bool = False) -> ModelConfig:
    return ModelConfig(
        n_layers=layers, n_heads=heads, n_kv_heads=groups, d_model=8, d_head=2, d_mlp=8 if mlp else 0, d_vocab=5,
        d_vocab_out=5, n_ctx=8, name="drawn", parallel=parallel,
    )  # fmt: skip


def circuit(graph: Graph, count: int, seed: int = 0) -> Circuit:
    """Of so many random edges, with effects of all sizes; some were never measured."""
    draw = np.random.default_rng(seed)
    places = np.argwhere(graph.edges)
    mask, effects = np.zeros(graph.shape, bool), np.full(graph.shape, np.nan)
    chosen = places[draw.permutation(len(places))[:count]]
    mask[tuple(chosen.T)] = True
    effects[tuple(places.T)] = draw.normal(size=len(places)) * 10.0 ** draw.uniform(-3, 1, len(places))
    effects[tuple(chosen[: count // 10].T)] = np.nan
    return Circuit(graph, mask, effects, np.where(mask, 1, -1))


@st.composite
def circuits(draw: st.DrawFn) -> Circuit:
    groups = draw(st.integers(1, 5))
    heads = groups * draw(st.integers(1, 8))
    of = config(draw(st.integers(1, 14)), heads, groups, draw(st.booleans()), draw(st.booleans()))
    graph = Graph(of, split_qkv=draw(st.booleans()), direct_edges=draw(st.booleans()))
    return circuit(graph, draw(st.integers(1, 300)), draw(st.integers(0, 99)))


def nodes_of(circuit: Circuit) -> list[placing.Node]:
    from pahq.report.figures.circuit import _nodes

    return _nodes(circuit.graph, graph_rows(circuit))


@drawn(60)
@given(of=circuits(), width=st.sampled_from((229.0, 480.0)))
def test_nodes_stand_clear_of_each_other(of: Circuit, width: float) -> None:
    nodes, cfg = nodes_of(of), of.graph.config
    text = {node.label: 3.2 * len(node.label) for node in nodes} | {"layer": 14.0}
    laid = placing.layout(nodes, cfg.n_heads, cfg.n_kv_heads, width, text)
    places = laid.places
    assert set(places) == {node.name for node in nodes}
    for place in places.values():
        assert place.x - place.width / 2 >= 0
        assert place.x + place.width / 2 <= width
        assert 0 <= place.bottom < place.top <= laid.height
    for (name, a), (other, b) in combinations(places.items(), 2):
        wide, high = (a.width + b.width) / 2 - abs(a.x - b.x), (a.height + b.height) / 2 - abs(a.y - b.y)
        assert wide < 0.01 or high < 0.01, (name, other)
    for a, b in combinations(nodes, 2):
        here, there = places[a.name], places[b.name]
        if a.layer < b.layer:
            assert here.y < there.y, (a, b)
        if a.kind == b.kind and a.layer == b.layer and here.y == there.y:  # side by side, in order
            assert (here.x < there.x) == (a.index < b.index)


def test_the_same_head_stands_in_the_same_column() -> None:
    nodes = [placing.Node(f"a{layer}.{head}", "head", layer, head) for layer, head in ((0, 3), (1, 0), (1, 3), (2, 3))]
    nodes += [placing.Node("embed", "embed", -1), placing.Node("logits", "logits", 3)]
    laid = placing.layout(nodes, 8, 8, 230.0, {node.label: 9.0 for node in nodes} | {"layer": 14.0})
    assert len({round(laid.places[f"a{layer}.3"].x, 6) for layer in range(3)}) == 1


def test_heads_alone_in_their_layers_stand_apart() -> None:
    nodes = [placing.Node(f"a{layer}.{head}", "head", layer, head) for layer, head in enumerate((30, 1, 3, 2, 1))]
    nodes += [placing.Node("embed", "embed", -1), placing.Node("logits", "logits", 5)]
    laid = placing.layout(nodes, 32, 32, 230.0, {node.label: 12.0 for node in nodes} | {"layer": 14.0})
    xs = {node.index: laid.places[node.name].x for node in nodes if node.kind == "head"}
    assert [xs[index] for index in sorted(xs)] == sorted(xs.values())  # left or right as in a whole layer
    assert min(b - a for a, b in pairwise(sorted(xs.values()))) > 12.0 + placing.LANE
    assert laid.places["a1.1"].x == laid.places["a4.1"].x


def test_groups_stand_below_the_heads_they_feed() -> None:
    nodes = [placing.Node(f"a0.{head}", "head", 0, head) for head in (0, 1, 6)]
    nodes += [placing.Node(f"a0.{group}.kv", "group", 0, group) for group in (0, 2)]
    nodes += [placing.Node("embed", "embed", -1), placing.Node("logits", "logits", 1)]
    places = placing.layout(nodes, 9, 3, 230.0, {node.label: 9.0 for node in nodes} | {"layer": 14.0}).places
    assert places["a0.0.kv"].x == pytest.approx((places["a0.0"].x + places["a0.1"].x) / 2)
    assert places["a0.2.kv"].x == pytest.approx(places["a0.6"].x)
    assert places["a0.0.kv"].top < places["a0.0"].bottom


def test_layers_without_a_node_take_no_room() -> None:
    def height(layers: tuple[int, ...]) -> float:
        nodes = [placing.Node(f"a{layer}.0", "head", layer) for layer in layers]
        nodes += [placing.Node("embed", "embed", -1), placing.Node("logits", "logits", 40)]
        return placing.layout(nodes, 4, 4, 230.0, {node.label: 9.0 for node in nodes} | {"layer": 14.0}).height

    assert height((0, 1, 2)) == height((3, 17, 39))


def test_edges_run_around_other_nodes() -> None:
    start, end, between = bends.End(50, 0), bends.End(50, 100), np.array([[40.0, 60.0, 45.0, 55.0]])
    straight = bends.around(start, end, np.zeros((0, 4)), 200.0)
    assert straight == bends.around(start, end, between + 60.0, 200.0)  # nothing is in its way
    assert {x for x, _ in straight} == {50.0}
    assert bends.touches(straight, between) == 1
    around = bends.around(start, end, between, 200.0)
    assert bends.touches(around, between, 1.0) == 0
    assert (around[0], around[3]) == ((50, 0), (50, 100))
    assert around == bends.around(start, end, between, 200.0)
    row = np.array([[0.0, 46.0, 45.0, 55.0], *between, [65.0, 110.0, 45.0, 55.0]])  # the one gap is at the right
    assert bends.touches(bends.around(start, end, row, 200.0), row) == 0
    wall = np.array([[0.0, 200.0, 45.0, 55.0], [40.0, 60.0, 70.0, 80.0]])
    assert bends.touches(bends.around(start, end, wall, 200.0), wall) == 1  # no more than it must


def test_edges_stay_on_the_paper() -> None:
    between = np.array([[-10.0, 30.0, 45.0, 55.0]])
    x = bends.points(np.array([bends.around(bends.End(10, 0), bends.End(10, 100), between, 200.0, 5.0)]))[..., 0]
    assert x.min() >= 5
    assert x.max() > 30


def test_no_edge_seems_to_be_two() -> None:
    """Of a circuit as deep as that of a real model, no edge touches a node between its ends."""
    draw = np.random.default_rng(3)
    of = config(30, 9, 3)
    graph = Graph(of)
    names = [f"a{layer}.{draw.integers(9)}" for layer in range(8, 30, 2)] + [f"m{layer}" for layer in range(0, 30, 3)]
    mask = np.zeros(graph.shape, bool)
    for name in names:
        mask[graph.edge(f"{name}->logits")] = True
        for other in names:
            edge = f"{name}->{other + ('.q' if other[0] == 'a' else '')}"
            if int(name[1:].split(".")[0]) < int(other[1:].split(".")[0]) and draw.random() < 0.2:
                mask[graph.edge(edge)] = True
    rows = graph_rows(Circuit(graph, mask, np.where(mask, 1.0, np.nan), np.where(mask, 1, -1)))
    shown = drawing._Picture(graph, rows, 3.25)
    touched = 0
    for row, line in zip(rows, shown._lines(), strict=True):
        ends = {row["sender"], shown._reader(row)}
        boxes = [drawing._box(place) for name, place in shown.layout.places.items() if name not in ends]
        touched += bends.touches(line.curve, np.array(boxes))
    assert len(rows) > 50
    assert touched == 0


def test_what_is_drawn_are_the_edges_of_the_circuit() -> None:
    of = circuit(Graph(config(5, 6, 3)), 80)
    rows = graph_rows(of, most=30)
    assert {(row["sender"], row["receiver"]) for row in rows} == {(e.sender, e.receiver) for e in of.edges()}
    sizes = [abs(row["effect"]) if row["effect"] is not None else -math.inf for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert [row["drawn"] for row in rows] == [True] * 30 + [False] * 50
    assert sum(row["effect"] is None for row in rows) == 8


def picture(of: Circuit, **options: Any) -> Any:
    overlay = options.pop("overlay", None)
    rows = graph_rows(of, overlay, **options)
    other = None if overlay is None else overlay.name
    return figures.Chart("graph", lambda figure, some: draw_graph(figure, some, of.graph, other), rows).figure()


def lines(figure: Any) -> list[tuple[str, float]]:
    """Colour and width of each edge."""
    collection, _ = figure.axes[0].collections  # lines and their arrow heads
    colours = [to_hex(colour) for colour in collection.get_edgecolor()]
    return list(zip(colours, collection.get_linewidth(), strict=True))


def test_colours_tell_what_reads_and_widths_the_effect() -> None:
    of = circuit(Graph(config(4, 4, 2)), 60)
    rows = [row for row in graph_rows(of) if row["sender"] != DIRECT]
    largest = max(abs(row["effect"]) for row in rows if row["effect"] is not None)
    wanted = []
    for row in rows:
        share = 0.0 if row["effect"] is None else abs(row["effect"]) / largest
        wanted.append((KINDS[row["kind"]], THIN + (THICK - THIN) * math.sqrt(share)))
    for (colour, width), (mine, thick) in zip(sorted(lines(picture(of))), sorted(wanted), strict=True):
        assert (colour, width) == (mine, pytest.approx(thick))
    dots = [line for line in picture(of).axes[0].get_lines() if line.get_marker() == "o"]
    assert len(dots) == sum(row["sender"] == DIRECT for row in graph_rows(of)) > 0


def test_every_line_has_an_arrow_head() -> None:
    of = circuit(Graph(config(4, 4, 2)), 60)
    figure = picture(of)
    edges, heads = figure.axes[0].collections
    assert len(heads.get_paths()) == len(edges.get_paths()) > 0
    assert np.array_equal(heads.get_facecolor()[:, :3], edges.get_edgecolor()[:, :3])
    for line, head in zip(edges.get_paths(), heads.get_paths(), strict=True):
        tip, *corners = head.vertices[:3]
        gap = [np.linalg.norm(line.vertices[-1] - corner) for corner in (tip, *corners)]
        assert gap[1] == pytest.approx(gap[2])  # the line ends in the middle of its head
        assert max(gap) < 6


@pytest.mark.parametrize("seed", range(4))
def test_the_legend_shows_widths_that_are_drawn(seed: int) -> None:
    of = circuit(Graph(config(4, 4, 4)), 60, seed)
    drawn = [abs(row["effect"]) for row in graph_rows(of) if row["effect"] and row["sender"] != DIRECT]
    texts = [text.get_text() for text in picture(of).legends[0].get_texts()]
    shown = [float(text.removeprefix("effect ")) for text in texts if text.startswith("effect")]
    assert len(shown) == 2
    assert min(drawn) <= shown[1] < shown[0] <= max(drawn)


@pytest.mark.parametrize(
    ("drawn", "shown"),
    [
        ((0.311, 3.2689), [3.2, 0.32]),
        ((2.0, 2.0), [2.0]),
        ((0.0, 0.0), []),
        ((0.0, 1.0), [1.0, 0.0]),
        ((2.31, 2.38), [2.38]),
    ],
)
def test_values_of_the_legend(drawn: tuple[float, float], shown: list[float]) -> None:
    assert legend_values(*drawn) == shown


def test_a_second_circuit_is_told_by_colour_and_dash() -> None:
    graph = Graph(config(4, 4, 4))
    of, other = circuit(graph, 50, 1), circuit(graph, 300, 2)
    overlay = Overlay("other", other.mask)
    rows = graph_rows(of, overlay, most=10_000)
    found = {status: sum(row["status"] == status for row in rows) for status in STATUS}
    assert found == {
        "both": int((of.mask & other.mask).sum()),
        "extra": int((of.mask & ~other.mask).sum()),
        "missed": int((other.mask & ~of.mask).sum()),
    }
    assert min(found.values()) > 0
    assert len({str(dash) for dash in DASHES.values()}) == 3
    figure = picture(of, overlay=overlay, most=10_000)
    assert {colour for colour, _ in lines(figure)} == set(STATUS.values())
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:3] == [
        f"in both: {found['both']}",
        f"only here: {found['extra']}",
        f"only in other: {found['missed']}",
    ]


def test_what_is_left_out_is_said_in_the_figure() -> None:
    of = circuit(Graph(config(4, 4, 4)), 50)
    assert picture(of, most=20).legends[0].get_title().get_text() == "without the 30 smallest edges"
    assert picture(of).legends[0].get_title().get_text() == ""


def test_a_circuit_alone_can_be_drawn(tmp_path: Path) -> None:
    of = circuit(Graph(config(3, 2, 2)), 12)
    assert figures.graph(of).save(tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(PahqError, match="give the folder of its run"):
        figures.graph(of, truth="ioi-gpt2")
    nothing = Circuit(of.graph, of.mask & False, of.effects, of.order)
    with pytest.raises(PahqError, match="the circuit has no edge"):
        figures.graph(nothing)


def test_colours_are_the_viewers() -> None:
    light = (ROOT / "viewer" / "src" / "look.ts").read_text().partition("const DARK")[0]
    for kind in ("q", "k", "v", "qkv", "mlp", "logits"):
        assert re.search(rf'\b{kind}: "{KINDS[kind]}"', light)
    for mine, theirs in (("both", "hit"), ("missed", "miss"), ("extra", "extra")):
        assert re.search(rf'\b{theirs}: "{STATUS[mine]}"', light)


SEEN = {
    "all": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
"""What is left of linear RGB for the eyes of few. Source: Machado et al. 2009, severity 1."""


def lab(colour: str, eyes: str) -> np.ndarray:
    """CIE L*a*b* of a colour as seen."""
    values = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(SEEN[eyes]) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ seen / [0.9505, 1.0, 1.089]
    root = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


@pytest.mark.parametrize("eyes", SEEN)
@pytest.mark.parametrize("palette", ["methods", "kinds", "status"])
def test_colours_differ_to_all_eyes(eyes: str, palette: str) -> None:
    kinds = {kind: KINDS[kind] for kind in ("q", "k", "v", "mlp")}
    colours = {"methods": METHODS, "kinds": kinds, "status": STATUS}[palette]
    for a, b in combinations(colours.values(), 2):
        assert np.linalg.norm(lab(a, eyes) - lab(b, eyes)) > 10, (a, b)  # a just noticeable difference is 2.3


def test_a_method_keeps_its_colour() -> None:
    few = looks(["eap-ig steps=10", "acdc"])
    many = looks(["random", "acdc pahq", "acdc", "acdc rtn", *METHODS])
    assert few["acdc"].colour == METHODS["acdc"]
    assert few["eap-ig steps=10"].colour == many["eap-ig"].colour == METHODS["eap-ig"]
    assert many["acdc"].colour == METHODS["acdc"]  # the plain one, wherever it stands
    assert len(set(many.values())) == len(many)  # by colour, mark or line
