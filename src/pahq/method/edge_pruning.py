"""Edge pruning: a hard-concrete gate on every edge, trained to a given sparsity. Bhaskar et al. 2024.

    loss = (metric - full model's metric) / range + m1 * (target - sparsity) + m2 * (target - sparsity)^2

where sparsity is the expected share of closed gates. The multipliers m1 and m2 rise along their own gradients until
the target is met; the target itself rises from the initial sparsity over the first part of training. In the second
part all learning rates fall to 0 in a straight line: multipliers that kept rising would overshoot, and a circuit once
shut altogether has no gradient to come back by.

With gates on nodes as well (``nodes``), an edge is open where its own gate and its sender's are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from pahq.errors import PahqError
from pahq.graph import Graph
from pahq.method import hard_concrete
from pahq.method.base import NoWork, Problem, Scores, Work
from pahq.method.mask_training import Parameters, Training, count, number, prepare

NAME = "edge-pruning"
Start = Literal["none", "eap", "eap-ig"]
MISSED = 0.05
"""Sparsity short of (or beyond) the target from which users are told."""


@dataclass(frozen=True)
class EdgePruningOptions:
    """sparsity: share of edges to remove. warmup: share of the steps over which the target rises to it.

    steps: updates. lr: Adam's for the gates' log-alphas. multiplier_lr: Adam's for the multipliers.
    start: ``none``: all gates begin with log-alpha ``open``; ``eap``, ``eap-ig``: the best edge by the ranks of that
    method's scores (as it scores by default) begins with ``open``, the worst with ``shut``, others between.
    nodes: a gate on every sender as well. batch: examples of a step, 0 for all.
    """

    sparsity: float = 0.95
    steps: int = 400
    warmup: float = 0.6
    lr: float = 0.1
    multiplier_lr: float = 1.0
    start: Start = "none"
    open: float = 2.0
    shut: float = -1.0
    nodes: bool = False
    batch: int = 0

    def __post_init__(self) -> None:
        number(self, "sparsity", 0, 1, NAME)
        number(self, "warmup", 0, 1, NAME, "[]")
        for name in ("lr", "multiplier_lr"):
            number(self, name, 0, float("inf"), NAME)
        number(self, "open", -5, 10, NAME, "[]")
        number(self, "shut", -5, 10, NAME, "[]")
        count(self, "steps", 1, NAME)
        count(self, "batch", 0, NAME)
        if not isinstance(self.nodes, bool):
            raise PahqError(f"{NAME}: nodes is {self.nodes!r}; give true or false")
        if self.start not in get_args(Start):
            raise PahqError(f"{NAME}: start '{self.start}' is unknown; choose one of {', '.join(get_args(Start))}")
        if self.shut > self.open:
            raise PahqError(f"{NAME}: shut is {self.shut:g}, above open ({self.open:g}); give at most that")


class EdgeMask:
    """One gate an edge, and one a sender if asked for. log_alpha: of the edges, in the order of ``graph.edges``."""

    def __init__(self, graph: Graph, options: EdgePruningOptions, log_alpha: Tensor, first: float | None) -> None:
        """first: expected sparsity at the start, where the target sets out from; None for that of ``log_alpha``."""
        self.graph, self.options = graph, options
        self.rows, self.columns = (torch.from_numpy(where) for where in np.nonzero(graph.edges))
        self.log_alpha = log_alpha.clone().requires_grad_()
        # the last is for direct edges, which have no sender: it is never read
        self.node_log_alpha = torch.full((graph.shape[1],), options.open, dtype=torch.float64, requires_grad=True)
        self.multipliers = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        self.first = 1 - float(self.open_probability().detach().mean()) if first is None else first

    def parameters(self) -> list[Parameters]:
        trained: Mapping[str, Tensor] = {"log_alpha": self.log_alpha}
        if self.options.nodes:
            trained = {**trained, "node_log_alpha": self.node_log_alpha}
        multipliers = Parameters({"multipliers": self.multipliers}, self.options.multiplier_lr, rises=True)
        return [Parameters(trained, self.options.lr), multipliers]

    def gates(self, generator: torch.Generator) -> Tensor:
        edges = hard_concrete.sample(self.log_alpha, generator)
        if self.options.nodes:
            edges = edges * self._at_edges(hard_concrete.sample(self.node_log_alpha, generator))
        return torch.ones(self.graph.shape, dtype=edges.dtype).index_put((self.rows, self.columns), edges)

    def open_probability(self) -> Tensor:
        """The chance of every edge to be open: [edges]."""
        edges = hard_concrete.open_probability(self.log_alpha)
        if self.options.nodes:
            edges = edges * self._at_edges(hard_concrete.open_probability(self.node_log_alpha))
        return edges

    def _at_edges(self, nodes: Tensor) -> Tensor:
        """Values of senders at their edges, 1 at direct edges: [edges]."""
        return torch.where(self.columns == self.graph.direct, 1.0, nodes[self.columns])

    def target(self, step: int) -> float:
        """The sparsity asked for at a step."""
        rising = self.options.warmup * self.options.steps
        share = min(1.0, (step + 1) / rising) if rising >= 1 else 1.0
        return self.first + share * (self.options.sparsity - self.first)

    def penalty(self, step: int) -> Tensor:
        gap = self.target(step) - (1 - self.open_probability().mean())
        return self.multipliers[0] * gap + self.multipliers[1] * gap.square()

    def rate(self, step: int) -> float:
        left = self.options.steps - step
        return min(1.0, left / max(1.0, self.options.steps * (1 - self.options.warmup)))


class _Before(NoWork):
    """The work of the method that scores edges for the start: kept as such, its progress is not the run's."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        found = self.work.load()
        if found is None or found[1].get("stage") != "start":
            return None
        return found[0], found[1]["facts"]

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.work.save(tensors, {"stage": "start", "facts": dict(facts)})


