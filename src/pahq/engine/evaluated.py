"""What an engine keeps of a batch it evaluated, and of FP32's own state beside a low-precision one."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from pahq.engine.batch import BatchPass
from pahq.engine.state import State
from pahq.engine.vocabulary import VocabularyReadout

Final = tuple[int, Tensor] | None
"""(first state that differs from the base, final residual streams at the read positions), if any does."""


@dataclass
class Evaluated:
    """States that went through a pass. metrics, slack: float64 [S]; moved: float64 [S], see ``Engine.moved``."""

    rows: BatchPass
    final: Final
    read: VocabularyReadout | None
    metrics: np.ndarray
    slack: np.ndarray
    moved: np.ndarray


@dataclass
class Lag:
    """The FP32 state under a policy that quantises differences, which follows the base only when it is asked for.

    final: its final residual stream at the read positions. edges: those removed from the base since. fine: states of
    the batch evaluated from it, with their place in the pass; metrics: (state, full) -> metric and slack, as
    ``Engine.refine`` gives them.
    """

    state: State
    final: Tensor
    edges: list[tuple[int, int]] = field(default_factory=list)
    fine: dict[int, tuple[BatchPass, Final, int]] = field(default_factory=dict)
    metrics: dict[tuple[int, bool], tuple[float, float]] = field(default_factory=dict)

    def forget_batch(self) -> None:
        self.fine, self.metrics = {}, {}
