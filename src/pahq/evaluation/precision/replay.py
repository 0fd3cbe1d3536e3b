"""Samples of an FP32 sweep of ACDC, to be evaluated again on the same base states under any policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pahq.engine import Batch, Engine, Marks
from pahq.engine.chain import parents
from pahq.errors import PahqError
from pahq.evaluation.circuit import Circuit
from pahq.graph import Graph
from pahq.method.acdc import Acdc, AcdcOptions, Progress
from pahq.method.sweep import Sweep, visits
from pahq.model.transformer import Transformer
from pahq.task.prompts import Prompts

Tested = tuple[int, int, bool]
"""Row and column of a tested edge, and whether it was kept."""
WINDOW = 16
"""Consecutive tests in one sample."""


@dataclass(frozen=True)
class Window:
    """Consecutive tests of a sweep.

    start: the edges present when the visit in progress began (an engine can be based there); before: brings the base
    to the first test, as one state, None where nothing was removed since; batch: the tests.
    """

    start: Marks
    before: Batch | None
    batch: Batch


def sweep(
    model: Transformer,
    prompts: Prompts,
    options: AcdcOptions,
    on_batch: Callable[[Progress], None] | None = None,
) -> list[Tested]:
    """All tests of a sweep made now, in order."""
    decisions = Acdc(model, prompts, options).run(on_batch=on_batch).decisions
    return [(decision.row, decision.column, decision.kept) for decision in decisions]


def sweep_of(circuit: Circuit) -> list[Tested]:
    """All tests of the sweep that found a circuit, in order."""
    rows, columns = np.nonzero(circuit.order >= 0)
    order = np.argsort(circuit.order[rows, columns])
    return [
        (row, column, bool(circuit.mask[row, column]))
        for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True)
    ]


def windows(graph: Graph, options: AcdcOptions, decisions: Sequence[Tested], tests: int) -> list[Window]:
    """About ``tests`` of a sweep's tests, in windows spread evenly over it (all of them, where there are no more).

    Raises PahqError if the decisions are not those of a sweep with these options.
    """
    length = min(WINDOW, tests, len(decisions))
    count = 0 if not length else max(1, min(tests, len(decisions)) // length)
    starts = {round(start) for start in np.linspace(0, len(decisions) - length, count)}
    order = visits(graph, options.head_order == "ascending", options.sender_order == "earliest")
    walk, found = Sweep(order, Marks.full(graph)), []
    visit, begun = -1, walk.marks
    removed: list[tuple[int, int]] = []  # since the visit began
    for index, (row, column, kept) in enumerate(decisions):
        if walk.peek() != (row, column):
            raise PahqError(f"sweep: test {index + 1} of it is not what these options ask for; take another run")
        if walk.at_visit != visit:
            visit, begun, removed = walk.at_visit, walk.marks.copy(), []
        if index in starts:
            before = None
            if removed:
                before = Batch(list(removed), np.ones((1, len(removed)), dtype=bool), walk.marks.copy())
            found.append(Window(begun, before, _batch(walk, decisions[index : index + length])))
        walk.decide(kept)
        if not kept:
            removed.append((row, column))
    return found


def _batch(walk: Sweep, decisions: Sequence[Tested]) -> Batch:
    """The states of consecutive decisions: each without its own edge, and without those that went before it."""
    future = walk.copy()
    for _, _, kept in decisions:
        future.peek()
        future.decide(kept)
    edges = [(row, column) for row, column, _ in decisions]
    gone = np.array([not kept for _, _, kept in decisions])
    applied = np.tril(np.ones((len(edges), len(edges)), dtype=bool)) & gone
    np.fill_diagonal(applied, True)
    return Batch(edges, applied, future.marks, spine=gone)


def replay(engine: Engine, sample: Sequence[Window], on_window: Callable[[], None] | None = None) -> np.ndarray:
    """The effects of all tests of the windows in the engine's arithmetic: float64 [tests]."""
    effects: list[float] = []
    for window in sample:
        engine.rebase(window.start)
        if window.before is not None:
            engine.evaluate(window.before)
            engine.commit(0)
        metrics = _all_states(engine, window.batch)
        for state, parent in enumerate(parents(window.batch.spine.tolist())):
            before = engine.base_metric if parent < 0 else metrics[parent]
            effects.append(float(metrics[state] - before))
        if on_window is not None:
            on_window()
    return np.array(effects)


def _all_states(engine: Engine, batch: Batch) -> np.ndarray:
    """The metrics of all states, where memory may not reach for all at once."""
    found: list[np.ndarray] = []
    done = 0
    while done < batch.n_states:
        metrics, _ = engine.evaluate(batch.take(slice(done, None)))
        found.append(metrics)
        done += len(metrics)
    return np.concatenate(found)
