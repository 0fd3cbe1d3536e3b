"""Matrix products of differences: a node's states form a chain, and only what changes from one to the next is
multiplied in low precision.

    W x_i = W x_parent + low(W) low(x_i - x_parent)

The first term is carried along in FP32, from the base state, whose values are FP32's own. Nonlinear functions
act on the FP32 sums. So an error is in proportion to the change that a decision is about, not to the values.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pahq.engine import chain
from pahq.engine.arithmetic import Arithmetic, Walk, pieces
from pahq.engine.marks import Reach
from pahq.engine.nodes import Nodes
from pahq.engine.state import Products, State
from pahq.graph import Graph
from pahq.model.components import linear
from pahq.precision.formats import Rounded
from pahq.precision.matrix import LowMatrix
from pahq.precision.mixed import MixedProducts
from pahq.precision.schedule import Scheduler
from pahq.precision.store import WeightKey, WeightStore


class Chains(Arithmetic):
    """See the module's text. nodes: of the FP32 model; store: its weights in low precision."""

    chained = True

    def __init__(
        self, graph: Graph, nodes: Nodes, state: State, store: WeightStore, scheduler: Scheduler | None = None
    ) -> None:
        policy = store.policy
        super().__init__(graph, nodes, nodes if policy.receiver_under_test else None, policy.others_under_test)
        self.state, self.store = state, store
        self.mixed = MixedProducts(store, scheduler)

    def projection(self, row: int, first: int, which: str, index: int, reach: tuple[Reach, Reach]) -> Walk:
        layer, model, spans = self.graph.receivers[row].layer, self.nodes.model, self.nodes.spans
        positions, level = spans.positions(reach[1]), reach[1]
        _, bias, norm = model.frames[layer].attn.parts(which)
        tip = model.attn_input(spans.narrow(self.state.input(row, reach[0]), *reach), layer, which, positions)
        key = (which, row, index, level)
        if norm is None:
            total = self.state.projected(which, layer, index, level)
        else:  # what is kept of the base state is the norm's output; the sum has to be carried before it

            def make() -> Products:
                weight = model.blocks[layer].attn.parts(which)[0][index]
                out = linear(tip.flatten(0, -2), weight, None if bias is None else bias[index])
                return (out.view(*tip.shape[:-1], -1),)

            (total,) = self.state.products(key, make)
        matrix, under = self.store.matrix(which, layer, index), self.under_test(row, first)

        def walk(states: slice, x: Tensor) -> Tensor:
            nonlocal tip, total
            x = model.attn_input(spans.narrow(x, *reach), layer, which, positions)
            spine = self._spine(first, states)
            change = chain.deltas(x, tip, spine)
            self.nodes.flops.add("qkv", change.numel() * model.config.d_head)
            change = self._product(matrix, (which, layer, index), change, under[states])
            tip = chain.last(x, tip, spine)
            if norm is None:
                change = self.nodes.rotate(change, which, level)
            out = chain.sums(change, total, spine)
            total = chain.last(out, total, spine)
            if norm is not None and self._is_end(first, states):
                self.linear[key] = (total.clone(),)
            return out if norm is None else self.nodes.rotate(norm(out), which, level)

        return walk

    def mlp(self, row: int, first: int, level: Reach) -> Walk:
        """The MLP of a receiver: what it writes beyond the base state."""
        layer = self.graph.receivers[row].layer
        cfg, block = self.nodes.model.config, self.nodes.model.frames[layer]
        mlp, ln2 = block.mlp, block.ln2
        assert mlp is not None
        assert ln2 is not None
        names = ("mlp_in", "mlp_out") if mlp.W_gate is None else ("mlp_in", "mlp_gate", "mlp_out")
        low = [self.store.matrix(name, layer) for name in names]
        tip = ln2(self.state.input(row, level))
        key = ("mlp", row, 0, level)

        def make() -> Products:
            self.nodes.flops.add("mlp", (len(low) - 1) * tip.numel() * cfg.d_mlp)
            whole, shape = self.nodes.model.blocks[layer].mlp, (*tip.shape[:-1], -1)
            assert whole is not None
            return tuple(part.view(shape) for part in whole.hidden(tip.flatten(0, -2)) if part is not None)

        hidden, *gates = self.state.products(key, make)
        gate = gates[0] if gates else None
        acted = mlp.act_on(hidden, gate)
        out = torch.zeros_like(tip)
        under = self.under_test(row, first)

        def walk(states: slice, x: Tensor) -> Tensor:
            nonlocal tip, hidden, gate, acted, out
            x, spine, exact = ln2(x), self._spine(first, states), under[states]
            change = chain.deltas(x, tip, spine)
            self.nodes.flops.add("mlp", len(low) * change.numel() * cfg.d_mlp)
            tip = chain.last(x, tip, spine)
            encoded = None if exact.any() else low[0].encode(change.flatten(0, -2), spent=True)
            here = chain.sums(self._product(low[0], (names[0], layer, 0), change, exact, encoded), hidden, spine)
            hidden, opened = chain.last(here, hidden, spine), None
            if mlp.W_gate is not None and gate is not None:
                opened = chain.sums(self._product(low[1], (names[1], layer, 0), change, exact, encoded), gate, spine)
                gate = chain.last(opened, gate, spine)
            here = mlp.act_on(here, opened)
            change = chain.deltas(here, acted, spine)
            acted = chain.last(here, acted, spine)
            written = chain.sums(self._product(low[-1], (names[-1], layer, 0), change, exact), out, spine)
            out = chain.last(written, out, spine)
            if self._is_end(first, states):
                self.linear[key] = tuple(part.clone() for part in (hidden, gate) if part is not None)
            return written

        return walk

    def written(self, layer: int, head: int, first: int, values: Tensor, base: Tensor) -> Tensor:
        matrix, under = self.store.matrix("o", layer, head), self.head_under_test(layer, head, first)
        out = values.new_empty((*values.shape[:-1], self.nodes.model.config.d_model))
        self.nodes.flops.add("out", values[..., 0].numel() * values.shape[-1] * out.shape[-1])
        tip, total = base, torch.zeros_like(out[0])
        for states in pieces(0, len(values), total):
            spine = self._spine(first, states)
            change = chain.deltas(values[states], tip, spine)
            tip = chain.last(values[states], tip, spine)
            change = self._product(matrix, ("o", layer, head), change, under[states])
            total = chain.last(chain.sums(change, total, spine, out[states]), total, spine)
        return out

    def _is_end(self, first: int, states: slice) -> bool:
        return first + states.stop == len(self.spine)

    def _spine(self, first: int, states: slice) -> list[bool]:
        return self.spine[first + states.start : first + states.stop].tolist()

    def _product(
        self, low: LowMatrix, key: WeightKey, change: Tensor, under: np.ndarray, encoded: Rounded | None = None
    ) -> Tensor:
        """Differences [s, B, P, k] times a matrix -> [s, B, P, o], in FP32 where the head is under test.

        encoded: the differences in the matrix's format, if they are at hand; else they are overwritten here.
        """
        if encoded is not None:
            return low.product(encoded).view(*change.shape[:-1], -1)
        if not under.any():
            return low.multiply(change, spent=True)
        return self.mixed.product(low, key, change, under)
