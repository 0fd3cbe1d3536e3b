"""How far a mean over examples may be off by the luck of which examples were drawn: the percentile bootstrap.

Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pahq.errors import PahqError


@dataclass(frozen=True)
class Interval:
    """A confidence interval of a figure. level: such as 0.95; examples, samples: what it was made of."""

    low: float
    high: float
    level: float
    examples: int
    samples: int


class Bootstrap:
    """Resamples N examples with replacement, the same ones for every figure, so that ratios and differences hold.

    drawn: int64 [samples, N]. Raises PahqError for sizes or levels that make no interval.
    """

    def __init__(self, examples: int, samples: int = 1000, level: float = 0.95, seed: int = 0) -> None:
        if samples < 10:
            raise PahqError(f"bootstrap: {samples} resamples are too few; take at least 10, better 1000")
        if not 0 < level < 1:
            raise PahqError(f"bootstrap: level {level} lies outside 0 … 1; take one such as 0.95")
        if examples < 1:
            raise PahqError("bootstrap: there are no examples; give at least 2")
        self.examples, self.level = examples, level
        self.drawn = np.random.default_rng(seed).integers(0, examples, (samples, examples))

    def interval(self, statistic: Callable[[np.ndarray], np.ndarray]) -> Interval | None:
        """statistic: resamples int64 [S, N] -> its values float64 [S].

        None where there is one example only, or where a resample has no value: both say nothing about the spread.
        """
        if self.examples < 2:
            return None
        values = statistic(self.drawn)
        if not np.isfinite(values).all():
            return None
        edge = (1 - self.level) / 2
        low, high = np.quantile(values, [edge, 1 - edge])
        return Interval(float(low), float(high), self.level, self.examples, len(values))


def as_json(interval: Interval | None) -> dict[str, Any] | None:
    return None if interval is None else vars(interval).copy()
