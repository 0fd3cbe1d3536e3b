"""Random scores: a seed decides on them, and nothing else does."""

from __future__ import annotations

import numpy as np
import torch

from pahq.graph import Graph
from pahq.method.base import Problem
from pahq.method.random import RandomOptions, random_scores, uniform
from pahq.model.config import ModelConfig
from pahq.model.transformer import build
from pahq.task.prompts import last_position
from random_models import random_weights

CFG = ModelConfig(4, 8, 4, 12, 4, 16, 10, 10, 8, gated=True)


def problem(seed: int) -> Problem:
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    model = build(CFG, random_weights(CFG, 0, set()))
    return Problem(model, last_position(tokens, tokens, [[0]], [[1]]), Graph(CFG), seed=seed)


def test_a_seed_gives_the_same_scores_whatever_came_before() -> None:
    first = random_scores(problem(3), RandomOptions()).values
    state = torch.random.get_rng_state()
    again = random_scores(problem(3), RandomOptions()).values
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's generator moved
    torch.rand(5)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, random_scores(problem(4), RandomOptions()).values)


def test_scores_are_uniform_over_the_edges() -> None:
    graph = Graph(CFG)
    scores = uniform(graph, 0)
    drawn = scores.values[graph.edges]
    assert (scores.values[~graph.edges] == 0).all()
    assert drawn.min() > 0
    assert drawn.max() < 1
    assert len(np.unique(drawn)) == graph.n_edges
    counts = np.histogram(drawn, bins=10, range=(0, 1))[0]
    assert counts.min() > 0.6 * graph.n_edges / 10  # hundreds of edges in each tenth
    assert scores.natural is None
    assert not scores.signed
