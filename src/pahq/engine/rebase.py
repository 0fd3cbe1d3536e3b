"""The base state of a mask, computed afresh node by node."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from pahq.engine.arithmetic import Arithmetic
from pahq.engine.marks import Marks, Reach, head_column, mlp_column
from pahq.engine.state import State, projections


class Rebase:
    """Replaces what a state holds by the values of ``marks``: a function of the mask alone."""

    def __init__(self, state: State, maths: Arithmetic, marks: Marks) -> None:
        self.state, self.maths, self.marks = state, maths, marks
        self.graph, self.spans, self.nodes = state.graph, state.spans, maths.nodes

    def run(self) -> Tensor:
        """-> the final residual stream [B, P, d], laid out for ``READ``."""
        state, marks = self.state, self.marks
        state.clear()
        self.maths.begin(np.full(1, -1), np.ones(1, dtype=bool))
        final = state.input(len(self.graph.receivers) - 1, Reach.READ)
        touched: set[tuple[int, int]] = set()  # heads whose q, k or v were set, ended by layer
        layer = -1
        for row, receiver in enumerate(self.graph.receivers):
            if not marks.finished[row] and not marks.direct_cut(row):
                continue  # untouched so far: as in the clean run
            if receiver.layer != layer or not receiver.is_attention:
                self._heads(touched)
                touched, layer = set(), receiver.layer
            level = marks.consumers_reach(receiver)
            if not level:
                continue
            if receiver.is_attention:
                touched |= self._attention(row, level)
                continue
            x = self._input(row, level)
            if receiver.kind == "logits":
                final = x
            else:
                if self.maths.keeps:
                    out, products = self.nodes.mlp_products(x, receiver.layer)
                    state.know(("mlp", row, 0, level), products)
                else:
                    out = self.nodes.mlp(x[None], receiver.layer)[0]
                state.update({("out", mlp_column(self.graph, receiver.layer), 0): out})
        return final

    def _input(self, row: int, level: Reach) -> Tensor:
        x = self.state.patched_input(row, self.marks, level, self.maths)
        self.state.update({("x", row, 0): x})
        return x

    def _attention(self, row: int, level: Reach) -> set[tuple[int, int]]:
        """Queries, keys or values of one receiver afresh; -> the heads (layer, head) that use them."""
        receiver, touched, state = self.graph.receivers[row], set(), self.state
        x = None if self.marks.direct_cut(row) else self._input(row, level)
        for which, index in projections(self.graph, receiver):
            reach = level
            if which == "q":
                reach = self.marks.sender_reach(head_column(self.graph, receiver.layer, index))
            if not reach:
                continue
            if x is None:
                base = state.projected(which, receiver.layer, index, reach)
                value = state.fallback(which, receiver.layer, index, reach).expand_as(base)
            else:
                narrowed = self.spans.narrow(x, level, reach)
                value = self.nodes.project(narrowed[None], which, receiver.layer, index, reach)[0]
            state.update({(which, receiver.layer, index): value})
        for head in self.graph.heads_of(receiver):
            touched.add((receiver.layer, head))
        return touched

    def _heads(self, heads: set[tuple[int, int]]) -> None:
        size, state = self.graph.config.group_size, self.state
        for layer, head in sorted(heads):
            column = head_column(self.graph, layer, head)
            level = self.marks.sender_reach(column)
            if not level:
                continue
            group = head // size
            q = state.projected("q", layer, head, level)[None]
            k, v = (state.projected(which, layer, group, Reach.ALL)[None] for which in "kv")
            prefix = [state.clean_prefix(which, layer, group) for which in "kv"]
            state.update({("out", column, 0): self.nodes.head(q, k, v, level, *prefix)[0]})
