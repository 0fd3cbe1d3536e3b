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
from pahq.engine.arithmetic import Arithmetic, Keep, Walk
from pahq.engine.marks import Reach, mlp_column
from pahq.engine.nodes import Nodes
from pahq.engine.state import State
from pahq.graph import Graph
from pahq.model.components import linear
from pahq.precision.matrix import LowMatrix
from pahq.precision.store import WeightStore


class Chains(Arithmetic):
    """See the module's text. nodes: of the FP32 model; store: its weights in low precision."""

    chained = True

    def __init__(self, graph: Graph, nodes: Nodes, state: State, store: WeightStore) -> None:
        policy = store.policy
        super().__init__(graph, nodes, nodes if policy.receiver_under_test else None, policy.others_under_test)
        self.state, self.store = state, store

    def projection(self, row: int, first: int, which: str, index: int, reach: tuple[Reach, Reach]) -> Walk:
        layer, model, spans = self.graph.receivers[row].layer, self.nodes.model, self.nodes.spans
        positions, level = spans.positions(reach[1]), reach[1]
        attn = model.blocks[layer].attn
        weights, bias, norm = attn.parts(which)
        tip = model.attn_input(spans.narrow(self.state.input(row, reach[0]), *reach), layer, which, positions)
        if norm is None:
            total = self.state.projected(which, layer, index, level)
        else:  # what is kept of the base state is the norm's output; the sum has to be carried before it
            total = linear(tip.flatten(0, -2), weights[index], None if bias is None else bias[index])
            total = total.view(*tip.shape[:-1], -1)
        matrix, under = self.store.matrix(which, layer, index), self.under_test(row, first)

        def walk(states: slice, x: Tensor) -> Tensor:
            nonlocal tip, total
            x = model.attn_input(spans.narrow(x, *reach), layer, which, positions)
            spine = self._spine(first, states)
            change = chain.deltas(x, tip, spine)
            self.nodes.flops.add("qkv", change.numel() * weights.shape[-1])
            change = self._product(f"{which}{layer}.{index}", matrix, weights[index], change, under[states])
            tip = chain.last(x, tip, spine)
            if norm is None:
                change = self.nodes.rotate(change, which, level)
            out = chain.sums(change, total, spine)
            total = chain.last(out, total, spine)
            return out if norm is None else self.nodes.rotate(norm(out), which, level)

        return walk

    def mlp(self, row: int, first: int, level: Reach, keep: Keep | None = None) -> Walk:
        layer = self.graph.receivers[row].layer
        block = self.nodes.model.blocks[layer]
        mlp, ln2 = block.mlp, block.ln2
        assert mlp is not None
        assert ln2 is not None
        low = [
            self.store.matrix(name, layer)
            for name in ("mlp_in", "mlp_gate", "mlp_out")
            if name != "mlp_gate" or mlp.W_gate is not None
        ]
        tip = ln2(self.state.input(row, level))
        hidden, gate = self.state.hidden(row, level)
        acted = mlp.act_on(hidden, gate)
        out = self.state.output(mlp_column(self.graph, layer), level)
        under = self.under_test(row, first)

        def walk(states: slice, x: Tensor) -> Tensor:
            nonlocal tip, hidden, gate, acted, out
            x, spine, exact = ln2(x), self._spine(first, states), under[states]
            change = chain.deltas(x, tip, spine)
            self.nodes.flops.add("mlp", len(low) * change.numel() * mlp.W_in.shape[1])
            tip = chain.last(x, tip, spine)
            name = f"mlp{layer}"
            here = chain.sums(self._product(name, low[0], mlp.W_in, change, exact), hidden, spine)
            hidden, gates = chain.last(here, hidden, spine), None
            if mlp.W_gate is not None and gate is not None:
                gates = chain.sums(self._product(name, low[1], mlp.W_gate, change, exact), gate, spine)
                gate = chain.last(gates, gate, spine)
            here = mlp.act_on(here, gates)
            change = chain.deltas(here, acted, spine)
            acted = chain.last(here, acted, spine)
            written = chain.sums(self._product(name, low[-1], mlp.W_out, change, exact), out, spine)
            out = chain.last(written, out, spine)
            return written

        return walk

    def written(self, layer: int, head: int, first: int, values: Tensor, base: Tensor) -> Tensor:
        spine = self._spine(first, slice(0, len(values)))
        change = chain.deltas(values, base, spine)
        self.nodes.flops.add("out", change.numel() * self.nodes.model.config.d_model)
        weight = self.nodes.model.blocks[layer].attn.W_O[head]
        under = self.head_under_test(layer, head, first)
        change = self._product(f"o{layer}.{head}", self.store.matrix("o", layer, head), weight, change, under)
        return chain.sums(change, torch.zeros_like(change[0]), spine)

    def _spine(self, first: int, states: slice) -> list[bool]:
        return self.spine[first + states.start : first + states.stop].tolist()

    def _product(self, name: str, low: LowMatrix, weight: Tensor, change: Tensor, under: np.ndarray) -> Tensor:
        """Differences [s, B, P, k] times a matrix -> [s, B, P, o], in FP32 where the head is under test."""

        def rough(part: Tensor) -> Tensor:
            return low.multiply(part)

        def fine(part: Tensor) -> Tensor:
            return (part.reshape(-1, part.shape[-1]) @ weight).view(*part.shape[:-1], -1)

        return self._mixed(under, change, rough, fine)
