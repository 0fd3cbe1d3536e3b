"""ACDC within a run: journalled decisions, taken up where a killed run left them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from pahq.course import Course, Found
from pahq.errors import PahqError
from pahq.graph import Graph
from pahq.method.acdc import Acdc, AcdcResult, Decision, Progress
from pahq.model import Transformer
from pahq.report import machine
from pahq.report.journal import JOURNAL_FILE, Journal
from pahq.report.journal import cut as cut_journal
from pahq.report.journal import read as read_journal
from pahq.report.precision import merged_check, precision_record
from pahq.scoring import Prefiltered
from pahq.task.prompts import Prompts


def sweep(course: Course, model: Transformer, prompts: Prompts, filtered: Prefiltered | None = None) -> Found:
    """The sweep's circuit, the work of all processes that took part, and precision's figures.

    filtered: the edges that are swept and the order of tests, where a method's scores set them.
    """
    c, graph = course.config, course.graph(model)
    decisions: list[Decision] = []
    before: dict[str, Any] = {}
    path = None if course.folder is None else course.folder / JOURNAL_FILE
    if path is not None and path.exists():
        decisions, before = read_journal(path)
        _check_places(path, decisions, graph)
        course.earlier = before.get("total_seconds", 0.0)
        before["resumes"] = before.get("resumes", 0) + 1
        cut_journal(path, decisions, before, graph.edge_name)
        course.watch.say(f"going on after {len(decisions):,} decisions")
    start = time.perf_counter()
    acdc = Acdc(
        model,
        prompts,
        course.options,
        screen=False if c.full_vocabulary else None,
        check=c.check,
        scheduler=course.scheduler,
        start=None if filtered is None else filtered.start,
        strength=None if filtered is None else filtered.strength,
    )
    replayed, earlier = len(decisions), before.pop("disagreements", [])
    told = 0  # disagreements that the journal has
    refined = sum(decision.refined for decision in decisions)

    def checked() -> dict[str, Any] | None:
        if acdc.check is None:
            return None
        return merged_check(earlier, replayed, before.get("check_error", 0.0), acdc.check.figures())

    def spent(states: int, wasted: int) -> dict[str, Any]:
        flops = dict(before.get("flops", {}))
        for component, count in acdc.engine.flops.by_component.items():
            flops[component] = flops.get(component, 0) + count
        return {
            "seconds": before.get("seconds", 0.0) + time.perf_counter() - start,
            "total_seconds": course.total_seconds,
            "states": before.get("states", 0) + states,
            "wasted": before.get("wasted", 0) + wasted,
            "resumes": before.get("resumes", 0),
            "flops": flops,
            "exact_states": before.get("exact_states", 0) + acdc.engine.exact_states,
        }

    def news() -> dict[str, Any]:
        """What the check found since the journal's last line."""
        nonlocal told
        if acdc.check is None:
            return {}
        fresh, told = acdc.check.disagreements[told:], len(acdc.check.disagreements)
        largest = max(before.get("check_error", 0.0), acdc.check.largest_error)
        return {"check_error": largest} | ({"disagreements": fresh} if fresh else {})

    with nullcontext() if path is None else closing(Journal(path, graph.edge_name)) as journal:

        def on_batch(progress: Progress) -> None:
            nonlocal refined
            so_far = spent(progress.states, progress.wasted)
            if journal is not None:
                journal.append(progress.decisions, so_far | news())
            course.watch.update(progress)
            refined += sum(decision.refined for decision in progress.decisions)
            course.tracker.progress("acdc", _so_far(progress, refined, so_far))

        course.watch.begin(acdc.options.metric, len(decisions))
        try:
            result = acdc.run(decisions, on_batch)
        finally:
            course.watch.end()
    total = spent(result.stats["states"], result.stats["wasted"])
    figures = _search_figures(total, result, model)
    figures["streams"] = None if course.scheduler is None else list(course.scheduler.streams)
    precision = precision_record(acdc, result, total["exact_states"], checked())
    more = {} if filtered is None else {"prefilter": filtered.record}
    return Found(graph, result.mask, result.effects, result.order, result.metric, figures, precision, more)


def _so_far(progress: Progress, refined: int, spent: dict[str, Any]) -> dict[str, Any]:
    """What an event of progress tells. refined_share: of the decisions, those taken in FP32 after low precision."""
    return {
        "tests": progress.tested,
        "kept": progress.kept,
        "removed": progress.tested - progress.kept,
        "edges_left": progress.edges_left,
        "metric": progress.metric,
        "refined_share": refined / max(1, progress.tested),
        **{name: spent[name] for name in ("states", "wasted", "seconds", "total_seconds")},
    }


def _check_places(path: Path, decisions: Sequence[Decision], graph: Graph) -> None:
    for decision in decisions:
        inside = 0 <= decision.row < graph.shape[0] and 0 <= decision.column < graph.shape[1]
        if not inside or not graph.edges[decision.row, decision.column]:
            raise PahqError(
                f"{path}: decision {decision.order} is about no edge of {graph.config.name}; "
                "the journal is damaged, start the run anew in another folder"
            )


def _search_figures(spent: dict[str, Any], result: AcdcResult, model: Transformer) -> dict[str, Any]:
    total = sum(spent["flops"].values())
    peak = machine.gemm_peak(model.device, model.dtype)
    rate = total / spent["seconds"] if spent["seconds"] else 0.0
    return {
        "tests": result.stats["tests"],
        "states": spent["states"],
        "wasted": spent["wasted"],
        "batches": result.stats["batches"],
        "seconds": spent["seconds"],
        "resumes": spent["resumes"],
        "flops": spent["flops"],
        "flops_total": total,
        "flops_per_second": rate,
        "peak_flops_per_second": peak,
        "share_of_peak": rate / peak,
    }
