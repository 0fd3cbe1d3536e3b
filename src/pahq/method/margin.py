"""How far an effect measured in low precision may be from FP32's: learned from effects measured both ways.

The error of an effect grows with how far the edge's removal moves the final residual stream, not with the effect
or the values themselves: an edge whose large changes cancel in the metric still has their rounding errors. It grows
with the metric's own slope as well: at a KL divergence of 4 the same movement counts for far more than near 0. So
the margin is a multiple of the largest ratio of error to movement times slope that was seen, plus FP32's own rounding
noise. The ratios spread over decades: what tells most about the largest are the states near the threshold, which are
measured both ways in any case. Kinds of receivers err differently (a head under test is FP32, an MLP is not), so each
has to be seen often enough.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

ENOUGH, ENOUGH_EXACT = 12, 32
"""Effects of a kind of receiver measured both ways and found to differ, or found to differ or not, before the margin
is relied on for that kind."""
SAFETY = 4.0
NOISE = 1e-5
"""FP32's rounding noise of an effect, as a share of the metric's size (at least 1)."""


class Margin:
    """See the module's text. ``largest``: the largest ratio seen; ``error``: the largest error.

    slope: a metric's value -> how steeply it answers there, see ``task.metrics.Metric.slope``.
    """

    def __init__(self, slope: Callable[[float], float] = lambda _: 1.0) -> None:
        self.slope = slope
        self.largest = self.error = 0.0
        self._differed: Counter[str] = Counter()
        self._seen: Counter[str] = Counter()

    @property
    def seen(self) -> int:
        """Effects measured both ways."""
        return self._seen.total()

    def ready(self, kind: str) -> bool:
        """Whether it may be relied on for receivers of a kind."""
        return not self.lacks(kind)

    def lacks(self, kind: str) -> int:
        """Effects that have to be measured both ways yet, at least, before it may be relied on for a kind."""
        return max(0, min(ENOUGH - self._differed[kind], ENOUGH_EXACT - self._seen[kind]))

    def observe(self, kind: str, error: float, moved: float, metric: float) -> None:
        """Takes in |low-precision effect - FP32 effect| of a state that lies ``moved`` from its parent.

        kind: of the receiver that the state tests an edge into. metric: the parent's.
        """
        self.error = max(self.error, error)
        if moved > 0:
            beyond = error - noise(metric)
            self._seen[kind] += 1
            self._differed[kind] += beyond > 0  # where nothing was rounded, little is told about rounding
            self.largest = max(self.largest, beyond / (moved * self.slope(metric)))

    def of(self, moved: np.ndarray, metric: float) -> np.ndarray:
        """The margin of effects with these movements, where the metric is about ``metric``."""
        return SAFETY * self.largest * self.slope(metric) * moved + noise(metric)


def noise(metric: float) -> float:
    """FP32's rounding noise of an effect, where the metric is about ``metric``."""
    return NOISE * max(1.0, abs(metric))
