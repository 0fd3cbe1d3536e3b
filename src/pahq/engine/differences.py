"""What removed edges take away from a receiver: (clean - reference) of each sender, in the residual stream."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pahq.engine.flops import KEPT
from pahq.engine.marks import Reach
from pahq.engine.nodes import Nodes
from pahq.engine.reference import Run
from pahq.engine.spans import Spans
from pahq.graph import Graph

TABLE_BYTES = 1 << 30
"""Memory for the differences of all senders at the positions of one reach; beyond it they are made when needed."""


Gap = Callable[[int], Tensor]
"""Column of a sender -> its clean value less that of the reference run, as written [B or 1, T, d]."""


class Differences:
    """Senders as in the clean run less those of the reference run, kept in one table a reach where memory allows.

    gap: how the difference of a sender is made; by default in the arithmetic of ``nodes``.
    """

    def __init__(
        self, graph: Graph, clean: Run, reference: Run, spans: Spans, nodes: Nodes, gap: Gap | None = None
    ) -> None:
        self.graph, self.clean, self.reference, self.spans, self.nodes = graph, clean, reference, spans, nodes
        self._gap = gap
        self._tables: dict[Reach, tuple[Tensor, np.ndarray] | None] = {}

    def one(self, column: int, level: Reach) -> Tensor:
        """[B, P, d] for one sender."""
        table = self._table(level)
        if table is None:
            return self._make(column, level)
        values, known = table
        if not known[column]:
            values[column] = self._make(column, level)
            known[column] = True
        return values[column]

    def subtract(self, x: Tensor, applied: Tensor, columns: list[int], level: Reach) -> None:
        """x [S, B, P, d] -= applied [S, len(columns)] @ the senders' differences, in place."""
        flat = x.view(x.shape[0], -1)
        table = self._table(level)
        first, count = min(columns), max(columns) - min(columns) + 1
        if table is None or count > 2 * len(columns):
            gaps = torch.stack([self.one(column, level).reshape(-1) for column in columns])
            flat.addmm_(applied, gaps, alpha=-1)
            return
        # Senders tested one after the other lie side by side in the table: no copy is needed.
        values, known = table
        for column in np.flatnonzero(~known[first : first + count]) + first:
            self.one(int(column), level)
        spread = applied.new_zeros(applied.shape[0], count)
        spread[:, [column - first for column in columns]] = applied
        flat.addmm_(spread, values[first : first + count].view(count, -1), alpha=-1)

    def _make(self, column: int, level: Reach) -> Tensor:
        if self._gap is not None:
            return self.spans.take(self._gap(column), level).expand(self.spans.read.shape[0], -1, -1)
        sender = self.graph.senders[column]
        gap = self.spans.take(self.clean.sender(sender), level)
        gap = gap - self.spans.take(self.reference.sender(sender), level)
        if sender.kind == "head":
            gap = self.nodes.write(gap, sender.layer, sender.index, KEPT)
        return gap.expand(self.spans.read.shape[0], -1, -1)

    def _table(self, level: Reach) -> tuple[Tensor, np.ndarray] | None:
        if level not in self._tables:
            x = self.clean.final
            shape = (len(self.graph.senders), self.spans.read.shape[0], self.spans.count(level), x.shape[-1])
            count = torch.Size(shape).numel()
            self._tables[level] = None
            if count * x.element_size() <= TABLE_BYTES:
                self._tables[level] = (x.new_empty(shape), np.zeros(shape[0], dtype=bool))
        return self._tables[level]
