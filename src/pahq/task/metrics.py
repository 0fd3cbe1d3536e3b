"""Metrics, all to be minimised, as functions of what can be read off a final residual stream.

A metric asks its ``Readout`` only for what it needs: a few answer logits, a projection, the
log-sum-exp over the vocabulary, or all logits. So the engine can skip the vocabulary product
where a metric does not depend on it. Definitions: Conmy et al. 2023, section 3 and appendices.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from pahq.errors import PahqError, choices
from pahq.task.prompts import Prompts


class Readout(Protocol):
    """What can be asked about S states of N examples at P read positions."""

    def select(self, ids: Tensor) -> Tensor:
        """Token ids [N, P, A] (-1 allowed, meaningless there) -> their logits [S, N, P, A]."""
        ...

    def expect(self, probabilities: Tensor) -> Tensor:
        """Fixed weights [N, P, V] -> weighted sums of logits [S, N, P]."""
        ...

    def logsumexp(self) -> Tensor:
        """log of the sum of exp(logit) over the vocabulary [S, N, P]."""
        ...

    def logits(self) -> Tensor:
        """All logits [S, N, P, V]."""
        ...


class LogitsReadout:
    """Answers a metric's questions from one state's logits [N, P, V]."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits[None]

    def select(self, ids: Tensor) -> Tensor:
        return self._logits.gather(-1, ids.clamp(min=0)[None])

    def expect(self, probabilities: Tensor) -> Tensor:
        return (self._logits.to(probabilities) * probabilities).sum(-1)

    def logsumexp(self) -> Tensor:
        return torch.logsumexp(self._logits.double(), dim=-1)

    def logits(self) -> Tensor:
        return self._logits


class Metric(ABC):
    """A metric bound to its prompts and to the full-precision clean model's logits.

    clean_logits: [N, P, V] at ``prompts.read``, the reference of kl_div, match_nll and l2.
    """

    name: str
    sums_vocabulary = True
    """Whether it asks for ``logsumexp``."""
    reads_logits = False
    """Whether it asks for ``logits``, which take much memory."""

    def __init__(self, prompts: Prompts, clean_logits: Tensor) -> None:
        self.prompts = prompts
        self.weight = prompts.read_mask.double() / prompts.read_mask.sum()
        """[N, P]: weights of a mean over all positions read."""
        self.bind(clean_logits)

    def bind(self, clean_logits: Tensor) -> None:  # noqa: B027  (optional: most metrics need no reference)
        """Takes what the metric needs from the clean model."""

    @abstractmethod
    def per_position(self, read: Readout) -> Tensor:
        """[S, N, P]"""

    def __call__(self, read: Readout) -> Tensor:
        """The metric of each state: float64 [S]."""
        value = self.per_position(read).double()
        return torch.where(self.prompts.read_mask, value * self.weight, 0.0).sum(dim=(-1, -2))

    def slope(self, value: float) -> float:
        """How steeply it answers to small movements of the logits where it has a value, up to a constant factor."""
        return 1.0

    def need_answers(self, wrong: bool = True) -> None:
        """Raises PahqError where an example that is read lacks right (or wrong) answers."""
        sides = [("answers", self.prompts.answers)] + ([("wrong_answers", self.prompts.wrong)] if wrong else [])
        for field, ids in sides:
            missing = ((ids >= 0).sum(-1) == 0) & self.prompts.read_mask
            if bool(missing.any()):
                example = int(missing.any(-1).nonzero()[0, 0])
                raise PahqError(f"metric '{self.name}': example {example} has no {field}; give them, or use kl_div")


class KlDiv(Metric):
    """KL(clean full model || patched model), mean over examples and positions read."""

    name = "kl_div"

    def bind(self, clean_logits: Tensor) -> None:
        log_p = torch.log_softmax(clean_logits.double(), dim=-1)
        self.p = log_p.exp()
        self.negative_entropy = (self.p * log_p).sum(-1)

    def slope(self, value: float) -> float:
        """Its gradient is a difference of distributions, at most sqrt(2 KL) in all (Pinsker's inequality).

        At 0 the gradient vanishes and the second order remains: of movements as large as a KL of 0.01.
        """
        return math.sqrt(max(value, 0.0) + 0.01)

    def per_position(self, read: Readout) -> Tensor:
        return self.negative_entropy - read.expect(self.p).double() + read.logsumexp().double()


class LogitDiff(Metric):
    """-(mean logit of the right answers - mean logit of the wrong ones)."""

    name = "logit_diff"
    sums_vocabulary = False

    def bind(self, clean_logits: Tensor) -> None:
        self.need_answers()

    def per_position(self, read: Readout) -> Tensor:
        return _mean(read, self.prompts.wrong) - _mean(read, self.prompts.answers)


