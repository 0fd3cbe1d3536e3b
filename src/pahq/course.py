"""What a run is in one process: its options and folder, and what its search hands back."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pahq.graph import Graph
from pahq.precision.policy import Policy
from pahq.precision.schedule import Scheduler
from pahq.report.config import RunConfig
from pahq.report.progress import Watch
from pahq.report.tracking.tracker import Tracker


@dataclass
class Course:
    """options: of the method, as it takes them. folder: None where nothing is written. tracker: takes events.

    earlier: seconds that earlier processes gave to this run.
    """

    config: RunConfig
    options: Any
    policy: Policy
    folder: Path | None
    watch: Watch
    scheduler: Scheduler | None = None
    tracker: Tracker = field(default_factory=Tracker)
    began: float = field(default_factory=time.perf_counter)
    earlier: float = 0.0

    @property
    def total_seconds(self) -> float:
        return self.earlier + time.perf_counter() - self.began

    def graph(self, model: Any) -> Graph:
        """The model's graph under the run's options."""
        return Graph(model.config, self.config.split_qkv, self.config.direct_edges, self.config.split_pos)


@dataclass(frozen=True)
class Found:
    """mask, effects, order: as in ``evaluation.circuit.Circuit``. metric: of the circuit, None if not measured yet.

    search, precision: parts of ``run.json``; more: further ones by name.
    """

    graph: Graph
    mask: np.ndarray
    effects: np.ndarray
    order: np.ndarray
    metric: float | None
    search: dict[str, Any]
    precision: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)
