"""Exact single-edge patching: the effect of removing each edge alone from the full model.

The slow truth that attribution methods approximate: one patched pass an edge (of which the engine computes only what
the edge changes), against one backward pass for all. Activation patching on edges: Wang et al. 2022, Goldowsky-Dill
et al. 2023 (path patching).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pahq.engine.batch import Batch
from pahq.engine.engine import Engine
from pahq.engine.marks import Marks
from pahq.errors import PahqError
from pahq.graph import Graph
from pahq.method.base import NoWork, Problem, Scores, Work


@dataclass(frozen=True)
class ExactOptions:
    """max_states: most edges that are removed in one batch, each in a state of its own; memory may allow for less."""

    max_states: int = 128

    def __post_init__(self) -> None:
        if isinstance(self.max_states, bool) or not isinstance(self.max_states, int) or self.max_states < 1:
            raise PahqError(f"max_states {self.max_states!r}: give a whole number of at least 1, for example 128")


def exact_scores(problem: Problem, options: ExactOptions | None = None, work: Work | None = None) -> Scores:
    """Score of an edge: metric of the full model without it - metric of the full model, both under ``problem.policy``.

    Sums over the vocabulary are full ones. Progress is kept receiver by receiver.
    Raises PahqError if a metric is not finite.
    """
    options, work = options or ExactOptions(), work or NoWork()
    graph = problem.graph
    engine = Engine(
        problem.model,
        problem.prompts,
        graph,
        problem.metric,
        problem.ablation,
        problem.memory_limit,
        screen=False,
        policy=problem.policy,
    )
    marks, base = _full_model(graph), engine.base_metric
    values, first = np.zeros(graph.shape), 0
    kept = work.load()
    if kept is not None:
        values, first = kept[0]["values"].numpy().copy(), int(kept[1]["receivers"])
    for row in range(first, len(graph.receivers)):
        columns = np.flatnonzero(graph.edges[row])
        done = 0
        while done < len(columns):
            edges = [(row, int(column)) for column in columns[done : done + options.max_states]]
            metrics, _ = engine.evaluate(Batch(edges, np.eye(len(edges), dtype=bool), marks))
            values[row, columns[done : done + len(metrics)]] = metrics - base
            done += len(metrics)
        work.save({"values": torch.from_numpy(values.copy())}, {"receivers": row + 1})
        work.progress(int(graph.edges[: row + 1].sum()), graph.n_edges)
    stats = {"metric": problem.metric, "metric_full": base, "states": graph.n_edges}
    return Scores(graph, values, "exact", stats=stats)


def _full_model(graph: Graph) -> Marks:
    """All edges present and decided, so that a change is followed wherever it is read."""
    marks = Marks.full(graph)
    for row in reversed(range(len(graph.receivers))):  # who reads a sender comes after it in the forward pass
        marks.finish(row)
    return marks
