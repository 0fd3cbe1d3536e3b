"""Circuits from scores, against paths in a networkx graph and one edge at a time."""

from __future__ import annotations

import itertools

import networkx as nx
import numpy as np
import pytest

from pahq.errors import PahqError
from pahq.evaluation.circuit import Circuit
from pahq.graph import Graph
from pahq.method.base import Scores
from pahq.method.select import above, beyond, closed, connected, greedy, ranked, select, top
from pahq.model.config import ModelConfig


def config(**more: object) -> ModelConfig:
    given = {
        "n_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 2,
        "d_model": 8,
        "d_head": 4,
        "d_mlp": 8,
        "d_vocab": 9,
        "d_vocab_out": 9,
        "n_ctx": 5,
    }
    return ModelConfig(**{**given, **more})  # pyright: ignore[reportArgumentType]


GRAPHS = {
    "plain": Graph(config()),
    "deep": Graph(config(n_layers=3)),
    "grouped": Graph(config(n_heads=4)),
    "attention only": Graph(config(d_mlp=0)),
    "parallel": Graph(config(parallel=True)),
    "joint": Graph(config(n_heads=4), split_qkv=False),
    "no direct edges": Graph(config(), direct_edges=False),
    "split positions": Graph(config(), split_pos=True),
}
SEEDS = range(4)


def scores(graph: Graph, seed: int) -> np.ndarray:
    """Random, in every other case with many ties; NaN where there is no edge."""
    values = np.random.default_rng(seed).normal(size=graph.shape)
    values = np.round(values, 0) if seed % 2 else values
    return np.where(graph.edges, values, np.nan)


def paths(graph: Graph, mask: np.ndarray) -> np.ndarray:
    """The edges of ``mask`` on a path from an embedding to the logits: nodes by name, reachability by networkx."""
    net = nx.DiGraph()
    net.add_nodes_from(["start", "end"])
    for name in ("embed", "pos_embed"):
        net.add_edge("start", f"out {name}")
    net.add_edge("in logits", "end")
    for row, receiver in enumerate(graph.receivers):
        if receiver.kind == "mlp":
            net.add_edge(f"in {receiver}", f"out {receiver}")
        elif receiver.is_attention:
            if mask[row, graph.direct] or not graph.edges[row, graph.direct]:
                net.add_edge(f"in {receiver}", f"computed {receiver}")
            for head in graph.heads_of(receiver):
                net.add_edge(f"computed {receiver}", f"out a{receiver.layer}.{head}")
        for column in np.flatnonzero(mask[row, : graph.direct]):
            net.add_edge(f"out {graph.senders[column]}", f"in {receiver}")
    alive = nx.descendants(net, "start") & nx.ancestors(net, "end")
    out = np.zeros_like(mask)
    for row, column in np.argwhere(mask):
        receiver = graph.receivers[row]
        if column == graph.direct:
            ends = f"in {receiver}", f"computed {receiver}"
        else:
            ends = f"out {graph.senders[column]}", f"in {receiver}"
        out[row, column] = set(ends) <= alive
    return out


def with_direct(graph: Graph, edges: list[tuple[int, int]]) -> np.ndarray:
    mask = np.zeros(graph.shape, dtype=bool)
    for row, column in edges:
        mask[row, column] = True
        if graph.edges[row, graph.direct]:
            mask[row, graph.direct] = True
    return mask


def by_rank(graph: Graph, values: np.ndarray) -> list[tuple[int, int]]:
    places = [(int(row), int(column)) for row, column in np.argwhere(graph.edges)]
    return sorted(places, key=lambda edge: (-values[edge], edge))


def slow_largest(graph: Graph, order: list[tuple[int, int]], edges: int) -> np.ndarray:
    """Edge by edge, the last circuit that is not too large."""
    best = np.zeros(graph.shape, dtype=bool)
    for count in range(len(order) + 1):
        found = paths(graph, with_direct(graph, order[:count]))
        best = found if found.sum() <= edges else best
    return best


