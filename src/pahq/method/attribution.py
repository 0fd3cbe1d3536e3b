"""From gradients at some base points to scores of edges: what attribution methods share.

A base point is a run of the model at which the gradient is taken. A score is minus the mean of the gradients with
respect to an edge's gate: the first-order estimate of what removing the edge does to the metric.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pahq.engine.gradients import Gradients, Point
from pahq.errors import PahqError
from pahq.method.base import Problem, Work
from pahq.model.transformer import Transformer
from pahq.precision.differentiable import differentiable
from pahq.task.metrics import LogitsReadout, get_metric
from pahq.task.prompts import Prompts
from pahq.task.score import read_logits

PROBES, PROBED = 5, 4
"""Directions in which a metric's slope is looked for, and examples that are looked at."""
STEP = 1e-3
"""Length of a probe, as a share of the logits' spread."""
SLOPED = 0.5
"""Share of a metric's change along a probe that has to be odd for it to count as a slope; 1 where it is linear."""


def is_flat(model: Transformer, prompts: Prompts, metric: str, seed: int = 0) -> bool:
    """Whether a metric has no slope at the model's own logits, so that first-order scores there say nothing.

    So it is for metrics that are least at the clean run: kl_div, l2, match_nll. Measured, in float64: the metric is
    taken a small step to either side of the logits of a few examples, in random directions. Where it rises both ways
    alike (or not at all) there is no slope, even if autograd should give one, as it does at the tip of an absolute
    value. Raises PahqError for a metric that the prompts do not allow.
    """
    prompts = prompts[:PROBED]
    logits = read_logits(model, prompts).double()
    measure = get_metric(metric, prompts, logits)
    generator = torch.Generator().manual_seed(seed)
    middle = float(measure(LogitsReadout(logits))[0])
    step, shares = STEP * max(float(logits.std(correction=0)), 1e-6), []
    for _ in range(PROBES):
        probe = step * torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits.device)
        up, down = (float(measure(LogitsReadout(logits + sign * probe))[0]) - middle for sign in (1, -1))
        size = abs(up) + abs(down)
        shares.append(abs(up - down) / size if size else 0.0)
    return float(np.median(shares)) < SLOPED


def sloped_metric(problem: Problem, model: Transformer) -> tuple[str | None, str | None]:
    """The metric to take gradients of at the clean run, and what users must be told if it is not ``problem.metric``.

    The first of ``problem.fallbacks`` that has a slope there stands in for a metric that has none; None if none has.
    """
    if not is_flat(model, problem.prompts, problem.metric, problem.seed):
        return problem.metric, None
    why = f"metric '{problem.metric}' has no slope at the clean run, where all its first-order scores vanish"
    for name in problem.fallbacks:
        try:
            if not is_flat(model, problem.prompts, name, problem.seed):
                return name, f"{why}; scores are those of metric '{name}'"
        except PahqError:  # these prompts lack what it needs
            continue
    return None, why


def gradients_of(problem: Problem, model: Transformer, metric: str) -> Gradients:
    """Gradients of a problem's edges; model: its model as it is computed."""
    return Gradients(
        model, problem.prompts, problem.graph, metric, problem.ablation, problem.memory_limit, full=problem.model
    )


def computed_model(problem: Problem) -> Transformer:
    """The problem's model as its policy computes it, with gradients."""
    return differentiable(problem.model, problem.policy)


def mean_scores(gradients: Gradients, points: Sequence[Point], work: Work) -> tuple[np.ndarray, list[float]]:
    """Minus the mean over base points of the gradient, float64 [R, S + 1], and the metric at each of them.

    Progress is kept after every piece of the examples; a killed run goes on to the same sums in the same order.
    Raises PahqError where the kept state is of another number of points or pieces.
    """
    pieces = len(gradients.pieces)
    size = {"points": len(points), "pieces": pieces}
    total = torch.zeros(gradients.graph.shape, dtype=torch.float64, device=gradients.model.device)
    partial, at, done, values = torch.zeros_like(total), 0, 0, []
    kept = work.load()
    if kept is not None:
        tensors, facts = kept
        if any(facts.get(name) != count for name, count in size.items()):
            raise PahqError(
                f"state: it was kept for {facts.get('points')} base points of {facts.get('pieces')} pieces, not for "
                f"{len(points)} of {pieces}; resume with the options and memory limit that the run began with"
            )
        total, partial = (tensors[name].to(total) for name in ("total", "partial"))
        at, done, values = facts["at"], facts["done"], list(facts["values"])

    def save() -> None:
        facts = {**size, "at": at, "done": done, "values": values}
        work.save({"total": total.cpu().clone(), "partial": partial.cpu().clone()}, facts)
        work.progress(at * pieces + done, len(points) * pieces)

    def after(count: int, summed: Tensor) -> None:
        nonlocal done, partial
        if count < pieces:
            done, partial = count, summed
            save()

    while at < len(points):
        value, gradient = gradients.gradient(gradients.ones(), points[at], None, done, partial, after)
        total += gradient
        values.append(value)
        at, done, partial = at + 1, 0, torch.zeros_like(total)
        save()
    return -(total / len(points)).cpu().numpy(), values
