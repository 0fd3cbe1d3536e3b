"""A second engine in FP32 that follows a sweep's decisions and says where its own would differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pahq.engine import Batch, Engine, Marks
from pahq.engine.chain import parents
from pahq.method.margin import noise
from pahq.model.transformer import Transformer
from pahq.precision.policy import FP32
from pahq.task.prompts import Prompts

if TYPE_CHECKING:
    from pahq.method.acdc import AcdcOptions, Decision


class Check:
    """Evaluates every decided state in FP32 over the full vocabulary.

    A disagreement whose FP32 effect lies within FP32's own rounding noise of the threshold is counted apart.
    """

    def __init__(
        self,
        engine: Engine,
        model: Transformer,
        prompts: Prompts,
        options: AcdcOptions,
        start: np.ndarray | None = None,
    ) -> None:
        self.graph, self.threshold, self.absolute = engine.graph, options.threshold, options.absolute
        self.engine = Engine(
            model,
            prompts,
            engine.graph,
            options.metric,
            options.ablation,
            engine.memory_limit,
            False,
            policy=FP32,
            start=start,
        )
        self.checked = self.within_noise = 0
        self.largest_error = 0.0
        self.disagreements: list[dict[str, Any]] = []

    def batch(self, batch: Batch, decided: Sequence[Decision], commit: int) -> None:
        """Compares the decisions on the first states of a batch; commit: the state that becomes the base, or -1."""
        done = 0
        while done < len(decided):  # memory may not reach for all states at once
            states = list(range(done, len(decided)))
            values, _ = self.engine.evaluate(batch.take(states))
            self._compare(batch, decided, done, values.tolist())
            done += len(values)
        if commit >= 0:
            self.engine.evaluate(batch.take([commit]))
            self.engine.commit(0)

    def _compare(self, batch: Batch, decided: Sequence[Decision], first: int, values: list[float]) -> None:
        spine = [not decision.kept for decision in decided]
        of = parents(spine)
        known = self._known if first else {}
        known |= {first + i: value for i, value in enumerate(values)}
        self._known = known
        for state in range(first, first + len(values)):
            decision = decided[state]
            before = self.engine.base_metric if of[state] < 0 else known[of[state]]
            effect = known[state] - before
            size = abs(effect) if self.absolute else effect
            self.checked += 1
            self.largest_error = max(self.largest_error, abs(effect - decision.effect))
            if (not size < self.threshold) != decision.kept:
                near = abs(size - self.threshold) <= noise(before)
                self.within_noise += near
                self.disagreements.append(
                    {
                        "edge": self.graph.edge_name(decision.row, decision.column),
                        "order": decision.order,
                        "effect": decision.effect,
                        "fp32_effect": effect,
                        "within_noise": near,
                    }
                )

    def rebase(self, marks: Marks) -> None:
        self.engine.rebase(marks)

    def figures(self) -> dict[str, Any]:
        """checked, disagreements (those within noise included and marked), largest error of an effect."""
        return {
            "checked": self.checked,
            "disagreements": self.disagreements,
            "within_noise": self.within_noise,
            "largest_error": self.largest_error,
        }
