"""The order in which ACDC tests edges, and what it prunes untested. Conmy et al. 2023, section 3 and code."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pahq.engine.marks import Marks, head_column, mlp_column
from pahq.graph import Graph, Receiver


@dataclass(frozen=True)
class Visit:
    """One receiver's turn: its row, and the columns tested in order (``direct`` alone, or its senders)."""

    row: int
    columns: tuple[int, ...]
    is_last: bool
    """Whether all of the receiver's edges are decided afterwards."""


def visits(graph: Graph, ascending_heads: bool = False, earliest_first: bool = False) -> list[Visit]:
    """All visits, from the logits back: m{l}; direct edges of v, k, q; inputs of v, k, q; heads from the highest down.

    ascending_heads: within a layer, senders are tested from head 0 up.
    earliest_first: senders are tested from the embedding up.
    """
    order: list[Visit] = []
    rows = {receiver: row for row, receiver in enumerate(graph.receivers)}
    senders = _senders(graph, ascending_heads, earliest_first)

    def upstream(receiver: Receiver) -> tuple[int, ...]:
        count = graph.n_upstream(receiver)
        return tuple(column for column in senders if column < count)

    for layer in reversed(range(graph.config.n_layers + 1)):
        here = [r for r in graph.receivers if r.layer == layer]
        for kind in ("logits", "mlp"):
            order += [Visit(rows[r], upstream(r), True) for r in here if r.kind == kind]
        attention = [r for kind in ("qkv", "v", "k", "q") for r in reversed(here) if r.kind == kind]
        if graph.direct_edges:
            order += [Visit(rows[r], (graph.direct,), False) for r in attention]
        order += [Visit(rows[r], upstream(r), True) for r in attention]
    return order


def restricted(order: list[Visit], mask: np.ndarray, strength: np.ndarray | None = None) -> list[Visit]:
    """The same visits to the edges of ``mask`` [n_receivers, n_senders + 1] alone.

    strength: of the same shape; a receiver's senders are then visited from the least up (ties as they stood).
    """
    visited = []
    for visit in order:
        columns = [column for column in visit.columns if mask[visit.row, column]]
        if strength is not None:
            columns.sort(key=lambda column: float(strength[visit.row, column]))
        visited.append(replace(visit, columns=tuple(columns)))
    return visited


def _senders(graph: Graph, ascending_heads: bool, earliest_first: bool) -> list[int]:
    """All senders, latest first: the last layer's MLP, its heads, the layer below, …, the embeddings."""
    groups: list[list[int]] = []
    for layer in reversed(range(graph.config.n_layers)):
        heads = [head_column(graph, layer, head) for head in range(graph.config.n_heads)]
        mlp = [mlp_column(graph, layer)] if graph.config.d_mlp else []
        groups += [mlp, heads if ascending_heads else heads[::-1]]
    groups += [[0], [1]] if graph.split_pos else [[0]]
    if earliest_first:
        groups.reverse()
    return [column for group in groups for column in group]


class Sweep:
    """A position in the sweep and the edges present there. Cheap to copy, so that futures can be tried out."""

    def __init__(self, order: list[Visit], marks: Marks) -> None:
        self.order, self.marks = order, marks
        self._visit, self._column, self._entered = 0, 0, False

    def copy(self) -> Sweep:
        twin = Sweep(self.order, self.marks.copy())
        twin._visit, twin._column, twin._entered = self._visit, self._column, self._entered
        return twin

    def peek(self) -> tuple[int, int] | None:
        """The next edge (row, column) to test, or None at the end; prunes dead receivers on the way."""
        while self._visit < len(self.order):
            visit = self.order[self._visit]
            if not self._entered:
                self._entered = True
                dead = not self.marks.level(visit.row)
                if dead:
                    self.marks.mask[visit.row, list(visit.columns)] = False
                if dead or not visit.columns:
                    self._leave(visit)
                    continue
            return visit.row, visit.columns[self._column]
        return None

    def decide(self, keep: bool) -> None:
        """Takes the decision on the edge that ``peek`` gave."""
        visit = self.order[self._visit]
        if not keep:
            self.marks.mask[visit.row, visit.columns[self._column]] = False
        self._column += 1
        if self._column == len(visit.columns):
            self._leave(visit)

    def _leave(self, visit: Visit) -> None:
        if visit.is_last:
            self.marks.finish(visit.row)
        self._visit, self._column, self._entered = self._visit + 1, 0, False

    @property
    def at_visit(self) -> int:
        """How many visits are over."""
        return self._visit

    def edges_left(self) -> int:
        """An upper bound on the tests still to come."""
        left = sum(len(visit.columns) for visit in self.order[self._visit :])
        return left - self._column
