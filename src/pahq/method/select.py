"""From scores of edges to a circuit: the best edges, all above a threshold, or a circuit grown from the logits.

An addition edge into an attention receiver does nothing without that receiver's direct edge, so whoever chooses the
former gets the latter along (it counts as an edge). Edges that lead nowhere are dropped: those on no path from an
embedding to the logits. Ties go to the edge whose receiver, then sender, computes first.
"""

from __future__ import annotations

import heapq

import numpy as np

from pahq.engine.marks import head_column, mlp_column
from pahq.errors import PahqError
from pahq.graph import Graph
from pahq.method.base import Scores
from pahq.method.registry import RULES


def select(
    scores: Scores,
    rule: str,
    edges: int | None = None,
    threshold: float | None = None,
    absolute: bool = False,
) -> np.ndarray:
    """The circuit that a rule of ``RULES`` takes from scores: bool [n_receivers, n_senders + 1].

    edges: how many at most (``top``, ``greedy``). threshold: the least score that stays (``threshold``; None: the
    method's own). absolute: scores count by their size. Raises PahqError where the rule lacks what it needs.
    """
    graph, values = scores.graph, scores.values
    if rule == "threshold":
        least = scores.natural if threshold is None else threshold
        if least is None:
            raise PahqError(f"threshold: method '{scores.method}' sets none of its own here; give edges or threshold")
        return above(graph, values, least, absolute)
    if rule not in RULES:
        raise PahqError(f"select: '{rule}' is unknown; known: {', '.join(RULES)}")
    if edges is None:
        raise PahqError(f"select: '{rule}' takes a number of edges; give edges")
    return (top if rule == "top" else greedy)(graph, values, edges, absolute)


def top(graph: Graph, values: np.ndarray, edges: int, absolute: bool = False) -> np.ndarray:
    """The best-scored edges, as many as make up a circuit of at most ``edges`` once dead ends are dropped.

    values: [n_receivers, n_senders + 1], read where there is an edge. Raises PahqError for NaN there, or more edges
    than the graph has.
    """
    strength = _strength(graph, values, absolute)
    return _largest(graph, ranked(graph, strength), edges)


def greedy(graph: Graph, values: np.ndarray, edges: int, absolute: bool = False) -> np.ndarray:
    """The largest circuit of at most ``edges`` grown from the logits: always the best-scored edge into what is there.

    Hanna et al. 2024, section 2. Arguments and errors: as for ``top``.
    """
    strength = _strength(graph, values, absolute)
    return _largest(graph, _grown(graph, strength), edges)


def beyond(graph: Graph, values: np.ndarray, rule: str, edges: int, absolute: bool = False) -> int | None:
    """How many edges the next larger circuit of ``top`` or ``greedy`` has, None if there is none.

    The best edges of a ranking may make no whole path for long, and then many at once.
    """
    strength = _strength(graph, values, absolute)
    order = ranked(graph, strength) if rule == "top" else _grown(graph, strength)
    count = _fitting(graph, order, edges) + 1
    return None if count > len(order) else int(_circuit(graph, order, count).sum())


def above(graph: Graph, values: np.ndarray, threshold: float, absolute: bool = False) -> np.ndarray:
    """All edges with a score of at least ``threshold`` (ACDC's rule) that lie on a path; see ``top``."""
    return connected(graph, closed(graph, _strength(graph, values, absolute) >= threshold))


def ranked(graph: Graph, strength: np.ndarray) -> np.ndarray:
    """Flat indices (row * columns + column) of all edges from the largest strength down, ties by place: int64 [E]."""
    places = np.flatnonzero(graph.edges)
    return places[np.argsort(-strength.ravel()[places], kind="stable")]


def closed(graph: Graph, mask: np.ndarray) -> np.ndarray:
    """``mask`` and the direct edge of every receiver into which it has an addition edge."""
    out = mask & graph.edges
    out[:, graph.direct] |= graph.edges[:, graph.direct] & out[:, : graph.direct].any(axis=1)
    return out


