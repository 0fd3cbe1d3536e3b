"""The MIB benchmark's two figures of a ranking of edges: CPR and CMD.

With f(k) the share of the metric that a circuit of the best share k of all edges recovers (``faithfulness.recovered``),
measured at the benchmark's ten sizes:

* CPR (integrated circuit performance ratio) is the area under f: large where few edges do the task, and above 1 where
  circuits do better than the model. Edges are ranked by signed score, as those that harm belong in no such circuit.
* CMD (integrated circuit-model distance) is the area between f and 1: 0 where circuits of any size behave as the
  model does. Edges are ranked by absolute score.

Both areas are trapezoids between neighbouring sizes on a linear axis, from 0.1 % to 100 % (what lies below 0.1 % is
left out, so that a perfect CPR is 0.999). The distance to 1 is taken at the sizes themselves: where f crosses 1
between two of them, the trapezoid does not know. Abscissae are the sizes asked for, not those that pruning leaves.
Source: Mueller et al. 2025 (arXiv 2504.13151), section 3, and the benchmark's public evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pahq.errors import PahqError

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def sizes(n_edges: int, shares: Sequence[float] = SHARES) -> list[int]:
    """Edges of a circuit for each share, rounded down as the benchmark does; 0 stands for the empty circuit."""
    return [int(share * n_edges) for share in shares]


def cpr(faithfulness: Sequence[float], shares: Sequence[float] = SHARES) -> float:
    """Area under f; faithfulness: f at each of the shares. Raises PahqError where they do not fit each other."""
    return _area(np.asarray(faithfulness, dtype=np.float64), shares)


def cmd(faithfulness: Sequence[float], shares: Sequence[float] = SHARES) -> float:
    """Area between f and 1. Raises PahqError where lengths differ."""
    return _area(np.abs(1 - np.asarray(faithfulness, dtype=np.float64)), shares)


def _area(heights: np.ndarray, shares: Sequence[float]) -> float:
    x = np.asarray(shares, dtype=np.float64)
    if heights.shape != x.shape or len(x) < 2:
        raise PahqError(f"mib: {len(heights)} values do not fit {len(x)} circuit sizes; give one for each of them")
    if (np.diff(x) <= 0).any():
        raise PahqError(f"mib: circuit sizes {list(shares)} do not grow; sort them")
    return float((np.diff(x) * (heights[1:] + heights[:-1]) / 2).sum())
