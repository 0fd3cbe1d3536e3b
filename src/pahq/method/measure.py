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
ROUGH_KEPT = 0.1
"""The same of an edge that surely stays, whose effect low precision measured."""
AUDIT = 256
"""Every so many tests one is measured in FP32 as well, however clear its decision."""


@dataclass(frozen=True)
class Measured:
    """A state's metric and its parent's. refined: in FP32, after low precision.

    error, moved: |low-precision effect - FP32's| (or what it is at least) and how far the state lies from its parent,
    where both are known.
    """

    before: float
    after: float
    refined: bool = False
    error: float | None = None
    moved: float | None = None


Pair = tuple[float, float, float]
"""The metric of a state's parent and its own, and how far their difference may be off."""


class Measurer:
    """Measures batches of one sweep. exact: decide as FP32 would, under a policy that quantises differences."""

    def __init__(self, engine: Engine, threshold: float, absolute: bool, exact: bool) -> None:
        self.engine, self.threshold, self.absolute, self.exact = engine, threshold, absolute, exact
        self.margin = Margin(engine.metric.slope)

    def lacks(self, kind: str) -> int:
        """Edges into a kind of receiver that are measured in FP32 as well whatever they come to; 0: no more of them."""
        return self.margin.lacks(kind) if self.exact else 0

    def measure(
        self, metrics: np.ndarray, slack: np.ndarray, guesses: list[bool], kinds: list[str], order: int
    ) -> list[Measured]:
        """The states of the batch just evaluated.

        metrics, slack: as it gave them; kinds: of the receivers that they test; order: of the first state's test.
        """
        self._metrics, self._slack = metrics, slack
        self._first = metrics.copy(), slack.copy(), self.engine.base_metric, self.engine.base_slack
        self._sharp: set[int] = set()
        self._guesses, self._parents = guesses, parents([not guess for guess in guesses[: len(metrics)]])
        self._fine: dict[int, Pair] = {}
        self._errors: dict[int, float] = {}
        if self.exact:
            self._learn(kinds, order)
        self._sharpen()
        if self.exact:
            self._refine()
        measured = []
        for state in range(len(self._parents)):
            before, after, _ = self._pair(state)
            error = self._errors.get(state)
            moved = None if error is None else float(self.engine.moved[state])
            measured.append(Measured(before, after, state in self._fine, error, moved))
        return measured

    def _pair(self, state: int) -> Pair:
        """The best that is known of a state. Low precision's own doubt is left aside."""
        if state in self._fine:
            return self._fine[state]
        parent = self._parents[state]
        metrics, slack, base, base_slack = self._first
        if state in self._sharp and parent in self._sharp:  # else one end would be measured otherwise than the other
            metrics, slack, base, base_slack = (
                self._metrics,
                self._slack,
                self.engine.base_metric,
                self.engine.base_slack,
            )
        before, doubt = (base, base_slack) if parent < 0 else (metrics[parent], slack[parent])
        return float(before), float(metrics[state]), float(slack[state] + doubt)

    @property
    def _margins(self) -> np.ndarray:
        """How far low precision may be off in each state's effect; 0 where that is not asked."""
        moved = self.engine.moved
        return self.margin.of(moved, self.engine.base_metric) if self.exact else np.zeros_like(moved)

    def _over(self, state: int) -> float:
        """How far a state's effect lies above the threshold."""
        before, after, _ = self._pair(state)
        return (abs(after - before) if self.absolute else after - before) - self.threshold

    def _ends(self, state: int, doubt: float) -> bool:
        """Whether a state surely shows a wrong guess: what comes after it is evaluated anew."""
        over = self._over(state)
        return abs(over) > doubt and (over >= 0) != self._guesses[state]

    def _learn(self, kinds: list[str], order: int) -> None:
        """Measures states in FP32 as well, to know errors by: of kinds of receivers not known enough, and audits.

        Both measures sum over the likely tokens alike, so that what that leaves out does not look like an error.
        Decisions about the former rest on FP32.
        """
        margins = self._margins
        unknown = [not self.margin.ready(kind) for kind in kinds[: len(self._parents)]]
        wanted = []
        for state in range(len(self._parents)):
            if unknown[state] or (order + state) % AUDIT == 0:
                wanted.append(state)
            elif self._ends(state, margins[state] + self._pair(state)[2]):
                break
        if not wanted:
            return
        both = sorted({*wanted, *(self._parents[state] for state in wanted)})
        found = self.engine.refine(both, full=False)
        for state in wanted:
            (before, less), (after, more) = found[self._parents[state]], found[state]
            low_before, low_after, _ = self._pair(state)
            self._errors[state] = abs((low_after - low_before) - (after - before))
            if unknown[state]:
                self._fine[state] = before, after, less + more

    def _sharpen(self) -> None:
        """Has the states summed in full on which a decision within its slack of the threshold would rest.

        Also those whose slack would make the recorded effect rough, and all of edges that stay; but where low precision
        limits how exact an effect is in any case, no more of these than that. And those that FP32 would have to decide
        for their slack alone. As far as guesses hold.
        """
        margins = self._margins
        low: set[int] = set()
        fine: set[int] = set()
        for state, parent in enumerate(self._parents):
            before, after, doubt = self._pair(state)
            over, size = self._over(state), max(abs(after - before), abs(self.threshold))
            if self.engine.policy.differences and over > doubt:
                wanted = doubt > ROUGH_KEPT * size
            else:
                wanted = over >= -doubt or doubt > ROUGH * size
            if state not in self._fine:
                wanted |= margins[state] < abs(over) <= margins[state] + doubt
            if doubt and wanted:
                (fine if state in self._fine else low).update((state, parent))
            if self._ends(state, doubt):
                break
        if low:
            self.engine.sharpen(sorted(low))
            self._sharp |= low
        if fine:
            self._measure_fine(fine)

    def _refine(self) -> None:
        """Has the states measured in FP32 that low precision cannot decide, as far as guesses hold."""
        margins = self._margins
        again = True
        while again:
            again = False
            wanted: set[int] = set()
            for state, parent in enumerate(self._parents):
                doubt = self._pair(state)[2] + (0.0 if state in self._fine else float(margins[state]))
                if state not in self._fine and abs(self._over(state)) <= doubt:
                    wanted |= {state, parent}
                elif self._ends(state, doubt):
                    break
            if wanted:
                self._measure_fine(wanted)
                again = True

    def _measure_fine(self, states: set[int]) -> None:
        """FP32 over the full vocabulary, for every state of ``states`` whose parent is among them, too."""
        found = self.engine.refine(sorted(states))
        for state in states:
            if state < 0 or self._parents[state] not in found:
                continue
            before, after = found[self._parents[state]][0], found[state][0]
            if state not in self._fine:  # what low precision gave is still at hand: at least so far it is off
                low_before, low_after, doubt = self._pair(state)
                off = max(0.0, abs((low_after - low_before) - (after - before)) - doubt)
                self._errors[state] = max(off, self._errors.get(state, 0.0))
            self._fine[state] = before, after, 0.0
