"""Which edges are present, which nodes still matter, and at which positions they are read.

Sweeping from the output back, a sender's consumers are all decided before its own inputs are
tested; so how widely it is read is known by then and never changes again.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from pahq.graph import Graph, Receiver


class Reach(IntEnum):
    """Where a value is read: nowhere (a dead node), at the metric's positions, or at all positions."""

    NOWHERE = 0
    READ = 1
    ALL = 2


class Marks:
    """A mask of present edges, with the reach of every sender that follows from the finished receivers.

    mask: bool [n_receivers, n_senders + 1]; reach: int8 [n_senders]; finished: bool [n_receivers].
    """

    def __init__(self, graph: Graph, mask: np.ndarray, reach: np.ndarray, finished: np.ndarray) -> None:
        self.graph, self.mask, self.reach, self.finished = graph, mask, reach, finished

    @classmethod
    def full(cls, graph: Graph, mask: np.ndarray | None = None) -> Marks:
        """All edges present, or those of ``mask``; no receiver decided."""
        return cls(
            graph,
            (graph.edges if mask is None else mask).copy(),
            np.zeros(len(graph.senders), dtype=np.int8),
            np.zeros(len(graph.receivers), dtype=bool),
        )

    def copy(self) -> Marks:
        return Marks(self.graph, self.mask.copy(), self.reach.copy(), self.finished.copy())

    def direct_cut(self, row: int) -> bool:
        """Whether the receiver's direct edge has been removed."""
        return bool(self.graph.edges[row, self.graph.direct] and not self.mask[row, self.graph.direct])

    def level(self, row: int) -> Reach:
        """Where a receiver's input matters, given that everything after it is decided."""
        return Reach.NOWHERE if self.direct_cut(row) else self.consumers_reach(self.graph.receivers[row])

    def sender_reach(self, column: int) -> Reach:
        """Where a sender is read."""
        return Reach(int(self.reach[column]))

    def consumers_reach(self, receiver: Receiver) -> Reach:
        """Where the receiver's node is read, its direct edge left aside."""
        graph = self.graph
        if receiver.kind == "logits":
            return Reach.READ
        if receiver.kind == "mlp":
            return self.sender_reach(mlp_column(graph, receiver.layer))
        first = head_column(graph, receiver.layer, 0)
        heads = graph.heads_of(receiver)
        reach = int(self.reach[first + heads.start : first + heads.stop].max())
        if receiver.kind == "q" or not reach:
            return Reach(reach)
        return Reach.ALL  # keys and values are needed wherever a query may look

    def finish(self, row: int) -> None:
        """Marks the senders of a receiver whose edges are all decided."""
        level = self.level(row)
        columns = self.mask[row, : self.graph.direct]
        if level:
            np.maximum(self.reach, level, out=self.reach, where=columns)
        self.finished[row] = True


def head_column(graph: Graph, layer: int, head: int) -> int:
    """Column of a head's output in the mask."""
    per_layer = graph.config.n_heads + bool(graph.config.d_mlp)
    return 1 + graph.split_pos + layer * per_layer + head


def mlp_column(graph: Graph, layer: int) -> int:
    """Column of an MLP's output in the mask."""
    return head_column(graph, layer, graph.config.n_heads)
