"""Guessing the sweep's next decisions, so that many states can be evaluated in one batch.

A guess never decides anything: every decision is taken on an evaluated state that differs from
its predecessor by just that edge, and a batch is dropped from the first wrong guess on. What was
dropped still tells how large those edges' effects are about, and so makes the next guess better.
"""

from __future__ import annotations

from collections import defaultdict, deque

import numpy as np

from pahq.engine.batch import Batch
from pahq.graph import Graph
from pahq.method.sweep import Sweep

MAX_STATES = 128
START, SHORTEST = 8, 3
"""Unfounded guesses in a row: at first, and at least."""
HISTORY = 96
"""Decisions whose share of wrong guesses sets how many are risked in a row."""


class Precedents:
    """Effects of decided edges, and what they say about the same sender's edge into another head.

    A head's direct edge is tested before its input edges, and its effect is the weight of that whole
    input; an edge's effect is guessed as the same share of it that the sender had elsewhere: in other
    heads' inputs of that kind and layer, else in this layer, else anywhere.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._weight: dict[int, float] = {}
        self._sums: defaultdict[tuple[object, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])

    def _places(self, row: int, column: int) -> list[tuple[object, ...]]:
        receiver = self.graph.receivers[row]
        return [(receiver.layer, receiver.kind, column), (receiver.layer, column), (column,)]

    def add(self, row: int, column: int, effect: float) -> None:
        """Takes in a decided edge."""
        effect = max(effect, 0.0)
        if not self.graph.receivers[row].is_attention:
            return
        if column == self.graph.direct:
            self._weight[row] = effect
            return
        for place in self._places(row, column):
            sums = self._sums[place]
            sums[0] += effect
            sums[1] += self._weight.get(row, 1.0)

    def effect(self, row: int, column: int) -> float | None:
        """The effect to be expected, or None without precedent; infinite for direct edges, most of which stay."""
        if column == self.graph.direct:
            return float("inf")
        if self.graph.receivers[row].is_attention:
            for place in self._places(row, column):
                if place in self._sums:
                    effect, weight = self._sums[place]
                    return effect / weight * self._weight.get(row, 1.0) if weight > 0 else None
        return None


class Speculator:
    """Builds batches. Its state depends on past decisions alone, never on timing: a resumed run guesses the same."""

    def __init__(self, graph: Graph, threshold: float, absolute: bool, max_states: int = MAX_STATES) -> None:
        self.threshold, self.absolute, self.max_states = threshold, absolute, max_states
        self.precedents = Precedents(graph)
        self.overhead = 1.0
        """What a batch costs beyond its states, in states; the caller keeps it up to date."""
        self._measured: dict[tuple[int, int], float] = {}
        self._surprises: deque[bool] = deque(maxlen=HISTORY)

    def reset(self) -> None:
        """Forgets all but the decisions themselves (at a checkpoint, where a resumed run starts afresh)."""
        self._measured.clear()
        self._surprises.clear()

    def keeps(self, effect: float) -> bool:
        """ACDC's rule: an edge stays unless its effect is below the threshold (strictly)."""
        return not (abs(effect) if self.absolute else effect) < self.threshold

    def guess(self, edge: tuple[int, int]) -> bool:
        """Whether the edge will be kept: by its effect in a neighbouring state, by precedent, or else no."""
        effect = self._measured.get(edge)
        if effect is None:
            effect = self.precedents.effect(*edge)
        return effect is not None and self.keeps(effect)

    @property
    def reach(self) -> int:
        """How many unfounded guesses in a row are worth while.

        With a share s of wrong guesses, k of them waste about k * k * s / 2 states; a batch more costs
        ``overhead`` states. The sum of both, for each decision, is least at k = sqrt(2 * overhead / s).
        """
        if not self._surprises:
            return START
        share = (sum(self._surprises) + 0.5) / (len(self._surprises) + 1)
        return int(min(self.max_states, max(SHORTEST, (2 * self.overhead / share) ** 0.5)))

    def batch(self, sweep: Sweep, stop_at: int, most: int | None = None) -> tuple[Batch, list[bool]]:
        """The next states and the decisions guessed for them.

        stop_at: tests after which the batch ends with the visit in progress. most: states that it may have.
        """
        most = self.max_states if most is None else min(most, self.max_states)
        future = sweep.copy()
        edges: list[tuple[int, int]] = []
        guesses: list[bool] = []
        unfounded = self.reach
        while len(edges) < most:
            edge = future.peek()
            if edge is None:
                break
            if edge not in self._measured:
                if not unfounded:
                    break
                unfounded -= 1
            visit = future.at_visit
            edges.append(edge)
            guesses.append(self.guess(edge))
            future.decide(guesses[-1])
            if len(edges) >= stop_at and future.at_visit != visit:
                break
        # State i lacks edge i and every earlier edge that is guessed to go.
        applied = np.tril(np.ones((len(edges), len(edges)), dtype=bool)) & ~np.array(guesses, dtype=bool)
        np.fill_diagonal(applied, True)
        return Batch(edges, applied, future.marks, spine=~np.array(guesses, dtype=bool)), guesses

    def decided(self, edge: tuple[int, int], effect: float, guessed: bool | None = None) -> None:
        """Takes in a decision; guessed: None for one that was replayed."""
        self.precedents.add(*edge, abs(effect) if self.absolute else effect)
        if guessed is not None:
            self._measured.pop(edge, None)
            self._surprises.append(self.keeps(effect) != guessed)

    def measured(self, edge: tuple[int, int], effect: float) -> None:
        """Takes in an effect that was evaluated in a state which did not come about."""
        self._measured[edge] = effect
