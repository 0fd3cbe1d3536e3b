"""How far an effect measured in low precision may be from FP32's: learned from effects measured both ways.

The error of an effect grows with how far the edge's removal moves the final residual stream, not with the effect
or the values themselves: an edge whose large changes cancel in the metric still has their rounding errors. So
the margin is a multiple of the largest ratio of the two that was seen, plus FP32's own rounding noise.
"""

from __future__ import annotations

import numpy as np

ENOUGH = 32
"""Effects measured both ways, and found to differ, before the margin is relied on."""
SAFETY = 4.0
NOISE = 3e-6
"""FP32's rounding noise of an effect, as a share of the metric's size (at least 1)."""


class Margin:
    """See the module's text. ``largest``: the largest ratio of error to movement seen; ``error``: the largest error."""

    def __init__(self) -> None:
        self.largest = self.error = 0.0
        self.seen = 0

    @property
    def ready(self) -> bool:
        return self.seen >= ENOUGH

    def observe(self, error: float, moved: float) -> None:
        """Takes in |low-precision effect - FP32 effect| of a state that lies ``moved`` from its parent."""
        self.error = max(self.error, error)
        if moved > 0:
            self.seen += error > NOISE  # where nothing was rounded, nothing is told about rounding
            self.largest = max(self.largest, (error - NOISE) / moved)

    def of(self, moved: np.ndarray, metric: float) -> np.ndarray:
        """The margin of effects with these movements, where the metric is about ``metric``."""
        return SAFETY * self.largest * moved + NOISE * max(1.0, abs(metric))
