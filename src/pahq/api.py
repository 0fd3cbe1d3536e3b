"""Finding a circuit from start to finish: what ``pahq discover`` and ``pahq.discover`` both call."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from pahq.errors import PahqError
from pahq.evaluation.behaviour import behaviour
from pahq.evaluation.circuit import Circuit
from pahq.files import read_json, write_json
from pahq.graph import Graph
from pahq.inputs import (
    DTYPES,
    absolute,
    acdc_options,
    device_of,
    held_out_prompts,
    load,
    metric_of,
    task_options,
    timestamp,
)
from pahq.method.acdc import Acdc, AcdcOptions, AcdcResult, Decision, Progress
from pahq.model import Transformer
from pahq.precision.schedule import Scheduler
from pahq.report import identity, machine
from pahq.report.config import RunConfig
from pahq.report.folder import RUN_FILE, RunFolder
from pahq.report.journal import JOURNAL_FILE, Journal
from pahq.report.journal import cut as cut_journal
from pahq.report.journal import read as read_journal
from pahq.report.precision import merged_check, precision_record
from pahq.report.progress import Watch, watch_for
from pahq.report.tracing import open_scheduler, trace_path, traced
from pahq.task import Task, get_task
from pahq.task.prompts import Prompts

OBJECT = "object:"
"""Marks a model or task in a record that was given as a Python object, not by name."""


class Outcome(NamedTuple):
    """A circuit, the record of its run (as in ``run.json``), and whether it was finished before."""

    circuit: Circuit
    record: dict[str, Any]
    was_finished: bool


def discover(
    model: Any,
    task: str | Task,
    threshold: float,
    *,
    out: str | PathLike[str] | None = None,
    progress: bool = False,
    streams: str | None = None,
    trace: str | PathLike[str] | None = None,
    **options: Any,
) -> Circuit:
    """Finds a circuit and returns it.

    model: whatever ``load_model`` takes: a name, folder or file, a ``transformers`` or TransformerLens
        model, or a ``Transformer``. task: a name, a prompt file, or a ``Task``.
    threshold: an edge goes if cutting it raises the metric by less than this (in the metric's units).
    out: folder for the run's files; a run that was cut short there goes on, a finished one is loaded.
    progress: show a bar (or a line now and then) on standard error.
    streams: those of ``load,low,high`` to use, or ``none``; trace: a file for what was done on them, in Chrome's
        format. The circuit is the same whatever they are.
    options: the other fields of ``RunConfig``: method, metric, n, seed, ablation, absolute, head_order,
        sender_order, split_qkv, direct_edges, split_pos, fold_ln, center_writing, center_unembed,
        fold_value_biases, pad, task_options, full_vocabulary, device, dtype, policy, under_test, exact, check.
    Raises PahqError for bad input. Source: Conmy et al. 2023, section 3; policies: Wang et al. 2025.
    """
    model_name = model if isinstance(model, str) else f"{OBJECT}{type(model).__name__}"
    if isinstance(model, PathLike):
        model = model_name = str(model)
    task_name = task if isinstance(task, str) else f"{OBJECT}{task.name}"
    try:
        config = RunConfig(model=model_name, task=task_name, threshold=threshold, **options)
    except TypeError as error:
        raise PahqError(f"discover: {error}; see the options of RunConfig") from None
    watch = watch_for(quiet=not progress)
    return execute(config, out, model=model, task=task, watch=watch, streams=streams, trace=trace).circuit


def execute(
    config: RunConfig,
    out: str | PathLike[str] | None,
    *,
    model: Any = None,
    task: str | Task | None = None,
    watch: Watch | None = None,
    command: str | None = None,
    streams: str | None = None,
    trace: str | PathLike[str] | None = None,
) -> Outcome:
    """Runs, resumes or loads the run that ``config`` describes.

    out: its folder, None to write nothing. model, task: objects in place of the names in ``config``.
    command: what was typed, for the record. streams, trace: see ``discover``. Raises PahqError for bad input.
    """
    watch = Watch() if watch is None else watch
    model = config.model if model is None else model
    prompts_of = task if isinstance(task, Task) else get_task(config.task, **task_options(config))
    config = replace(absolute(config), metric=metric_of(config.metric, prompts_of))
    options, device = acdc_options(config), device_of(config.device)
    options.policy.require(device, DTYPES[config.dtype])
    path = trace_path(trace, None if out is None else Path(out))
    with ExitStack() as stack:
        scheduler = open_scheduler(device, streams, trace is not None)
        if scheduler is not None:
            stack.enter_context(scheduler)
        folder = None if out is None else stack.enter_context(RunFolder(out))
        if folder is not None:
            folder.check(config)
            folder.check_policy(config.policy, options.policy.to_dict())
            if folder.finished:
                return Outcome(Circuit.load(folder.path), read_json(folder.path / RUN_FILE), True)
        return _Run(config, options, folder, watch, scheduler, path).finish(model, prompts_of, command)


def resume(
    out: str | PathLike[str],
    *,
    watch: Watch | None = None,
    command: str | None = None,
    streams: str | None = None,
    trace: str | PathLike[str] | None = None,
) -> Outcome:
    """Goes on with the run in ``out``, or loads it if it is finished; raises PahqError if none is there.

    The arguments are those of ``execute``.
    """
    if not Path(out).is_dir():
        raise PahqError(f"{out}: there is no such folder; give the --out of the run to go on with")
    with RunFolder(out, create=False) as folder:
        config = folder.config()
    assert config is not None
    for what in (config.model, config.task):
        if what.startswith(OBJECT):
            raise PahqError(
                f"{out}: the run was started from Python with a {what.removeprefix(OBJECT)} object; "
                "call pahq.discover with that object and the same out to go on"
            )
    return execute(config, out, watch=watch, command=command, streams=streams, trace=trace)


class _Run:
    """The course of one run in this process."""

    def __init__(
        self,
        config: RunConfig,
        options: AcdcOptions,
        folder: RunFolder | None,
        watch: Watch,
        scheduler: Scheduler | None,
        trace: Path | None,
    ) -> None:
        self.config, self.options, self.folder, self.watch = config, options, folder, watch
        self.scheduler, self.trace = scheduler, trace
        self.began, self.started = time.perf_counter(), timestamp()
        self.earlier = 0.0  # seconds that earlier processes gave to this run

    def finish(self, model: Any, task: Task, command: str | None) -> Outcome:
        """Loads, searches, measures and writes."""
        config, watch = self.config, self.watch
        command = config.call(None if self.folder is None else str(self.folder.path)) if command is None else command
        transformer = load(model, config, watch, self.options.policy, self.scheduler)
        prompts = task.prompts(transformer, config.n, config.seed, "validation")
        held_out, no_test = held_out_prompts(task, transformer, config)
        fingerprints = {"weights": identity.of_model(transformer), "prompts": identity.of_prompts(prompts)}
        self.facts = {
            "versions": machine.versions(),
            "commit": machine.commit(),
            "machine": machine.describe(transformer.device),
            "source": dict(transformer.source),
        }
        if self.folder is not None:
            facts = {"command": command, "started": self.started, "policy": self.options.policy.to_dict(), **self.facts}
            record = self.folder.begin(config, fingerprints, facts)
            self._compare_machines(record)
            self.started = record.get("started", self.started)
            command = record.get("command", command)
        with traced(self.scheduler, self.trace, watch.say):
            result, spent, precision = self._search(transformer, prompts)
            watch.say("measuring the circuit …")
            circuit = Circuit(result.graph, result.mask, result.effects, result.order)
            figures = self._figures(transformer, circuit, task, prompts, held_out)
            figures = {"final_metric": result.metric, **figures}
            if held_out is None:
                figures["test"] = {"missing": no_test}
            circuit.metadata.update({"config": config.to_dict(), "figures": figures})
            search = _search_figures(spent, result, transformer)
            record = {
                "command": command,
                "config": config.to_dict(),
                "precision": precision,
                "identity": fingerprints,
                **self.facts,
                "started": self.started,
                "finished": timestamp(),
                "search": search | {"streams": None if self.scheduler is None else list(self.scheduler.streams)},
                "peak_memory": machine.peak_memory(transformer.device),
                "total_seconds": self.earlier + time.perf_counter() - self.began,
            }
            if self.folder is not None:
                circuit.save(self.folder.path)
                write_json(self.folder.path / RUN_FILE, record)  # last: its presence says that the run is finished
            return Outcome(circuit, record, False)

    def _figures(
        self, model: Transformer, circuit: Circuit, task: Task, prompts: Prompts, held_out: Prompts | None
    ) -> dict[str, Any]:
        """How the circuit behaves on the prompts it was chosen on, and on held-out ones if there are any."""
        metric, ablation = self.options.metric, self.options.ablation
        splits = {"validation": prompts} | ({} if held_out is None else {"test": held_out})
        return {name: behaviour(model, circuit, task, part, metric, ablation) for name, part in splits.items()}

    def _search(self, model: Transformer, prompts: Prompts) -> tuple[AcdcResult, dict[str, Any], dict[str, Any]]:
        """The sweep, journalled where there is a folder; the work of all processes that took part; precision."""
        c = self.config
        graph = Graph(model.config, c.split_qkv, c.direct_edges, c.split_pos)
        decisions: list[Decision] = []
        before: dict[str, Any] = {}
        path = None if self.folder is None else self.folder.path / JOURNAL_FILE
        if path is not None and path.exists():
            decisions, before = read_journal(path)
            self._check_places(decisions, graph)
            self.earlier = before.get("total_seconds", 0.0)
            before["resumes"] = before.get("resumes", 0) + 1
            cut_journal(path, decisions, before, graph.edge_name)
            self.watch.say(f"going on after {len(decisions):,} decisions")
        start = time.perf_counter()
        screen = False if c.full_vocabulary else None
        acdc = Acdc(model, prompts, self.options, screen=screen, check=c.check, scheduler=self.scheduler)
        replayed, earlier = len(decisions), before.pop("disagreements", [])
        told = 0  # disagreements that the journal has

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
                "total_seconds": self.earlier + time.perf_counter() - self.began,
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
                if journal is not None:
                    journal.append(progress.decisions, spent(progress.states, progress.wasted) | news())
                self.watch.update(progress)

            self.watch.begin(acdc.options.metric, len(decisions))
            try:
                result = acdc.run(decisions, on_batch)
            finally:
                self.watch.end()
        total = spent(result.stats["states"], result.stats["wasted"])
        return result, total, precision_record(acdc, result, total["exact_states"], checked())

    def _check_places(self, decisions: Sequence[Decision], graph: Graph) -> None:
        for decision in decisions:
            inside = 0 <= decision.row < graph.shape[0] and 0 <= decision.column < graph.shape[1]
            if not inside or not graph.edges[decision.row, decision.column]:
                assert self.folder is not None
                raise PahqError(
                    f"{self.folder.path / JOURNAL_FILE}: decision {decision.order} is about no edge of "
                    f"{graph.config.name}; the journal is damaged, start the run anew in another folder"
                )

    def _compare_machines(self, record: dict[str, Any]) -> None:
        """Says so where a resumed run goes on with other software or threads, which can move a close decision."""
        for what in ("versions", "machine"):
            for name, now in self.facts[what].items():
                then = record.get(what, {}).get(name)
                if name in ("torch", "cpu", "threads", "device", "gpu") and then != now:
                    self.watch.say(
                        f"note: this run began with {name} {then}, now it is {now}; sums may round otherwise"
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
