"""From the states of a batch to effects that decisions can rest on, evaluating again what was measured too roughly.

Two things make a first measure rough: a sum over likely tokens instead of the whole vocabulary (``slack``), and low
precision (``margin``). States far from the threshold bear both; others are summed in full, or evaluated in FP32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pahq.engine import Engine
from pahq.engine.chain import parents
from pahq.method.margin import Margin

ROUGH = 0.5
"""Slack that a recorded effect may have, as a share of itself or of the threshold, whichever is larger.

Slack is many times the error to be expected, which so stays within a few hundredths.
"""
AUDIT = 256
"""Every so many tests one is measured in FP32 as well, however clear its decision."""


@dataclass(frozen=True)
class Measured:
    """A state's metric and its parent's. refined: in FP32, after low precision.

    error, moved: |low-precision effect - FP32's| and how far the state lies from its parent, where both are known.
    """

    before: float
    after: float
    refined: bool = False
    error: float | None = None
    moved: float | None = None


class Measurer:
    """Measures batches of one sweep. exact: decide as FP32 would, under a policy that quantises differences."""

    def __init__(self, engine: Engine, threshold: float, absolute: bool, exact: bool) -> None:
        self.engine, self.threshold, self.absolute, self.exact = engine, threshold, absolute, exact
        self.margin = Margin()

    def measure(
        self, metrics: np.ndarray, slack: np.ndarray, guesses: list[bool], kinds: list[str], order: int
    ) -> list[Measured]:
        """The states of the batch just evaluated.

        metrics, slack: as it gave them; kinds: of the receivers that they test; order: of the first state's test.
        """
        self._metrics, self._slack, self._kinds = metrics, slack, kinds
        self._parents = parents([not guess for guess in guesses[: len(metrics)]])
        self._sharpen(guesses)
        fine = self._refine(guesses, order) if self.exact else {}
        measured = []
        for state, parent in enumerate(self._parents):
            before, after = self._pair(state)
            if state in fine and parent in fine:
                exact = fine[parent], fine[state]
                error, moved = abs((after - before) - (exact[1] - exact[0])), float(self.engine.moved[state])
                measured.append(Measured(*exact, True, error, moved))
            else:
                measured.append(Measured(before, after))
        return measured

    def _pair(self, state: int) -> tuple[float, float]:
        """The metric of a state's parent and its own."""
        parent = self._parents[state]
        before = self.engine.base_metric if parent < 0 else self._metrics[parent]
        return float(before), float(self._metrics[state])

    def _doubt(self, state: int) -> float:
        parent = self._parents[state]
        return float(self._slack[state] + (self.engine.base_slack if parent < 0 else self._slack[parent]))

    def _size(self, state: int) -> float:
        before, after = self._pair(state)
        return abs(after - before) if self.absolute else after - before

    def _sharpen(self, guesses: list[bool]) -> None:
        """Has the states summed in full on which a decision within its slack of the threshold would rest.

        Also those of edges that stay, and those whose slack would make the recorded effect rough; all as far as
        guesses hold, since what comes after a wrong one is evaluated anew.
        """
        doubtful: set[int] = set()
        for state, parent in enumerate(self._parents):
            before, after = self._pair(state)
            doubt = self._doubt(state)
            rough = doubt > ROUGH * max(abs(after - before), abs(self.threshold))
            over = self._size(state) - self.threshold
            if rough or over >= -doubt:
                doubtful |= {state, parent}
            if abs(over) > doubt and (over >= 0) != guesses[state]:
                break
        if doubtful:
            self.engine.sharpen(sorted(doubtful))

    def _refine(self, guesses: list[bool], order: int) -> dict[int, float]:
        """FP32 metrics of the states (and their parents) that low precision cannot decide, as far as guesses hold."""
        fine: dict[int, float] = {}
        while True:
            wanted = self._wanted(guesses, order, fine) - set(fine)
            if not wanted:
                return fine
            self.engine.sharpen(sorted(wanted))
            fine |= self.engine.refine(sorted(wanted))

    def _wanted(self, guesses: list[bool], order: int, fine: dict[int, float]) -> set[int]:
        margins = self.margin.of(self.engine.moved, self.engine.base_metric)
        wanted: set[int] = set()
        for state, parent in enumerate(self._parents):
            size, doubt = self._size(state), margins[state] + self._doubt(state)
            known = state in fine and parent in fine
            if known:
                size, doubt = fine[state] - fine[parent], 0.0
                size = abs(size) if self.absolute else size
            near = abs(size - self.threshold) <= doubt
            if not self.margin.ready(self._kinds[state]) or (order + state) % AUDIT == 0 or (near and not known):
                wanted |= {state, parent}
            elif (not size < self.threshold) != guesses[state]:
                break  # what comes after a wrong guess is evaluated anew
        return wanted
