"""What circuits do on a set of prompts, example by example, so that means come with an idea of their spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pahq.engine.full import CHUNK_BYTES, FullEvaluator, patched_logits
from pahq.errors import PahqError
from pahq.graph import Graph
from pahq.model.transformer import Transformer
from pahq.task.base import Task
from pahq.task.metrics import LogitsReadout, MatchNll, Metric, get_metric
from pahq.task.prompts import Prompts
from pahq.task.score import read_logits


@dataclass(frozen=True)
class Values:
    """One figure of N examples.

    totals: float64 [N], sums over the positions read. counts: float64 [N], how many those are.
    absolute: whether the figure is the absolute value of the mean.
    """

    totals: np.ndarray
    counts: np.ndarray
    absolute: bool = False

    @property
    def mean(self) -> float:
        """Over all positions read, as metrics have it."""
        return float(self.of(np.arange(len(self.totals))[None])[0])

    def of(self, drawn: np.ndarray) -> np.ndarray:
        """The means of S resamples: examples int64 [S, N] -> float64 [S]."""
        means = self.totals[drawn].sum(axis=1) / self.counts[drawn].sum(axis=1)
        return np.abs(means) if self.absolute else means


@dataclass(frozen=True)
class Figures:
    """What one circuit does. metric: as minimised; kl: KL(full || circuit); accuracy: None without answers."""

    metric: Values
    kl: Values
    accuracy: Values | None


class Kept(Protocol):
    """Finished passes by their masks; figures are float64 [N] by name."""

    def load(self, mask: np.ndarray) -> Mapping[str, Sequence[float]]: ...

    def save(self, mask: np.ndarray, sums: Mapping[str, np.ndarray]) -> None: ...


class Examples:
    """Evaluates masks of edges on one set of prompts, by whole passes in the model's own precision.

    full: the model with all its edges; empty: with none, which under resample ablation is the model on the corrupted
    prompts. Under mean ablation removed edges take the means of these very prompts.
    Raises PahqError where the metric lacks what it needs (answers, say), or a figure is NaN or infinite.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Prompts,
        graph: Graph,
        task: Task,
        metric: str,
        ablation: str = "resample",
        on_pass: Callable[[], None] | None = None,
        kept: Kept | None = None,
    ) -> None:
        """on_pass: told after each whole patched pass over all prompts. kept: passes that need not be run again."""
        self.model, self.prompts, self.graph, self.task, self.ablation = model, prompts, graph, task, ablation
        self.metric, self._on_pass, self._kept = metric, on_pass, kept
        with torch.no_grad():
            clean = read_logits(model, prompts, "clean")
        self._measure = get_metric(metric, prompts, clean)
        self._kl = get_metric("kl_div", prompts, clean)
        self._counts = prompts.read_mask.sum(-1).double().cpu().numpy()
        self._answered = bool(((prompts.answers >= 0).any(-1) | ~prompts.read_mask).all())
        self._evaluator: FullEvaluator | None = None
        self._clean_nll: np.ndarray | None = None
        if isinstance(self._measure, MatchNll):
            self._clean_nll = self._sums(self._measure, clean)
        self.full = self._figures(clean)
        self.empty = self.figures(np.zeros(graph.shape, dtype=bool))

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def gap(self) -> float:
        """The metric of the full model less that of the empty circuit: what a circuit can recover."""
        return self.full.metric.mean - self.empty.metric.mean

    def measure(self, mask: np.ndarray) -> float:
        """The metric of a mask bool [n_receivers, n_senders + 1], and nothing else."""
        known = self._recall(mask, "metric")
        if known is not None:
            return known["metric"].mean
        metric = self._values(self._measure, self._logits(mask))
        self._keep(mask, metric=metric)
        return metric.mean

    def figures(self, mask: np.ndarray) -> Figures:
        """All figures of a mask bool [n_receivers, n_senders + 1]."""
        known = self._recall(mask, "metric", "kl", *(["accuracy"] if self._answered else []))
        if known is not None:
            return Figures(known["metric"], known["kl"], known.get("accuracy"))
        figures = self._figures(self._logits(mask))
        self._keep(mask, metric=figures.metric, kl=figures.kl, accuracy=figures.accuracy)
        return figures

    def _recall(self, mask: np.ndarray, *names: str) -> dict[str, Values] | None:
        """These figures of a mask as an earlier pass gave them, None if one of them is not known."""
        sums = {} if self._kept is None else self._kept.load(mask)
        if not set(names) <= set(sums):
            return None
        if self._on_pass is not None:
            self._on_pass()
        absolute = isinstance(self._measure, MatchNll)
        return {name: Values(np.array(sums[name]), self._counts, absolute and name == "metric") for name in names}

    def _keep(self, mask: np.ndarray, **figures: Values | None) -> None:
        if self._kept is not None:
            self._kept.save(mask, {name: values.totals for name, values in figures.items() if values is not None})

    @torch.no_grad()
    def _logits(self, mask: np.ndarray) -> Tensor:
        """[N, P, V]"""
        if self._evaluator is None and self._held_bytes <= CHUNK_BYTES:
            self._evaluator = FullEvaluator(self.model, self.prompts, self.graph, self.ablation)
        if self._evaluator is not None:
            logits = self._evaluator.logits(mask)
        else:
            logits = patched_logits(self.model, self.prompts, self.graph, mask, self.ablation)
        if self._on_pass is not None:
            self._on_pass()
        return logits

    @property
    def _held_bytes(self) -> int:
        values = len(self.graph.senders) + 4 * self.model.config.n_heads
        return values * self.prompts.clean.numel() * self.model.config.d_model * self.model.dtype.itemsize

    def _figures(self, logits: Tensor) -> Figures:
        accuracy = None
        if self._answered:
            shares = [self.task.accuracy(logits[i : i + 1], self.prompts[i : i + 1]) for i in range(len(self))]
            accuracy = Values(np.array(shares) * self._counts, self._counts)
        return Figures(self._values(self._measure, logits), self._values(self._kl, logits), accuracy)

    def _values(self, metric: Metric, logits: Tensor) -> Values:
        sums = self._sums(metric, logits)
        if not isinstance(metric, MatchNll):
            return Values(sums, self._counts)
        assert self._clean_nll is not None
        return Values(sums - self._clean_nll, self._counts, absolute=True)

    def _sums(self, metric: Metric, logits: Tensor) -> np.ndarray:
        """The metric's sum over the positions of each example: float64 [N]."""
        values = metric.per_position(LogitsReadout(logits))[0].double()
        sums = torch.where(self.prompts.read_mask, values, 0.0).sum(-1).cpu().numpy()
        bad = np.flatnonzero(~np.isfinite(sums))
        if len(bad):
            raise PahqError(
                f"metric '{metric.name}': it is {sums[bad[0]]} for example {bad[0]}; check the model's weights, "
                "or use float64"
            )
        return sums
