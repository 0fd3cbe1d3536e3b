"""A graph of two layers and circuits of it, made by hand; and examples whose metric is a plain function of the mask."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pahq.evaluation.circuit import Circuit
from pahq.evaluation.examples import Examples, Figures, Values
from pahq.graph import Graph
from pahq.model import ModelConfig


def graph(layers: int = 2, heads: int = 2, groups: int | None = None, **options: bool) -> Graph:
    """Heads, groups of keys and values, and an MLP in each layer; no weights."""
    cfg = ModelConfig(
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=heads if groups is None else groups,
        d_model=8,
        d_head=4,
        d_mlp=8,
        d_vocab=10,
        d_vocab_out=10,
        n_ctx=8,
        name="toy",
    )
    return Graph(cfg, **options)


def mask(of: Graph, *names: str) -> np.ndarray:
    """The edges of these names: bool [n_receivers, n_senders + 1]."""
    found = np.zeros(of.shape, dtype=bool)
    for name in names:
        found[of.edge(name)] = True
    return found


def circuit(of: Graph, kept: np.ndarray, effects: np.ndarray | None = None, swept: bool = False) -> Circuit:
    """A circuit; swept: as if every edge had been tested in turn, otherwise a choice by scores."""
    order = np.full(of.shape, -1)
    if swept:
        order[of.edges] = np.arange(of.n_edges)
    values = np.where(of.edges, 0.0, np.nan) if effects is None else effects
    return Circuit(of, kept, values, order)


class ToyExamples(Examples):
    """One example, whose metric is ``of(mask)``; KL is its distance to the full model's. No model."""

    def __init__(self, of: Callable[[np.ndarray], float], on: Graph) -> None:
        self.graph, self._of, self.metric = on, of, "toy"
        self.calls = 0
        self.full, self.empty = self.figures(on.edges), self.figures(on.edges & False)

    def __len__(self) -> int:
        return 1

    def measure(self, mask: np.ndarray) -> float:
        self.calls += 1
        return self._of(mask)

    def figures(self, mask: np.ndarray) -> Figures:
        one, value = np.ones(1), self._of(mask)
        return Figures(
            Values(np.array([value]), one), Values(np.array([abs(value - self._of(self.graph.edges))]), one), None
        )
