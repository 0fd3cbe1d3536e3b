"""How well effects measured in low precision agree with FP32's."""

from __future__ import annotations

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0 of values [n], float64 [n]; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2)[inverse]


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation of a and b [n]; None where one of them does not vary."""
    if len(a) < 2 or not np.ptp(a) or not np.ptp(b):
        return None
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def agreement(low: np.ndarray, fp32: np.ndarray, threshold: float) -> dict[str, float | None]:
    """Effects [n] of the same edges measured twice.

    decisions: share with the same answer to ``effect < threshold``. spearman: rank correlation (None if undefined).
    error_median, error_99, error_rms: of |low - fp32|, in the metric's units.
    """
    error = np.abs(low - fp32)
    return {
        "decisions": float(((low < threshold) == (fp32 < threshold)).mean()),
        "spearman": spearman(low, fp32),
        "error_median": float(np.median(error)),
        "error_99": float(np.quantile(error, 0.99)),
        "error_rms": float(np.sqrt(np.mean(np.square(error)))),
    }
