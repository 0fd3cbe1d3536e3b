"""Methods that score edges within a run: their state in its folder, the circuit they select, and ACDC's prefilter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pahq.course import Course, Found
from pahq.errors import PahqError
from pahq.evaluation.behaviour import behaviour
from pahq.evaluation.circuit import Circuit
from pahq.evaluation.faithfulness import recovered
from pahq.graph import Graph
from pahq.method.base import Problem, Scores
from pahq.method.registry import get_method
from pahq.method.select import beyond, select, top
from pahq.model import Transformer
from pahq.report.config import RunConfig
from pahq.report.state import FolderWork, load_scores, save_scores
from pahq.report.steps import Steps
from pahq.task import Task
from pahq.task.prompts import Prompts

ENOUGH = 0.8
"""Share of the edges asked for below which a circuit counts as much smaller."""
WITH_GRADIENT = ("logit_diff", "greaterthan", "docstring", "nll")
"""Metrics whose gradient does not vanish at the clean run, in order of preference after the task's own."""


def problem_of(course: Course, model: Transformer, prompts: Prompts, task: Task) -> Problem:
    """The run's behaviour, as methods take it."""
    c = course.config
    assert c.metric is not None
    wanted = (task.default_metric, *WITH_GRADIENT)
    fitting = [name for name in wanted if name in task.metrics and name in WITH_GRADIENT and name != c.metric]
    return Problem(
        model,
        prompts,
        course.graph(model),
        c.metric,
        c.ablation,
        course.policy,
        c.seed,
        fallbacks=tuple(dict.fromkeys(fitting)),
    )


def scores_of(course: Course, problem: Problem, name: str, options: Any) -> tuple[Scores, dict[str, Any]]:
    """A method's scores, and the seconds and resumes they took over all processes; once made they are read again."""
    method = get_method(name)
    if course.folder is not None:
        found = load_scores(course.folder, problem.graph, name)
        if found is not None:
            course.earlier = found[1]["seconds"]
            return found
    steps = Steps(course.watch)
    work = FolderWork(course.folder, name, steps, course.tracker)
    try:
        scores = method.scores(problem, options, work)
    finally:
        steps.end()
    course.earlier = work.before
    spent = {"seconds": work.seconds, "resumes": work.resumes}
    for note in scores.notes:
        course.watch.say(f"note: {note}")
    if course.folder is not None:
        save_scores(course.folder, scores, spent)
        work.finish()
    return scores, spent


def score(course: Course, model: Transformer, prompts: Prompts, task: Task) -> Found:
    """The circuit that a method's scores select, its scores in the place of effects."""
    c, graph = course.config, course.graph(model)
    _check_edges(c.edges, graph)
    scores, spent = scores_of(course, problem_of(course, model, prompts, task), c.method, course.options)
    mask = select(scores, c.rule, c.edges, c.threshold, bool(c.absolute))
    note = _shortfall(c, scores, int(mask.sum()))
    if note is not None:
        course.watch.say(f"note: {note}")
        scores = replace(scores, notes=(*scores.notes, note))
    order = np.full(graph.shape, -1, dtype=np.int64)
    search = {
        **spent,
        **_facts(scores),
        "selection": {
            "rule": c.rule,
            "edges": c.edges,
            "threshold": scores.natural if c.rule == "threshold" and c.threshold is None else c.threshold,
            "selected": int(mask.sum()),
        },
    }
    precision = {"policy": course.policy.to_dict()}
    return Found(graph, mask, np.where(graph.edges, scores.values, np.nan), order, None, search, precision)


def _shortfall(c: RunConfig, scores: Scores, selected: int) -> str | None:
    """What users must be told where a circuit is empty, or much smaller than was asked for."""
    if c.edges is None:
        return None if selected else "no path from the embeddings to the logits scores so high; the circuit is empty"
    if selected >= ENOUGH * c.edges:
        return None
    larger = beyond(scores.graph, scores.values, c.rule, c.edges, bool(c.absolute))
    what = f"only {selected:,} of the {c.edges:,} edges were kept" if selected else "no edge was kept"
    mend = "" if c.absolute or not scores.signed else ", or absolute"
    return (
        f"{what}: of whole paths from the embeddings to the logits, the next larger circuit has {larger:,} edges; "
        f"ask for so many{mend}"
        if larger is not None
        else None
    )


def _check_edges(edges: int | None, graph: Graph) -> None:
    """Before any work is done; ``select`` would find it only afterwards."""
    if edges is not None and edges > graph.n_edges:
        raise PahqError(f"edges: {edges} lies outside 1 … {graph.n_edges:,}, the edges of {graph.config.name}")


def _facts(scores: Scores) -> dict[str, Any]:
    """What a record says about scores."""
    stats = dict(scores.stats)
    return {
        "states": stats.get("states"),
        "passes": stats.get("passes"),
        "natural": scores.natural,
        "signed": scores.signed,
        "notes": list(scores.notes),
        "stats": stats,
    }


@dataclass(frozen=True)
class Prefiltered:
    """start: bool [n_receivers, n_senders + 1], the edges left to sweep; strength: their scores where they set the
    order of tests, else None. record: for ``run.json``."""

    start: np.ndarray
    strength: np.ndarray | None
    record: dict[str, Any]


def prefilter(course: Course, model: Transformer, prompts: Prompts, task: Task, options: Any) -> Prefiltered:
    """Scores, the best share of the edges by them, and what leaving the others out costs."""
    c, graph = course.config, course.graph(model)
    assert c.prefilter is not None
    assert c.metric is not None
    scores, spent = scores_of(course, problem_of(course, model, prompts, task), c.prefilter, options)
    keep, by_size = 1.0 if c.keep is None else c.keep, get_method(c.prefilter).by_size or bool(c.absolute)
    start = graph.edges.copy()
    if keep < 1:
        start = top(graph, scores.values, max(1, round(keep * graph.n_edges)), by_size)
    if not start.any():
        raise PahqError(
            f"keep: no path from the embeddings to the logits lies within {keep:g} of the edges; keep more of them"
        )
    nothing = np.full(graph.shape, np.nan), np.full(graph.shape, -1, dtype=np.int64)
    figures, empty = (
        behaviour(model, Circuit(graph, mask, *nothing), task, prompts, c.metric, c.ablation)
        for mask in (start, np.zeros_like(start))  # which only resampling makes the model on corrupted prompts
    )
    full, circuit = (figures[name]["metric"] for name in ("full", "circuit"))
    record = {
        "method": c.prefilter,
        "keep": keep,
        "order_by_score": c.order_by_score,
        "edges": graph.n_edges,
        "edges_left": int(start.sum()),
        "share_filtered": 1 - int(start.sum()) / graph.n_edges,
        "metric": circuit,
        "faithfulness": recovered(circuit, empty["circuit"]["metric"], full),
        "figures": figures,
        **spent,
        **_facts(scores),
    }
    strength = None
    if c.order_by_score:
        strength = np.abs(scores.values) if by_size else scores.values
    return Prefiltered(start, strength, record)
