"""Random scores: the baseline that every method has to beat, and random circuits of a given size."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pahq.graph import Graph
from pahq.method.base import NoWork, Problem, Scores, Work


@dataclass(frozen=True)
class RandomOptions:
    """There are none: the run's seed is the seed."""


def random_scores(problem: Problem, options: RandomOptions | None = None, work: Work | None = None) -> Scores:
    """Scores drawn uniformly from (0, 1), the same for the same graph and seed."""
    work = work or NoWork()
    scores = uniform(problem.graph, problem.seed)
    work.progress(1, 1)
    return scores


def uniform(graph: Graph, seed: int) -> Scores:
    """One uniform draw from (0, 1) for every edge, in order of receivers and then of senders."""
    draw = torch.rand(graph.n_edges, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    values = torch.zeros(graph.shape, dtype=torch.float64)
    values[torch.from_numpy(graph.edges.copy())] = draw.clamp(min=torch.finfo(torch.float64).tiny)
    return Scores(graph, values.numpy(), "random", signed=False)
