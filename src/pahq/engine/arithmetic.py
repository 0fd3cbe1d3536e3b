"""How a batch computes its nodes: each state by itself. (``chains`` carries differences from state to state.)

A node is computed some states at a time, so the arithmetic hands out a walk for it: a function that is
called with consecutive pieces of its inputs. Shapes: S states, B examples, P positions of a reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from pahq.engine.marks import Reach
from pahq.engine.nodes import Nodes
from pahq.engine.state import LinearKey, Products
from pahq.graph import Graph
from pahq.precision.formats import Format, get_format

EXACT = get_format("fp32")
PIECE_ELEMENTS = {"cpu": 1 << 19, "gpu": 1 << 22}
"""Numbers in residual streams that are worked on at a time: for each thread of a CPU what stays in its cache, on a GPU
enough for its kernels to be worth their launch."""
MOST_THREADS = 8
"""Threads that count for that, so that working memory (some twenty times a piece in an MLP) keeps small."""
Walk = Callable[[slice, Tensor], Tensor]
"""(states counted from the step's first one, their inputs [s, B, P, d]) -> the node's values [s, B, P, …]"""


def pieces(first: int, stop: int, stream: Tensor) -> Iterator[slice]:
    """The states from ``first`` to ``stop``, some at a time; stream: the residual stream of one."""
    on_cpu = stream.device.type == "cpu"
    elements = PIECE_ELEMENTS["cpu"] * min(torch.get_num_threads(), MOST_THREADS) if on_cpu else PIECE_ELEMENTS["gpu"]
    some = max(1, elements // stream.numel())
    for begin in range(first, stop, some):
        yield slice(begin, min(begin + some, stop))


class Arithmetic:
    """Every state by itself, in the arithmetic of the model that ``nodes`` has.

    exact: nodes in FP32 for heads under test, where those of ``nodes`` round; others: for other receivers, too.
    rounds: values are rounded, so that a product of a difference is not the difference of products.
    residual: format that sums in the residual stream are rounded to.
    keeps: of a pass over a single state the products in MLPs are kept, for chains that start there.
    """

    chained = False
    """Whether a node's states have to be computed in one walk."""

    def __init__(
        self,
        graph: Graph,
        nodes: Nodes,
        exact: Nodes | None = None,
        others: bool = False,
        rounds: bool = False,
        residual: Format = EXACT,
        keeps: bool = False,
    ) -> None:
        self.graph, self.nodes, self.exact, self.others = graph, nodes, exact, others
        self.rounds, self.residual, self.keeps = rounds, residual, keeps
        self._rows_of: dict[tuple[int, int], list[int]] = {}
        for row, receiver in enumerate(graph.receivers):
            for head in graph.heads_of(receiver) if receiver.is_attention else ():
                self._rows_of.setdefault((receiver.layer, head), []).append(row)
        self.linear: dict[LinearKey, Products] = {}
        """Products before nonlinearities from which a chain can go on: of the batch's last state on the spine, or of
        the only one."""
        self.tested = np.empty(0, dtype=np.int64)

    def begin(self, tested: np.ndarray, spine: np.ndarray) -> None:
        """Tells what the states of the next batch test (rows of receivers) and which ones later states build on."""
        self.tested, self.spine = tested, spine
        self.linear = {}

    def under_test(self, row: int, first: int) -> np.ndarray:
        """bool [S - first]: the states that compute a receiver's own node in FP32."""
        head = self.graph.receivers[row].is_attention or self.others
        return (self.tested[first:] == row) & head & (self.exact is not None)

    def head_under_test(self, layer: int, head: int, first: int) -> np.ndarray:
        """bool [S - first]: the states that test an input of this head."""
        if self.exact is None:
            return np.zeros(len(self.tested) - first, dtype=bool)
        return np.isin(self.tested[first:], self._rows_of[layer, head])

    def projection(self, row: int, first: int, which: str, index: int, reach: tuple[Reach, Reach]) -> Walk:
        """q, k or v of a receiver. reach: of the receiver's input, and of the value."""
        layer, level = self.graph.receivers[row].layer, reach[1]
        under = self.under_test(row, first)

        def walk(states: slice, x: Tensor) -> Tensor:
            x = self.nodes.spans.narrow(x, *reach)
            return self._mixed(
                under[states],
                x,
                lambda part: self.nodes.project(part, which, layer, index, level),
                lambda part: self._exact.project(part, which, layer, index, level),
            )

        return walk

    def mlp(self, row: int, first: int, level: Reach) -> Walk:
        """The MLP of a receiver."""
        layer, under = self.graph.receivers[row].layer, self.under_test(row, first)

        def walk(states: slice, x: Tensor) -> Tensor:
            if self.keeps and len(self.spine) == 1:
                out, self.linear["mlp", row, 0, level] = self.nodes.mlp_products(x[0], layer)
                return out[None]
            return self._mixed(
                under[states], x, lambda part: self.nodes.mlp(part, layer), lambda part: self._exact.mlp(part, layer)
            )

        return walk

    def written(self, layer: int, head: int, first: int, values: Tensor, base: Tensor) -> Tensor:
        """What a head with z values [S - first, B, P, dh] adds to the residual stream beyond the base's [B, P, dh]."""
        if not self.rounds:
            return self.nodes.write(values - base, layer, head)
        change = self._mixed(
            self.head_under_test(layer, head, first),
            values,
            lambda part: self.nodes.write(part, layer, head),
            lambda part: self._exact.write(part, layer, head),
        )
        return change - self.nodes.write(base, layer, head)

    @property
    def _exact(self) -> Nodes:
        assert self.exact is not None
        return self.exact

    @staticmethod
    def _mixed(
        under: np.ndarray, x: Tensor, low: Callable[[Tensor], Tensor], high: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Some states by ``high``, the others by ``low``, put together in order."""
        if not under.any():
            return low(x)
        if under.all():
            return high(x)
        where = torch.from_numpy(under).to(x.device)
        rough, fine = low(x[~where]), high(x[where])
        out = rough.new_empty((x.shape[0], *rough.shape[1:]))
        out[~where], out[where] = rough, fine
        return out
