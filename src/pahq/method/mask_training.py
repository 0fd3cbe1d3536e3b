"""Training of gates on edges by gradient descent: what subnetwork probing and edge pruning share.

A step draws examples and gates, takes the metric's derivative with respect to every edge's gate from one pass back
and forth (``Gradients``), and leads it on through the gates' formula to what is trained. The metric counts in units
of its range, from the full model to the model without any edge, so that the same options serve every metric.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pahq.engine.gradients import Gradients
from pahq.errors import PahqError
from pahq.method.attribution import computed_model, gradients_of
from pahq.method.base import Problem, Work

SAVE_EVERY = 10
"""Steps between two states kept for a killed run."""


@dataclass(frozen=True)
class Parameters:
    """Tensors (float64, CPU) trained with one learning rate; ``rises``: towards larger loss, as multipliers are."""

    tensors: Mapping[str, Tensor]
    lr: float
    rises: bool = False


class Mask(Protocol):
    """What is trained."""

    def parameters(self) -> list[Parameters]: ...

    def gates(self, generator: torch.Generator) -> Tensor:
        """Gates of all edges, drawn: float64 [R, S + 1] on the CPU, differentiable; 1 where there is no edge."""
        ...

    def penalty(self, step: int) -> Tensor:
        """What is added to the metric at a step, a differentiable scalar."""
        ...

    def rate(self, step: int) -> float:
        """The factor on all learning rates at a step."""
        ...


@dataclass(frozen=True)
class Setting:
    """A problem made ready: gradients of its metric, and the metric of the full model and without any edge."""

    problem: Problem
    gradients: Gradients
    full: float
    empty: float

    @property
    def range(self) -> float:
        return abs(self.empty - self.full)

    def circuit(self, mask: np.ndarray) -> float:
        """The metric of a circuit, bool [R, S + 1]."""
        return self.gradients.value(self.gradients.gates(mask))

    def stats(self) -> dict[str, Any]:
        return {"metric_full": self.full, "metric_empty": self.empty}


def prepare(problem: Problem, method: str) -> Setting:
    """Raises PahqError where removing every edge leaves the metric as it is: there is nothing to learn from then."""
    gradients = gradients_of(problem, computed_model(problem), problem.metric)
    full = gradients.value(gradients.ones())
    empty = gradients.value(gradients.gates(np.zeros(problem.graph.shape, dtype=bool)))
    if abs(empty - full) <= 1e-12 * max(abs(full), abs(empty), 1.0):
        raise PahqError(
            f"method '{method}': metric '{problem.metric}' is {full} with every edge and without any, so that no mask "
            "can be trained on it; use another metric, ablation, or prompts"
        )
    return Setting(problem, gradients, full, empty)


@dataclass
class Training:
    """Steps of Adam (Kingma & Ba 2015) on a mask.

    batch: examples of a step, 0 for all. facts: what the state must hold beside the tensors, JSON-ready.
    """

    setting: Setting
    mask: Mask
    steps: int
    batch: int
    work: Work
    facts: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Trains ``mask`` in place, from the last saved state on."""
        groups = self.mask.parameters()
        self._named = {name: value for group in groups for name, value in group.tensors.items()}
        self._optimizer = torch.optim.Adam(
            [{"params": list(one.tensors.values()), "lr": one.lr, "maximize": one.rises} for one in groups]
        )
        self._rates = [one.lr for one in groups]
        self._draw = torch.Generator().manual_seed(self.setting.problem.seed)
        done = self._load()
        if done is None:
            done = 0
            self._save(0)  # whatever the start took (a warm start's passes) is not done again
        self.work.progress(done, self.steps)
        with torch.enable_grad():
            for step in range(done, self.steps):
                self._step(step)
                if (step + 1) % SAVE_EVERY == 0 and step + 1 < self.steps:
                    self._save(step + 1)
                self.work.progress(step + 1, self.steps)

    def _step(self, step: int) -> None:
        examples = self._examples()
        gates = self.mask.gates(self._draw)
        _, slope = examples.gradient(gates.detach().to(examples.ones()))
        penalty = self.mask.penalty(step)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.mask.rate(step)
        self._optimizer.zero_grad()
        torch.autograd.backward([gates, penalty], [slope.to(gates) / self.setting.range, torch.ones_like(penalty)])
        self._optimizer.step()

    def _examples(self) -> Gradients:
        whole = self.setting.gradients
        count = len(whole.prompts)
        if not 0 < self.batch < count:
            return whole
        return whole.part(sorted(torch.randperm(count, generator=self._draw)[: self.batch].tolist()))

    def _save(self, step: int) -> None:
        tensors = {"generator": self._draw.get_state()}
        for name, value in self._named.items():
            tensors[name] = value.detach().clone()
            for part, moment in self._optimizer.state[value].items():
                tensors[f"{name}.{part}"] = moment.clone()
        self.work.save(tensors, {**self.facts, "stage": "train", "step": step})

    def _load(self) -> int | None:
        """Puts all as it was saved, and gives the steps done; None if nothing of this training was."""
        found = self.work.load()
        if found is None or found[1].get("stage") != "train":
            return None
        tensors, facts = found
        self._draw.set_state(tensors["generator"])
        for name, value in self._named.items():
            value.detach().copy_(tensors[name])
            state = {key.removeprefix(f"{name}."): kept for key, kept in tensors.items() if key.startswith(f"{name}.")}
            if state:
                self._optimizer.state[value] = {part: moment.clone() for part, moment in state.items()}
        return int(facts["step"])


def count(options: Any, name: str, least: int, method: str) -> None:
    """Raises PahqError unless the option is a whole number from ``least`` up."""
    value = getattr(options, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PahqError(f"{method}: {name} is {value!r}; give a whole number from {least} up")


def number(options: Any, name: str, low: float, high: float, method: str, ends: str = "()") -> None:
    """Raises PahqError unless the option is a number between both ends, either of which may count as well (``[]``)."""
    value = getattr(options, name)
    good = isinstance(value, int | float) and not isinstance(value, bool)
    good = good and (low <= value if ends[0] == "[" else low < value)
    good = good and (value <= high if ends[1] == "]" else value < high)
    if not good:
        above = f"{'at least' if ends[0] == '[' else 'above'} {low:g}"
        below = f" and {'at most' if ends[1] == ']' else 'below'} {high:g}" if np.isfinite(high) else ""
        raise PahqError(f"{method}: {name} is {value!r}; give a number {above}{below}")
