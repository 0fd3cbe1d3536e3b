"""Exact single-edge patching against one whole pass an edge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given

from pahq.engine.full import patched_logits
from pahq.errors import PahqError
from pahq.graph import Graph
from pahq.method.base import Problem
from pahq.method.exact import ExactOptions, exact_scores
from pahq.precision.policy import POLICIES, get_policy
from pahq.task.metrics import LogitsReadout, get_metric
from pahq.task.score import read_logits
from random_models import Case, cases, drawn
from tiny import RandomTask, transformer


def slow(problem: Problem) -> np.ndarray:
    """Every edge removed by a whole pass."""
    graph, clean = problem.graph, read_logits(problem.model, problem.prompts)
    metric = get_metric(problem.metric, problem.prompts, clean)

    def measured(mask: np.ndarray) -> float:
        logits = patched_logits(problem.model, problem.prompts, graph, mask, problem.ablation)
        return float(metric(LogitsReadout(logits))[0])

    out, full = np.zeros(graph.shape), measured(graph.edges)
    for row, column in np.argwhere(graph.edges):
        mask = graph.edges.copy()
        mask[row, column] = False
        out[row, column] = measured(mask) - full
    return out


@drawn(25)
@given(case=cases())
def test_every_edge_has_the_effect_of_a_whole_pass_without_it(case: Case) -> None:
    problem = Problem(case.model, case.prompts, case.graph, case.metric, case.ablation)
    expected = slow(problem)
    found = exact_scores(problem, ExactOptions(max_states=3 if case.absolute else 128))
    np.testing.assert_allclose(found.values, expected, rtol=0, atol=1e-9 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_policies_apply(policy: str) -> None:
    model = transformer(2, 2)
    prompts = RandomTask().prompts(model, 4)
    problem = Problem(model, prompts, Graph(model.config), "logit_diff", policy=get_policy(policy))
    exact, found = slow(problem), exact_scores(problem).values
    error = np.abs(found - exact).max() / np.abs(exact).max()
    assert error < {"fp32": 1e-5, "rtn": 10.0}.get(policy, 0.2)
    tight = exact_scores(Problem(**{**vars(problem), "memory_limit": 1})).values  # one state at a time
    np.testing.assert_allclose(tight, found, rtol=0, atol=2e-2 * np.abs(exact).max() * (policy != "fp32") + 1e-6)


def test_bad_options_and_metrics_take_one_line() -> None:
    with pytest.raises(PahqError, match=r"max_states 0: give a whole number of at least 1, for example 128"):
        ExactOptions(max_states=0)
    model = transformer(1, 2)
    with torch.no_grad():
        model.W_U.mul_(1e38)
    problem = Problem(model, RandomTask().prompts(model, 2), Graph(model.config), "l2")
    with pytest.raises(PahqError, match="metric 'l2' became"):
        exact_scores(problem)