def _start(problem: Problem, options: EdgePruningOptions, work: Work) -> tuple[Tensor, tuple[str, ...]]:
    """Initial log-alphas [edges], and what the method that ranked the edges has to say."""
    if options.start == "none":
        return torch.full((problem.graph.n_edges,), options.open, dtype=torch.float64), ()
    if options.start == "eap":
        from pahq.method.eap import EapOptions, eap_scores

        scores = eap_scores(problem, EapOptions(), _Before(work))
    else:
        from pahq.method.eap_ig import EapIgOptions, eap_ig_scores

        scores = eap_ig_scores(problem, EapIgOptions(), _Before(work))
    return log_alphas_by_rank(scores.values[problem.graph.edges], options.open, options.shut), scores.notes


def log_alphas_by_rank(scores: np.ndarray, highest: float, lowest: float) -> Tensor:
    """From ``highest`` for the best of the scores [edges] down to ``lowest`` in equal steps; of equals the first leads.

    Scores above 0 stand for edges that help: an edge that harms ranks last, however large its score is.
    """
    order = np.argsort(-scores, kind="stable")
    out = np.empty(len(scores))
    out[order] = np.linspace(highest, lowest, len(scores))
    return torch.from_numpy(out)


def edge_pruning_scores(
    problem: Problem, options: EdgePruningOptions | None = None, work: Work | None = None
) -> Scores:
    """Trains the gates; an edge's score is the chance that it is open, in (0, 1).

    The natural threshold keeps as many edges as are expected to be open at the end (ties aside).
    Raises PahqError where the metric, or its gradient, is not finite, or does not depend on the edges at all.
    """
    options, work = options or EdgePruningOptions(), work or NoWork()
    setting = prepare(problem, NAME)
    kept = work.load()
    if kept is not None and kept[1].get("stage") == "train":
        first, notes = float(kept[1]["first"]), tuple(kept[1]["notes"])
        log_alpha = torch.zeros(problem.graph.n_edges, dtype=torch.float64)  # read by ``Training`` below
    else:
        first = None
        log_alpha, notes = _start(problem, options, work)
    mask = EdgeMask(problem.graph, options, log_alpha, first)
    facts = {"first": mask.first, "notes": list(notes)}
    Training(setting, mask, options.steps, options.batch, work, facts).run()
    chance = mask.open_probability().detach().numpy()
    sparsity, natural = 1 - float(chance.mean()), natural_threshold(chance)
    if abs(sparsity - options.sparsity) > MISSED:
        notes = (
            *notes,
            f"{NAME}: training ended at sparsity {sparsity:.3f}, not at {options.sparsity:g}; give more steps, or a "
            "larger lr",
        )
    values = np.zeros(problem.graph.shape)
    values[problem.graph.edges] = chance
    circuit = problem.graph.edges & (values >= natural)
    stats = {
        **setting.stats(),
        "metric_natural": setting.circuit(circuit),
        "steps": options.steps,
        "sparsity": sparsity,
        "target": options.sparsity,
        "multipliers": mask.multipliers.tolist(),
        "edges_natural": int(circuit.sum()),
    }
    return Scores(problem.graph, values, NAME, signed=False, natural=natural, notes=notes, stats=stats)


def natural_threshold(chance: np.ndarray) -> float:
    """The threshold that keeps as many edges as are expected to be open, or as near as equal chances allow.

    It lies midway between the last edge kept and the first removed.
    """
    expected = float(chance.sum())
    levels, counts = np.unique(-chance, return_counts=True)
    kept = np.concatenate(([0], np.cumsum(counts)))  # with the threshold below so many levels
    below = int(np.argmin(np.abs(kept - expected)))
    ends = np.concatenate(([1.0], -levels, [0.0]))
    middle = float(ends[below] + ends[below + 1]) / 2
    return middle if middle > ends[below + 1] or below == len(levels) else float(ends[below])