def connected(graph: Graph, mask: np.ndarray) -> np.ndarray:
    """The edges of ``mask`` that lie on a path from an embedding to the logits within it.

    A path enters an attention receiver by an addition edge and leaves it by the direct edge, where graphs have them.
    """
    direct, counted = graph.direct, graph.edges[:, graph.direct]
    outputs = [feeds(graph, row) for row in range(len(graph.receivers))]
    passes = mask[:, direct] | ~counted
    fed = np.zeros(direct, dtype=bool)  # senders with a path from an embedding
    fed[: 1 + graph.split_pos] = True
    reached = np.zeros(len(outputs), dtype=bool)  # receivers whose input has one
    for row, columns in enumerate(outputs):
        reached[row] = bool((mask[row, :direct] & fed).any())
        if reached[row] and passes[row]:
            fed[columns] = True
    read = np.zeros(direct, dtype=bool)  # senders with a path to the logits
    useful = np.zeros(len(outputs), dtype=bool)  # receivers whose node has one
    for row in reversed(range(len(outputs))):
        useful[row] = not outputs[row] or bool(read[outputs[row]].any())
        if useful[row] and passes[row]:
            read |= mask[row, :direct]
    out = np.zeros_like(mask)
    out[:, :direct] = mask[:, :direct] & fed & (useful & passes)[:, None]
    out[:, direct] = mask[:, direct] & reached & useful
    return out


def feeds(graph: Graph, row: int) -> list[int]:
    """Columns of the senders that a receiver's node writes to: its heads or its MLP; none for the logits."""
    receiver = graph.receivers[row]
    if receiver.kind == "logits":
        return []
    if receiver.kind == "mlp":
        return [mlp_column(graph, receiver.layer)]
    return [head_column(graph, receiver.layer, head) for head in graph.heads_of(receiver)]


def _strength(graph: Graph, values: np.ndarray, absolute: bool) -> np.ndarray:
    """Scores, or their sizes, and minus infinity where there is no edge."""
    bad = np.argwhere(np.isnan(values) & graph.edges)
    if len(bad):
        raise PahqError(f"scores: {graph.edge_name(*map(int, bad[0]))} has none; rank edges that are all scored")
    return np.where(graph.edges, np.abs(values) if absolute else values, -np.inf)


def _grown(graph: Graph, strength: np.ndarray) -> np.ndarray:
    """Flat indices of addition edges in the order in which a circuit grows from the logits."""
    rows_of: dict[int, list[int]] = {}
    for row in range(len(graph.receivers)):
        for column in feeds(graph, row):
            rows_of.setdefault(column, []).append(row)
    width, ranks = graph.shape[1], np.empty(strength.size, dtype=np.int64)
    best_first = ranked(graph, strength)
    ranks[best_first] = np.arange(len(best_first))
    heap: list[int] = []
    there: set[int] = set()

    def enter(rows: list[int]) -> None:
        for row in rows:
            if row not in there:  # a group's key and value belong to several heads
                there.add(row)
                for column in np.flatnonzero(graph.edges[row, : graph.direct]).tolist():
                    heapq.heappush(heap, int(ranks[row * width + column]))

    enter([len(graph.receivers) - 1])
    order = []
    while heap:
        place = int(best_first[heapq.heappop(heap)])
        order.append(place)
        enter(rows_of.get(place % width, []))
    return np.array(order, dtype=np.int64)


def _circuit(graph: Graph, order: np.ndarray, count: int) -> np.ndarray:
    """What the first ``count`` places of ``order`` make, closed and without dead ends."""
    mask = np.zeros(graph.shape, dtype=bool)
    mask.ravel()[order[:count]] = True
    return connected(graph, closed(graph, mask))


def _fitting(graph: Graph, order: np.ndarray, edges: int) -> int:
    """How many places of ``order`` make a circuit of at most ``edges`` edges, as many as can be."""
    if not 1 <= edges <= graph.n_edges:
        raise PahqError(f"edges: {edges} lies outside 1 … {graph.n_edges:,}, the edges of {graph.config.name}")
    low, high = 0, len(order)  # more places never make a smaller circuit
    while low < high:
        middle = (low + high + 1) // 2
        if int(_circuit(graph, order, middle).sum()) <= edges:
            low = middle
        else:
            high = middle - 1
    return low


def _largest(graph: Graph, order: np.ndarray, edges: int) -> np.ndarray:
    """The longest beginning of ``order`` that makes, closed and without dead ends, at most ``edges`` edges."""
    return _circuit(graph, order, _fitting(graph, order, edges))
