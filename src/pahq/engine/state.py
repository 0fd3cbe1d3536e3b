"""The current state of a sweep: which values differ from the clean run, and how to get at the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pahq.engine.differences import Differences
from pahq.engine.marks import Marks, Reach
from pahq.engine.nodes import Nodes
from pahq.engine.reference import Run
from pahq.engine.spans import Spans
from pahq.graph import Graph, Receiver

if TYPE_CHECKING:
    from pahq.engine.arithmetic import Arithmetic

Key = tuple[str, int, int]
"""("x", row, 0): a receiver's input; ("q", layer, head), ("k" or "v", layer, group); ("out", column, 0)."""
LinearKey = tuple[str, int, int, Reach]
"""("mlp", row, 0, reach) or ("q", "k" or "v"; row, head or group, reach)."""
Products = tuple[Tensor, ...]
"""What a receiver's matrices give before any nonlinearity: an MLP's hidden layer [B, P, d_mlp] and its gate if it has
one; queries, keys or values [B, P, dh] before their norm."""
STARTED = 32
"""Receivers whose inputs at a start without all edges are kept at a time."""
LINEAR_BYTES = 1 << 30
"""Memory for products that may be needed; beyond it they are computed when they are."""


class State:
    """Values of the base state: those that differ from the clean run are stored, the others are views of it.

    Shapes: receiver inputs and MLP outputs [B, P, d], heads before W_O [B, P, dh], at the positions
    of their reach; queries likewise; keys and values [B, stop - start, dh].
    rough: the senders' differences as chains take them away, where those of ``differences`` are not theirs.
    start: the edges [n_receivers, n_senders + 1] that ``clean`` was computed with, None for all.
    """

    def __init__(
        self,
        graph: Graph,
        clean: Run,
        reference: Run,
        spans: Spans,
        nodes: Nodes,
        differences: Differences,
        rough: Differences | None = None,
        start: np.ndarray | None = None,
    ) -> None:
        self.graph, self.clean, self.reference, self.spans, self.nodes = graph, clean, reference, spans, nodes
        self.differences, self.rough, self.start = differences, rough, start
        self.changed: dict[Key, Tensor] = {}
        self._prefix: dict[Key, Tensor] = {}
        self._clean: dict[tuple[str, int, int, Reach], Tensor] = {}
        self._linear: dict[LinearKey, Products] = {}

    def twin(self) -> State:
        """Another state of the same runs, at the clean run."""
        other = State(
            self.graph, self.clean, self.reference, self.spans, self.nodes, self.differences, start=self.start
        )
        other._prefix, other._clean = self._prefix, self._clean
        return other

    def update(self, changed: dict[Key, Tensor], linear: dict[LinearKey, Products] | None = None) -> None:
        """Takes in values of a new base state. linear: products that belong to its inputs, see ``products``."""
        rows = {row for kind, row, _ in changed if kind == "x"}
        for key in [key for key in self._linear if key[1] in rows]:
            del self._linear[key]
        self.changed |= changed
        if linear is not None:
            self._linear |= {key: value for key, value in linear.items() if key[1] in rows}

    def become(self, other: State) -> None:
        """Takes over another state's values, and those products of them that it has."""
        inputs = [key for key in (*self.changed, *other.changed) if key[0] == "x"]
        rows = {key[1] for key in inputs if self.changed.get(key) is not other.changed.get(key)}
        self._linear = {key: value for key, value in self._linear.items() if key[1] not in rows}
        self._linear |= {key: value for key, value in other._linear.items() if key[1] in rows}
        self.changed = dict(other.changed)

    def know(self, key: LinearKey, products: Products) -> None:
        """Takes in products of a receiver's input in the base state, where there is room for them."""
        if self._has_room(products):
            self._linear[key] = products

    def _has_room(self, more: Products) -> bool:
        return sum(part.nbytes for held in (more, *self._linear.values()) for part in held) <= LINEAR_BYTES

    def forget_products(self) -> None:
        self._linear.clear()

    def clear(self) -> None:
        """Back to the clean run."""
        self.changed.clear()
        self._linear.clear()

    def products(self, key: LinearKey, make: Callable[[], Products]) -> Products:
        """Products of a receiver's input in the base state; ``make`` computes them where they are not kept."""
        found = self._linear.get(key)
        if found is None:
            found = make()
            if ("x", key[1], 0) in self.changed or self._has_room(found):
                self._linear[key] = found
        return found

    def input(self, row: int, level: Reach) -> Tensor:
        """A receiver's input in the base state: [B, P, d]."""
        stored = self.changed.get(("x", row, 0))
        if stored is not None:
            return stored
        receiver = self.graph.receivers[row]
        if self.start is None or receiver.kind == "logits":
            return self.spans.take(self.clean.receiver(receiver), level)
        return self._started(row, level)

    def _started(self, row: int, level: Reach) -> Tensor:
        """The input at the start where edges were gone then: each receiver has its own, made when it is asked for."""
        key = ("x", row, 0, level)
        if key not in self._clean:
            for old in [old for old in self._clean if old[0] == "x"][:-STARTED]:
                del self._clean[old]
            assert self.start is not None
            x = self.spans.take(self.reference.receiver(self.graph.receivers[row]), level)
            x = x.expand(self.spans.read.shape[0], -1, -1).clone()
            for column in self.start[row, : self.graph.direct].nonzero()[0].tolist():
                x += self.differences.one(column, level)
            self._clean[key] = x
        return self._clean[key]

    def projected(self, which: str, layer: int, index: int, level: Reach) -> Tensor:
        """q, k or v in the base state, turned by its positions: [B, P, dh]; ``level`` ALL for k and v."""
        stored = self.changed.get((which, layer, index))
        if stored is not None:
            return stored
        key = (which, layer, index, level)  # a guess about the future may ask for another reach than the truth
        if key not in self._clean:
            self._clean[key] = self._turned(self.clean, which, layer, index, level)
        return self._clean[key]

    def fallback(self, which: str, layer: int, index: int, level: Reach) -> Tensor:
        """q, k or v of the reference run, which a cut direct edge puts in place: [B or 1, P, dh]."""
        return self._turned(self.reference, which, layer, index, level)

    def _turned(self, run: Run, which: str, layer: int, index: int, level: Reach) -> Tensor:
        return self.nodes.rotate(self.spans.take(run.projected(which, layer, index), level), which, level)

    def clean_prefix(self, which: str, layer: int, index: int) -> Tensor:
        """Keys or values of the positions before ``start``, the same in all states: [B, start, dh]."""
        key = (which, layer, index)
        if key not in self._prefix:
            value = self.clean.projected(which, layer, index)[:, : self.spans.start]
            if which == "k":
                value = self.nodes.model.rotate(value, torch.arange(self.spans.start, device=value.device))
            self._prefix[key] = value
        return self._prefix[key]

    def output(self, column: int, level: Reach) -> Tensor:
        """A sender's value in the base state: [B, P, d], [B, P, dh] for a head."""
        stored = self.changed.get(("out", column, 0))
        return self.spans.take(self.clean.sender(self.graph.senders[column]), level) if stored is None else stored

    def patched_input(self, row: int, marks: Marks, level: Reach, maths: Arithmetic) -> Tensor:
        """A receiver's input afresh: reference + sum over present edges of (sender now - sender in reference)."""
        if maths.rounds:
            return self._patched_of_rounded(row, marks, level, maths)
        receiver, spans = self.graph.receivers[row], self.spans
        x = spans.take(self.reference.receiver(receiver), level)
        x = x.expand(self.spans.read.shape[0], -1, -1).clone()
        present = marks.mask[row, : self.graph.direct].nonzero()[0].tolist()
        for column in present:
            sender = self.graph.senders[column]
            if ("out", column, 0) not in self.changed:
                x += self.differences.one(column, level)
                continue
            reach = marks.sender_reach(column)
            now = spans.narrow(self.output(column, reach), reach, level)
            gap = now - spans.take(self.reference.sender(sender), level)
            x += self.nodes.write(gap, sender.layer, sender.index) if sender.kind == "head" else gap
        return x

    def _patched_of_rounded(self, row: int, marks: Marks, level: Reach, maths: Arithmetic) -> Tensor:
        """The same from the clean input down, as batches do it: sums of rounded values do not add up to it exactly."""
        spans, add = self.spans, self.nodes.model.add
        x = spans.take(self.clean.receiver(self.graph.receivers[row]), level).clone()
        for column in range(self.graph.n_upstream(self.graph.receivers[row])):
            sender = self.graph.senders[column]
            if not marks.mask[row, column]:
                x = add(x, -self.differences.one(column, level))
            elif ("out", column, 0) in self.changed:
                reach = marks.sender_reach(column)
                now, before = self.output(column, reach), spans.take(self.clean.sender(sender), reach)
                gap = now - before
                if sender.kind == "head":
                    gap = maths.written(sender.layer, sender.index, 0, now[None], before)[0]
                x = add(x, spans.narrow(gap, reach, level))
        return x


def projections(graph: Graph, receiver: Receiver) -> list[tuple[str, int]]:
    """What an attention receiver's input is turned into: [("q", head)], [("k", group)], … or all three for qkv."""
    if receiver.kind != "qkv":
        return [(receiver.kind, receiver.index)]
    return [("k", receiver.index), ("v", receiver.index), *(("q", head) for head in graph.heads_of(receiver))]