def slow_growth(graph: Graph, values: np.ndarray) -> list[tuple[int, int]]:
    """Always the best edge into a node that is there."""
    order: list[tuple[int, int]] = []
    nodes = {"logits"}
    while True:
        candidates = []
        for row, column in by_rank(graph, values):
            receiver = graph.receivers[row]
            names = {"logits"} if receiver.kind == "logits" else {f"m{receiver.layer}"}
            if receiver.is_attention:
                names = {f"a{receiver.layer}.{head}" for head in graph.heads_of(receiver)}
            if column != graph.direct and names & nodes and (row, column) not in order:
                candidates.append((row, column))
        if not candidates:
            return order
        order.append(candidates[0])
        nodes.add(graph.senders[candidates[0][1]].name)


@pytest.mark.parametrize("name", GRAPHS)
def test_connected_edges_lie_on_a_path(name: str) -> None:
    graph = GRAPHS[name]
    for seed, share in itertools.product(range(8), (0.15, 0.3, 0.6)):
        mask = graph.edges & (np.random.default_rng(seed).random(graph.shape) < share)
        found = connected(graph, mask)
        assert np.array_equal(found, paths(graph, mask))
        assert Circuit(graph, mask, np.zeros(graph.shape), np.zeros(graph.shape, int)).is_connected == found.any()
        assert np.array_equal(connected(graph, found), found)
        assert np.array_equal(closed(graph, mask)[:, : graph.direct], mask[:, : graph.direct])
    assert np.array_equal(connected(graph, graph.edges), graph.edges)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("absolute", [False, True])
def test_top_takes_the_best_edges(name: str, absolute: bool) -> None:
    graph = GRAPHS[name]
    for seed in SEEDS:
        values = scores(graph, seed)
        strength = np.abs(values) if absolute else values
        order = by_rank(graph, strength)
        assert order == [divmod(place, graph.shape[1]) for place in ranked(graph, strength).tolist()]
        for edges in (1, 7, graph.n_edges // 3, graph.n_edges):
            expected = slow_largest(graph, order, edges)
            assert np.array_equal(top(graph, values, edges, absolute), expected), (seed, edges)
            larger = beyond(graph, values, "top", edges, absolute)
            sizes = [int(paths(graph, with_direct(graph, order[:count])).sum()) for count in range(len(order) + 1)]
            assert larger == min((size for size in sizes if size > edges), default=None)
    assert np.array_equal(top(graph, scores(graph, 0), graph.n_edges), graph.edges)


@pytest.mark.parametrize("name", GRAPHS)
def test_greedy_grows_from_the_logits(name: str) -> None:
    graph = GRAPHS[name]
    for seed in SEEDS:
        values = scores(graph, seed)
        order = slow_growth(graph, values)
        for edges in (1, 9, graph.n_edges // 2):
            assert np.array_equal(greedy(graph, values, edges), slow_largest(graph, order, edges)), (seed, edges)


@pytest.mark.parametrize("name", GRAPHS)
def test_threshold_is_acdcs_rule(name: str) -> None:
    """What reaches the threshold stays, with its direct edge, if it leads anywhere."""
    graph = GRAPHS[name]
    values = scores(graph, 1)  # ties at the threshold
    for threshold, absolute in itertools.product((-0.5, 0.0, 1.0), (False, True)):
        strength = np.abs(values) if absolute else values
        chosen = [(int(row), int(column)) for row, column in np.argwhere(graph.edges & ~(strength < threshold))]
        assert np.array_equal(above(graph, values, threshold, absolute), paths(graph, with_direct(graph, chosen)))


def test_what_cannot_be_selected_is_said() -> None:
    graph = GRAPHS["plain"]
    found = Scores(graph, np.where(graph.edges, 1.0, 0.0), "test")
    with pytest.raises(PahqError, match="edges: 0 lies outside 1 … "):
        select(found, "top", 0)
    with pytest.raises(PahqError, match=f"edges: {graph.n_edges + 1} lies outside"):
        select(found, "greedy", graph.n_edges + 1)
    with pytest.raises(PahqError, match="select: 'greedy' takes a number of edges"):
        select(found, "greedy")
    with pytest.raises(PahqError, match="select: 'best' is unknown"):
        select(found, "best", 3)
    with pytest.raises(PahqError, match="threshold: method 'test' sets none of its own"):
        select(found, "threshold")
    with pytest.raises(PahqError, match=r"scores: embed->a0.0.q has none"):
        top(graph, np.full(graph.shape, np.nan), 3)
    assert np.array_equal(select(Scores(graph, found.values, "test", natural=0.5), "threshold"), graph.edges)
    assert select(found, "threshold", threshold=1.5).sum() == 0
