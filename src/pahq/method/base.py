"""What every method is given, and what every method that scores edges gives back.

A score is minus the gradient, or the measured change, of the metric when an edge is removed: above 0 where the
edge helps (all metrics are minimised), as ACDC's effects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from pahq.engine.gradients import MEMORY_LIMIT
from pahq.errors import PahqError
from pahq.graph import Graph
from pahq.model.transformer import Transformer
from pahq.precision.policy import FP32, Policy
from pahq.task.prompts import Prompts


@dataclass(frozen=True)
class Problem:
    """One behaviour of one model: what a method works on.

    metric, ablation: as for ACDC. fallbacks: metrics of the task in order of preference, for methods that cannot use
    ``metric``. policy: precision of what the method computes. memory_limit: bytes for the values of a batch.
    """

    model: Transformer
    prompts: Prompts
    graph: Graph
    metric: str = "kl_div"
    ablation: str = "resample"
    policy: Policy = FP32
    seed: int = 0
    memory_limit: int = MEMORY_LIMIT
    fallbacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scores:
    """values: float64 [n_receivers, n_senders + 1], 0 where there is no edge.

    signed: whether values below 0 stand for edges that harm (else they are sizes, importance alone).
    natural: the threshold that the method itself sets, None if it has none. notes: what users must be told.
    stats: JSON-ready facts (passes, states, seconds …).
    """

    graph: Graph
    values: np.ndarray
    method: str
    signed: bool = True
    natural: float | None = None
    notes: tuple[str, ...] = ()
    stats: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.values.shape != self.graph.shape:
            raise PahqError(
                f"scores: shape {list(self.values.shape)} does not fit {self.graph.config.name}, which asks for "
                f"{list(self.graph.shape)}"
            )
        bad = np.argwhere(~np.isfinite(self.values))
        if len(bad):
            row, column = map(int, bad[0])
            raise PahqError(
                f"method '{self.method}': the score of {self.graph.edge_name(row, column)} is "
                f"{self.values[row, column]}; check the model's weights, or use float64"
            )


class Work(Protocol):
    """How a method tells where it stands, and keeps what a killed run needs to go on to the same result."""

    def progress(self, done: int, total: int) -> None:
        """done of total steps (passes, states, updates) are over."""
        ...

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What ``save`` kept last, or None at the start."""
        ...

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keeps CPU tensors and JSON-ready facts, replacing what was kept before. May be called at every step."""
        ...


class NoWork:
    """Nothing told, nothing kept."""

    def progress(self, done: int, total: int) -> None:
        pass

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return None

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        pass
