"""How much of the model's behaviour a circuit keeps, alone and against its size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from pahq.errors import PahqError
from pahq.evaluation.bootstrap import Bootstrap, as_json
from pahq.evaluation.examples import Examples, Figures
from pahq.graph import Graph
from pahq.method.select import greedy, top

UNDEFINED = "metric recovered is undefined: the full model and the empty circuit have the same metric"


def recovered(circuit: float, empty: float, full: float) -> float | None:
    """(m(circuit) - m(empty)) / (m(full) - m(empty)): 0 as bad as no circuit, 1 as good as the model.

    Above 1 where the circuit does better than the model; None where the model does no better or worse than nothing.
    For KL divergence, where m(full) = 0, it is 1 - KL(circuit) / KL(empty).
    Source: Mueller et al. 2025 (MIB, arXiv 2504.13151), section 3; Marks et al. 2024 (arXiv 2403.19647).
    """
    return None if full == empty else (circuit - empty) / (full - empty) + 0.0  # no -0.0


def row(examples: Examples, figures: Figures, bootstrap: Bootstrap | None = None) -> dict[str, Any]:
    """JSON-ready: metric, recovered, kl, accuracy; with a bootstrap ``…_interval`` of each."""
    full, empty = examples.full.metric, examples.empty.metric
    found: dict[str, Any] = {
        "metric": figures.metric.mean,
        "recovered": recovered(figures.metric.mean, empty.mean, full.mean),
        "kl": figures.kl.mean,
        "accuracy": None if figures.accuracy is None else figures.accuracy.mean,
    }
    if bootstrap is None:
        return found

    def ratio(drawn: np.ndarray) -> np.ndarray:
        base = empty.of(drawn)
        gap = full.of(drawn) - base
        with np.errstate(divide="ignore", invalid="ignore"):
            return (figures.metric.of(drawn) - base) / gap

    statistics: dict[str, Callable[[np.ndarray], np.ndarray] | None] = {
        "metric": figures.metric.of,
        "recovered": None if found["recovered"] is None else ratio,
        "kl": figures.kl.of,
        "accuracy": None if figures.accuracy is None else figures.accuracy.of,
    }
    for name, statistic in statistics.items():
        found[f"{name}_interval"] = None if statistic is None else as_json(bootstrap.interval(statistic))
    return found


def point(examples: Examples, mask: np.ndarray, bootstrap: Bootstrap | None = None) -> dict[str, Any]:
    """``row`` of a mask bool [n_receivers, n_senders + 1], with its size (``edges``, and ``share`` of all edges)."""
    count = int(mask.sum())
    size = {"edges": count, "share": count / examples.graph.n_edges}
    return size | row(examples, examples.figures(mask), bootstrap)


def series(
    graph: Graph, values: np.ndarray, sizes: Iterable[int], rule: str = "top", absolute: bool = False
) -> list[tuple[int, np.ndarray]]:
    """(size asked for, mask) of the best edges by scores [n_receivers, n_senders + 1]; 0 is the empty circuit.

    rule: ``top`` or ``greedy``, see ``method.select``; absolute: rank by the size of scores.
    Raises PahqError for another rule, or more edges than there are.
    """
    rules = {"top": top, "greedy": greedy}
    if rule not in rules:
        raise PahqError(f"select: '{rule}' makes no circuits of given size; choose {' or '.join(rules)}")
    empty = np.zeros(graph.shape, dtype=bool)
    return [(size, rules[rule](graph, values, size, absolute) if size else empty) for size in sizes]


def curve(
    examples: Examples, masks: Iterable[tuple[int, np.ndarray]], bootstrap: Bootstrap | None = None
) -> list[dict[str, Any]]:
    """A ``point`` for each (number of edges asked for, mask); ``asked`` beside ``edges``, which selection may miss."""
    return [{"asked": asked} | point(examples, mask, bootstrap) for asked, mask in masks]