class Docstring(Metric):
    """-(logit of the right answer - largest logit among the wrong ones)."""

    name = "docstring"
    sums_vocabulary = False

    def bind(self, clean_logits: Tensor) -> None:
        self.need_answers()

    def per_position(self, read: Readout) -> Tensor:
        wrong = read.select(self.prompts.wrong).masked_fill(self.prompts.wrong < 0, float("-inf"))
        return wrong.amax(-1) - _mean(read, self.prompts.answers)


class GreaterThan(Metric):
    """-(probability of the right answers - probability of the wrong ones)."""

    name = "greaterthan"

    def bind(self, clean_logits: Tensor) -> None:
        self.need_answers()

    def per_position(self, read: Readout) -> Tensor:
        total = read.logsumexp()[..., None]

        def probability(ids: Tensor) -> Tensor:
            return torch.where(ids >= 0, (read.select(ids) - total).exp(), 0.0).sum(-1)

        return probability(self.prompts.wrong) - probability(self.prompts.answers)


class Nll(Metric):
    """-log of the probability of the right answers (of their sum where there are several)."""

    name = "nll"

    def bind(self, clean_logits: Tensor) -> None:
        self.need_answers(wrong=False)

    def per_position(self, read: Readout) -> Tensor:
        right = read.select(self.prompts.answers).masked_fill(self.prompts.answers < 0, float("-inf"))
        return read.logsumexp() - torch.logsumexp(right, dim=-1)


class MatchNll(Nll):
    """|nll - nll of the clean full model|, the difference taken after averaging."""

    name = "match_nll"

    def bind(self, clean_logits: Tensor) -> None:
        super().bind(clean_logits)
        log_p = torch.log_softmax(clean_logits.double(), dim=-1)
        right = log_p.gather(-1, self.prompts.answers.clamp(min=0))
        right = right.masked_fill(self.prompts.answers < 0, float("-inf"))
        self.clean = -torch.where(self.prompts.read_mask, torch.logsumexp(right, -1) * self.weight, 0.0).sum()

    def __call__(self, read: Readout) -> Tensor:
        return (super().__call__(read) - self.clean).abs()


class L2(Metric):
    """Mean squared error against the clean logits; ``l2:0`` looks at output dimension 0 only."""

    name = "l2"
    sums_vocabulary = False
    reads_logits = True
    dims: tuple[int, ...] = ()

    def bind(self, clean_logits: Tensor) -> None:
        for dim in self.dims:
            if not 0 <= dim < clean_logits.shape[-1]:
                raise PahqError(f"metric 'l2:{dim}': the model has output dimensions 0 to {clean_logits.shape[-1] - 1}")
        self.clean = self._pick(clean_logits)

    def _pick(self, logits: Tensor) -> Tensor:
        return logits[..., list(self.dims)] if self.dims else logits

    def per_position(self, read: Readout) -> Tensor:
        return (self._pick(read.logits()) - self.clean).square().mean(-1)


def _mean(read: Readout, ids: Tensor) -> Tensor:
    """Mean logit over the ids that are not padding: [S, N, P]."""
    valid = ids >= 0
    return torch.where(valid, read.select(ids), 0.0).sum(-1) / valid.sum(-1).clamp(min=1)


METRICS: dict[str, type[Metric]] = {
    cls.name: cls for cls in (KlDiv, LogitDiff, Docstring, GreaterThan, Nll, MatchNll, L2)
}


def metric_class(name: str) -> type[Metric]:
    """The class of a metric's name; ``l2:0,2`` restricts l2 to some output dimensions. PahqError if unknown."""
    base, colon, dims = name.partition(":")
    if base not in METRICS or (colon and base != "l2"):
        known = choices(base, METRICS, "choose one of")
        raise PahqError(f"metric '{name}' is unknown; {known} (l2:0 for output 0 alone)")
    if not colon:
        return METRICS[base]
    try:
        chosen = tuple(int(dim) for dim in dims.split(","))
    except ValueError:
        raise PahqError(
            f"metric '{name}': '{dims}' is no list of output dimensions; write for example l2:0,2"
        ) from None
    return type("L2", (L2,), {"name": name, "dims": chosen})


def get_metric(name: str, prompts: Prompts, clean_logits: Tensor) -> Metric:
    """The metric ``name`` for these prompts; see ``Metric``. Raises PahqError for an unknown name."""
    return metric_class(name)(prompts, clean_logits)
