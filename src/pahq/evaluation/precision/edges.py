"""Exact effects of single edges, each removed from the full model; and which edge is worth a close look."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pahq.engine import Batch, Engine, Marks, Reach
from pahq.graph import Graph

BATCH = 32
"""Edges in a batch, at most."""
SHORTLIST = 8
"""Edges measured to find a strong one."""

Edge = tuple[int, int]
"""(row, column) in the graph's mask."""


def full_marks(graph: Graph) -> Marks:
    """The full model with every receiver decided: a change anywhere is followed to the logits."""
    marks = Marks.full(graph)
    for row in reversed(range(len(graph.receivers))):
        marks.finish(row)
    return marks


def edge_effects(engine: Engine, edges: Sequence[Edge], on_batch: Callable[[int], None] | None = None) -> np.ndarray:
    """Metric without an edge less that of the full model, float64 [edges], for an engine whose base is the full model.

    on_batch: called with the number of edges just measured.
    """
    marks = full_marks(engine.graph)
    # Late receivers first: what an edge changes is computed for all edges after it, which have to change it, too.
    order = sorted(range(len(edges)), key=lambda i: edges[i], reverse=True)
    effects = np.empty(len(edges))
    while order:
        some = order[:BATCH]
        batch = Batch([edges[i] for i in some], np.eye(len(some), dtype=bool), marks)
        metrics, _ = engine.evaluate(batch)
        done = some[: len(metrics)]  # fewer where memory does not reach for all
        effects[done] = metrics - engine.base_metric
        order = order[len(done) :]
        if on_batch is not None:
            on_batch(len(done))
    return effects


def strong_edge(engine: Engine) -> tuple[Edge, str]:
    """An edge between heads early enough that many layers follow, and strong; and how it was chosen, in words.

    Of the eight edges from a head into a head of the first half of the layers that change their receiver's input
    most, the one whose removal moves the metric most. (Any addition edge, where a model has none of those.)
    engine: in FP32, with the full model as its base.
    """
    graph, state = engine.graph, engine.state
    half = max(1, graph.config.n_layers // 2)
    rows, columns = graph.edges[:, : graph.direct].nonzero()
    every = list(zip(rows.tolist(), columns.tolist(), strict=True))
    early = [
        (row, column)
        for row, column in every
        if graph.receivers[row].is_attention
        and graph.receivers[row].layer <= half
        and graph.senders[column].kind == "head"
    ]
    taken = {
        column: float(state.differences.one(column, Reach.ALL).norm()) for column in {c for _, c in early or every}
    }
    inputs = {row: float(state.clean.receiver(graph.receivers[row]).norm()) for row in {r for r, _ in early or every}}
    ranked = sorted(early or every, key=lambda edge: -taken[edge[1]] / max(inputs[edge[0]], 1e-30))
    # The receivers of one layer share an input: one edge a sender and kind of receiver makes the list wide enough.
    shortlist: dict[tuple[str, int], Edge] = {}
    for row, column in ranked:
        shortlist.setdefault((graph.receivers[row].kind, column), (row, column))
        if len(shortlist) == SHORTLIST:
            break
    chosen = list(shortlist.values())
    which = "the edges between heads, into the first half of the layers," if early else "all edges"
    why = f"of {which} that change their receiver's input most, the one whose removal moves the metric most"
    return chosen[int(np.argmax(np.abs(edge_effects(engine, chosen))))], why
