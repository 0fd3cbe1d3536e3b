"""What the viewer draws: nodes and edges of a circuit, and how they stand to a second circuit. JSON-ready."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pahq.evaluation.circuit import Circuit
from pahq.graph import Graph, Receiver

MAX_EDGES = 2000
"""Edges drawn at most; those of a circuit come first, then those of the one beside it, then the largest effects.
Direct edges are parts of a head's ring, not lines, and not counted."""

REMOVED, KEPT, UNTESTED = 0, 1, 2
"""Decisions. An edge without any effect that was nevertheless kept is ``KEPT``."""


@dataclass(frozen=True)
class Overlay:
    """A second circuit. mask: bool, of the same shape as the first one's."""

    name: str
    mask: np.ndarray


def drawing(circuit: Circuit, absolute: bool = False, overlay: Overlay | None = None) -> dict[str, Any]:
    """nodes, edges, direct edges, links and counts of a circuit, as the page takes them.

    absolute: whether edges count by the size of their effects. At most ``MAX_EDGES`` addition edges are drawn;
    ``omitted`` tells how many are not: only kept, only of the overlay, of both, only tested. An edge is a list:
    indices of its two nodes, its kind (q, k, v, qkv, mlp or logits), effect (None if unmeasured), order (-1 if
    untested), decision, and whether the overlay has it (0 or 1). A direct edge is the same with one node in place of
    two. Links lead from a group's keys and values to its heads.
    """
    graph = circuit.graph
    nodes = _nodes(graph)
    index = {node["id"]: place for place, node in enumerate(nodes)}
    other = np.zeros(graph.shape, dtype=bool) if overlay is None else overlay.mask
    chosen = drawn_edges(circuit, absolute, other)
    edges, direct = [], []
    for row, column in np.argwhere(chosen).tolist():
        receiver = graph.receivers[row]
        facts = [
            receiver.kind,
            _number(circuit.effects[row, column]),
            int(circuit.order[row, column]),
            _decision(circuit, row, column),
            int(other[row, column]),
        ]
        target = index[reader(graph, receiver)]
        if column == graph.direct:
            direct.append([target, *facts])
        else:
            edges.append([index[graph.sender_name(column)], target, *facts])
    left = _worth_drawing(circuit, other) & ~chosen
    return {
        "nodes": nodes,
        "edges": edges,
        "direct": direct,
        "links": _links(graph, index),
        "omitted": {
            "kept": int((left & ~other & circuit.mask).sum()),
            "missed": int((left & other & ~circuit.mask).sum()),
            "shared": int((left & other & circuit.mask).sum()),
            "tested": int((left & ~other & ~circuit.mask).sum()),
        },
        "overlay": None if overlay is None else {"name": overlay.name, "edges": int(other.sum())},
    }


def drawn_edges(circuit: Circuit, absolute: bool, other: np.ndarray) -> np.ndarray:
    """bool [n_receivers, n_senders + 1]: the edges to draw."""
    worth = _worth_drawing(circuit, other)
    value = np.abs(circuit.effects) if absolute else circuit.effects
    value = np.where(np.isfinite(value), value, -np.inf)
    rank = np.where(circuit.mask, 2, np.where(other, 1, 0))
    chosen = worth.copy()
    chosen[:, : circuit.graph.direct] = False
    lines = worth & ~chosen
    places = np.flatnonzero(lines.ravel())
    by = np.lexsort((-value.ravel()[places], -rank.ravel()[places]))
    chosen.ravel()[places[by[:MAX_EDGES]]] = True
    return chosen


def reader(graph: Graph, receiver: Receiver) -> str:
    """The node that an edge into ``receiver`` ends at: a head, a group of keys and values, an MLP or the logits."""
    if not receiver.is_attention:
        return receiver.name
    if graph.config.group_size > 1 and receiver.kind != "q":
        return f"a{receiver.layer}.{receiver.index}.kv"
    return f"a{receiver.layer}.{receiver.index}"


def kept_nodes(circuit: Circuit) -> dict[str, float]:
    """Nodes of the circuit -> the sum of their kept edges' sizes; heads of a group that reads count, too."""
    graph = circuit.graph
    size = np.where(circuit.mask, np.abs(np.nan_to_num(circuit.effects)), 0.0)
    found: dict[str, float] = {}
    for row, column in np.argwhere(circuit.mask).tolist():
        receiver = graph.receivers[row]
        names = [reader(graph, receiver)]
        if receiver.is_attention:
            names = [f"a{receiver.layer}.{head}" for head in graph.heads_of(receiver)]
        for name in [*names, *([] if column == graph.direct else [graph.sender_name(column)])]:
            found[name] = found.get(name, 0.0) + float(size[row, column])
    return found


def _worth_drawing(circuit: Circuit, other: np.ndarray) -> np.ndarray:
    return circuit.graph.edges & (circuit.mask | other | np.isfinite(circuit.effects))


def _decision(circuit: Circuit, row: int, column: int) -> int:
    if circuit.mask[row, column]:
        return KEPT
    return REMOVED if math.isfinite(circuit.effects[row, column]) else UNTESTED


def _number(value: float) -> float | None:
    """Six digits are more than a reader can see, and half the size."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _nodes(graph: Graph) -> list[dict[str, Any]]:
    config = graph.config
    nodes = [{"id": s.name, "kind": s.kind, "layer": s.layer, "index": s.index} for s in graph.senders]
    if config.group_size > 1:
        nodes += [
            {"id": f"a{layer}.{group}.kv", "kind": "group", "layer": layer, "index": group}
            for layer in range(config.n_layers)
            for group in range(config.n_kv_heads)
        ]
    return [*nodes, {"id": "logits", "kind": "logits", "layer": config.n_layers, "index": 0}]


def _links(graph: Graph, index: dict[str, int]) -> list[list[int]]:
    size = graph.config.group_size
    if size == 1:
        return []
    return [
        [index[f"a{layer}.{head // size}.kv"], index[f"a{layer}.{head}"]]
        for layer in range(graph.config.n_layers)
        for head in range(graph.config.n_heads)
    ]
