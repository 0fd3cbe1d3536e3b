"""Guessing the sweep's next decisions, so that many states can be evaluated in one batch.

The guess never decides anything: every decision is taken on an evaluated state that differs from
its predecessor by just that edge, and the batch is dropped from the first wrong guess on. What was
dropped still tells how large those edges' effects are about, and so makes the next guess better.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from pahq.engine.batch import Batch
from pahq.method.sweep import Sweep

MIN_STATES, MAX_STATES = 4, 128
HISTORY = 96
"""Decisions whose share of kept edges sets the length of unfounded guesses."""


class Speculator:
    """Builds batches. Its state depends on past decisions alone, never on timing: a resumed run guesses the same."""

    def __init__(self, threshold: float, absolute: bool, max_states: int = MAX_STATES) -> None:
        self.threshold, self.absolute, self.max_states = threshold, absolute, max_states
        self._effects: dict[tuple[int, int], float] = {}
        self._surprises: deque[bool] = deque(maxlen=HISTORY)

    def reset(self) -> None:
        """Forgets everything (at a checkpoint, where a resumed run starts afresh)."""
        self._effects.clear()
        self._surprises.clear()

    def keeps(self, effect: float) -> bool:
        """ACDC's rule: an edge stays unless its effect is below the threshold (strictly)."""
        return not (abs(effect) if self.absolute else effect) < self.threshold

    def guess(self, edge: tuple[int, int]) -> bool:
        """Whether the edge will be kept; without evidence: no, since most are not."""
        effect = self._effects.get(edge)
        return effect is not None and self.keeps(effect)

    @property
    def reach(self) -> int:
        """How many unfounded guesses in a row are worth while: about the run length between surprises."""
        if not self._surprises:
            return 8
        share = (sum(self._surprises) + 0.5) / (len(self._surprises) + 1)
        return int(min(self.max_states, max(MIN_STATES, 0.7 / share)))

    def batch(self, sweep: Sweep, limit: int, stop_at: int) -> tuple[Batch, list[bool]]:
        """The next states and the decisions guessed for them.

        limit: states at most. stop_at: tests after which the batch ends with the visit in progress.
        """
        future = sweep.copy()
        edges: list[tuple[int, int]] = []
        guesses: list[bool] = []
        blind = self.reach
        while len(edges) < min(limit, self.max_states):
            edge = future.peek()
            if edge is None:
                break
            if edge not in self._effects:
                if not blind:
                    break
                blind -= 1
            visit = future.at_visit
            edges.append(edge)
            guesses.append(self.guess(edge))
            future.decide(guesses[-1])
            if len(edges) >= stop_at and future.at_visit != visit:
                break
        # State i lacks edge i and every earlier edge that is guessed to go.
        applied = np.tril(np.ones((len(edges), len(edges)), dtype=bool)) & ~np.array(guesses, dtype=bool)
        np.fill_diagonal(applied, True)
        return Batch(edges, applied, future.marks), guesses

    def learn(self, edge: tuple[int, int], effect: float, decided: bool, guessed: bool = False) -> None:
        """Takes in the effect of an evaluated edge, whether or not it could be decided on."""
        if decided:
            self._effects.pop(edge, None)
            self._surprises.append(self.keeps(effect) != guessed)
        else:
            self._effects[edge] = effect
